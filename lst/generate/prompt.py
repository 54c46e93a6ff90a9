"""Prompts: text and speech, in order, as the beginning of a document, and documents as text and
speech again.

A prompt is what the documents that a model was trained on begin with (lst.data.interleave)::

    text, then text         <bos> text                  a document of text alone has no marker
    text, then speech       <bos> <t> text <s>
    text, then either       <bos> <t> text
    speech, then speech     <bos> <s> units
    speech, then text       <bos> <s> units <t>
    text and speech         <bos> <t> text <s> units

Two parts of one modality side by side are one: texts are joined by a blank. Text after a stretch of
speech goes on with the text before it: its pieces are those that it has in the whole.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from lst.data.encoded import word_pieces
from lst.data.records import FRAMES_PER_SECOND
from lst.errors import UserError
from lst.generate.sampling import Modality
from lst.pretrained import Pretrained
from lst.speech.audio import SAMPLE_RATE, AudioError, AudioReader
from lst.speech.units import UnitEncoder, UnitsConfig, load_units
from lst.vocabulary import BOS, SPEECH, TEXT, Tokenizer, Vocabulary

__all__ = ["SILENCE", "Span", "audio_units", "open_units", "prompt_tokens", "readable", "spans_of"]

Span = str | np.ndarray  # text, or (F,) units of the codebook
MARKERS = {"text": TEXT, "speech": SPEECH}
SILENCE = 1e-4  # −80 dBFS; a peak below it is no recording of anything


# Tokens -------------------------------------------------------------------------------------------


def prompt_tokens(
    spans: Sequence[Span], vocabulary: Vocabulary, tokenizer: Tokenizer, *, then: Modality
) -> np.ndarray:
    """The beginning of a document.

    Args:
        spans: text, and (F,) integers in [0, vocabulary.num_units), in order. Empty ones count for
            nothing; there may be none at all.
        then: what is to follow. "text" and "speech" put the marker that opens it where the last
            span is of the other modality; with "any" it is the model's choice.

    Returns:
        (T,) int32 joint ids, from ``<bos>`` on.

    Raises:
        UserError: a text with characters that are none (half a surrogate pair), or units that the
            vocabulary does not have.
    """
    joined = _join(spans)
    modality = None
    is_text_alone = then == "text" and all(isinstance(span, str) for span in joined)
    parts, written = [_special(BOS)], ""
    for span in joined:
        modality = "text" if isinstance(span, str) else "speech"
        if not is_text_alone:
            parts.append(_special(MARKERS[modality]))
        if isinstance(span, str):
            parts.append(vocabulary.piece_to_id(_pieces(written, span, tokenizer)))
            written = f"{written} {span}" if written else span
        else:
            parts.append(vocabulary.encode_units(_checked(span, vocabulary)))
    if then not in ("any", modality) and not is_text_alone:
        parts.append(_special(MARKERS[then]))
    return np.concatenate(parts)


def _join(spans: Sequence[Span]) -> list[Span]:
    """Neighbours of one modality made one, empty ones left out."""
    joined: list[Span] = []
    for kind, group in groupby((span for span in spans if len(span)), key=type):
        same = list(group)
        joined.append(" ".join(same) if kind is str else np.concatenate(same))  # type: ignore[arg-type]
    return joined


def _pieces(before: str, text: str, tokenizer: Tokenizer) -> np.ndarray:
    """(n,) int32 of a text that goes on with the one before it, where there is one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"prompt: expected text, got {text[:40]!r} with a character that is none at "
            f"{error.start}"
        ) from None
    if not before:
        return np.array(tokenizer.encode(text), np.int32)
    pieces, cuts = word_pieces([before, text], tokenizer)
    return pieces[cuts[1] :]


def _checked(units: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    if units.ndim != 1 or units.dtype.kind not in "iu":
        raise UserError(
            f"prompt: expected units (F,) as integers, got {units.dtype} of shape {units.shape}"
        )
    if not 0 <= units.min() <= units.max() < vocabulary.num_units:
        raise UserError(
            f"prompt: expected units in [0, {vocabulary.num_units}), "
            f"got {units.min()} to {units.max()}"
        )
    return units


def _special(id: int) -> np.ndarray:
    return np.array([id], np.int32)


def spans_of(
    tokens: np.ndarray,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    *,
    after: np.ndarray | None = None,
) -> list[Span]:
    """What joint ids say: text, and (F,) int16 units, in order.

    Args:
        tokens: (n,) ids; specials end a span and are not told of.
        after: (m,) ids that come before ``tokens``, such as the prompt of a continuation. Text that
            goes on with theirs begins with the blank, or in the middle of the word, that it goes
            on with.
    """
    tokens = np.asarray(tokens)
    before = np.zeros(0, np.int32) if after is None else _open_text(np.asarray(after), vocabulary)
    spans: list[Span] = []
    for kind, ids in _runs(tokens, vocabulary):
        if kind == "speech":
            spans.append(vocabulary.decode_units(ids))
        elif kind == "text":
            spans.append(_decode(before, ids, vocabulary, tokenizer))
        before = before[:0]
    return spans


def readable(span: Span) -> str:
    """A span as text; of speech, how long it is: ``[1.24 s of speech]``."""
    return span if isinstance(span, str) else f"[{len(span) / FRAMES_PER_SECOND:.2f} s of speech]"


def _runs(
    tokens: np.ndarray, vocabulary: Vocabulary
) -> Iterator[tuple[Literal["special", "text", "speech"], np.ndarray]]:
    kinds = 2 * vocabulary.is_unit(tokens) + vocabulary.is_piece(tokens)
    edges = np.flatnonzero(np.diff(kinds)) + 1
    for run in np.split(tokens, edges) if len(tokens) else []:
        is_unit, is_piece = vocabulary.is_unit(run[0]), vocabulary.is_piece(run[0])
        yield "speech" if is_unit else "text" if is_piece else "special", run


def _open_text(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The pieces at the end of a document, which more may go on with."""
    others = np.flatnonzero(~vocabulary.is_piece(tokens))
    return tokens[others[-1] + 1 :] if len(others) else tokens


def _decode(
    before: np.ndarray, ids: np.ndarray, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> str:
    if not len(before):
        return tokenizer.decode(vocabulary.id_to_piece(ids).tolist())
    start = tokenizer.decode(vocabulary.id_to_piece(before).tolist())
    whole = tokenizer.decode(vocabulary.id_to_piece(np.concatenate([before, ids])).tolist())
    # Where start ends within a character of several byte pieces, its end is another in whole.
    same = zip(start, whole, strict=False)
    differ = (place for place, (a, b) in enumerate(same) if a != b)
    return whole[next(differ, min(len(start), len(whole))) :]


# Audio --------------------------------------------------------------------------------------------


def open_units(
    trained: Pretrained,
    *,
    codebook: Path | None = None,
    hubert: str | None = None,
    layer: int | None = None,
    device: str = "cpu",
) -> UnitEncoder:
    """What makes units for a model: those that it was trained on, and no others.

    Args:
        codebook: None for the log-mel codebook that comes with the model.
        hubert, layer, device: as of :class:`lst.speech.units.UnitsConfig`.

    Raises:
        UserError: no codebook, or one of other units.
    """
    expected = f"the codebook of the model's speech units ({trained.codebook or 'not known'})"
    path = codebook or trained.codebook_file
    if path is None:
        raise UserError(f"expected {expected}, got none; --codebook names it")
    encoder = load_units(UnitsConfig(codebook=path, hubert=hubert, layer=layer, device=device))
    if trained.codebook not in (None, encoder.fingerprint):
        raise UserError(f"{path}: expected {expected}, got {encoder.fingerprint}")
    if encoder.num_units != trained.vocabulary.num_units:
        raise UserError(
            f"{path}: expected a codebook of {trained.vocabulary.num_units} units, as the model "
            f"has, got one of {encoder.num_units}"
        )
    return encoder


def audio_units(
    path: Path | str, encoder: UnitEncoder, *, max_seconds: float | None = None
) -> np.ndarray:
    """A recording of any rate and channels → (F,) int16 units, 25 a second.

    Args:
        max_seconds: longer audio is refused by what its header says, before it is read.

    Raises:
        UserError: no audio file; one that is empty, cut short, damaged, silent or too long, or
            with samples that are no numbers.
    """
    try:
        audio = AudioReader.open(path)
        seconds = audio.num_samples / SAMPLE_RATE
        if max_seconds is not None and seconds > max_seconds:
            raise UserError(
                f"{path}: expected at most {max_seconds:g} s of audio as a prompt, "
                f"got {seconds:.1f} s"
            )
        waveform = audio.read()
    except AudioError as error:
        raise UserError(str(error)) from None
    peak = float(np.abs(waveform).max())
    if peak < SILENCE:
        level = f"{20 * np.log10(peak):.0f} dBFS" if peak else "all samples are 0"
        raise UserError(f"{path}: expected speech, got silence ({level})")
    return encoder.encode(waveform)
