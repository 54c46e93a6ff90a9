"""transformers' BLT computes the same on these kernels: logits and gradients, switch by switch.

The models are small and random; what they compute without the kernels is the oracle.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers.models.blt")
from transformers import BltConfig, BltForCausalLM
from transformers.models.blt import modeling_blt

from lst_kernels.integrations import apply_lst_kernels_to_blt

SWITCHES = ("cross_attention", "self_attention", "pooling", "patch_ids")
ROPE = {"rope_type": "default", "rope_theta": 5e5}
BYTES = torch.tensor(
    [[7, 9, 4, 4, 30, 31, 32, 5, 6, 7, 8, 9], [40, 4, 4, 4, 9, 8, 7, 6, 5, 50, 51, 4]]
)
# Rows sum to one more than the bytes: the next byte has a patch as well. The second row is padded.
LENGTHS = torch.tensor([[1, 4, 3, 2, 3], [1, 6, 6, 0, 0]])


def make_model(*, window=None, attention="eager", all_layers=False, kv_heads=2, **options):
    stack = {
        "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": kv_heads,
        "intermediate_size": 64, "max_position_embeddings": 256, "rope_parameters": ROPE,
        "vocab_size": 64,
    }  # fmt: skip
    local = {**stack, "hidden_size_global": 64, "cross_attn_all_layers": all_layers}
    large = {key: value for key, value in stack.items() if key != "vocab_size"}
    config = BltConfig(
        vocab_size=64,
        cross_attn_k=2,
        rope_parameters=ROPE,
        encoder_hash_byte_group_size=[2, 3],
        encoder_hash_byte_group_vocab=64,
        local_attention_window_len=window,
        patcher_config={**stack, "num_hidden_layers": 1},
        encoder_config={**local, "num_hidden_layers": 2},
        decoder_config={**local, "num_hidden_layers": 3, "cross_attn_all_layers": True},
        global_config={**large, "hidden_size": 64, "num_hidden_layers": 2},
        attn_implementation=attention,
        **{"patch_in_forward": False, **options},
    )
    torch.manual_seed(0)
    return BltForCausalLM(config)


def differentiate(model, bytes=BYTES, lengths=LENGTHS, **options):
    """Logits, and the gradient of every parameter that has one."""
    model.zero_grad()
    out = model(bytes, patch_lengths=lengths, labels=bytes, use_cache=False, **options)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def assert_other_code_ran(model, **options):
    """The same within rounding, and not to the bit: nothing was compared with itself."""
    with apply_lst_kernels_to_blt(model, **options):
        ours = differentiate(model)
    theirs = differentiate(model)
    assert_same(ours, theirs)
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_gradients_stay(window, attention):
    assert_other_code_ran(make_model(window=window, attention=attention))


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_alone_changes_nothing(switch):
    model = make_model(window=5)
    expected = differentiate(model)
    only = {name: name == switch for name in SWITCHES}
    with apply_lst_kernels_to_blt(model, **only):
        assert_same(differentiate(model), expected)


def test_cross_attention_after_every_encoder_layer_stays():
    assert_other_code_ran(make_model(all_layers=True))


def test_grouped_heads_stay():
    assert_other_code_ran(make_model(kv_heads=1))


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=6), min_size=1, max_size=3))
def test_uneven_batches_stay(rows):
    num_bytes = max(sum(row) for row in rows)
    rows = [[1, *row[:-1], row[-1] + num_bytes - sum(row)] for row in rows]
    width = max(map(len, rows))
    lengths = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    bytes = torch.randint(4, 64, (len(rows), num_bytes), generator=torch.Generator().manual_seed(0))
    model = make_model(window=4)
    expected = differentiate(model, bytes, lengths)
    with apply_lst_kernels_to_blt(model):
        assert_same(differentiate(model, bytes, lengths), expected)


def test_the_entropy_patcher_cuts_alike():
    """Its lengths are −1 in the padding of an uneven batch."""
    model = make_model(patch_in_forward=True, patching_threshold=4.0, patch_size=4).eval()
    expected = model(BYTES, use_cache=False).logits
    with apply_lst_kernels_to_blt(model):
        torch.testing.assert_close(
            model(BYTES, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5
        )


def test_a_window_of_ones_own_is_the_configurations():
    wide, narrow = make_model(window=None), make_model(window=5)
    expected = differentiate(narrow)
    with apply_lst_kernels_to_blt(wide, local_window=5):
        assert_same(differentiate(wide), expected)


def test_gradient_checkpointing_recomputes_the_same():
    model = make_model(window=5).train()
    expected = differentiate(model)
    model.gradient_checkpointing_enable()
    with apply_lst_kernels_to_blt(model):
        assert_same(differentiate(model), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_to_transformers(side):
    model = make_model(window=5)
    mask = torch.ones_like(BYTES)
    mask[1, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    expected = differentiate(model, attention_mask=mask)
    with apply_lst_kernels_to_blt(model):
        assert_same(differentiate(model, attention_mask=mask), expected)


def test_a_mask_without_padding_is_none():
    model = make_model(window=5)
    expected = differentiate(model)
    with apply_lst_kernels_to_blt(model):
        assert_same(differentiate(model, attention_mask=torch.ones_like(BYTES)), expected)


def test_dropout_draws_as_before():
    model = make_model(dropout=0.3).train()
    for part in (model.config.encoder_config, model.config.decoder_config):
        part.dropout = 0.3
    torch.manual_seed(1)
    expected = differentiate(model)
    torch.manual_seed(1)
    with apply_lst_kernels_to_blt(model):
        assert_same(differentiate(model), expected)


def test_attention_weights_are_left_to_transformers():
    model = make_model().eval()
    with apply_lst_kernels_to_blt(model):
        out = model(BYTES, patch_lengths=LENGTHS, use_cache=False, output_attentions=True)
    assert all(weights is not None for weights in out.attentions)


def test_undoing_puts_everything_back():
    def code():
        owners = (modeling_blt.BltModel, modeling_blt.BltCrossAttention)
        return [*(owner.forward for owner in owners), modeling_blt.create_causal_mask]

    before = code()
    model = make_model()
    expected = differentiate(model)
    applied = apply_lst_kernels_to_blt(model)
    assert not any(now is then for now, then in zip(code(), before, strict=True))
    applied.undo()
    assert all(now is then for now, then in zip(code(), before, strict=True))
    for name, value in differentiate(model).items():
        assert torch.equal(value, expected[name])


def test_only_the_model_that_was_meant_changes():
    ours, theirs = make_model(), make_model()
    expected = differentiate(theirs)
    with apply_lst_kernels_to_blt(ours):
        untouched = differentiate(theirs)
        changed = differentiate(ours)
    assert all(torch.equal(untouched[name], expected[name]) for name in expected)
    assert any(not torch.equal(changed[name], expected[name]) for name in expected)


def test_without_a_model_all_change_also_those_made_later():
    early = make_model()
    expected = differentiate(early)
    with apply_lst_kernels_to_blt():
        for model in (early, make_model()):
            got = differentiate(model)
            assert_same(got, expected)
            assert any(not torch.equal(got[name], expected[name]) for name in expected)


def test_no_buffer_grows_with_the_square_of_the_length():
    """A dense mask of 4,096 bytes has 2^24 elements; nothing saved or made comes near."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                if isinstance(each, torch.Tensor) and each.untyped_storage().nbytes():
                    stored = each.untyped_storage().nbytes() // each.element_size()
                    self.elements = max(self.elements, stored)
            return out

    model = make_model(max_position_embeddings=4096, attention="sdpa", window=512)
    bytes = torch.randint(4, 64, (1, 4096), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[1, *[4] * 1024]])
    with apply_lst_kernels_to_blt(model), Largest() as largest:
        differentiate(model, bytes, lengths)
    assert largest.elements < 4096 * 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "model must be or hold a BltModel"),
        ({"model": "owner/blt"}, "model must be or hold a BltModel .* got 'owner/blt'"),
        ({"model": BltForCausalLM}, "model must be or hold a BltModel .* got <class"),
        ({"local_window": 0}, "local_window must be at least 1, or None; got 0"),
        ({"local_window": 2.5}, "local_window must be at least 1, or None; got 2.5"),
        ({"local_window": 4, "self_attention": False}, "local_window needs self_attention"),
    ],
)
def test_bad_input_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        apply_lst_kernels_to_blt(**options)


def test_patch_lengths_of_other_rows_than_the_bytes_are_told():
    """Transformers pools one row of them into the first row of bytes, and none into the others."""
    model = make_model()
    with (
        apply_lst_kernels_to_blt(model),
        pytest.raises(ValueError, match="patch_lengths has 1 rows, but there are 2 of bytes"),
    ):
        model(BYTES, patch_lengths=LENGTHS[:1], use_cache=False)


def test_applying_twice_is_told():
    model = make_model()
    for target in (model, None):
        with (
            apply_lst_kernels_to_blt(target),
            pytest.raises(ValueError, match=r"has these kernels already; first \.undo\(\)"),
        ):
            apply_lst_kernels_to_blt(target)


def test_undoing_what_is_not_applied_is_told():
    model = make_model()
    with apply_lst_kernels_to_blt(model) as applied:
        applied.undo()
        with pytest.raises(RuntimeError, match="not in place: they were undone already"):
            applied.undo()
    with pytest.raises(RuntimeError, match="not in place: they were undone already"):
        applied.undo()
    expected = differentiate(model)
    with apply_lst_kernels_to_blt(model):  # nothing was left behind
        assert_same(differentiate(model), expected)


def test_a_transformers_without_blt_is_told(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.40.0")
    monkeypatch.setitem(sys.modules, "transformers.models.blt", None)
    with pytest.raises(ImportError, match=r"with the BLT of 5.* got 4.40.0, .* no BLT"):
        apply_lst_kernels_to_blt()


def test_no_transformers_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="not installed: pip install transformers"):
        apply_lst_kernels_to_blt()


def test_a_transformers_with_another_blt_is_told_and_left_alone(monkeypatch):
    """As 4.57 was: other arguments of attention. Or as one to come may be: a function less."""

    def forward(self, hidden_states, cross_attention_states=None, past_key_values=None):
        raise AssertionError("never called")

    def masks(config, input_embeds, attention_mask, past_key_values):
        raise AssertionError("never called")

    model, untouched = make_model(), modeling_blt.BltModel.forward
    monkeypatch.setattr("transformers.__version__", "4.57.0")
    for owner, name, theirs, message in (
        (modeling_blt.BltCrossAttention, "forward", forward, "forward takes self, hidden_states"),
        (modeling_blt, "create_causal_mask", masks, "create_causal_mask takes config, input_emb"),
        (modeling_blt.BltLocalEncoder, "patch_reduce", None, "no patch_reduce in BltLocalEncoder"),
        (modeling_blt, "BltLocalEncoder", None, "no attribute 'BltLocalEncoder'"),
    ):
        with monkeypatch.context() as patch:
            if theirs is None:
                patch.delattr(owner, name)
            else:
                patch.setattr(owner, name, theirs)
            with pytest.raises(ImportError, match=rf"got 4\.57\.0.*{message}"):
                apply_lst_kernels_to_blt(model)
        assert modeling_blt.BltModel.forward is untouched
    with apply_lst_kernels_to_blt(model):
        differentiate(model)
