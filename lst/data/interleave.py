"""From a record to a document: the joint token ids that the model reads, and what is known of them.

    records -> [interleave] -> patching -> packing -> batch

An aligned record becomes text and speech spans in turn, each opened by its marker (paper, A.1):

    words   Once upon a time there | was a girl | named Lily and she loved ...
    tokens  <bos> <t> ▁Once ▁upon ▁a ▁time ▁there <s> 17 17 203 ... <t> ▁named ... <eos>

A text span has 5 to 30 words, the speech span after it half as many. The silence between two words
on either side of a switch is cut in half: the speech side keeps its half, the other half, which
belongs to the text, disappears. A span's text tokens are the pieces of all the record's words,
joined by blanks, that end in the span's words. A record can be trained on in other ways too:

    interleaved      <bos> <t> text <s> units <t> text … <eos>
    speech           <bos> <s> units <eos>
    text             <bos> text <eos>
    speech-to-text   <bos> <s> units <t> text <eos>
    text-to-speech   <bos> <t> text <s> units <eos>
    asr              <bos> <s> units <t> text <eos>     the text and <eos> alone are targets
    tts              <bos> <t> text <s> units <eos>     the units and <eos> alone are targets

The last two are tasks: what is asked for is given, and only the answer is learnt. They stay whole
(lst.data.lanes), as an answer without its question teaches nothing.

Everything here is a pure function; what is drawn comes from a generator made of (seed, epoch,
record id), so that every epoch interleaves anew and nothing depends on the order of reading.
"""

import hashlib
from typing import Literal, NamedTuple, get_args

import numpy as np

from lst.data.alignment import Alignment, spans_within, with_noise
from lst.data.encoded import EncodedRecord, encode_record
from lst.data.records import Record
from lst.errors import UserError
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Tokenizer, Vocabulary

__all__ = [
    "DOCUMENT_KINDS",
    "NEEDS",
    "TASKS",
    "Document",
    "DocumentKind",
    "Mode",
    "Task",
    "encoded_document",
    "item_document",
    "record_document",
    "stable_rng",
]

WORDS = Alignment()
MIN_TEXT_WORDS, MAX_TEXT_WORDS = 5, 30  # of a text span

Task = Literal["asr", "tts"]
TASKS: tuple[Task, ...] = get_args(Task)
DocumentKind = Literal[
    "auto", "interleaved", "speech", "text", "speech-to-text", "text-to-speech", "asr", "tts"
]
DOCUMENT_KINDS: tuple[DocumentKind, ...] = get_args(DocumentKind)
_SPANS: dict[DocumentKind, tuple[Literal["text", "speech"], ...]] = {
    "speech": ("speech",),
    "speech-to-text": ("speech", "text"),
    "text-to-speech": ("text", "speech"),
    "asr": ("speech", "text"),
    "tts": ("text", "speech"),
}
# What a record must have to become such a document.
NEEDS: dict[DocumentKind, tuple[Literal["text", "units", "words"], ...]] = {
    "auto": (),
    "interleaved": ("units", "words"),
    "speech": ("units",),
    "text": ("text",),
    "speech-to-text": ("units", "text"),
    "text-to-speech": ("text", "units"),
    "asr": ("units", "text"),
    "tts": ("text", "units"),
}
Mode = Literal["T→T", "S→S", "S→T", "T→S"]


class Document(NamedTuple):
    """Tokens that may see each other. A token position counts from ``<bos>`` at 0.

    Attributes:
        tokens: (T,) int32 joint ids, ``<bos> … <eos>``.
        aligned: (A, 2) int32, the half-open token range of each aligned word or piece, none of
            them empty, in order, disjoint, inside speech spans; none where the vocabulary has
            speech in pieces of its own.
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
    *,
    alignment: Alignment = WORDS,
) -> Document:
    """The document that a record is trained on; every token after ``<bos>`` is a target, of a task
    those of the answer.

    Args:
        rng: draws the spans and, where it is asked for, the noise on aligned boundaries.
        kind: see above. "auto": interleaved where the record's words are aligned, speech where it
            has units alone, text where it has no units.
        alignment: what :attr:`Document.aligned` holds.

    Raises:
        UserError: the kind needs text, units or aligned words that the record does not have.
    """
    encoded = encode_record(record, tokenizer, alignment.by)
    return encoded_document(encoded, vocabulary, rng, kind, noise_ms=alignment.noise_ms)


def encoded_document(
    record: EncodedRecord,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    kind: DocumentKind = "auto",
    *,
    noise_ms: float = 0.0,
) -> Document:
    """:func:`record_document` of a record that is encoded already."""
    if kind not in DOCUMENT_KINDS:
        raise ValueError(f"expected a kind of {DOCUMENT_KINDS}, got {kind!r}")
    if kind == "auto":
        has_words = record.words is not None
        kind = "text" if record.units is None else "interleaved" if has_words else "speech"
    draft = _Draft(vocabulary, noise_ms)
    if kind == "text":
        draft.text(_text_of(record), marker=False)
    elif kind == "interleaved":
        _interleave(draft, record, rng)
    else:
        for modality in _SPANS[kind]:
            if modality == "text":
                draft.text(_text_of(record))
            else:
                draft.speech(_units_of(record), record.aligned, rng)
    return draft.finish(record.id, score_from=draft.last_start if kind in TASKS else 0)


def item_document(
    prompt: Record | None,
    ending: Record,
    mode: Mode,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    *,
    alignment: Alignment = WORDS,
) -> Document:
    """A prompt and one ending to score: the ending's tokens alone are targets.

    "S→T" reads a spoken prompt and a written ending, and so on; without a prompt the document is
    the ending. A written ending has the pieces that it has after the prompt and a blank, as a span
    of a longer text has. The ending starts a new patch, so that the patches of the prompt do not
    depend on it; ``<eos>`` and markers are no targets. The noise of ``alignment`` depends on the
    record alone: a prompt is the same for every ending.

    Raises:
        UserError: the mode needs text or units that a record does not have, or a prompt.
    """
    modes: tuple[str, ...] = ("T→T", "S→S", "S→T", "T→S")
    if mode not in modes:
        raise ValueError(f"expected a mode of {modes}, got {mode!r}")
    draft = _Draft(vocabulary, alignment.noise_ms)
    side_before = "T" if mode == "T→T" else ""  # text alone has no marker
    parts = [(mode[0], prompt), (mode[2], ending)]
    if prompt is None:
        if mode[0] != mode[2]:
            raise UserError(f"record {ending.id!r}: expected a prompt for mode {mode}, got none")
        del parts[0]
    for side, record in parts:
        assert record is not None
        encoded = encode_record(record, tokenizer, alignment.by)
        if side == "T":
            text = _text_of(encoded)
            if record is ending and prompt is not None:
                text = _pieces_after(prompt.text, text, ending, tokenizer)
            draft.text(text, marker=side != side_before)
        else:
            rng, units = stable_rng("item", record.id), _units_of(encoded)
            draft.speech(units, encoded.aligned, rng, marker=side != side_before)
        side_before = side
    start = draft.last_start
    return draft.finish(ending.id, breaks=(start,), score_from=start, score_eos=False)


def _pieces_after(
    context: str | None, alone: np.ndarray, ending: Record, tokenizer: Tokenizer
) -> np.ndarray:
    """An ending's pieces after a text and a blank: a tokenizer may cut a word that opens a text in
    another way. Those it has alone where the cut between the two is not one between pieces."""
    before = context or "."  # what a spoken prompt says need not be known
    start = tokenizer.encode(before)
    both = tokenizer.encode(f"{before} {ending.text}")
    if both[: len(start)] != start:
        return alone
    return np.array(both[len(start) :], np.int32)


def _interleave(draft: "_Draft", record: EncodedRecord, rng: np.random.Generator) -> None:
    """Text and speech spans in turn, from the first word to the last. A fair coin says which comes
    first; the last span is as long as what is left."""
    units = _units_of(record)
    if record.words is None:
        raise UserError(f"record {record.id!r}: expected aligned words to interleave, got none")
    words = record.words
    # Word i's side of the stream is frames cuts[i] … cuts[i + 1]: each silence is cut in half.
    cuts = [0, *((words[:-1, 1] + words[1:, 0]) // 2).tolist(), len(units)]
    for is_text, first, stop in _draw_spans(len(words), rng):
        if is_text:
            draft.text(record.pieces[record.cuts[first] : record.cuts[stop]])
        else:
            start, end = cuts[first], cuts[stop]
            draft.speech(units[start:end], spans_within(record.aligned, start, end), rng)


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


_SPECIALS = np.arange(SPEECH + 1, dtype=np.int32)[:, None]
_NONE = np.zeros((0, 2), np.int32)


class _Draft:
    """A document being written, span by span."""

    def __init__(self, vocabulary: Vocabulary, noise_ms: float) -> None:
        self._vocabulary, self._noise_ms = vocabulary, noise_ms
        self._parts = [_SPECIALS[BOS]]
        self._aligned: list[np.ndarray] = []
        self._length = 1
        self.last_start = 1  # of the last span, after its marker

    def text(self, pieces: np.ndarray, *, marker: bool = True) -> None:
        ids = self._vocabulary.piece_to_id(pieces.astype(np.int32, copy=False))
        self._add(TEXT if marker else None, ids)

    def speech(
        self, units: np.ndarray, spans: np.ndarray, rng: np.random.Generator, *, marker: bool = True
    ) -> None:
        """A stretch of units, and the frames in it of what is aligned."""
        self._add(SPEECH if marker else None, self._vocabulary.encode_units(units))
        if self._vocabulary.speech_bpe is None:
            spans = with_noise(spans, len(units), self._noise_ms, rng)
            self._aligned.append(spans + self.last_start)

    def finish(
        self,
        record_id: str,
        *,
        breaks: tuple[int, ...] = (),
        score_from: int = 0,
        score_eos: bool = True,
    ) -> Document:
        return Document(
            tokens=np.concatenate([*self._parts, _SPECIALS[EOS]]),
            aligned=np.concatenate(self._aligned) if self._aligned else _NONE,
            breaks=breaks,
            score_from=score_from,
            score_eos=score_eos,
            record_id=record_id,
        )

    def _add(self, marker: int | None, ids: np.ndarray) -> None:
        if marker is not None:
            self._parts.append(_SPECIALS[marker])
            self._length += 1
        self.last_start = self._length
        self._parts.append(ids)
        self._length += len(ids)


def _text_of(record: EncodedRecord) -> np.ndarray:
    if record.text is None:
        raise UserError(f"record {record.id!r}: expected text, got none")
    return record.text


def _units_of(record: EncodedRecord) -> np.ndarray:
    if record.units is None:
        raise UserError(f"record {record.id!r}: expected speech units, got none")
    return record.units
