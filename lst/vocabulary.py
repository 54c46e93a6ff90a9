"""The joint vocabulary: specials, then text pieces, then speech units.

    id      0      1      2      3    4    5 ... 5+num_pieces ... 5+num_pieces+num_units
            <pad>  <bos>  <eos>  <t>  <s>  text pieces          speech units

``<t>`` opens a text span and ``<s>`` a speech span; a document of text alone has neither.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from torch import Tensor

from lst.errors import UserError

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "SPEECH",
    "TEXT",
    "Tokenizer",
    "Vocabulary",
    "fingerprint",
    "train_tokenizer",
]

PAD, BOS, EOS, TEXT, SPEECH = range(5)

#: What plain arithmetic and comparisons work on.
Ids = TypeVar("Ids", int, np.ndarray, Tensor)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Which id means what. Every method takes an int, a NumPy array or a tensor.

    >>> vocabulary = Vocabulary(num_pieces=2000, num_units=501)
    >>> vocabulary.size, vocabulary.first_unit, vocabulary.unit_to_id(7)
    (2506, 2005, 2012)
    """

    num_pieces: int
    num_units: int

    def __post_init__(self) -> None:
        if self.num_pieces < 0 or self.num_units < 0:
            raise ValueError(f"counts must not be negative, got {self}")

    @property
    def first_piece(self) -> int:
        return SPEECH + 1

    @property
    def first_unit(self) -> int:
        return self.first_piece + self.num_pieces

    @property
    def size(self) -> int:
        return self.first_unit + self.num_units

    def is_special(self, ids: Any) -> Any:
        """Boolean of the shape of ``ids``."""
        return ids < self.first_piece

    def is_piece(self, ids: Any) -> Any:
        """Boolean of the shape of ``ids``."""
        return (ids >= self.first_piece) & (ids < self.first_unit)

    def is_unit(self, ids: Any) -> Any:
        """Boolean of the shape of ``ids``."""
        return ids >= self.first_unit

    def piece_to_id(self, pieces: Ids) -> Ids:
        return pieces + self.first_piece

    def id_to_piece(self, ids: Ids) -> Ids:
        return ids - self.first_piece

    def unit_to_id(self, units: Ids) -> Ids:
        return units + self.first_unit

    def id_to_unit(self, ids: Ids) -> Ids:
        return ids - self.first_unit


class Tokenizer:
    """A SentencePiece model: text to piece numbers (0 … num_pieces − 1) and back.

    Built from the model's bytes, so that it can be sent to another process and its fingerprint is
    that of what it does.
    """

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._processor = SentencePieceProcessor(model_proto=model)
        self.fingerprint = _sha256(model)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a ``.model`` file. Raises UserError where it is missing or not such a file."""
        try:
            return cls(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"{path}: no tokenizer could be read here ({error.strerror})") from None
        except RuntimeError:
            raise UserError(f"{path}: expected a SentencePiece model, got another file") from None

    def save(self, path: Path | str) -> None:
        Path(path).write_bytes(self._model)

    @property
    def num_pieces(self) -> int:
        return int(self._processor.vocab_size())

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, pieces: Sequence[int]) -> str:
        return self._processor.decode([int(piece) for piece in pieces])

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self._model,)


def train_tokenizer(lines: Iterable[str], path: Path | str, *, num_pieces: int) -> Tokenizer:
    """Train byte-pair encoding with byte fallback on ``lines`` and write the model to ``path``.

    The same lines give the same bytes. The model has no ``<bos>``, ``<eos>`` or ``<pad>`` of its
    own (those are the joint vocabulary's); its 256 byte pieces and ``<unk>`` count in num_pieces.

    Raises:
        UserError: the lines are too few for ``num_pieces``.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=num_pieces,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,  # decode(encode(text)) == text
            split_digits=True,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            # One thread and every line: what comes out depends on the lines alone.
            num_threads=1,
            input_sentence_size=0,
            max_sentence_length=1 << 24,  # bytes; longer lines would be left out without a word
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"no tokenizer of {num_pieces} pieces from these lines: {reason}") from None
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(path)
    return tokenizer


def fingerprint(path: Path | str) -> str:
    """``sha256:<hex>`` of a file's bytes: how datasets name their codebook and tokenizer."""
    try:
        return _sha256(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror})") from None


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
