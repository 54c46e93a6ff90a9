"""Viterbi's path is the best of all paths, for every shape, alone or in a batch."""

import tracemalloc
from itertools import groupby, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.speech import ctc
from lst.speech.ctc import best_paths, frames_needed

VOCABULARY = 3  # and the blank is 1
BLANK = 1


def emissions_of(seed: int, num_frames: int, vocabulary: int = VOCABULARY) -> np.ndarray:
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(vocabulary), num_frames)
    return np.log(probabilities).astype(np.float32)


def labels_of(frames: tuple[int, ...]) -> list[int]:
    """What a path of labels and blanks says: repeats count once, then blanks go."""
    return [label for label, _ in groupby(frames) if label != BLANK]


def best_of_all(emissions: np.ndarray, labels: list[int]) -> float:
    """The highest score of the V^T strings that say the labels, −inf where none does."""
    scores = [
        emissions[range(len(frames)), frames].astype(np.float64).sum()
        for frames in product(range(VOCABULARY), repeat=len(emissions))
        if labels_of(frames) == labels
    ]
    return max(scores, default=-np.inf)


def spoken(path: np.ndarray, labels: list[int]) -> tuple[int, ...]:
    return tuple(BLANK if index < 0 else labels[index] for index in path)


utterances = st.lists(
    st.tuples(
        st.integers(0, 1000),
        st.integers(1, 7),
        st.lists(st.sampled_from([0, 2]), max_size=4),
    ),
    min_size=1,
    max_size=5,
)


@given(utterances)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_no_path_is_better(batch: list[tuple[int, int, list[int]]]) -> None:
    """Utterances of every length together, against every string of labels and blanks."""
    emissions = [emissions_of(seed, num_frames) for seed, num_frames, _ in batch]
    labels = [each for _, _, each in batch]
    best = [best_of_all(*each) for each in zip(emissions, labels, strict=True)]
    for each, given_emissions, score in zip(labels, emissions, best, strict=True):
        assert (frames_needed(np.array(each)) <= len(given_emissions)) == np.isfinite(score)
    if not np.isfinite(best).all():
        with pytest.raises(ValueError, match="no path of"):
            best_paths(emissions, [np.array(each) for each in labels], blank=BLANK)
        return
    found = best_paths(emissions, [np.array(each) for each in labels], blank=BLANK)
    for (path, score), each, given_emissions, expected in zip(
        found, labels, emissions, best, strict=True
    ):
        frames = spoken(path, each)
        assert score == pytest.approx(expected, abs=1e-9)
        assert given_emissions[range(len(path)), frames].astype(float).sum() == pytest.approx(score)
        assert labels_of(frames) == each
        assert labels_of_path(path) == list(range(len(each)))


@given(st.integers(0, 100), st.lists(st.integers(20, 300), min_size=2, max_size=6))
@settings(deadline=None, derandomize=True, max_examples=10)
def test_a_batch_gives_what_each_utterance_gives_alone(seed: int, lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    emissions = [emissions_of(seed + length, length, 12) for length in lengths]
    labels = [rng.integers(2, 12, rng.integers(0, length // 2)) for length in lengths]
    together = best_paths(emissions, labels, blank=0)
    for given_emissions, each, (path, score) in zip(emissions, labels, together, strict=True):
        (alone, score_alone), *_ = best_paths([given_emissions], [each], blank=0)
        np.testing.assert_array_equal(path, alone)
        assert score == score_alone


def test_the_alignment_that_is_seen_is_found() -> None:
    certain = np.full((8, 4), -20.0, np.float32)
    for frame, label in enumerate([0, 2, 2, 0, 2, 3, 3, 0]):
        certain[frame, label] = 0.0
    (path, score), *_ = best_paths([certain], [np.array([2, 2, 3])], blank=0)
    assert path.tolist() == [-1, 0, 0, -1, 1, 2, 2, -1]
    assert score == 0.0


def test_of_equal_paths_the_one_that_is_further_at_the_end_is_taken() -> None:
    (path, _), *_ = best_paths([np.zeros((6, 4), np.float32)], [np.array([2, 3])], blank=0)
    assert path.tolist() == [0, 1, -1, -1, -1, -1]


def test_no_labels_are_all_blank() -> None:
    (path, score), *_ = best_paths([np.full((3, 2), -1.0)], [np.array([], int)], blank=0)
    assert (path.tolist(), score) == ([-1, -1, -1], -3.0)
    assert best_paths([], [], blank=0) == []


def near_diagonal(num_frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Emissions that favour labels spoken at an even speed, and the labels."""
    labels = np.random.default_rng(seed).integers(1, 30, num_frames // 3)
    emissions = emissions_of(seed, num_frames, 30)
    emissions[3 * np.arange(len(labels)) + 1, labels] += 5.0
    return emissions, labels


def test_a_band_finds_what_the_whole_search_does(monkeypatch: pytest.MonkeyPatch) -> None:
    emissions, labels = zip(*(near_diagonal(each, each) for each in (900, 400, 130)), strict=True)
    whole = best_paths(emissions, labels, blank=0)
    monkeypatch.setattr(ctc, "BAND", 40)
    banded = best_paths(emissions, labels, blank=0)
    for (path, score), (expected, best) in zip(banded, whole, strict=True):
        np.testing.assert_array_equal(path, expected)
        assert score == best


def test_a_band_is_no_better_than_the_whole_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half is spoken three times as fast: a path that the band does not hold."""
    emissions, labels = near_diagonal(900, 0)
    rushed = np.concatenate([emissions[1:450:3], emissions[450:]])
    (_, best), *_ = best_paths([rushed], [labels], blank=0)
    monkeypatch.setattr(ctc, "BAND", 10)
    (path, score), *_ = best_paths([rushed], [labels], blank=0)
    assert labels_of_path(path) == list(range(len(labels)))
    assert score < best


def labels_of_path(path: np.ndarray) -> list[int]:
    return [int(index) for index, _ in groupby(path) if index >= 0]


def test_memory_is_linear_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the band, two bits a state and frame; scores of all would be 16 times as much. The text
    is as much longer as the speech is."""
    monkeypatch.setattr(ctc, "BAND", 200)

    def peak(num_frames: int) -> int:
        given = near_diagonal(num_frames, 0)
        tracemalloc.start()
        best_paths([given[0]], [given[1]], blank=0)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return taken

    more = 1024
    bits = 2 * (2 * 200 + 64) * more / 8
    paths = 3 * 8 * more  # states, labels, and which is which
    scores_and_states = 2 * more // 3 * 80
    assert peak(2 * more) - peak(more) < 1.1 * bits + paths + scores_and_states


@pytest.mark.parametrize(
    ("num_frames", "labels"), [(2, [2, 0, 2]), (3, [2, 2, 0]), (1, [0, 0]), (0, [])]
)
def test_too_few_frames_are_refused(num_frames: int, labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"no path of|at least one frame"):
        best_paths([emissions_of(0, num_frames)], [np.array(labels, int)], blank=BLANK)


def test_emissions_that_are_no_numbers_are_refused() -> None:
    emissions = emissions_of(0, 9)
    emissions[4] = np.nan
    with pytest.raises(ValueError, match="utterance 1: no path of 9 frames speaks its labels"):
        best_paths([emissions_of(1, 12), emissions], [np.array([2]), np.array([0])], blank=BLANK)


def test_torchaudio_finds_the_same() -> None:
    """Its search over the same states, in C++; where it is installed."""
    functional = pytest.importorskip("torchaudio.functional")
    import torch

    for seed in range(20):
        emissions = emissions_of(seed, 200, 30)
        labels = np.random.default_rng(seed).integers(1, 30, 60)
        (path, score), *_ = best_paths([emissions], [labels], blank=0)
        tokens, scores = functional.forced_align(
            torch.from_numpy(emissions)[None], torch.from_numpy(labels)[None], blank=0
        )
        expected = np.where(path < 0, 0, labels[path])
        np.testing.assert_array_equal(tokens[0].numpy(), expected)
        assert score == pytest.approx(scores.double().sum().item(), rel=1e-5)
