"""Compute is counted as the model's products and attentions are, part by part.

The oracle is torch's FlopCounterMode on the reference path, which sees each product that is made.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import lst_kernels
from lst import flops
from lst.data.batch import Batch, PlanConfig, make_batch, pack_documents, plan_batch
from lst.data.interleave import Document
from lst.data.packing import patch_document
from lst.data.patching import Aligned, NoPatching, Static, Strategy
from lst.errors import UserError
from lst.flops import (
    Counts,
    FlopsConfig,
    Mix,
    batch_counts,
    expected_counts,
    forward_flops,
    patch_counts,
    report,
    training_flops,
)
from lst.model import ModelConfig, StackConfig, build_model
from lst.prepare.demo import DemoConfig
from lst.presets import PRESETS
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Vocabulary

VOCABULARY = Vocabulary(num_pieces=40, num_units=20)
SMALL = ModelConfig(
    encoder=StackConfig(layers=1, dim=16, heads=2),
    global_transformer=StackConfig(layers=2, dim=32, heads=2),
    decoder=StackConfig(layers=2, dim=16, heads=2),
    local_window=7,
    decoder_window=4,
)
CONFIGS = {
    "small": SMALL,
    "four slots, deep locals": replace(
        SMALL,
        encoder=StackConfig(layers=2, dim=8, heads=2),
        global_transformer=StackConfig(layers=1, dim=32, heads=4),
        decoder=StackConfig(layers=3, dim=8, heads=2),
    ),
    "one slot, every patch read": replace(
        SMALL,
        global_transformer=StackConfig(layers=3, dim=16, heads=2),
        local_window=1,
        decoder_window=None,
    ),
    "global text": replace(SMALL, text_path="global"),
    "global text, keys shared and tied": replace(
        SMALL,
        text_path="global",
        global_transformer=StackConfig(layers=2, dim=32, heads=4, kv_heads=2, hidden=24),
        decoder_window=None,
        tied=True,
    ),
    "global text, of which few patches are read": replace(
        SMALL, text_path="global", decoder_window=1
    ),
    "token-level": replace(SMALL, architecture="token"),
}
STRATEGIES: dict[str, Strategy] = {
    "none": NoPatching(),
    "static": Static(size=3),
    "aligned": Aligned(silence="separate"),
}
CASES = [
    (name, strategy)
    for name, config in CONFIGS.items()
    for strategy in STRATEGIES
    if config.architecture == "lst" or strategy == "none"
]


def document(spans: list[int]) -> Document:
    """Text and speech in turn; the first third of a speech span is an aligned word."""
    tokens, aligned = [BOS], []
    for place, length in enumerate(spans):
        tokens.append(SPEECH if place % 2 else TEXT)
        if place % 2:
            aligned.append((len(tokens), len(tokens) + length // 3))
        tokens += [VOCABULARY.first_unit if place % 2 else VOCABULARY.first_piece] * length
    return Document(
        tokens=np.array([*tokens, EOS], np.int32),
        aligned=np.array(aligned, np.int32).reshape(-1, 2),
        breaks=(),
        score_from=0,
        score_eos=True,
        record_id="made",
    )


def packed(plan: PlanConfig, strategy: Strategy) -> Batch:
    documents = [document([3, 17, 2]), document([14]), document([1, 5, 1, 9]), document([8])]
    return pack_documents(documents, VOCABULARY, strategy, plan)


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_a_forward_pass_is_counted_as_flop_counter_mode_counts_it(name: str, strategy: str) -> None:
    config = CONFIGS[name]
    batch = packed(config.plan(), STRATEGIES[strategy])
    model = build_model(config, VOCABULARY)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), lst_kernels.backend("reference"), counter:
        model(batch)
    expected = forward_flops(config, VOCABULARY, batch_counts(batch))
    assert counter.get_total_flops() == sum(expected.values())
    modules = counter.get_flop_counts()
    for part, count in expected.items():
        if not part.endswith("head"):  # the loss multiplies by its weight, past the module
            module = modules.get(f"{type(model).__name__}.{part}", {})
            assert sum(module.values()) == count, part


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_counts_of_the_patches_add_up_to_those_of_the_batch(name: str, strategy: str) -> None:
    batch = packed(CONFIGS[name].plan(), STRATEGIES[strategy])
    counts = patch_counts(batch)
    assert len(counts) == batch.num_units
    assert sum(counts[1:], counts[0]) == batch_counts(batch)


@pytest.mark.parametrize("name", ["small", "four slots, deep locals", "token-level"])
def test_a_patch_costs_what_a_document_costs_more_for_having_it(name: str) -> None:
    """Nothing before a patch reads it. (With text="global" a patch may become one that is read.)"""
    config = CONFIGS[name]
    strategy = NoPatching() if name == "token-level" else STRATEGIES["static"]
    whole = document([3, 17, 2])
    counts = patch_counts(pack_documents([whole], VOCABULARY, strategy, config.plan()))
    lengths = patch_document(whole, VOCABULARY, strategy).lengths
    before = counts[0] * 0
    for own, stop in zip(counts, np.cumsum(lengths), strict=True):
        part = whole._replace(tokens=whole.tokens[:stop])
        batch = plan_batch(patch_document(part, VOCABULARY, strategy), VOCABULARY, config.plan())
        assert before + own == batch_counts(batch)
        before = batch_counts(batch)


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_training_is_counted_but_for_the_logits_that_are_made_again(
    name: str, strategy: str
) -> None:
    """The backward pass makes them again to save memory: more work, but no more that is needed."""
    config = CONFIGS[name]
    batch = packed(config.plan(), STRATEGIES[strategy])
    model = build_model(config, VOCABULARY)
    counter = FlopCounterMode(display=False)
    with lst_kernels.backend("reference"), counter:
        model(batch).sum().backward()
    counts = batch_counts(batch)
    forward = forward_flops(config, VOCABULARY, counts)
    again = sum(flops for part, flops in forward.items() if part.endswith("head"))
    needed = sum(training_flops(config, VOCABULARY, counts).values())
    assert counter.get_total_flops() == needed + again


def test_three_tokens_in_two_patches_by_hand() -> None:
    """Patches of 1 and 2 tokens, d = 2, two slots, a local window of 2; SwiGLU's width is 256."""
    local, large = (StackConfig(layers=1, dim=dim, heads=1) for dim in (2, 4))
    config = ModelConfig(encoder=local, global_transformer=large, decoder=local, local_window=2)
    counts = Counts(
        tokens=3,
        units=2,
        local_tokens=3,
        local_units=2,
        read_units=2,
        local_pairs=1 + 2 + 2,
        encoder_pairs=2 * 1 + 2 * 2,
        global_pairs=1 + 2,
        decoder_pairs=2 * 1 + 2 * 1 + 2 * 2,
    )
    local_layer = 2 * 3 * (4 * 2 * 2 + 3 * 2 * 256) + 4 * 5 * 2
    slot_queries, slots_q_output, tokens_k_v, read = 2 * 2 * 8, 2 * 4 * 8, 2 * 3 * 8, 4 * 6 * 2
    patches_k_v, tokens_q_output, read_patches = 2 * 4 * 8, 2 * 3 * 8, 4 * 8 * 2
    assert forward_flops(config, Vocabulary(num_pieces=2, num_units=3), counts) == {
        "embedding": 0,
        "encoder": local_layer + slot_queries + slots_q_output + tokens_k_v + read,
        "global_transformer": 2 * 2 * (4 * 4 * 4 + 3 * 4 * 256) + 4 * 3 * 4,
        "decoder": local_layer + patches_k_v + tokens_q_output + read_patches,
        "head": 2 * 3 * 2 * 10,
    }


def test_three_tokens_of_which_two_are_speech_by_hand() -> None:
    """The same where a text token, alone in its patch, passes the global transformer alone. The
    two speech tokens, in one patch, read both patches; the vocabulary is of 5 specials, 2 pieces
    and 3 units."""
    local, large = (StackConfig(layers=1, dim=dim, heads=1) for dim in (2, 4))
    config = ModelConfig(
        encoder=local, global_transformer=large, decoder=local, text_path="global", local_window=2
    )
    counts = Counts(
        tokens=3,
        units=2,
        local_tokens=2,
        local_units=1,
        read_units=2,
        local_pairs=1 + 2,
        encoder_pairs=2 * 2,
        global_pairs=1 + 2,
        decoder_pairs=2 * 1 + 2 * 2,
    )
    local_layer = 2 * 2 * (4 * 2 * 2 + 3 * 2 * 256) + 4 * 3 * 2
    slot_queries, slots_q_output, tokens_k_v, read = 2 * 1 * 8, 2 * 2 * 8, 2 * 2 * 8, 4 * 4 * 2
    patches_k_v, tokens_q_output, read_patches = 2 * 4 * 8, 2 * 2 * 8, 4 * 6 * 2
    assert forward_flops(config, Vocabulary(num_pieces=2, num_units=3), counts) == {
        "embedding": 0,
        "encoder": local_layer + slot_queries + slots_q_output + tokens_k_v + read,
        "global_transformer": 2 * 2 * (4 * 4 * 4 + 3 * 4 * 256) + 4 * 3 * 4,
        "decoder": local_layer + patches_k_v + tokens_q_output + read_patches,
        "head": 2 * 1 * 4 * 10,
        "speech_head": 2 * 2 * 2 * 8,
    }


@pytest.mark.parametrize("config", [SMALL, CONFIGS["global text"]], ids=["local", "global"])
def test_the_dead_tail_of_a_training_batch_is_not_counted(config: ModelConfig) -> None:
    documents = [document([3, 17, 2]), document([14])]
    rows = [patch_document(each, VOCABULARY, Static(size=3)) for each in documents]
    training = make_batch(rows, VOCABULARY, config.plan(), step=0)
    assert training.layout.num_dead_tokens > 0
    whole = pack_documents(documents, VOCABULARY, Static(size=3), config.plan())
    assert batch_counts(training) == batch_counts(whole)


# --- expected values ------------------------------------------------------------------------------


@given(length=st.integers(0, 60), window=st.none() | st.integers(1, 80))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_causal_pairs_are_the_sum_over_rows(length: int, window: int | None) -> None:
    summed = sum(min(i, window or length) for i in range(1, length + 1))
    assert flops._causal_pairs(length, window) == summed


@pytest.mark.parametrize("decoder_window", [128, 512, None])
@pytest.mark.parametrize(
    ("architecture", "text_path"), [("lst", "local"), ("lst", "global"), ("token", "local")]
)
def test_expected_counts_are_those_of_a_stream_of_the_mix(
    architecture: str, text_path: str, decoder_window: int | None
) -> None:
    """Two documents of text and one whose spans are 3 text tokens, <s>, 12 units and <t>."""
    config = replace(SMALL, architecture=architecture, text_path=text_path, local_window=64)
    config = replace(config, decoder_window=decoder_window)
    spoken, written = document([3, 12] * 80), document([])
    length = len(spoken.tokens)
    written = written._replace(tokens=np.full(length, VOCABULARY.first_piece, np.int32))
    mix = Mix(speech=12 * 80 / length, document_tokens=length)
    strategy: Strategy = Static(size=4) if architecture == "lst" else NoPatching()
    batch = pack_documents([written, spoken, written], VOCABULARY, strategy, config.plan())
    actual = batch_counts(batch) * (1 / batch.num_tokens)
    for name, value in vars(expected_counts(config, mix)).items():
        assert value == pytest.approx(vars(actual)[name], rel=0.01), name


def test_the_demo_corpus_has_the_vocabulary_that_is_counted() -> None:
    corpus = DemoConfig()
    assert str(corpus.out) == flops.DEMO_CORPUS == PRESETS["demo"].data.corpus
    made = Vocabulary(num_pieces=corpus.pieces, num_units=corpus.codes)
    assert made == flops.DEMO_VOCABULARY


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [name for name in PRESETS if "bpe" not in name])
def test_the_report_derives_table_13(preset: str) -> None:
    text = report(FlopsConfig(preset=preset))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "token-level 0.77 0.23 2.00 3.00" in lines
    assert "lst, static 4 0.19 0.23 2.00 2.42" in lines
    assert "saving in length = 1 − 2.42 / 3.00 = 19.3% (19.25% before rounding)" in lines


@pytest.mark.parametrize(("text_path", "saved"), [("local", "6.4%"), ("global", "16.4%")])
def test_with_everything_counted_the_1b_model_saves_less_than_its_length_says(
    text_path: str, saved: str
) -> None:
    """By hand, in GFLOPs of a forward pass. A layer has 4 d² + 3 d f weights: 51.4 M of the 25
    large ones, 12.8 M of the ten local ones; f is 5,632 and 2,816."""
    model = replace(PRESETS["lst-1b"].model, text_path=text_path)
    lst, token = expected_counts(model, Mix()), expected_counts(PRESETS["baseline-1b"].model, Mix())
    large, local = 25 * 2 * 51.380224e-3, 10 * 2 * 12.845056e-3
    large_pairs, local_pairs = 25 * 4 * 2048e-9, 10 * 4 * 1024e-9
    d2 = 2 * 1024**2 * 1e-9  # of a product d → d
    large_head, local_head = 4 * 32506 * 1024e-9, 2 * 32506 * 1024e-9  # of a token
    before = token.tokens * (large + large_head) + large_pairs * token.global_pairs
    heads = lst.tokens * local_head
    if text_path == "global":
        text = lst.tokens - lst.local_tokens
        heads = text * large_head + lst.local_tokens * local_head * 506 / 32506
        # a third of the documents, 77 % of these, in patches of 4; all that is in them is read
        assert lst.local_tokens == pytest.approx(0.77 / 3)
        assert lst.local_units == pytest.approx(0.77 / 3 / 4)
        assert lst.read_units == pytest.approx((0.23 + 0.77 / 4) / 3)
    after = (
        heads
        + lst.local_tokens * (local + (2 + 9 * 2) * d2)
        + lst.local_units * (2 + 2 * 2) * d2
        + lst.read_units * 2 * 18 * d2
        + lst.units * large
        + large_pairs * lst.global_pairs
        + local_pairs * lst.local_pairs
        + 4 * 1024e-9 * (lst.encoder_pairs + 9 * lst.decoder_pairs)
    )
    for name in ("lst-1b", "baseline-1b"):
        text = report(FlopsConfig(preset=name))
        whole = (
            f'lst, text "{text_path}": saving = 1 − {9e3 * after:,.1f} / {9e3 * before:,.1f} '
            f"= {1 - after / before:.1%}"
        )
        assert whole in text
        assert whole.endswith(saved)


def test_shares_add_up_and_only_what_a_model_has_is_listed() -> None:
    local = ["embedding", "encoder", "global transformer", "decoder", "head", "total"]
    expected = {
        "lst-1b": [local, [*local[:-1], "speech head", "total"]],
        "baseline-1b": [[part for part in local if part not in ("encoder", "decoder")]],
    }
    for name, parts in expected.items():
        sections = report(FlopsConfig(preset=name)).split("\n\n")
        tables = [s.splitlines()[1:] for s in sections if "MFLOPs/token" in s.splitlines()[0]]
        assert [[line[:18].strip() for line in table] for table in tables] == parts
        for table in tables:
            shares = [float(line.split("%")[0].split()[-1]) for line in table]
            assert sum(shares[:-1]) == pytest.approx(100, abs=0.3)
            assert shares[-1] == 100


def test_options_change_what_is_counted() -> None:
    usual = report(FlopsConfig(preset="demo"))
    assert "a vocabulary of 2,506" in usual
    assert "Documents of 1,024 tokens" in usual
    other = report(FlopsConfig(preset="demo", num_pieces=1000, document_tokens=4096))
    assert "a vocabulary of 1,506" in other
    assert "Documents of 4,096 tokens" in other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "lst-2b"}, "preset: expected one of demo, .*, got 'lst-2b'"),
        ({"preset": "demo-bpe"}, "expected a preset over units, got 'demo-bpe'"),
        ({"preset": "demo", "document_tokens": 0}, "--document-tokens: expected 1 or more, got 0"),
        ({"preset": "demo", "num_pieces": 0}, "--num-pieces: expected 1 or more, got 0"),
    ],
)
def test_a_mistake_is_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlopsConfig(**options)


def test_the_command_prints_the_report_and_refuses_an_unknown_preset_in_one_line() -> None:
    command = [sys.executable, "-m", "lst.flops"]
    right = subprocess.run([*command, "lst-1b"], capture_output=True, text=True, check=True)
    assert right.stdout == report(FlopsConfig(preset="lst-1b")) + "\n"
    wrong = subprocess.run([*command, "lst-2b"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: preset: expected one of demo, ")
    assert wrong.stderr.count("\n") == 1
