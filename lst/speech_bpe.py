"""Byte-pair encoding of speech: pieces that stand for several units (paper, section 4.2).

    units   17 17 17 203  5  5  17 17  →  pieces   [17 17 17] [203] [5 5] [17 17]

Each unit is written as a character, and SentencePiece learns which characters go together. Every
unit is a piece of its own too, so that any sequence can be encoded and none is encoded as unknown.
"""

import hashlib
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np

from lst.errors import UserError
from lst.files import Location
from lst.strict_json import parse_json

__all__ = [
    "SPEECH_BPE",
    "SPEECH_BPE_INFO",
    "SpeechBPE",
    "read_speech_bpe",
    "train_speech_bpe",
]

SPEECH_BPE = "speech_bpe.model"  # in a corpus, and in a checkpoint
SPEECH_BPE_INFO = "speech_bpe.json"  # beside it in a corpus: what it was trained on

_FIRST_CHARACTER, _NUM_CHARACTERS = 0x4E00, 20_992  # CJK ideographs: letters, in one plane
_LONGEST_STRETCH = 4096  # units that the trainer looks at as one: its positions have 16 bits


class SpeechBPE:
    """A SentencePiece model over speech units: units to piece numbers and back.

    Built from the model's bytes, so that it can be sent to another process and its fingerprint is
    that of what it does. Two of the same bytes are equal.

    Attributes:
        num_units: of the codebook.
        lengths: (len(self),) int32, the units of each piece; 0 for SentencePiece's ``<unk>``.
    """

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)  # of no bytes model_proto= makes none
        self.fingerprint = f"sha256:{hashlib.sha256(model).hexdigest()}"
        unknown = self._processor.unk_id()
        pieces = [
            _to_units("" if number == unknown else self._processor.id_to_piece(number))
            for number in range(self._processor.vocab_size())
        ]
        self.lengths = np.array([len(piece) for piece in pieces], np.int32)
        self._offsets = np.cumsum(self.lengths) - self.lengths
        self._units = np.concatenate(pieces)
        alone = np.sort(self._units[self._offsets[self.lengths == 1]])
        self.num_units = len(alone)
        if not np.array_equal(alone, np.arange(self.num_units)):
            raise RuntimeError("not a model over speech units")

    @classmethod
    def load(cls, path: Path | str | Location) -> Self:
        """Read a ``.model`` file. Raises UserError where it is missing or not such a file."""
        try:
            return cls(Location(path).read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path}: expected a speech BPE model, got no file") from None
        except (RuntimeError, ValueError):  # a piece that is no text, too
            raise UserError(
                f"{path}: expected a SentencePiece model over speech units, got another file"
            ) from None

    def save(self, path: Path | str) -> None:
        Path(path).write_bytes(self._model)

    def __len__(self) -> int:
        return len(self.lengths)

    def encode(self, units: np.ndarray) -> np.ndarray:
        """(F,) units of one stretch of speech → (n,) int32 piece numbers, n ≤ F."""
        if len(units) and not 0 <= units.min() <= units.max() < self.num_units:
            raise ValueError(
                f"expected units in [0, {self.num_units}), got {units.min()} to {units.max()}"
            )
        return np.array(self._processor.encode(_to_text(units)), np.int32)

    def decode(self, pieces: np.ndarray) -> np.ndarray:
        """(n,) piece numbers → the (F,) int16 units that they stand for."""
        lengths = self.lengths[pieces]
        ends = np.cumsum(lengths)
        places = np.arange(lengths.sum()) + np.repeat(
            self._offsets[pieces] - ends + lengths, lengths
        )
        return self._units[places]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpeechBPE) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"SpeechBPE({len(self)} pieces, {self.fingerprint[:15]})"

    def __reduce__(self) -> tuple[type["SpeechBPE"], tuple[bytes]]:
        return SpeechBPE, (self._model,)


def read_speech_bpe(corpus: Location, codebook: str | None) -> SpeechBPE:
    """The speech BPE of a corpus folder.

    Args:
        codebook: fingerprint of the units that it is to encode; None to skip the check.

    Raises:
        UserError: there is none, or it was trained on units of another codebook.
    """
    path = corpus / SPEECH_BPE_INFO
    try:
        facts = parse_json(path.read_bytes(), str(path))
        expected, trained_on = facts["speech_bpe"], facts["codebook"]
    except FileNotFoundError:
        raise UserError(
            f"{path}: expected the description of a speech BPE, got no file; "
            f"make one by python -m lst.prepare speech-bpe {corpus}"
        ) from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a speech BPE's description, got {error!r}") from None
    bpe = SpeechBPE.load(corpus / SPEECH_BPE)
    if bpe.fingerprint != expected:
        raise UserError(f"{corpus / SPEECH_BPE}: expected {expected}, got {bpe.fingerprint}")
    if None not in (codebook, trained_on) and trained_on != codebook:
        raise UserError(f"{path}: expected pieces of codebook {codebook}, got of {trained_on}")
    return bpe


def train_speech_bpe(
    sequences: Iterable[np.ndarray], *, num_units: int, num_pieces: int
) -> SpeechBPE:
    """Learn ``num_pieces`` pieces, the ``num_units`` single units and ``<unk>`` among them.

    The same sequences give the same model. Pieces have up to 16 units, SentencePiece's own limit.

    Args:
        sequences: (F,) units each; one of more than 4,096 is learnt from in stretches.

    Raises:
        UserError: the sequences are too few for ``num_pieces``, or a codebook that does not fit.
    """
    from sentencepiece import SentencePieceTrainer

    if not num_units < num_pieces or num_units > _NUM_CHARACTERS:
        raise UserError(
            f"speech BPE: expected more pieces than the codebook's {num_units} units (of at most "
            f"{_NUM_CHARACTERS}), got {num_pieces}"
        )
    model = io.BytesIO()
    alone = np.arange(num_units)[:, None]  # each unit once, so that every one is a piece
    stretches = (
        _to_text(sequence[first : first + _LONGEST_STRETCH])
        for sequence in itertools.chain(alone, sequences)
        for first in range(0, len(sequence), _LONGEST_STRETCH)
    )
    try:
        SentencePieceTrainer.train(
            sentence_iterator=stretches,
            model_writer=model,
            model_type="bpe",
            vocab_size=num_pieces,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            split_by_unicode_script=False,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            # One thread and every stretch: what comes out depends on the sequences alone.
            num_threads=1,
            input_sentence_size=0,
            max_sentence_length=1 << 24,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:  # the latter of more than an int holds
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"no speech BPE of {num_pieces} pieces from this speech: {reason}"
        ) from None
    return SpeechBPE(model.getvalue())


def _to_text(units: np.ndarray) -> str:
    return (units.astype("<u2") + _FIRST_CHARACTER).astype("<u2").tobytes().decode("utf-16-le")


def _to_units(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-16-le"), "<u2").astype(np.int32)
    return (codes - _FIRST_CHARACTER).astype(np.int16)
