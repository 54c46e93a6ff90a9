"""Cross-entropy of a linear head, without ever holding all logits: (T, V) is too large.

    losses[t] = logsumexp(W · x[t]) − (W · x[t])[targets[t]]

Two ways to the same numbers. Ours goes through the rows in pieces; each piece's logits are computed
again in the backward pass. On a GPU where liger-kernel is installed, its Triton kernel turns a
piece's logits into their gradient in place.

T tokens, V ids.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target without loss
CPU_ROWS = 1024
GPU_BYTES = 2**29  # of the float32 logits of a piece: large enough that products run at full speed

# (x (rows, d), weight (V, d), targets (rows,)) to losses (rows,)
RowLosses = Callable[[Tensor, Tensor, Tensor], Tensor]


def row_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(rows,) float32 losses of few enough rows that their logits may be held."""
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")


def token_losses(
    x: Tensor,
    head: nn.Linear,
    targets: Tensor,
    rows: int | None = None,
    row_losses: RowLosses = row_losses,
) -> Tensor:
    """Cross-entropy of every row.

    Args:
        x: (T, d) what the head reads.
        head: d → V.
        targets: (T,) int64 ids; ``IGNORE`` carries no loss.
        rows: rows whose logits live at a time; None: :func:`piece_rows`.
        row_losses: of a piece; a compiled one, say.

    Returns:
        (T,) float32, nats; 0 where there is no target. Any weights may be put on them.
    """
    if x.is_cuda and rows is None and liger() is not None:
        return _by_liger(x, head.weight, targets)
    rows = rows or piece_rows(head.out_features, x.device.type)
    pieces = zip(x.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([row_losses(part, head.weight, ids) for part, ids in pieces])
    return torch.cat(
        [
            checkpoint(
                row_losses, part, head.weight, ids, use_reentrant=False, preserve_rng_state=False
            )
            for part, ids in pieces
        ]
    )


def piece_rows(num_ids: int, device: str) -> int:
    """How many rows to take at a time: on a GPU as many as memory allows, a multiple of 256."""
    if device == "cpu":
        return CPU_ROWS
    return max(256, GPU_BYTES // (4 * num_ids) // 256 * 256)


@functools.cache
def liger() -> Callable[..., Any] | None:
    """Liger's operator where it is installed and weighs the gradients of single rows rightly.

    Its earlier releases multiplied the gradient of the weight, a sum over rows, by the first row's
    gradient whatever the others had.
    """
    try:
        from liger_kernel.ops import fused_linear_cross_entropy as module
    except Exception:  # a package that is found need not import
        return None
    if (
        "token_grad_output"
        not in inspect.signature(module.fused_linear_cross_entropy_forward).parameters
    ):
        return None
    apply: Callable[..., Any] = module.LigerFusedLinearCrossEntropyFunction.apply
    return apply


def _by_liger(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    operator = liger()
    assert operator is not None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        # in the order of its arguments: bias, weights of ids, ignored id, z-loss, smoothing,
        # reduction, soft cap, z-loss returned, type of the weight's gradient while it is summed
        return operator(
            x, weight, targets, None, None, IGNORE, 0.0, 0.0, "none", None, False, torch.float32
        )[0]
