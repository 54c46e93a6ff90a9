"""The joint vocabulary: specials, then text pieces, then speech units.

    id      0      1      2      3    4    5 ... 5+num_pieces ... 5+num_pieces+num_units
            <pad>  <bos>  <eos>  <t>  <s>  text pieces          speech units

With ``speech_bpe`` (the paper's BPE baseline) the last part is the pieces of that model, each of
which stands for one or more units; whatever is said of a unit's id is then said of theirs.

``<t>`` opens a text span and ``<s>`` a speech span; a document of text alone has neither.
"""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from torch import Tensor

from lst.errors import UserError
from lst.files import Location
from lst.speech_bpe import SpeechBPE

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "SPEECH",
    "TEXT",
    "JsonTokenizer",
    "SentencePieceTokenizer",
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
    num_units: int  # of the codebook
    speech_bpe: SpeechBPE | None = None

    def __post_init__(self) -> None:
        if self.num_pieces < 0 or self.num_units < 0:
            raise ValueError(f"counts must not be negative, got {self}")
        if self.speech_bpe is not None and self.speech_bpe.num_units != self.num_units:
            raise ValueError(f"speech_bpe is of {self.speech_bpe.num_units} units, got {self}")

    @property
    def first_piece(self) -> int:
        return SPEECH + 1

    @property
    def first_unit(self) -> int:
        return self.first_piece + self.num_pieces

    @property
    def size(self) -> int:
        return self.first_unit + (
            self.num_units if self.speech_bpe is None else len(self.speech_bpe)
        )

    @property
    def speech_size(self) -> int:
        """Ids of the speech vocabulary: the specials, then units or their pieces."""
        return self.size - self.num_pieces

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

    def encode_units(self, units: np.ndarray) -> np.ndarray:
        """(F,) units of one stretch of speech → (n,) int32 ids; n = F without ``speech_bpe``."""
        speech = (
            units.astype(np.int32) if self.speech_bpe is None else self.speech_bpe.encode(units)
        )
        return self.unit_to_id(speech)

    def decode_units(self, ids: np.ndarray) -> np.ndarray:
        """(n,) ids of speech → the (F,) int16 units that they stand for."""
        speech = self.id_to_unit(ids)
        return (
            speech.astype(np.int16) if self.speech_bpe is None else self.speech_bpe.decode(speech)
        )

    def num_frames(self, ids: np.ndarray) -> np.ndarray:
        """How many units, of 40 ms, each id stands for: 0 where it is no speech."""
        is_unit = self.is_unit(ids)
        if self.speech_bpe is None:
            return is_unit.astype(np.int32)
        speech = np.where(is_unit, self.id_to_unit(ids), 0)
        return np.where(is_unit, self.speech_bpe.lengths[speech], 0)

    def to_speech_id(self, ids: Any) -> Any:
        """Joint ids of specials and units in the speech vocabulary; negative ones stay."""
        return ids - self.num_pieces * self.is_unit(ids)


class Tokenizer(ABC):
    """Text to piece numbers (0 … num_pieces − 1) and back; `load` makes one.

    Made from a file's bytes, so that it can be sent to another process and its fingerprint is that
    of what it does.
    """

    file_name: ClassVar[str]  # of its file in a corpus, and in a checkpoint
    what: ClassVar[str]  # its file is, in words

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.fingerprint = _sha256(content)

    @staticmethod
    def load(path: Path | str | Location) -> "Tokenizer":
        """Read a ``tokenizer.model`` (SentencePiece) or ``tokenizer.json`` (``tokenizers``).

        Args:
            path: the file, whose suffix ``.json`` or ``.model`` tells which; or the folder that
                holds one of the two.

        Raises:
            UserError: it is missing or no such file; ``tokenizers`` is not installed.
        """
        path = Location(path)
        if path.is_folder():
            path = _tokenizer_in(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path}: expected a tokenizer, got no file") from None
        kind = JsonTokenizer if path.url.endswith(".json") else SentencePieceTokenizer
        try:
            return kind(content)
        except UserError:
            raise
        except Exception:  # what tokenizers raises has no narrower type
            raise UserError(f"{path}: expected {kind.what}, got another file") from None

    def save(self, path: Path | str) -> None:
        Path(path).write_bytes(self._content)

    @property
    @abstractmethod
    def num_pieces(self) -> int: ...

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Pieces of the text alone: none is added at its ends."""

    @abstractmethod
    def decode(self, pieces: Sequence[int]) -> str: ...

    @abstractmethod
    def piece_ends(self, text: str) -> np.ndarray:
        """(n,) int32, for each piece of ``encode(text)`` one past its last character in ``text``.

        A blank belongs to the piece that it opens. Of a character in several byte pieces, the
        first has all of it.

        Raises:
            UserError: the tokenizer changes the text before it cuts it.
        """

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return type(self), (self._content,)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    file_name = "tokenizer.model"
    what = "a SentencePiece model"

    def __init__(self, content: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        super().__init__(content)
        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(content)  # of no bytes model_proto= makes none
        self._piece_lengths = _piece_lengths(self._processor)

    @property
    def num_pieces(self) -> int:
        return int(self._processor.vocab_size())

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, pieces: Sequence[int]) -> str:
        return self._processor.decode([int(piece) for piece in pieces])

    def piece_ends(self, text: str) -> np.ndarray:
        blank = int(self._piece_lengths[self.encode("a")].sum()) - 1  # put before every text, or 0
        ends = np.cumsum(self._piece_lengths[self.encode(text)], dtype=np.int32) - blank
        if text and (not len(ends) or ends[-1] != len(text)):
            raise UserError(
                "tokenizer: expected one that keeps every character, to align its pieces, got one "
                f"that does not: {text[:40]!r}"
            )
        return ends


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, as checkpoints in Hugging Face's format bring along.

    Its own ``<bos>``, ``<eos>`` and so on are pieces that no text ever becomes: text that spells
    one is text.
    """

    file_name = "tokenizer.json"
    what = "a tokenizer.json of the tokenizers library"

    def __init__(self, content: bytes) -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise UserError(
                "tokenizer.json needs the tokenizers package: pip install 'lst[llama]'"
            ) from None

        super().__init__(content)
        self._tokenizer = Library.from_str(content.decode())
        self._tokenizer.no_truncation()  # a file may ask for either
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as the text that they are

    @property
    def num_pieces(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, pieces: Sequence[int]) -> str:
        ids = [int(piece) for piece in pieces]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def piece_ends(self, text: str) -> np.ndarray:
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.array([stop for _, stop in offsets], np.int32)


def _tokenizer_in(folder: Location) -> Location:
    kinds = (SentencePieceTokenizer, JsonTokenizer)
    found = [folder / kind.file_name for kind in kinds if (folder / kind.file_name).exists()]
    if len(found) != 1:
        names = " or ".join(kind.file_name for kind in kinds)
        raise UserError(f"{folder}: expected {names}, got {'both' if found else 'no tokenizer'}")
    return found[0]


def _piece_lengths(processor: Any) -> np.ndarray:
    """Characters of each piece. A byte that goes on with a character has none of its own."""
    lengths = []
    for piece in range(processor.vocab_size()):
        text = processor.id_to_piece(piece)
        continues = processor.is_byte(piece) and int(text[1:-1], 16) & 0xC0 == 0x80
        lengths.append(0 if continues else 1 if processor.is_byte(piece) else len(text))
    return np.array(lengths, np.int32)


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
    except (RuntimeError, ValueError) as error:  # the latter of more than an int holds
        last = str(error).strip().splitlines()[-1]
        raise UserError(f"no tokenizer of {num_pieces} pieces from these lines: {last}") from None
    tokenizer = SentencePieceTokenizer(model.getvalue())
    tokenizer.save(path)
    return tokenizer


def fingerprint(path: Path | str | Location) -> str:
    """``sha256:<hex>`` of a file's bytes: how datasets name their codebook and tokenizer."""
    try:
        return _sha256(Location(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: expected a file, got none") from None


def _sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
