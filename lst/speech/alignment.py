"""When each word and each character is spoken: forced alignment by a CTC model.

    waveform → wav2vec 2.0 → log-probabilities of characters, 50 frames a second as a rule ┐
    text → characters of the model's vocabulary, words joined by its "|"                   ┴→ path

A character starts with the first frame that speaks it, and lasts until the next one of the same
word starts; the last one of a word ends with its own last frame. A word is its characters; what no
word covers is silence. Between words, models often turn to the blank before a sound has ended, so
a short silence there need not be one that is heard.

A character that the vocabulary lacks, such as most punctuation, is spoken by no frame: its times
are those of the end of the character before it. So is a word of nothing else ("1984", for most
models): texts should be written out as they are read.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch

from lst.data.records import Span, Word
from lst.errors import UserError, brief
from lst.machine import find_device
from lst.speech.audio import SAMPLE_RATE, Timed
from lst.speech.ctc import best_paths, frames_needed
from lst.speech.units import word_frames
from lst.speech.wav2vec2 import FrameModel, load_pretrained

__all__ = ["Alignment", "CTCAligner"]

WORD = re.compile(r"\S+")
APOSTROPHES = str.maketrans("‘’ʼ", "'''")


@dataclass(frozen=True, slots=True)
class Alignment:
    """When an utterance's words and characters are spoken, in seconds, in order and disjoint.

    Attributes:
        words: one for each string between blanks, as it is written.
        chars: one for each character of the text; those that are not spoken are empty.
        score: mean log-probability of a frame, to tell texts that do not go with their speech.
    """

    words: tuple[Timed, ...]
    chars: tuple[Timed, ...]
    score: float

    def frames(self, num_frames: int) -> tuple[tuple[Word, ...], tuple[Span, ...]]:
        """``words`` and ``chars`` of a record of ``num_frames`` units.

        Each end goes to the nearest end of a frame of 40 ms, and so is at most 20 ms away.
        """
        spans = word_frames(self.chars, num_frames)
        return word_frames(self.words, num_frames), tuple(
            Span(span.start, span.stop) for span in spans
        )


class CTCAligner:
    """A ``Wav2Vec2ForCTC`` model and the characters that it knows.

    Args:
        model: waveforms to states.
        head: states to logits, (D,) → (V,).
        vocabulary: the id of each character.
        blank: the id of no character.
        delimiter: the id of the space between words, None where the model has none.
    """

    def __init__(
        self,
        model: FrameModel,
        head: torch.nn.Module,
        vocabulary: dict[str, int],
        *,
        blank: int,
        delimiter: int | None,
    ) -> None:
        self._model = model
        self._head = head
        self._vocabulary = vocabulary
        self._blank = blank
        self._delimiter = delimiter

    @classmethod
    def load(cls, name: str, *, device: str = "cpu") -> Self:
        """Open a model of ``transformers`` and its tokenizer.

        Args:
            name: a local folder or a name on the hub.

        Raises:
            UserError: not a Wav2Vec2 model with a CTC head, or one whose tokenizer has no
                characters or another blank; no such device; transformers is not installed.
        """
        place = find_device(device)
        model, normalize = load_pretrained(name, "wav2vec2", "Wav2Vec2ForCTC")
        if model.config.add_adapter:
            raise UserError(f"{name}: expected a model without an adapter after its transformer")
        from transformers import Wav2Vec2CTCTokenizer

        try:
            tokenizer: Any = Wav2Vec2CTCTokenizer.from_pretrained(name)
        except Exception as error:  # of transformers, and of whatever it reads a file by
            why = brief(error)
            raise UserError(f"{name}: no CTC tokenizer could be read here ({why})") from None
        ids = tokenizer.get_vocab()
        blank, delimiter = model.config.pad_token_id, tokenizer.word_delimiter_token
        if tokenizer.pad_token_id != blank:
            raise UserError(
                f"{name}: expected the tokenizer's padding to be the blank {blank}, "
                f"got {tokenizer.pad_token_id}"
            )
        vocabulary = {
            token: number
            for token, number in ids.items()
            if len(token) == 1 and token != delimiter and number != blank
        }
        size = model.config.vocab_size
        for token, number in (vocabulary | {"the delimiter": ids.get(delimiter, 0)}).items():
            if type(number) is not int or number < 0 or (number >= size and token in vocabulary):
                raise UserError(
                    f"{name}: expected the ids of characters below the model's {size}, "
                    f"got {number!r} of {token}"
                )
        if not vocabulary:
            raise UserError(f"{name}: expected a vocabulary of characters, got none")
        return cls(
            FrameModel(model.wav2vec2, layer=None, normalize=normalize).to(place),
            model.lm_head.requires_grad_(False).to(place),
            vocabulary,
            blank=blank,
            # transformers adds a delimiter to the tokenizer of a model that was made without one.
            delimiter=ids[delimiter] if ids.get(delimiter, size) < size else None,
        )

    def reason_against(self, num_samples: int, text: str) -> str | None:
        """Why an utterance cannot be aligned, or None where it can."""
        labels, _ = self._spell(text)
        if not len(labels):
            return f"no character of {text!r} is in the aligner's vocabulary"
        needed, given = frames_needed(labels), -(-num_samples // self._model.stride)
        if needed > given:
            seconds = [frames * self._model.stride / SAMPLE_RATE for frames in (needed, given)]
            return (
                f"the text needs {needed} frames ({seconds[0]:.2f} s) at least, "
                f"the speech has {given} ({seconds[1]:.2f} s)"
            )
        return None

    def align(self, waveforms: Sequence[np.ndarray], texts: Sequence[str]) -> list[Alignment]:
        """Align utterances, all at once.

        Args:
            waveforms: (n,) float at 16 kHz each.
            texts: what is said in each, written with its punctuation.

        Raises:
            UserError: one for which :meth:`reason_against` has a reason, or whose best path is
                not in the band or has no finite score; it names the place in the list.
        """
        for place, (waveform, text) in enumerate(zip(waveforms, texts, strict=True)):
            if reason := self.reason_against(len(waveform), text):
                raise UserError(f"utterance {place}: {reason}")
        spelt = [self._spell(text) for text in texts]
        labels = [labels for labels, _ in spelt]
        try:
            paths = best_paths(self.emissions(waveforms), labels, blank=self._blank)
        except ValueError as error:  # samples that are no numbers, or a text far out of step
            raise UserError(str(error)) from None
        return [
            self._read(path, score, owners, text, len(waveform))
            for (path, score), (_, owners), text, waveform in zip(
                paths, spelt, texts, waveforms, strict=True
            )
        ]

    @torch.inference_mode()
    def emissions(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(n,) each → (T, V) float32 log-probabilities each, a frame for every begun stride."""
        return [
            torch.log_softmax(self._head(states), -1).cpu().numpy()
            for states in self._model.states(waveforms)
        ]

    def _spell(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels (L,), and the character of the text that each is of, −1 for a delimiter."""
        labels: list[int] = []
        owners: list[int] = []
        for word in WORD.finditer(text):
            spelt = [
                (label, place)
                for place in range(*word.span())
                for label in self._labels_of(text[place])
            ]
            if spelt and labels and self._delimiter is not None:
                labels.append(self._delimiter)
                owners.append(-1)
            labels += [label for label, _ in spelt]
            owners += [place for _, place in spelt]
        return np.array(labels, np.int64), np.array(owners, np.int64)

    def _labels_of(self, character: str) -> list[int]:
        """Those of a character, whatever its case; of ``é`` those of ``e`` where it is unknown."""
        character = character.translate(APOSTROPHES)
        parts = unicodedata.normalize("NFKD", character)
        plain = "".join(part for part in parts if part.isalnum())
        for written in (character, plain):
            for cased in (written, written.upper(), written.lower()):
                if cased and all(part in self._vocabulary for part in cased):
                    return [self._vocabulary[part] for part in cased]
        return []

    def _read(
        self, path: np.ndarray, score: float, owners: np.ndarray, text: str, num_samples: int
    ) -> Alignment:
        """The times that a path gives to the text."""
        frames = np.flatnonzero(path >= 0)
        spans = _character_spans(frames.tolist(), owners[path[frames]].tolist(), text)
        seconds = [min(num_samples, self._model.stride * end) / SAMPLE_RATE for end in spans.flat]
        chars = tuple(map(Timed, text, seconds[::2], seconds[1::2]))
        words = []
        for word in WORD.finditer(text):
            times = chars[word.start() : word.end()]
            spoken = [time for time in times if time.start < time.stop] or times[:1]
            words.append(Timed(word.group(), spoken[0].start, spoken[-1].stop))
        return Alignment(tuple(words), chars, score / len(path))


def _character_spans(frames: list[int], places: list[int], text: str) -> np.ndarray:
    """Frames and the character that each of them speaks → (len(text), 2) starts and stops."""
    first: dict[int, int] = {}
    stop: dict[int, int] = {}
    for frame, place in zip(frames, places, strict=True):
        first.setdefault(place, frame)
        stop[place] = frame + 1
    for word in WORD.finditer(text):
        spoken = [place for place in range(*word.span()) if place in first]
        stop |= {place: first[following] for place, following in pairwise(spoken)}
    spans = np.zeros((len(text), 2), np.int64)
    end = 0
    for place in range(len(text)):
        start, end = first.get(place, end), stop.get(place, end)
        spans[place] = start, end
    return spans
