"""Which frames speak which label: the best path of connectionist temporal classification.

A path gives each frame a label or the blank; labels follow one another in the order of the text,
and two equal ones have a blank between them. Among all paths the best is found by Viterbi's search
over the states  blank, label 0, blank, label 1, …, blank  (A. Graves, S. Fernández, F. Gomez and
J. Schmidhuber, Connectionist temporal classification, ICML 2006, section 4.1, with the sum of
eq. 6 a maximum):

    score[t, s] = emission[t, label(s)] + max(score[t−1, s], score[t−1, s−1], score[t−1, s−2])

where s−2 counts only if s is a label other than the one before it. Each step is done for all states
of all utterances at once, and two bits say where a state was reached from.

Texts of more than 1024 labels, a minute and more of speech, are searched in a band: at frame t of T
the 2048 states on either side of state S·t/T. Time and memory are so linear in T, at most 1.1 kB a
frame; a path that runs more than 1024 labels, over a minute of speech, ahead of the average or
behind it is not seen.
"""

from collections.abc import Sequence

import numpy as np

__all__ = ["best_paths", "frames_needed"]

STEPS = 64  # frames whose emissions are gathered, and whose bits are packed, at once
BAND = 2048  # states on either side of the average that are searched


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
    bands = []  # for each STEPS frames the first state searched, and the bits
    for begin in range(0, int(num_frames[0]), STEPS):
        active = int(np.count_nonzero(num_frames > begin))
        steps = min(STEPS, int(num_frames[0]) - begin)
        speed = last_states[:active] / num_frames[:active]
        low = max(0, int((speed * begin).min()) - BAND)
        high = min(num_states, int((speed * (begin + steps)).max()) + BAND + 1)
        scores[:, :active, : low + 2] = -np.inf  # what the band has left behind
        here = slice(low, high)
        spoken = np.zeros((steps, active, high - low), np.float32)
        for row in range(active):
            piece = emissions[row][begin : begin + steps]
            spoken[: len(piece), row] = piece[:, states[row, here]]
        moved = np.zeros((2, steps, active, high - low), bool)  # by one state; by two
        for step in range(steps):
            now = int(np.count_nonzero(num_frames > begin + step))
            before = scores[(begin + step) % 2, :now, low : high + 2]
            after = scores[(begin + step + 1) % 2, :now, low + 2 : high + 2]
            np.greater(before[:, 1:-1], before[:, 2:], out=moved[0, step, :now])
            np.maximum(before[:, 1:-1], before[:, 2:], out=after)
            skipping = before[:, :-2] + skip_cost[:now, here]
            np.greater(skipping, after, out=moved[1, step, :now])
            np.maximum(skipping, after, out=after)
            after += spoken[step, :now]
        bands.append((low, np.packbits(moved, axis=-1)))

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
        low, bits = bands[frame // STEPS]
        place = state - low
        one, two = (bits[:, frame % STEPS, every[:now], place >> 3] >> (7 - (place & 7))) & 1
        states_now[:now] = state - np.where(two, 2, one)
    return [
        (np.where(path[:length] % 2 == 1, path[:length] // 2, -1), float(total))
        for path, length, total in zip(paths, num_frames, totals, strict=True)
    ]
