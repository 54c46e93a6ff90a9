"""The call to FlashAttention means what ours means. No GPU: dense stand-ins answer it.

Each stand-in implements what its provider documents:

- torch's ``varlen_attn``: a window (left, right) lets row i of a sequence read rows i - left … i +
  right, -1 being no bound. Like FlashAttention it leaves rows past ``max_q`` unwritten and refuses
  a gradient whose last dimension is not contiguous.
- flash-attn's ``flash_attn_varlen_func``: the same window; ``causal=True`` bounds the right side.
- xformers' ``BlockDiagonalCausalMask``: row i reads the rows up to i of its block; after
  ``make_local_attention(window)`` those greater than i - window. Batch dimension of 1.
"""

import dataclasses
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from lst_kernels import (
    PatchLayout,
    backends,
    block_causal_attention,
    explain,
    flash,
    sliding_window_attention,
)
from lst_kernels.backends import Call

LAYOUT = PatchLayout.from_lengths([2, 3, 1, 1, 4, 0, 2, 5], [3, 0, 4, 1])


def banded(query, key, value, cu, max_q, scale, left, right):
    assert query.shape[1] == key.shape[1]
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    out = torch.full_like(query, torch.nan)
    for a, b in zip(cu.tolist()[:-1], cu.tolist()[1:], strict=True):
        rows = torch.arange(b - a)
        offset = rows - rows[:, None]
        readable = torch.ones_like(offset, dtype=torch.bool)
        if left >= 0:
            readable &= offset >= -left
        if right >= 0:
            readable &= offset <= right
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[a:b]) * scale
        weights = scores.masked_fill(~readable, -torch.inf).softmax(-1)
        out[a : min(b, a + max_q)] = torch.einsum("hqk,khd->qhd", weights, value[a:b])[:max_q]
    if out.requires_grad:
        out.register_hook(refuse_strided)
    return out


def refuse_strided(grad):
    assert grad.stride(-1) == 1, "dout must have contiguous last dimension"


def repeated(query, *tensors):
    return [x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in tensors]


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    return banded(query, key, value, cu_seq_q, max_q, scale, *window_size)


def varlen_attn_gqa(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = repeated(query, key, value)
    return banded(query, key, value, cu_seq_q, max_q, scale, *window_size)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    left, right = window_size
    k, v = repeated(q, k, v)
    return banded(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, left, 0 if causal else right)


class SeqLenInfo(NamedTuple):
    seqstart: torch.Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list


@dataclasses.dataclass
class BlockDiagonalCausalMask:
    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    window: int | None = None

    def make_local_attention(self, window):
        return dataclasses.replace(self, window=window)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    assert len(query) == len(key) == len(value) == 1
    info, window = attn_bias.q_seqinfo, attn_bias.window
    left = -1 if window is None else window - 1  # rows greater than i - window
    return banded(query[0], key[0], value[0], info.seqstart, info.max_seqlen, scale, left, 0)[None]


def module(name, **members):
    made = ModuleType(name)
    vars(made).update(members)
    return made


STAND_INS = {
    "torch-2.11": [module("torch.nn.attention.varlen", varlen_attn=varlen_attn)],
    "torch-2.13": [module("torch.nn.attention.varlen", varlen_attn=varlen_attn_gqa)],
    "flash_attn": [module("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)],
    "xformers": [
        module("xformers"),
        module("xformers.ops", memory_efficient_attention=memory_efficient_attention),
        module("xformers.ops.fmha"),
        module(
            "xformers.ops.fmha.attn_bias",
            BlockDiagonalCausalMask=BlockDiagonalCausalMask,
            _SeqLenInfo=SeqLenInfo,
        ),
    ],
}


@pytest.fixture
def machine(monkeypatch):
    """A machine with no provider at all, to which `install` adds; its device is the CPU."""
    for name in ("torch.nn.attention.varlen", "flash_attn", "xformers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(flash, "PROVIDER", None)
    monkeypatch.setattr(flash, "_reasons", {})
    monkeypatch.setattr(flash, "_device_reason", lambda: None)
    monkeypatch.setattr(flash, "_device", lambda: torch.device("cpu"))
    flash._trial.cache_clear()
    allowed = dataclasses.replace(backends._BY_NAME["flash"], refuses=lambda call: None)
    monkeypatch.setitem(backends._BY_NAME, "flash", allowed)
    monkeypatch.setattr(backends, "BACKENDS", (allowed, backends._BY_NAME["reference"]))

    def install(*modules):
        for made in modules:
            monkeypatch.setitem(sys.modules, made.__name__, made)

    yield SimpleNamespace(install=install)
    flash._trial.cache_clear()


@pytest.fixture(params=STAND_INS)
def on_cpu(request, machine):
    """The flash backend, allowed on the CPU in float32, with each stand-in for its provider."""
    machine.install(*STAND_INS[request.param])
    assert flash.unavailable_reason() is None


def inputs(num_rows):
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_rows, 4, 16), (num_rows, 2, 16), (num_rows, 2, 16))
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("window", [1, 2, 3, 400])
@pytest.mark.usefixtures("on_cpu")
def test_a_window_counts_the_same_tokens_as_the_reference(window):
    results = []
    for backend in ("flash", "reference"):
        tensors = inputs(LAYOUT.num_tokens)
        out = sliding_window_attention(
            *tensors,
            LAYOUT.cu_tokens,
            window=window,
            max_length=LAYOUT.max_document_tokens,
            backend=backend,
        )
        out.sum().backward()  # a stride-0 gradient
        results.append([out.detach(), *[x.grad for x in tensors]])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.usefixtures("on_cpu")
def test_block_causal_reads_the_same_units_as_the_reference():
    q, k, v = (x.detach() for x in inputs(LAYOUT.num_patches))
    k, v = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (k, v))
    ours, reference = (
        block_causal_attention(
            *(q, k, v, LAYOUT.cu_documents),
            max_length=LAYOUT.max_document_patches,
            scale=0.3,
            backend=backend,
        )
        for backend in ("flash", "reference")
    )
    torch.testing.assert_close(ours, reference)


@pytest.mark.usefixtures("on_cpu")
def test_the_dead_tail_is_written_too():
    layout = PatchLayout.from_lengths([1, 2, 0, 9], [2, 2], num_dead_patches=2)
    q, k, v = inputs(layout.num_tokens)
    out = sliding_window_attention(
        *(q, k, v, layout.cu_tokens),
        window=4,
        max_length=layout.max_document_tokens,
        backend="flash",
    )
    assert out.isfinite().all()


@pytest.mark.usefixtures("on_cpu")
def test_no_tokens_at_all_are_no_call():
    q, k, v = inputs(0)
    cu = torch.zeros(1, dtype=torch.int32)
    out = sliding_window_attention(q, k, v, cu, window=4, max_length=0, backend="flash")
    assert out.shape == (0, 4, 16)


def refusal(**changes):
    call = Call("sliding_window_attention", "cuda", torch.bfloat16, head_dim=64)
    return backends._flash_refuses(dataclasses.replace(call, **changes))


def test_what_flash_cannot_do_it_says():
    assert refusal() is None
    assert refusal(device="cpu") == "runs on cuda, not on cpu"
    assert refusal(op="range_attention") == "has no range_attention"
    assert refusal(dtype=torch.float32) == "takes float16 and bfloat16, not float32"
    for head_dim in (20, 264):
        assert f"not {head_dim}" in refusal(head_dim=head_dim)


def test_compiled_code_calls_the_provider_without_a_break(machine):
    def traceable(q, k, v, *args, scale, window_size, enable_gqa=False):
        return q * scale + k.sum() + v.sum() + window_size[0]

    machine.install(module("torch.nn.attention.varlen", varlen_attn=traceable))
    torch._dynamo.reset()

    def attend(q, k, v):
        return sliding_window_attention(
            *(q, k, v, LAYOUT.cu_tokens),
            window=3,
            max_length=LAYOUT.max_document_tokens,
            backend="flash",
        )

    q, k, v = (x.detach() for x in inputs(LAYOUT.num_tokens))
    compiled = torch.compile(attend, fullgraph=True, backend="eager")  # finds the provider as well
    assert torch.equal(compiled(q, k, v), attend(q, k, v))


def test_the_first_provider_that_runs_is_used_and_the_others_have_reasons(machine):
    assert set(flash.providers()) == {"torch", "flash_attn", "xformers"}
    assert "flash_attn: ModuleNotFoundError" in flash.unavailable_reason()
    flash._reasons.clear()  # as in a process that starts with packages
    machine.install(*STAND_INS["flash_attn"], *STAND_INS["xformers"])
    assert flash.unavailable_reason() is None
    assert flash.PROVIDER.name == "flash_attn"
    told = flash.providers()
    assert told.pop("flash_attn") == "used"
    assert list(told) == ["torch"]  # later ones were not asked
    assert "ModuleNotFoundError" in told["torch"]


def test_explain_tells_of_every_provider(machine):
    machine.install(*STAND_INS["xformers"])
    q = torch.ones(2, 1, 16)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    told = explain(sliding_window_attention, q, q, q, cu, window=1, max_length=2)
    assert told["flash"] == "chosen"
    assert told["flash/xformers"] == "used"
    assert "ModuleNotFoundError" in told["flash/flash_attn"]
    assert list(told) == ["flash", *(f"flash/{n}" for n in flash.CANDIDATES), "reference"]


def test_a_function_of_another_signature_is_no_provider(machine):
    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        pass

    machine.install(module("torch.nn.attention.varlen", varlen_attn=old))
    reason = flash.unavailable_reason()
    assert "torch: TypeError: old takes no scale and no window_size" in reason


def test_flash_attention_4_alone_is_no_flash_attention_2(machine):
    machine.install(module("flash_attn"), module("flash_attn.cute"))
    assert "flash_attn: ImportError: cannot import name" in flash.unavailable_reason()


def test_a_provider_that_imports_and_refuses_gives_way_to_the_next(machine):
    def broken(q, k, v, *args, scale=None, window_size=None):
        raise RuntimeError("no kernel image is available\nand more")

    machine.install(
        module("torch.nn.attention.varlen", varlen_attn=broken), *STAND_INS["flash_attn"]
    )
    assert flash.unavailable_reason() is None
    assert flash.providers() == {
        "torch": "RuntimeError: no kernel image is available",
        "flash_attn": "used",
    }


def test_a_head_size_that_the_provider_refuses_is_its_reason(machine):
    def narrow(q, k, v, *args, scale=None, window_size=None):
        if q.shape[-1] > 64:
            raise ValueError("head sizes up to 64")
        return varlen_attn(q, k, v, *args, scale=scale, window_size=window_size)

    machine.install(module("torch.nn.attention.varlen", varlen_attn=narrow))
    assert refusal(head_dim=64) is None
    assert refusal(head_dim=128) == "ValueError: head sizes up to 64"


def test_a_backward_pass_that_fails_is_found_before_training_does(machine):
    def forward_only(q, k, v, *args, scale=None, window_size=None):
        return varlen_attn(q, k, v, *args, scale=scale, window_size=window_size).detach()

    machine.install(module("torch.nn.attention.varlen", varlen_attn=forward_only))
    assert "does not require grad" in flash.unavailable_reason()


def test_the_search_does_not_show_in_the_callers_modes(machine):
    from torch.utils.flop_counter import FlopCounterMode

    machine.install(*STAND_INS["torch-2.13"])
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        assert flash.unavailable_reason() is None
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(("major", "order"), [(9, ["FA3", "FA4"]), (10, ["FA4"])])
def test_activation_tries_the_newest_and_takes_back_what_does_not_run(
    machine, monkeypatch, major, order
):
    machine.install(*STAND_INS["torch-2.13"])
    active, restored = [], []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(
        torch.nn.attention, "restore_flash_attention_impl", lambda: restored.append(active[-1])
    )
    assert flash.activate() == {order[0]: "active"}
    assert (active, restored) == ([order[0]], [])
    monkeypatch.setattr(flash, "_trial", cached(lambda *_: "no kernel"))
    assert flash.activate() == dict.fromkeys(order, "no kernel")
    assert restored == order


def test_activation_says_what_is_not_installed(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    told = flash.activate()  # torch's own function, which finds no package
    assert list(told) == ["FA3", "FA4"]
    assert "flash_attn_interface" in told["FA3"]


def cached(function):
    function.cache_clear = lambda: None
    return function


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_device_the_reason_is_the_device():
    assert flash.unavailable_reason() == "torch sees no CUDA device"
    q = torch.ones(2, 1, 16)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    told = explain(sliding_window_attention, q, q, q, cu, window=1, max_length=2)
    assert told["flash"] == "runs on cuda, not on cpu"
