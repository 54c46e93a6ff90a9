"""Random documents in the shape of the paper's data, and streams of them.

The paper's mix (version 2, Table 13): of three tokens one is in documents of speech and text in
turn, of which 77 % are speech units, and two are in texts. Spans are 5 to 30 written words, each
followed by half as many spoken ones; a word has 5.8 units, the silence after it 3.7. The paper does
not say how long its documents are: here a text has 200 to 2,000 pieces, an interleaved document
about 27 seconds of speech (six spans of it), one of speech alone a minute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lst.data.batch import Batch, make_batch
from lst.data.interleave import Document
from lst.data.packing import Packed, concatenate, patch_document, take
from lst.data.patching import NoPatching, Static, Strategy
from lst.model import ModelConfig
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Vocabulary

__all__ = ["MIX", "PAPER", "SPEECH_ONLY", "TEXT_ONLY", "Shape", "documents", "fill", "random_batch"]

PIECES_PER_WORD = 1.3

# Shares of the tokens in documents of each kind.
MIX = {"text": 2.0, "interleaved": 1.0}
SPEECH_ONLY = {"speech": 1.0}
TEXT_ONLY = {"text": 1.0}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The vocabulary, and how long documents are."""

    vocabulary: Vocabulary
    text_pieces: tuple[int, int]  # of a text: at least, less than
    spans: int  # of text, and as many of speech, in an interleaved document
    speech_words: int  # of a document of speech alone


PAPER = Shape(
    vocabulary=Vocabulary(num_pieces=32000, num_units=501),  # Llama 2's pieces, HuBERT's units
    text_pieces=(200, 2000),
    spans=6,
    speech_words=158,
)


def documents(
    shares: Mapping[str, float], shape: Shape, num_tokens: int, seed: int
) -> list[Document]:
    """Documents of at least ``num_tokens`` tokens, the last of them shortened to make it so many.

    The same whatever the model: what models are compared on "at the same content".
    """
    stream = _Stream(shares, shape, seed)
    made: list[Document] = []
    left = num_tokens
    while left > 0:
        kind, document = stream.draw()
        if len(document.tokens) > left:
            document = _shortened(document, left)
        made.append(document)
        stream.taken[kind] += len(document.tokens)
        left -= len(document.tokens)
    return made


def fill(
    shares: Mapping[str, float], shape: Shape, strategy: Strategy, units: Sequence[int], seed: int
) -> list[Packed]:
    """A row of exactly so many units for each of ``units``."""
    stream = _Stream(shares, shape, seed)
    rows = []
    for room in units:
        parts: list[Packed] = []
        while room:
            kind, document = stream.draw()
            part, _ = take(patch_document(document, shape.vocabulary, strategy), 0, room)
            parts.append(part)
            stream.taken[kind] += len(part.tokens)
            room -= len(part.lengths)
        rows.append(concatenate(parts))
    return rows


def random_batch(
    config: ModelConfig,
    rows: int,
    units: int,
    seed: int,
    shape: Shape = PAPER,
    shares: Mapping[str, float] = MIX,
) -> Batch:
    """A training batch of ``rows`` rows of exactly ``units`` units, in static patches of 4."""
    strategy: Strategy = Static(size=4) if config.architecture == "lst" else NoPatching()
    content = fill(shares, shape, strategy, [units - 1] * rows, seed)
    return make_batch(content, shape.vocabulary, config.plan(), step=seed)


class _Stream:
    """Draws documents of the kinds in ``shares``, always of the one that is furthest behind."""

    def __init__(self, shares: Mapping[str, float], shape: Shape, seed: int) -> None:
        self._shares, self._shape = shares, shape
        self._rng = np.random.default_rng(seed)
        self.taken = dict.fromkeys(shares, 0)  # tokens of each kind that were used

    def draw(self) -> tuple[str, Document]:
        kind = min(self._shares, key=lambda name: self.taken[name] / self._shares[name])
        return kind, _KINDS[kind](self._shape, self._rng)


def text_document(shape: Shape, rng: np.random.Generator) -> Document:
    return _document([([BOS], []), _pieces(shape, int(rng.integers(*shape.text_pieces)), rng)])


def interleaved_document(shape: Shape, rng: np.random.Generator) -> Document:
    parts: list[Any] = [([BOS], [])]
    for _ in range(shape.spans):
        words = int(rng.integers(5, 31))
        parts += [([TEXT], []), _pieces(shape, round(words * PIECES_PER_WORD), rng)]
        parts += [([SPEECH], []), _speech(shape, round(words / 2), rng)]
    return _document(parts)


def speech_document(shape: Shape, rng: np.random.Generator) -> Document:
    words = int(rng.integers(shape.speech_words // 2, 3 * shape.speech_words // 2 + 1))
    return _document([([BOS], []), ([SPEECH], []), _speech(shape, words, rng)])


_KINDS = {"text": text_document, "interleaved": interleaved_document, "speech": speech_document}

# Tokens, and the half-open ranges of the words that are aligned among them.
_Part = tuple[Any, Any]


def _pieces(shape: Shape, count: int, rng: np.random.Generator) -> _Part:
    vocabulary = shape.vocabulary
    return vocabulary.piece_to_id(rng.integers(0, vocabulary.num_pieces, count)), []


def _speech(shape: Shape, words: int, rng: np.random.Generator) -> _Part:
    """Words and, after each, a silence, which may be empty."""
    lengths = np.clip(np.round(rng.lognormal(1.52, 0.7, words)), 1, 30).astype(int)
    silences = rng.geometric(1 / 4.7, words) - 1
    starts = np.concatenate(([0], np.cumsum(lengths + silences)[:-1]))
    total = int((lengths + silences).sum())
    units = rng.integers(0, shape.vocabulary.num_units, total)
    return shape.vocabulary.unit_to_id(units), np.stack((starts, starts + lengths), axis=1)


def _document(parts: list[_Part]) -> Document:
    tokens, aligned, at = [], [], 0
    for ids, words in (*parts, ([EOS], [])):
        tokens.append(np.asarray(ids, np.int32))
        aligned.append(np.asarray(words, np.int32).reshape(-1, 2) + at)
        at += len(ids)
    return Document(
        tokens=np.concatenate(tokens),
        aligned=np.concatenate(aligned).astype(np.int32),
        breaks=(),
        score_from=0,
        score_eos=True,
        record_id="random",
    )


def _shortened(document: Document, num_tokens: int) -> Document:
    aligned = document.aligned[document.aligned[:, 0] < num_tokens]
    return Document(
        tokens=document.tokens[:num_tokens],
        aligned=np.minimum(aligned, num_tokens),
        breaks=(),
        score_from=0,
        score_eos=True,
        record_id="random",
    )
