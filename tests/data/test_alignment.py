"""Aligned spans keep to what the aligner found; estimates and noise keep spans in order."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.data.alignment import (
    Alignment,
    aligned_spans,
    pieces_are_estimated,
    spans_within,
    with_noise,
)
from lst.data.records import Record, Span, Word

PIECES = Alignment(by="pieces")


class Letters:
    """A tokenizer that cuts after every so many characters of a word, blanks opening the words."""

    def __init__(self, size):
        self.size = size

    def piece_ends(self, text):
        ends, start = [], 0
        for word in text.split(" "):
            stop = start + len(word)
            ends += [*range(start + self.size, stop, self.size), stop]
            start = stop + 1
        return np.array(ends, np.int32)


def make_record(words, chars=None, text=None):
    """``words``: (word, start, stop)."""
    return Record(
        id="r",
        text=" ".join(word for word, _, _ in words) if text is None else text,
        units=np.zeros(1000, np.int16),
        words=tuple(Word(*word) for word in words),
        chars=None if chars is None else tuple(Span(*char) for char in chars),
        speaker=None,
        source="test",
    )


def test_words_are_as_the_record_has_them_but_for_empty_ones():
    record = make_record([("a", 1, 3), ("of", 3, 3), ("b", 5, 6)])
    assert aligned_spans(record, Letters(1), Alignment()).tolist() == [[1, 3], [5, 6]]


def test_characters_are_put_together_to_pieces():
    """The example at the head of the module: ▁up is 4-9, as the "o" has no frame; on is 9-12."""
    chars = [(4, 6), (6, 7), (7, 7), (9, 12)]
    record = make_record([("upon", 4, 12)], chars)
    assert aligned_spans(record, Letters(2), PIECES).tolist() == [[4, 9], [9, 12]]
    assert not pieces_are_estimated(record)


def test_silence_between_words_belongs_to_no_piece():
    chars = [(2, 3), (4, 5), (5, 8), (8, 9), (10, 11)]  # "ab cd": the blank has frames of its own
    record = make_record([("ab", 2, 5), ("cd", 8, 11)], chars)
    assert aligned_spans(record, Letters(1), PIECES).tolist() == [[2, 4], [4, 5], [8, 10], [10, 11]]
    assert aligned_spans(record, Letters(2), PIECES).tolist() == [[2, 5], [8, 11]]


def test_a_piece_that_nothing_is_heard_of_is_left_out():
    chars = [(0, 2), (2, 2), (2, 2), (2, 2), (5, 6)]  # "a" and "b" of "a.. b"
    record = make_record([("a..", 0, 2), ("b", 5, 6)], chars)
    assert aligned_spans(record, Letters(1), PIECES).tolist() == [[0, 2], [5, 6]]


def test_without_characters_a_word_is_split_in_proportion_to_its_letters():
    record = make_record([("abcdef", 10, 22), ("gh", 25, 26), ("i", 26, 26), ("jkl", 26, 31)])
    assert pieces_are_estimated(record)
    spans = aligned_spans(record, Letters(2), PIECES).tolist()
    # Two frames to a letter; one frame for a whole piece; none; five thirds of a frame to a letter.
    assert spans == [[10, 14], [14, 18], [18, 22], [25, 26], [26, 29], [29, 31]]
    # Two pieces of one frame: the second has it, the first is left out.
    short = make_record([("gh", 25, 26)])
    assert aligned_spans(short, Letters(1), PIECES).tolist() == [[25, 26]]


@st.composite
def words(draw):
    made, frame = [], 0
    for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=8)):
        start = frame + draw(st.integers(0, 4))
        frame = start + draw(st.integers(0, 12))
        made.append(("x" * length, start, frame))
    return made


@given(words(), st.integers(1, 4))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_estimated_pieces_are_their_words_cut_up(words, size):
    spans = aligned_spans(make_record(words), Letters(size), PIECES)
    assert (spans[:, 0] < spans[:, 1]).all()
    assert (spans[1:, 0] >= spans[:-1, 1]).all()
    covered = [frame for start, stop in spans for frame in range(start, stop)]
    assert covered == [frame for _, start, stop in words for frame in range(start, stop)]
    starts = {start for start, _ in spans}
    for word, start, stop in words:
        assert start in starts or start == stop
        assert sum(start <= s < stop for s in starts) <= -(-len(word) // size)


def test_a_record_without_words_has_nothing_aligned():
    bare = Record("b", None, np.zeros(9, np.int16), None, None, None, "test")
    for alignment in (Alignment(), PIECES):
        assert aligned_spans(bare, Letters(1), alignment).shape == (0, 2)
    assert not pieces_are_estimated(bare)


def test_spans_within_a_stretch_count_from_its_start():
    spans = np.array([(0, 3), (3, 5), (8, 12)])
    assert spans_within(spans, 3, 10).tolist() == [[0, 2], [5, 7]]
    assert spans_within(spans, 5, 8).shape == (0, 2)


@st.composite
def spans(draw):
    ends = sorted(draw(st.sets(st.integers(0, 60), min_size=2, max_size=20)))
    pairs = list(itertools.pairwise(ends))
    kept = [pair for pair in pairs if draw(st.booleans())] or pairs[:1]
    return np.array(kept, np.int32)


@given(spans(), st.floats(0, 500), st.integers(0, 100))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_noise_keeps_spans_and_silences_in_order(spans, noise_ms, seed):
    moved = with_noise(spans, 60, noise_ms, np.random.default_rng(seed))
    assert moved.shape == spans.shape
    assert (moved[:, 0] < moved[:, 1]).all()
    touching = spans[1:, 0] == spans[:-1, 1]
    assert (touching == (moved[1:, 0] == moved[:-1, 1])).all()
    assert (moved[1:, 0] >= moved[:-1, 1]).all()
    assert moved.min() >= 0
    assert moved.max() <= 60
    assert np.abs(moved - spans).max() <= noise_ms / 40 + 1


@pytest.mark.parametrize(("noise_ms", "share"), [(0.0, 0), (1e-9, 0), (20.0, 0.25), (40.0, 0.5)])
def test_noise_moves_as_many_boundaries_as_it_should(noise_ms, share):
    """Drawn within a frame of 40 ms and moved by ±n ms, a boundary leaves its frame so often."""
    spans = np.stack([np.arange(20, 40_000, 40), np.arange(40, 40_020, 40)], 1)
    moved = with_noise(spans, 40_040, noise_ms, np.random.default_rng(0))
    assert (moved != spans).mean() == pytest.approx(share, abs=0.03)
    assert (moved - spans).mean() == pytest.approx(0, abs=0.03)


def test_noise_of_no_spans_is_no_spans():
    none = np.zeros((0, 2), np.int32)
    assert with_noise(none, 9, 20.0, np.random.default_rng(0)).shape == (0, 2)
