"""Which frames speak which label: the best path of connectionist temporal classification.

A path gives each frame a label or the blank; labels follow one another in the order of the text,
and two equal ones have a blank between them. Among all paths the best is found by Viterbi's search
over the states  blank, label 0, blank, label 1, …, blank  (A. Graves, S. Fernández, F. Gomez and
J. Schmidhuber, Connectionist temporal classification, ICML 2006, section 4.1, with the sum of
eq. 6 a maximum):

    score[t, s] = emission[t, label(s)] + max(score[t−1, s], score[t−1, s−1], score[t−1, s−2])

where s−2 counts only if s is a label other than the one before it. Each step is done for all states
of all utterances at once. Two bits say where a state was reached from, so that T frames and L
labels take T·L/2 bytes: 0.15 MB for 20 s of speech at 50 frames and 15 characters a second.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["best_paths", "frames_needed"]

STEPS = 64  # frames whose emissions are gathered, and whose bits are packed, at once


def frames_needed(labels: np.ndarray) -> int:
    """The fewest frames in which the labels can be spoken: one each, and blanks between equals."""
    return len(labels) + int(np.count_nonzero(labels[1:] == labels[:-1]))


def best_paths(
    emissions: Sequence[np.ndarray], labels: Sequence[np.ndarray], *, blank: int
) -> list[tuple[np.ndarray, float]]:
    """The best path of each utterance.

    Args:
        emissions: (T, V) float each, log-probabilities.
        labels: (L,) integers each in [0, V), none of them ``blank``; L may be 0.
        blank: the label of no character.

    Returns:
        For each utterance the path, (T,) int64, the index into ``labels`` that each frame speaks,
        −1 for a blank; and its score, the sum of its T emissions. Of equally good paths, the one
        that is further along the labels at the last frame where they differ.

    Raises:
        ValueError: an utterance without frames, or without any path of finite score.
    """
    if any(not len(each) for each in emissions):
        raise ValueError("expected at least one frame, got an utterance of none")
    # Longest first: those that go on at any frame are then the first rows.
    order = sorted(range(len(emissions)), key=lambda index: -len(emissions[index]))
    emissions = [emissions[index] for index in order]
    labels = [np.asarray(labels[index], np.int64) for index in order]
    results: list[tuple[np.ndarray, float]] = [(np.empty(0, np.int64), 0.0)] * len(order)
    if order:
        found = _search(emissions, labels, blank)
        for index, (path, score) in zip(order, found, strict=True):
            if not np.isfinite(score):
                raise ValueError(
                    f"utterance {index}: no path of {len(path)} frames speaks its labels, which "
                    f"need {frames_needed(labels[order.index(index)])}, with a finite score"
                )
            results[index] = path, score
    return results


def _search(
    emissions: Sequence[np.ndarray], labels: Sequence[np.ndarray], blank: int
) -> list[tuple[np.ndarray, float]]:
    num_frames = np.array([len(each) for each in emissions])
    last_states = np.array([2 * len(each) for each in labels])
    rows, num_states = len(labels), int(last_states.max()) + 1
    states = np.full((rows, num_states), blank)  # B × S; those after a row's last do no harm
    for row, each in enumerate(labels):
        states[row, 1 : 2 * len(each) : 2] = each
    may_skip = np.zeros((rows, num_states), bool)
    may_skip[:, 3::2] = states[:, 3::2] != states[:, 1:-2:2]
    skip_cost = np.where(may_skip, 0.0, -np.inf)

    # Two states before the first one, which nothing reaches, spare the edge a case of its own.
    # Before the first frame a path is in the first blank.
    scores = np.full((2, rows, num_states + 2), -np.inf)
    scores[0, :, 2] = 0.0
    bits = []
    for begin in range(0, int(num_frames[0]), STEPS):
        active = int(np.count_nonzero(num_frames > begin))
        steps = min(STEPS, int(num_frames[0]) - begin)
        spoken = np.zeros((steps, active, num_states), np.float32)
        for row in range(active):
            piece = emissions[row][begin : begin + steps]
            spoken[: len(piece), row] = piece[:, states[row]]
        moved = np.zeros((2, steps, active, num_states), bool)  # by one state; by two
        for step in range(steps):
            now = int(np.count_nonzero(num_frames > begin + step))
            before = scores[(begin + step) % 2, :now]
            after = scores[(begin + step + 1) % 2, :now, 2:]
            np.greater(before[:, 1:-1], before[:, 2:], out=moved[0, step, :now])
            np.maximum(before[:, 1:-1], before[:, 2:], out=after)
            skipping = before[:, :-2] + skip_cost[:now]
            np.greater(skipping, after, out=moved[1, step, :now])
            np.maximum(skipping, after, out=after)
            after += spoken[step, :now]
        bits.append(np.packbits(moved, axis=-1))

    every = np.arange(rows)
    ends = scores[num_frames % 2, every, 2:]  # a row's last frame wrote the buffer of this parity
    before_last = np.maximum(last_states - 1, 0)
    ends_in_label = ends[every, before_last] > ends[every, last_states]
    states_now = np.where(ends_in_label, before_last, last_states)
    totals = ends[every, states_now]
    paths = np.empty((rows, int(num_frames[0])), np.int64)
    for frame in range(int(num_frames[0]) - 1, -1, -1):
        now = int(np.count_nonzero(num_frames > frame))
        state = states_now[:now]
        paths[:now, frame] = state
        bytes_of = bits[frame // STEPS][:, frame % STEPS, every[:now], state >> 3]
        one, two = (bytes_of >> (7 - (state & 7))) & 1
        states_now[:now] = state - np.where(two, 2, one)
    return [
        (np.where(path[:length] % 2 == 1, path[:length] // 2, -1), float(total))
        for path, length, total in zip(paths, num_frames, totals, strict=True)
    ]
