"""Does forced alignment keep up with what makes the emissions: 100 times real time on one core?

    search over T frames and 2 L + 1 states:  6 additions or comparisons a state and frame

Utterances of 5 to 20 s at 50 emissions and 14 characters a second, of a vocabulary of 32, alone and
32 at once. Before it is timed, the search is held against one written plainly, state by state.
NumPy does its sums on one core whatever the machine has. torchaudio's search, in C++ and one
utterance at a time, is reported beside it where it is installed.

    pytest benchmarks/test_speech.py --benchmark-only
"""

import importlib.util

import numpy as np
import pytest

from lst.speech.ctc import best_paths

RATE = 50  # emissions a second
CHARACTERS = 14  # a second
VOCABULARY = 32


def utterances(number: int) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """Emissions, labels, and how many seconds they are of."""
    rng = np.random.default_rng(0)
    seconds = rng.uniform(5, 20, number)
    emissions = [
        np.log(rng.dirichlet(np.ones(VOCABULARY), round(RATE * each))).astype(np.float32)
        for each in seconds
    ]
    labels = [rng.integers(1, VOCABULARY, round(CHARACTERS * each)) for each in seconds]
    return emissions, labels, float(seconds.sum())


def plain_score(emissions: np.ndarray, labels: np.ndarray) -> float:
    """The best score, by the recursion as it is written in textbooks."""
    states = [0]
    for label in labels.tolist():
        states += [label, 0]
    scores = [0.0] + [-np.inf] * (len(states) - 1)
    for frame in emissions.astype(np.float64):
        before = scores
        scores = []
        for state, label in enumerate(states):
            best = max(before[max(0, state - 1) : state + 1])
            if state > 2 and label and label != states[state - 2]:
                best = max(best, before[state - 2])
            scores.append(best + frame[label])
    return max(scores[-2:])


@pytest.mark.parametrize("number", [1, 32])
def test_search_is_a_hundred_times_faster_than_real_time(outrun, number: int):
    emissions, labels, seconds = utterances(number)
    path, score = best_paths(emissions[:1], labels[:1], blank=0)[0]
    spoken = np.where(path < 0, 0, labels[0][path])
    assert score == pytest.approx(plain_score(emissions[0], labels[0]), abs=1e-6)
    assert score == pytest.approx(emissions[0][range(len(spoken)), spoken].astype(float).sum())

    outrun(
        f"CTC alignment, {number} utterances of 5 to 20 s",
        lambda: best_paths(emissions, labels, blank=0),
        seconds=seconds,
        floor=100.0,
    )


def test_search_beside_torchaudio(race):
    if importlib.util.find_spec("torchaudio") is None:
        pytest.skip("torchaudio is not installed")
    import torch
    from torchaudio.functional import forced_align

    emissions, labels, _ = utterances(32)
    inputs = [
        (torch.from_numpy(given)[None], torch.from_numpy(each)[None])
        for given, each in zip(emissions, labels, strict=True)
    ]
    race(
        "CTC alignment, 32 utterances of 5 to 20 s",
        lambda: best_paths(emissions, labels, blank=0),
        {"torchaudio": lambda: [forced_align(*each, blank=0) for each in inputs]},
        floors={},
    )
