"""Patches cover the tokens, and no patch tells a reader what comes next."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.data.patching import (
    Aligned,
    NoPatching,
    PatchingConfig,
    Static,
    aligned_probability,
    final_strategy,
    patch_lengths,
    strategy_at,
)
from lst.errors import UserError
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Vocabulary
from lst_kernels import PatchLayout

VOCABULARY = Vocabulary(num_pieces=10, num_units=10)
UNIT, PIECE = VOCABULARY.first_unit, VOCABULARY.first_piece
SEPARATE, MERGED = Aligned(silence="separate"), Aligned(silence="merged")
STRATEGIES = {
    "none": NoPatching(),
    "static 1": Static(size=1),
    "static 3": Static(size=3),
    "static 4": Static(size=4),
    "separate": SEPARATE,
    "merged": MERGED,
    "separate, at most 2": Aligned(silence="separate", max_length=2, size=3),
    "merged, at most 3": Aligned(silence="merged", max_length=3),
    "merged, at most 1": Aligned(silence="merged", max_length=1),
}


def cut(units, strategy, aligned=(), breaks=()):
    """(lengths, closed late) of the patches of one run of units between <s> and <eos>."""
    tokens = np.array([BOS, SPEECH, *[UNIT] * units, EOS], np.int32)
    spans = np.array(aligned, np.int32).reshape(-1, 2) + 2
    lengths, late = patch_lengths(
        tokens, VOCABULARY, strategy, aligned=spans, breaks=tuple(b + 2 for b in breaks)
    )
    assert lengths[:2].tolist() == [1, 1]
    assert lengths[-1] == 1
    assert not late[[0, 1, -1]].any()
    return list(zip(lengths[2:-1].tolist(), late[2:-1].tolist(), strict=True))


def on_time(*lengths):
    return [(length, False) for length in lengths]


WORDS = [(2, 5), (6, 8)]
HALVES = [(2, 4), (4, 5), (6, 7), (7, 8)]
EXAMPLES = {
    "static, 3": (7, Static(size=3), ()),
    "silence separate": (8, SEPARATE, WORDS),
    "silence merged": (8, MERGED, WORDS),
    "separate, at most 2": (8, Aligned(max_length=2), WORDS),
    "merged, at most 4": (8, Aligned(silence="merged", max_length=4), WORDS),
    "by pieces, two to a word": (8, SEPARATE, HALVES),
    "token by token": (8, NoPatching(), WORDS),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_docs_patching_shows_the_patches_of_the_paper_s_examples(name):
    units, strategy, aligned = EXAMPLES[name]
    numbers, patches = iter(range(units)), []
    for length, late in cut(units, strategy, aligned):
        words = " ".join(str(next(numbers)) for _ in range(length))
        patches.append(words + "*" * late)
    page = (Path(__file__).parents[2] / "docs" / "patching.md").read_text()
    assert f"\n{name:<28}{' | '.join(patches)}\n" in page


@pytest.mark.parametrize("name", ["mixed", "curriculum"])
def test_drawn_patches_of_the_paper_s_example_are_static_or_aligned(name):
    rng = np.random.default_rng(0)
    drawn = [strategy_at(PatchingConfig(strategy=name), 50, 100, rng) for _ in range(20)]
    cuts = {tuple(cut(8, strategy, WORDS)) for strategy in drawn}
    assert cuts == {tuple(cut(8, Static(size=4), WORDS)), tuple(cut(8, SEPARATE, WORDS))}


def test_static_patches_of_the_paper():
    """Section 3.1: p = 3 over x0 … x6 gives {0,1,2}, {3,4,5}, {6}; the last is cut short."""
    assert cut(7, Static(size=3)) == [*on_time(3, 3), (1, True)]
    assert cut(6, Static(size=3)) == on_time(3, 3)


def test_aligned_patches_of_the_paper():
    """Section 3.1: words at [2,4] and [6,7], both ends included: silences {0,1} and {5}."""
    assert cut(8, SEPARATE, [(2, 5), (6, 8)]) == on_time(2, 3, 1, 2)
    assert cut(8, MERGED, [(2, 5), (6, 8)]) == [(6, False), (2, True)]


def test_trailing_silence_is_closed_late():
    assert cut(10, SEPARATE, [(2, 5), (6, 8)]) == [*on_time(2, 3, 1, 2), (2, True)]
    assert cut(10, MERGED, [(2, 5), (6, 8)]) == [(6, False), (4, True)]


def test_touching_words_need_no_silence():
    assert cut(6, SEPARATE, [(0, 2), (2, 5)]) == [*on_time(2, 3), (1, True)]
    assert cut(6, MERGED, [(0, 2), (2, 5)]) == [(2, False), (4, True)]


@pytest.mark.parametrize("silence", ["separate", "merged"])
def test_a_document_without_alignment_is_patched_statically(silence):
    assert cut(9, Aligned(silence=silence, size=4)) == [*on_time(4, 4), (1, True)]
    # A run without words beside one with words is a silence.
    tokens = np.array([BOS, SPEECH, *[UNIT] * 9, TEXT, PIECE, SPEECH, UNIT, EOS], np.int32)
    aligned = np.array([(14, 15)], np.int32)
    lengths, late = patch_lengths(tokens, VOCABULARY, Aligned(silence=silence), aligned=aligned)
    assert lengths.tolist() == [1, 1, 9, 1, 1, 1, 1, 1]
    assert np.flatnonzero(late).tolist() == [2] if silence == "separate" else [2, 6]


def test_long_patches_are_cut_from_their_start():
    """A silence of 7 and a word of 5 units, at most 3 to a patch: a full patch ends on time."""
    words = [(7, 12)]
    assert cut(12, Aligned(max_length=3), words) == on_time(3, 3, 1, 3, 2)
    assert cut(14, Aligned(max_length=3), words) == [*on_time(3, 3, 1, 3, 2), (2, True)]
    assert cut(15, Aligned(max_length=3), words) == on_time(3, 3, 1, 3, 2, 3)
    merged = Aligned(silence="merged", max_length=5)
    assert cut(14, merged, [(2, 7), (9, 11)]) == [*on_time(5, 4, 5)]
    assert cut(13, merged, [(2, 7), (9, 11)]) == [*on_time(5, 4), (4, True)]


def test_a_break_starts_a_run():
    assert cut(8, Static(size=3), breaks=[5]) == [(3, False), (2, True), (3, False)]
    assert cut(8, Static(size=3), breaks=[3]) == [*on_time(3, 3), (2, True)]
    words = [(1, 3), (6, 7)]
    assert cut(8, SEPARATE, words, [5]) == [*on_time(1, 2), (2, True), *on_time(1, 1), (1, True)]
    # Silence after the break leads its run: it joins the word after it.
    assert cut(8, MERGED, words, [5]) == [(5, True), (3, True)]
    # Where the aligner knows the break as a word's start, the patch before it is on time.
    assert cut(8, SEPARATE, words, [6]) == [*on_time(1, 2, 3, 1), (1, True)]


def test_static_patches_restart_at_each_span():
    tokens = np.array([BOS, SPEECH, *[UNIT] * 5, TEXT, PIECE, SPEECH, *[UNIT] * 4, EOS])
    lengths, late = patch_lengths(tokens, VOCABULARY, Static(size=4), aligned=np.zeros((0, 2), int))
    assert lengths.tolist() == [1, 1, 4, 1, 1, 1, 1, 4, 1]
    assert np.flatnonzero(late).tolist() == [3]


@st.composite
def streams(draw):
    """Tokens of any kind in any order, with aligned ranges and breaks anywhere."""
    tokens = [BOS, *draw(st.lists(st.sampled_from([UNIT] * 8 + [PIECE, TEXT, SPEECH, EOS]),
                                  min_size=1, max_size=24)), EOS]  # fmt: skip
    ends = sorted(draw(st.sets(st.integers(1, len(tokens) - 1), max_size=8)))
    pairs = [p for p in itertools.pairwise(ends) if draw(st.booleans())]
    breaks = draw(st.sets(st.integers(1, len(tokens) - 1), max_size=1))
    return np.array(tokens, np.int32), np.array(disjoint(pairs), np.int32).reshape(-1, 2), breaks


def disjoint(pairs):
    kept = []
    for start, stop in pairs:
        if not kept or start >= kept[-1][1]:
            kept.append((start, stop))
    return kept


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@given(stream=streams())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_patches_cover_the_tokens_and_keep_to_one_run(strategy, stream):
    tokens, aligned, breaks = stream
    lengths, late = patch_lengths(
        tokens, VOCABULARY, strategy, aligned=aligned, breaks=tuple(breaks)
    )
    assert (lengths.dtype, late.dtype, lengths.sum()) == (np.int32, bool, len(tokens))
    assert (lengths > 0).all()
    stops = np.cumsum(lengths)
    for start, stop in zip(stops - lengths, stops, strict=True):
        assert stop - start == 1 or VOCABULARY.is_unit(tokens[start:stop]).all()
        assert not any(start < b < stop for b in breaks)
    assert not late[~VOCABULARY.is_unit(tokens[stops - 1])].any()


def readable(tokens, strategy, aligned, breaks):
    """[token → extents of the patches it reads], by the layout that the model reads."""
    lengths, late = patch_lengths(tokens, VOCABULARY, strategy, aligned=aligned, breaks=breaks)
    layout = PatchLayout.from_lengths(lengths, [len(lengths)], closed_late=late)
    mask = layout.tokens_read_patches().dense_mask()
    stops = np.cumsum(lengths)
    extents = list(zip((stops - lengths).tolist(), stops.tolist(), strict=True))
    return [[extents[p] for p in row.nonzero()[:, 0].tolist()] for row in mask], extents


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@given(stream=streams(), data=st.data())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_no_token_changes_what_earlier_tokens_read(strategy, stream, data):
    """Half of causality: replace token t by any other, patch anew, and every earlier token reads
    the same patches, each of them over before it is read."""
    tokens, aligned, breaks = stream
    before, _ = readable(tokens, strategy, aligned, tuple(breaks))
    for token, extents in enumerate(before):
        assert all(stop <= token + 1 for _, stop in extents)
    t = data.draw(st.integers(1, len(tokens) - 1))
    for other in (UNIT, UNIT + 1, PIECE, TEXT, SPEECH, EOS, BOS):
        changed = tokens.copy()
        changed[t] = other
        after, _ = readable(changed, strategy, aligned, tuple(breaks))
        assert after[:t] == before[:t]


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@given(stream=streams())
@settings(deadline=None, derandomize=True, max_examples=20)
def test_patches_that_have_ended_stay_as_they_are(strategy, stream):
    """Of the patches wholly before t, those that t may yet lengthen are closed late."""
    tokens, aligned, breaks = stream
    for t in range(1, len(tokens)):
        lengths, late = patch_lengths(
            tokens, VOCABULARY, strategy, aligned=aligned, breaks=tuple(breaks)
        )
        stops = np.cumsum(lengths)
        ends = zip(lengths, stops, late, strict=True)
        settled = {(stop - length, stop) for length, stop, wait in ends if stop + wait <= t}
        for other in (UNIT, PIECE, SPEECH, EOS, BOS):
            changed = tokens.copy()
            changed[t] = other
            again, _ = patch_lengths(
                changed, VOCABULARY, strategy, aligned=aligned, breaks=tuple(breaks)
            )
            ends = np.cumsum(again)
            assert settled <= {(b - a, b) for a, b in zip(again, ends, strict=True)}


def test_a_patch_read_too_soon_would_be_noticed():
    """The test above sees the leak it is about: without closed_late, a cut patch tells of <eos>."""
    tokens = np.array([BOS, SPEECH, UNIT, UNIT, EOS], np.int32)
    none = np.zeros((0, 2), np.int32)
    lengths, late = patch_lengths(tokens, VOCABULARY, Static(size=3), aligned=none)
    assert late.tolist() == [False, False, True, False]
    leaking = PatchLayout.from_lengths(lengths, [len(lengths)]).tokens_read_patches().dense_mask()
    honest = PatchLayout.from_lengths(
        lengths, [len(lengths)], closed_late=torch.from_numpy(late)
    ).tokens_read_patches()
    assert leaking[3, 2]
    assert not honest.dense_mask()[3, 2]


def share_aligned(config, row, steps=300, draws=400):
    rng = np.random.default_rng(0)
    drawn = [strategy_at(config, row, steps, rng) for _ in range(draws)]
    assert set(drawn) <= {Aligned(silence="separate"), Static(size=4)}
    return np.mean([isinstance(strategy, Aligned) for strategy in drawn])


def test_curriculum_follows_the_paper():
    config = PatchingConfig()  # tau_1 = 100 and tau_2 = 200 of 300 steps
    assert share_aligned(config, 0) == share_aligned(config, 99) == 1
    assert share_aligned(config, 200) == share_aligned(config, 299) == 0
    for row, probability in ((125, 0.75), (150, 0.5), (175, 0.25)):
        assert share_aligned(config, row) == pytest.approx(probability, abs=0.06)


def test_the_curriculum_is_the_formula_of_the_paper():
    config = PatchingConfig(curriculum=(0.25, 0.75))
    probabilities = [aligned_probability(config, u, 8) for u in range(10)]
    assert probabilities == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0]


def test_mixed_patching_tosses_a_coin_for_each_document():
    """Section 4.2: static or aligned patching at random per sequence, whatever the step."""
    config = PatchingConfig(strategy="mixed")
    for row in (0, 299):
        assert share_aligned(config, row) == pytest.approx(0.5, abs=0.06)
    assert final_strategy(config) == Static(size=4)


def test_all_options_reach_the_patches():
    config = PatchingConfig(
        strategy="aligned",
        silence="merged",
        size=6,
        max_patch_length=25,
        aligned_by="pieces",
        boundary_noise_ms=20,
    )
    assert final_strategy(config) == Aligned(silence="merged", size=6, max_length=25)
    assert (config.alignment.by, config.alignment.noise_ms) == ("pieces", 20)


def test_a_curriculum_may_switch_at_once():
    config = PatchingConfig(curriculum=(0.5, 0.5))
    assert (share_aligned(config, 149), share_aligned(config, 150)) == (1, 0)


def test_strategies_by_name():
    rng = np.random.default_rng(0)
    for name, strategy in (
        ("none", NoPatching()),
        ("speech-bpe", NoPatching()),
        ("static", Static(size=4)),
        ("aligned", SEPARATE),
    ):
        config = PatchingConfig(strategy=name)
        assert strategy_at(config, 5, 10, rng) == final_strategy(config) == strategy
    assert final_strategy(PatchingConfig(size=6)) == Static(size=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "--data.patching.size: expected 1 or more, got 0"),
        ({"max_patch_length": 0}, "max-patch-length: expected 1 or more, got 0"),
        ({"boundary_noise_ms": -1.0}, "boundary-noise-ms: expected 0 or more, got -1.0"),
        (
            {"strategy": "static", "boundary_noise_ms": 20.0},
            "boundary_noise_ms is of aligned patches, which the strategy 'static' does not make",
        ),
        ({"strategy": "none", "max_patch_length": 9}, "max_patch_length is of aligned patches"),
        ({"curriculum": (0.7, 0.3)}, "curriculum fractions .* got 0.7 and 0.3"),
        ({"curriculum": (0.5, 1.5)}, "curriculum fractions"),
    ],
)
def test_bad_patching_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        PatchingConfig(**options)
