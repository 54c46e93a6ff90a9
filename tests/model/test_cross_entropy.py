"""Cross-entropy by pieces is cross-entropy, and never holds the logits of all rows."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lst.model import cross_entropy
from lst.model.cross_entropy import CPU_ROWS, GPU_BYTES, IGNORE, piece_rows, token_losses


def case(rows: int, dim: int, ids: int) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(rows, dim, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(dim, ids, bias=False, dtype=torch.float64)
    targets = torch.randint(ids, (rows,))
    targets[::3] = IGNORE
    return x, head, targets


def test_gradients_are_those_of_finite_differences_whatever_weighs_the_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, head, targets = case(7, 3, 5)

    def row_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # all in float64
        return F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORE, reduction="none")

    def losses(x: Tensor, weight: Tensor) -> Tensor:
        head.weight = weight  # type: ignore[assignment]
        return token_losses(x, head, targets, rows=3, row_losses=row_losses)

    weight = head.weight
    del head.weight  # a parameter, which takes no other tensor
    assert torch.autograd.gradcheck(losses, (x, weight))


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made in the block has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


def test_the_logits_of_all_rows_are_never_held_and_none_are_kept() -> None:
    rows, dim, ids = 64, 4, 100
    x, head, targets = case(rows, dim, ids)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = token_losses(x, head, targets, rows=8)
        losses.sum().backward()
    assert largest.numel == 8 * ids
    assert sum(kept.values()) <= x.nbytes + head.weight.nbytes + targets.nbytes


def test_pieces_are_as_long_as_memory_allows() -> None:
    assert piece_rows(32506, "cpu") == CPU_ROWS
    rows = piece_rows(32506, "cuda")
    assert rows % 256 == 0
    assert GPU_BYTES / 1.1 < rows * 32506 * 4 <= GPU_BYTES
    assert piece_rows(10**7, "cuda") == 256


def stand_in(*, weighs_rows: bool) -> ModuleType:
    """A liger-kernel that computes what its operator is documented to, on any device."""

    def operator(
        x: Tensor, weight: Tensor, targets: Tensor, bias: None, ids: None, ignored: int,
        z: float, smoothing: float, reduction: str, cap: None, with_z: bool, dtype: torch.dtype,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert (z, smoothing, cap, with_z, dtype) == (0, 0, None, False, torch.float32)
        logits = F.linear(x, weight).float()
        return F.cross_entropy(logits, targets, ignore_index=ignored, reduction=reduction), None

    module = ModuleType("fused_linear_cross_entropy")
    module.LigerFusedLinearCrossEntropyFunction = SimpleNamespace(apply=operator)  # type: ignore[attr-defined]
    if weighs_rows:
        module.fused_linear_cross_entropy_forward = lambda token_grad_output: None  # type: ignore[attr-defined]
    else:
        module.fused_linear_cross_entropy_forward = lambda: None  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("weighs_rows", [True, False])
def test_a_liger_that_weighs_rows_is_used_and_an_older_one_is_not(
    monkeypatch: pytest.MonkeyPatch, weighs_rows: bool
) -> None:
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = stand_in(weighs_rows=weighs_rows)
    sys.modules["liger_kernel.ops"].fused_linear_cross_entropy = module  # type: ignore[attr-defined]
    cross_entropy.liger.cache_clear()
    try:
        assert (cross_entropy.liger() is not None) == weighs_rows
        if not weighs_rows:
            return
        x, head, targets = case(9, 4, 6)
        x, head = x.detach().float().requires_grad_(), head.float()
        with torch.autocast("cpu", torch.bfloat16):
            got = cross_entropy._by_liger(x, head.weight, targets)
            expected = token_losses(x, head, targets)
        torch.testing.assert_close(got, expected)
        gradients = [torch.autograd.grad(each.sum(), (x, head.weight)) for each in (got, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    finally:
        cross_entropy.liger.cache_clear()


def test_without_liger_there_is_none() -> None:
    cross_entropy.liger.cache_clear()
    assert cross_entropy.liger() is None or "liger_kernel" in sys.modules
