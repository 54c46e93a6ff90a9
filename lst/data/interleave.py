"""From a record to a document: the joint token ids that the model reads, and what is known of them.

    records -> [interleave] -> patching -> packing -> batch

An aligned record becomes text and speech spans in turn, each opened by its marker (paper, A.1):

    words   Once upon a time there | was a girl | named Lily and she loved ...
    tokens  <bos> <t> ▁Once ▁upon ▁a ▁time ▁there <s> 17 17 203 ... <t> ▁named ... <eos>

A text span has 5 to 30 words, the speech span after it half as many. The silence between two words
on either side of a switch is cut in half: the speech side keeps its half, the other half, which
belongs to the text, disappears. A record can be trained on in other ways too:

    interleaved      <bos> <t> text <s> units <t> text … <eos>
    speech           <bos> <s> units <eos>
    text             <bos> text <eos>
    speech-to-text   <bos> <s> units <t> text <eos>
    text-to-speech   <bos> <t> text <s> units <eos>

Everything here is a pure function; what is drawn comes from a generator made of (seed, epoch,
record id), so that every epoch interleaves anew and nothing depends on the order of reading.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from lst.data.records import Record
from lst.errors import UserError
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Tokenizer, Vocabulary

__all__ = [
    "DOCUMENT_KINDS",
    "Document",
    "DocumentKind",
    "Mode",
    "interleaved_document",
    "item_document",
    "parallel_document",
    "record_document",
    "speech_document",
    "stable_rng",
    "text_document",
]

MIN_TEXT_WORDS, MAX_TEXT_WORDS = 5, 30  # of a text span

DocumentKind = Literal["auto", "interleaved", "speech", "text", "speech-to-text", "text-to-speech"]
DOCUMENT_KINDS: tuple[DocumentKind, ...] = get_args(DocumentKind)
Mode = Literal["T→T", "S→S", "S→T", "T→S"]
Part: TypeAlias = list[int] | np.ndarray  # a stretch of a document's ids


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens that may see each other. A token position counts from ``<bos>`` at 0.

    Attributes:
        tokens: (T,) int32 joint ids, ``<bos> … <eos>``.
        aligned: (A, 2) int32, the half-open token range of each aligned word, none of them empty,
            in order, disjoint, inside speech spans.
        breaks: positions where a patch starts whatever the strategy.
        score_from: position i is a target where i >= max(score_from, 1).
        score_eos: whether ``<eos>`` is a target.
        record_id: where the document comes from.
    """

    tokens: np.ndarray
    aligned: np.ndarray
    breaks: tuple[int, ...]
    score_from: int
    score_eos: bool
    record_id: str


def stable_rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone: the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def record_document(
    record: Record,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    kind: DocumentKind = "auto",
) -> Document:
    """The document that a record is trained on; every token after ``<bos>`` is a target.

    Args:
        kind: see above. "auto": interleaved where the record's words are aligned, speech where it
            has units alone, text where it has no units.

    Raises:
        UserError: the kind needs text, units or aligned words that the record does not have.
    """
    if kind == "auto":
        kind = "text" if record.units is None else "interleaved" if record.words else "speech"
    if kind == "text":
        return text_document(record, vocabulary, tokenizer)
    if kind == "speech":
        return speech_document(record, vocabulary)
    if kind == "interleaved":
        return interleaved_document(record, vocabulary, tokenizer, rng)
    return parallel_document(record, kind, vocabulary, tokenizer)


def text_document(record: Record, vocabulary: Vocabulary, tokenizer: Tokenizer) -> Document:
    """``<bos> text <eos>``, with no marker, as in any text language model."""
    pieces = _text_ids(_text_of(record), vocabulary, tokenizer)
    return _document([[BOS], pieces, [EOS]], [], record.id)


def speech_document(record: Record, vocabulary: Vocabulary) -> Document:
    """``<bos> <s> units <eos>``; the record's words, where it has any, are aligned."""
    units = vocabulary.unit_to_id(_units_of(record).astype(np.int32))
    return _document([[BOS, SPEECH], units, [EOS]], [_word_spans(record) + 2], record.id)


def interleaved_document(
    record: Record, vocabulary: Vocabulary, tokenizer: Tokenizer, rng: np.random.Generator
) -> Document:
    """Text and speech spans in turn, from the first word to the last. A fair coin says which comes
    first; the last span is as long as what is left.

    Raises:
        UserError: the record has no units or no aligned words.
    """
    units = vocabulary.unit_to_id(_units_of(record).astype(np.int32))
    if not record.words:
        raise UserError(f"record {record.id!r}: expected aligned words to interleave, got none")
    spans = np.array([(word.start, word.stop) for word in record.words], np.int32)
    # Word i's side of the stream is frames cuts[i] … cuts[i + 1]: each silence is cut in half.
    cuts = np.concatenate(([0], (spans[:-1, 1] + spans[1:, 0]) // 2, [len(units)]))
    parts: list[Part] = [[BOS]]
    aligned = []
    length = 1  # tokens so far
    for is_text, first, stop in _draw_spans(len(spans), rng):
        if is_text:
            text = " ".join(word.word for word in record.words[first:stop])
            parts += [[TEXT], _text_ids(text, vocabulary, tokenizer)]
        else:
            parts += [[SPEECH], units[cuts[first] : cuts[stop]]]
            aligned.append(spans[first:stop] - cuts[first] + length + 1)
        length += 1 + len(parts[-1])
    return _document([*parts, [EOS]], aligned, record.id)


def parallel_document(
    record: Record,
    kind: Literal["speech-to-text", "text-to-speech"],
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
) -> Document:
    """All of a record in one modality, then all of it in the other: recognition and synthesis.

    Raises:
        UserError: the record has no text or no units.
    """
    if kind not in ("speech-to-text", "text-to-speech"):
        raise ValueError(f"expected speech-to-text or text-to-speech, got {kind!r}")
    text: list[Part] = [[TEXT], _text_ids(_text_of(record), vocabulary, tokenizer)]
    speech: list[Part] = [[SPEECH], vocabulary.unit_to_id(_units_of(record).astype(np.int32))]
    is_spoken_first = kind == "speech-to-text"
    parts = [*speech, *text] if is_spoken_first else [*text, *speech]
    before = 2 if is_spoken_first else 3 + len(text[1])  # tokens before the first unit
    return _document([[BOS], *parts, [EOS]], [_word_spans(record) + before], record.id)


def item_document(
    prompt: Record, ending: Record, mode: Mode, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> Document:
    """A prompt and one ending to score: the ending's tokens alone are targets.

    "S→T" reads a spoken prompt and a written ending, and so on. The ending starts a new patch, so
    that the patches of the prompt do not depend on it; ``<eos>`` and markers are no targets.

    Raises:
        UserError: the mode needs text or units that a record does not have.
    """
    modes: tuple[str, ...] = ("T→T", "S→S", "S→T", "T→S")
    if mode not in modes:
        raise ValueError(f"expected a mode of {modes}, got {mode!r}")
    parts: list[Part] = [[BOS]]
    aligned = []
    length = 1
    side_before = "T" if mode == "T→T" else ""  # text alone has no marker
    for side, record in ((mode[0], prompt), (mode[2], ending)):
        if side != side_before:
            parts.append([TEXT if side == "T" else SPEECH])
            length += 1
        side_before, start = side, length
        if side == "T":
            parts.append(_text_ids(_text_of(record), vocabulary, tokenizer))
        else:
            parts.append(vocabulary.unit_to_id(_units_of(record).astype(np.int32)))
            aligned.append(_word_spans(record) + length)
        length += len(parts[-1])
    return _document(
        [*parts, [EOS]], aligned, ending.id, breaks=(start,), score_from=start, score_eos=False
    )


def _draw_spans(num_words: int, rng: np.random.Generator) -> list[tuple[bool, int, int]]:
    """(is text, first word, one past the last) of spans that cover all words in order."""
    is_text = bool(rng.integers(2))
    spans = []
    first = 0
    while first < num_words:
        text_words = int(rng.integers(MIN_TEXT_WORDS, MAX_TEXT_WORDS + 1))
        stop = min(first + (text_words if is_text else (text_words + 1) // 2), num_words)
        spans.append((is_text, first, stop))
        is_text, first = not is_text, stop
    return spans


def _document(
    parts: list[Part],
    aligned: list[np.ndarray],
    record_id: str,
    *,
    breaks: tuple[int, ...] = (),
    score_from: int = 0,
    score_eos: bool = True,
) -> Document:
    spans = np.concatenate([np.zeros((0, 2), np.int32), *aligned]).astype(np.int32)
    return Document(
        tokens=np.concatenate([np.asarray(part, np.int32) for part in parts]),
        aligned=spans[spans[:, 0] < spans[:, 1]],  # a word too short for a frame is no patch
        breaks=breaks,
        score_from=score_from,
        score_eos=score_eos,
        record_id=record_id,
    )


def _text_ids(text: str, vocabulary: Vocabulary, tokenizer: Tokenizer) -> np.ndarray:
    return vocabulary.piece_to_id(np.array(tokenizer.encode(text), np.int32))


def _word_spans(record: Record) -> np.ndarray:
    words = record.words or ()
    return np.array([(word.start, word.stop) for word in words], np.int32).reshape(-1, 2)


def _text_of(record: Record) -> str:
    if record.text is None:
        raise UserError(f"record {record.id!r}: expected text, got none")
    return record.text


def _units_of(record: Record) -> np.ndarray:
    if record.units is None:
        raise UserError(f"record {record.id!r}: expected speech units, got none")
    return record.units
