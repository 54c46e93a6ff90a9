"""The call to FlashAttention means what ours means. No GPU: a dense stand-in answers it.

The stand-in implements what torch documents for ``varlen_attn``: a window (left, right) lets row i
of a sequence read rows i - left … i + right, -1 being no bound. Like FlashAttention it leaves rows
past ``max_q`` unwritten and refuses a gradient whose last dimension is not contiguous.
"""

import dataclasses
import sys
from types import ModuleType

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


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1], "needs enable_gqa=True"
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    out = torch.full_like(query, torch.nan)
    for a, b in zip(cu_seq_q.tolist()[:-1], cu_seq_q.tolist()[1:], strict=True):
        rows = torch.arange(b - a)
        offset = rows - rows[:, None]
        left, right = window_size
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


def varlen_attn_gqa(query, key, value, *args, enable_gqa=False, **kwargs):
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return varlen_attn(query, key, value, *args, **kwargs)


def refuse_strided(grad):
    assert grad.stride(-1) == 1, "dout must have contiguous last dimension"


@pytest.fixture(params=[False, True], ids=["torch-2.11", "torch-2.13"])
def on_cpu(request, monkeypatch):
    """The flash backend, allowed on the CPU in float32, with the stand-in for its provider."""
    attend = varlen_attn_gqa if request.param else varlen_attn
    monkeypatch.setattr(flash, "PROVIDER", flash.Provider(attend, takes_gqa=request.param))
    allowed = dataclasses.replace(
        backends._BY_NAME["flash"], refuses=lambda call: None, unavailable=lambda: None
    )
    monkeypatch.setitem(backends._BY_NAME, "flash", allowed)


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
    return backends._BY_NAME["flash"].refuses(dataclasses.replace(call, **changes))


def test_what_flash_cannot_do_it_says():
    assert refusal() is None
    assert refusal(device="cpu") == "runs on cuda, not on cpu"
    assert refusal(op="range_attention") == "has no range_attention"
    assert refusal(dtype=torch.float32) == "takes float16 and bfloat16, not float32"
    for head_dim in (20, 264):
        assert f"not {head_dim}" in refusal(head_dim=head_dim)


def test_a_varlen_attn_of_another_signature_is_no_provider(monkeypatch):
    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        pass

    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = old
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    assert "takes no scale and no window_size" in flash.probe()
    module.varlen_attn = varlen_attn
    assert flash.probe() == flash.Provider(varlen_attn, takes_gqa=False)
    module.varlen_attn = lambda query, *, scale, window_size, enable_gqa: None
    assert flash.probe().takes_gqa


def test_a_provider_that_does_not_import_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert "torch.nn.attention.varlen does not import" in flash.probe()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_device_the_reason_is_the_device():
    assert flash.unavailable_reason() == "torch sees no CUDA device"
    q = torch.ones(2, 1, 16)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    told = explain(sliding_window_attention, q, q, q, cu, window=1, max_length=2)
    assert told["flash"] == "runs on cuda, not on cpu"
