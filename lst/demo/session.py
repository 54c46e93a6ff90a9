"""What happens between a prompt and a picture; the page only shows it.

text and audio → document → continuation → sound, text, picture
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lst.data.patching import Static, final_strategy
from lst.data.records import FRAMES_PER_SECOND, Record, Word
from lst.demo.analysis import analyse
from lst.demo.picture import draw
from lst.errors import UserError
from lst.generate import Generator, Sampling
from lst.generate.prompt import audio_units, prompt_tokens, readable, spans_of
from lst.model import count_parameters
from lst.pretrained import Pretrained
from lst.speech.audio import read_audio
from lst.speech.sound import UnitVoice, sound_of
from lst.speech.units import FRAME_SAMPLES, LogMelKMeans, UnitEncoder

__all__ = ["Limits", "Request", "Result", "Session"]

Order = Literal["text first", "audio first"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may take."""

    characters: int = 4000  # of the prompt's text
    seconds: float = 60.0  # of the prompt's audio
    tokens: int = 500  # of a continuation
    time: float = 60.0  # seconds, after which a continuation ends where it is


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it."""

    text: str = ""
    audio: Path | None = None
    order: Order = "text first"
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the page shows.

    Attributes:
        text: the continuation, speech as how long it is.
        sound: (n,) float32 at 16 kHz, the speech of the continuation.
        ended: why it ended and how long it took, in words.
        picture: of prompt and continuation, HTML.
    """

    text: str
    sound: np.ndarray
    ended: str
    picture: str


class _OutOfTime(Exception):
    pass


class Session:
    """A model and what turns sound into its units and back.

    Args:
        encoder: of the model's units; None where there is none, and so no prompt of audio.
        voice: speaks units; None where there is none, and so no sound.
    """

    def __init__(
        self,
        trained: Pretrained,
        *,
        encoder: UnitEncoder | None,
        voice: LogMelKMeans | UnitVoice | None,
        speaker: str | None = None,
        limits: Limits,
        device: str = "cpu",
    ) -> None:
        self.trained, self.encoder, self.limits, self.device = trained, encoder, limits, device
        self._voice, self._speaker = voice, speaker
        self._known: dict[str, Record] = {}  # by the SHA-256 of audio files
        self._generator = Generator(
            trained.model,
            trained.vocabulary,
            trained.config.model,
            trained.config.data.patching,
            device=device,
            context=trained.config.data.units_per_sequence,
        )

    def facts(self) -> list[str]:
        """What the model is, in a few words each."""
        config = self.trained.config
        parameters = count_parameters(self.trained.model)["total"]
        strategy = final_strategy(config.data.patching)
        if isinstance(strategy, Static):
            rate = FRAMES_PER_SECOND / strategy.size
            patches = f"static patches of {strategy.size} units, {rate:g} a second of speech"
        elif self.trained.vocabulary.speech_bpe is not None:
            patches = "token-level, over BPE pieces of speech units"
        else:
            patches = f"token-level: every token a patch, {FRAMES_PER_SECOND} a second of speech"
        facts = [
            f"{config.name}, step {self.trained.step:,}",
            f"{parameters / 1e6:,.3g} M parameters",
            patches,
            f"context of {config.data.units_per_sequence:,} patches",
        ]
        if config.model.architecture == "lst":
            path = {
                "local": "text passes encoder and decoder too",
                "global": "text passes the global transformer alone",
            }
            facts.append(path[config.model.text_path])
        return facts

    @property
    def speaks(self) -> bool:
        """Whether units become sound."""
        return self._voice is not None

    def know(self, audio: Path, record: Record) -> None:
        """From now on, the units and words of an audio file of this content are the record's."""
        self._known[_digest(audio)] = record

    def sound(self, units: np.ndarray) -> np.ndarray:
        """(F,) units → (640 F,) float32 at 16 kHz; silence where there is no voice."""
        if self._voice is None:
            return np.zeros(FRAME_SAMPLES * len(units), np.float32)
        sound = sound_of(units, self._voice, codebook=self.trained.codebook, speaker=self._speaker)
        return _of_length(sound, FRAME_SAMPLES * len(units))

    def continue_(
        self, request: Request, progress: Callable[[int], None] = lambda _: None
    ) -> Result:
        """Continue a prompt.

        Args:
            progress: called with the number of tokens that are there.

        Raises:
            UserError: the prompt cannot be read, or is longer than it may be.
        """
        limits = self.limits
        text = request.text.strip()
        if len(text) > limits.characters:
            raise UserError(
                f"text: expected at most {limits.characters:,} characters, got {len(text):,}"
            )
        if request.sampling.max_tokens > limits.tokens:
            raise UserError(
                f"length: expected at most {limits.tokens:,} tokens, "
                f"got {request.sampling.max_tokens:,}"
            )
        units, waveform, words = self._listen(request.audio)
        spans = [part for part in (text, units) if len(part)]
        if request.order == "audio first":
            spans.reverse()
        prompt = prompt_tokens(
            spans, self.trained.vocabulary, self.trained.tokenizer, then=request.sampling.modality
        )
        began = time.monotonic()
        continued, stopped = self._continue(prompt, request.sampling, progress)
        took = time.monotonic() - began

        tokens = np.concatenate((prompt, continued))
        analysis = analyse(
            tokens,
            len(prompt),
            self.trained.model,
            self.trained.vocabulary,
            self.trained.tokenizer,
            self.trained.config.model,
            self.trained.config.data.patching,
            device=self.device,
        )
        # The prompt's speech is the document's first; the continuation may go on with it.
        given, sounds, pictured = len(units), [], []
        for run in analysis.runs:
            if run.is_speech:
                sounds.append(self.sound(run.units[given:]))
                pictured.append(np.concatenate((waveform, sounds[-1])))
                given, waveform = 0, waveform[:0]
        return Result(
            text=self._text_of(continued, prompt),
            sound=np.concatenate([np.zeros(0, np.float32), *sounds]),
            ended=f"{stopped}: {len(continued):,} tokens in {took:.1f} s",
            picture=draw(analysis, pictured, [words]),
        )

    def _listen(self, path: Path | None) -> tuple[np.ndarray, np.ndarray, tuple[Word, ...]]:
        """Units (F,), the waveform (640 F,) and the words of an audio file; none without one."""
        if path is None:
            return np.zeros(0, np.int16), np.zeros(0, np.float32), ()
        if self.encoder is None:
            raise UserError("audio: expected text alone, as nothing makes units of audio here")
        known = self._known.get(_digest(path))
        if known is not None and known.units is not None:
            units, words = known.units, known.words or ()
        else:
            units = audio_units(path, self.encoder, max_seconds=self.limits.seconds)
            words = ()
        return units, _of_length(read_audio(path), FRAME_SAMPLES * len(units)), words

    def _continue(
        self, prompt: np.ndarray, sampling: Sampling, progress: Callable[[int], None]
    ) -> tuple[np.ndarray, str]:
        """The tokens that follow, and why there are no more."""
        until = time.monotonic() + self.limits.time
        tokens: list[int] = []

        def on_token(_: int, token: int, __: float) -> None:
            tokens.append(token)
            progress(len(tokens))
            if time.monotonic() > until:
                raise _OutOfTime

        try:
            (done,) = self._generator.generate([prompt], sampling, on_token=on_token)
        except _OutOfTime:
            return np.array(tokens, np.int32), f"Stopped after {self.limits.time:g} s"
        reasons = {
            "eos": "The model ended the document",
            "stop": "Stopped",
            "length": "As long as asked for",
            "context": "The model's context is full",
        }
        return done.tokens, reasons[done.stopped]

    def _text_of(self, tokens: np.ndarray, prompt: np.ndarray) -> str:
        spans = spans_of(tokens, self.trained.vocabulary, self.trained.tokenizer, after=prompt)
        return "\n".join(map(readable, spans))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_length(waveform: np.ndarray, length: int) -> np.ndarray:
    """Cut off, or filled with silence: a codebook's frames end up to 40 ms after the audio."""
    return np.pad(waveform[:length], (0, max(0, length - len(waveform))))
