"""Which frames of a record belong to which unit of its text: to its words, or to its text pieces.

    records -> [alignment] -> interleave -> patching -> packing -> batch

What an aligner has found is side information: known before the speech is read. Words are as the
record has them. Pieces are those of the text tokenizer (paper, A.4): the characters' frames, put
together piece by piece, where within a word each piece reaches up to the next:

    word            |  u  p  o  n |           frames 4 to 12
    characters      | 4-6 6-7 - 9-12 |        the "o" is too short for a frame, 7 to 9 are no one's
    pieces          | ▁up    | on |           frames 4-9 and 9-12

A record without characters has its words split in proportion to the letters of their pieces; those
boundaries are estimates (``pieces_are_estimated``).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lst.data.records import FRAMES_PER_SECOND, Record
from lst.vocabulary import Tokenizer

__all__ = ["Alignment", "aligned_spans", "pieces_are_estimated", "spans_within", "with_noise"]

_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], np.uint32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """What aligned patches follow.

    Attributes:
        by: units of text.
        noise_ms: each boundary is moved by up to so many milliseconds, drawn anew for each
            document: how much does a model rely on its aligner? (version 2's robustness test)
    """

    by: Literal["words", "pieces"] = "words"
    noise_ms: float = 0.0


def aligned_spans(record: Record, tokenizer: Tokenizer | None, alignment: Alignment) -> np.ndarray:
    """(A, 2) int32, the half-open frames of each unit of text, without noise.

    In order, disjoint, none of them empty: a word too short for a frame is left out, and so are
    the words of a record that has none aligned. Words need no tokenizer.
    """
    words = np.array([(word.start, word.stop) for word in record.words or ()], np.int32)
    words = words.reshape(-1, 2)
    if alignment.by == "words" or not (len(words) or record.chars):
        return words[words[:, 0] < words[:, 1]]
    if tokenizer is None:
        raise ValueError("expected a tokenizer to align its pieces, got None")
    if record.chars is not None and record.text is not None:
        text = record.text
        chars = np.array([(char.start, char.stop) for char in record.chars], np.int32)
    else:
        assert record.words is not None
        text = " ".join(word.word for word in record.words)
        chars = _proportional_chars(np.array([len(word.word) for word in record.words]), words)
    return _piece_spans(text, chars.reshape(-1, 2), tokenizer.piece_ends(text))


def pieces_are_estimated(record: Record) -> bool:
    """Whether the pieces of a record with aligned words are split in proportion to their letters,
    for want of aligned characters."""
    return bool(record.words) and (record.chars is None or record.text is None)


def _proportional_chars(letters: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Frames of the characters of words joined by blanks.

    Args:
        letters: (W,) characters of each word, at least 1.
        words: (W, 2) frames.

    Returns:
        (C, 2): character j of n in a word of F frames at s has s + [jF/n, (j+1)F/n), rounded; a
        blank is empty.
    """
    places = letters + 1  # boundaries of a word's characters
    first = np.cumsum(places) - places
    owner = np.repeat(np.arange(len(letters)), places)
    j = np.arange(len(owner)) - first[owner]
    n, frames = letters[owner], (words[:, 1] - words[:, 0])[owner]
    bounds = words[owner, 0] + (2 * j * frames + n) // (2 * n)
    # From a word's last boundary to the next word's first lies the blank; it takes no frame.
    return np.stack([bounds[:-1], np.where(j[1:] == 0, bounds[:-1], bounds[1:])], axis=1)


def _piece_spans(text: str, chars: np.ndarray, piece_ends: np.ndarray) -> np.ndarray:
    """(A, 2) int32 frames of the pieces that have any.

    Args:
        chars: (C, 2) frames of the text's characters; blanks belong to no piece.
        piece_ends: (n,) characters, one past the last of each piece.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    is_space = np.isin(codes, _SPACES)
    heard = np.flatnonzero((chars[:, 0] < chars[:, 1]) & ~is_space)
    first = np.searchsorted(heard, np.concatenate(([0], piece_ends[:-1])))
    stop = np.searchsorted(heard, piece_ends)
    first, stop = first[first < stop], stop[first < stop]
    spans = np.stack([chars[heard[first], 0], chars[heard[stop - 1], 1]], axis=1).astype(np.int32)
    word = np.cumsum(is_space)[heard[first]]
    inner = np.flatnonzero(word[1:] == word[:-1])  # pieces whose successor is of the same word
    spans[inner, 1] = spans[inner + 1, 0]
    return spans


def spans_within(spans: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Those of ``spans`` that start in [start, stop), counted from ``start``, cut at ``stop``."""
    starts = spans[:, 0]
    first, last = starts.searchsorted(start), starts.searchsorted(stop)
    return np.minimum(spans[first:last], stop) - start


def with_noise(
    spans: np.ndarray, num_frames: int, noise_ms: float, rng: np.random.Generator
) -> np.ndarray:
    """Move each boundary by a number drawn evenly from ±``noise_ms``; touching spans share theirs.

    A boundary is known to the frame, of 40 ms. Where in it the aligner heard it is drawn evenly as
    well, and noise is added before rounding: 20 ms move every fourth boundary by a frame, 0 ms
    none. No boundary passes the middle to its neighbour, so that spans and silences stay.

    Args:
        spans: (A, 2) frames in [0, num_frames], in order, disjoint, none of them empty.

    Returns:
        (A, 2) int32, likewise.
    """
    if not noise_ms or not len(spans):
        return spans
    ends = spans.ravel()
    is_own = np.ones(len(ends), bool)
    is_own[2::2] = ends[2::2] != ends[1:-1:2]
    bounds = ends[is_own]
    middles = (bounds[1:] + bounds[:-1]) // 2
    lowest, highest = np.append(0, middles + 1), np.append(middles, num_frames)
    noise = min(noise_ms * FRAMES_PER_SECOND / 1000, num_frames)  # more reaches no further
    heard = bounds + rng.uniform(-0.5, 0.5, len(bounds)) + rng.uniform(-noise, noise, len(bounds))
    moved = np.clip(np.floor(heard + 0.5).astype(np.int32), lowest, highest)
    return moved[np.cumsum(is_own) - 1].reshape(-1, 2).astype(np.int32)
