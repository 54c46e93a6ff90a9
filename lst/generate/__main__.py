"""``python -m lst.generate CHECKPOINT --prompt …``: go on with text and speech."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lst.data.patching import patch_lengths
from lst.data.records import FRAMES_PER_SECOND
from lst.errors import UserError, expect_positive, run_command
from lst.files import expect_absent, making_folder, write_atomically, write_json
from lst.generate import Continuation, Generator, Sampling
from lst.generate.passes import NOTHING_ALIGNED
from lst.generate.prompt import (
    Span,
    audio_units,
    open_units,
    prompt_tokens,
    readable,
    spans_of,
)
from lst.generate.requests import Request, audio_or_text, read_requests, stop_ids
from lst.generate.sampling import Modality
from lst.pretrained import Pretrained
from lst.speech.audio import write_wav
from lst.speech.sound import UnitVoice, load_voice, sound_of
from lst.speech.units import LogMelKMeans, UnitEncoder
from lst.train.checkpoint import load_trained
from lst.vocabulary import Tokenizer, Vocabulary

STORY, UNITS, RESULTS = "continuation.txt", "units.json", "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue text and speech with a trained model.

    The continuation goes to stdout, stretches of speech in it as [1.24 s of speech]; --out makes a
    folder with the sound as well.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, a checkpoint, a pretrained folder, or the name of one on the hub."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text, or an audio file (by its suffix: .wav, .flac, .mp3, .ogg); may be repeated."""
    prompts: Path | None = None
    """A JSONL file with a request per line, such as {"prompt": "Once"}."""
    out: Path | None = None
    """A new folder for text, units and sound; with several results, a folder for each."""
    num_samples: int = 1
    """Continuations of each prompt; number i uses the seed SEED + i."""
    modality: Modality = "any"
    """What to generate: text, speech, or whatever the model chooses."""
    max_tokens: int = 256
    """Maximum number of generated tokens: text pieces, speech units, markers."""
    seconds: float | None = None
    """With --modality speech: the maximum length in seconds, instead of --max-tokens."""
    temperature: float = 1.0
    """0: always the most likely token."""
    top_k: int | None = None
    """Sample only from this number of most likely tokens."""
    top_p: float | None = None
    """Sample only from the most likely tokens whose probabilities sum to this."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that have already occurred become less likely."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Stop at a token that contains this text, or at <t> or <s>; may be repeated."""
    seed: int = 0
    """Of the sampling."""
    context: int | None = None
    """Maximum patches of prompt and continuation; None: as in training."""
    max_prompt_seconds: float = 60.0
    """Longer audio prompts are refused."""
    batch_size: int = 16
    """Continuations generated together; it does not change the results."""
    codebook: Path | None = None
    """The codebook of the model's speech units; None: that of the model or its corpus."""
    hubert: str | None = None
    """HuBERT that the codebook was made for: a folder or a hub name; with --layer."""
    layer: int | None = None
    """The HuBERT layer that the codebook was made for."""
    voice: Path | None = None
    """Makes sound of units: a vocoder's folder or a log-mel codebook; None: the model's own."""
    speaker: str | None = None
    """One of the vocoder's speakers."""
    device: str = "cpu"
    """Device that the model runs on, such as cuda."""

    def __post_init__(self) -> None:
        if self.prompt and self.prompts is not None:
            raise UserError("expected --prompt or --prompts, got both")
        expect_positive(
            self, "num_samples", "batch_size", "context", "seconds", "max_prompt_seconds"
        )
        for name in ("voice", "speaker"):
            if self.out is None and getattr(self, name) is not None:
                raise UserError(f"--{name}: expected it with --out, which sound is written to")
        if self.seconds is not None and self.modality != "speech":
            raise UserError(f"--seconds: expected it with --modality speech, got {self.modality}")


# Results ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a request."""

    request: Request
    sample: int
    prompt: np.ndarray  # (T,) joint ids
    continuation: Continuation
    spans: list[Span]

    def to_json(self) -> dict[str, Any]:
        made = self.continuation
        return {
            "id": self.request.name,
            "sample": self.sample,
            "text": text_of(self.spans),
            "stopped": made.stopped,
            "tokens": len(made.tokens),
            "logprob": float(made.logprobs.astype(np.float64).sum()),
            "spans": _spans_json(self.spans),
        }


def _spans_json(spans: Sequence[Span]) -> list[dict[str, Any]]:
    return [{"text": s} if isinstance(s, str) else {"units": s.tolist()} for s in spans]


def text_of(spans: Sequence[Span]) -> str:
    return " ".join(map(readable, spans))


class Reader:
    """Prints a continuation as it comes: text as soon as it is whole characters, a stretch of
    speech when it ends."""

    def __init__(self, prompt: np.ndarray, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
        self._prompt, self._vocabulary, self._tokenizer = prompt, vocabulary, tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def __call__(self, number: int, token: int, nats: float) -> None:
        self._tokens.append(token)
        if self._vocabulary.is_unit(token):
            return
        tokens = np.array(self._tokens, np.int32)
        spans = spans_of(tokens, self._vocabulary, self._tokenizer, after=self._prompt)
        text = text_of(spans).rstrip("\N{REPLACEMENT CHARACTER}")
        if text.startswith(self._shown):
            print(text[len(self._shown) :], end="", flush=True)
            self._shown = text

    def finish(self, text: str) -> None:
        """Print what is left of the whole."""
        print(text.removeprefix(self._shown), flush=True)


# Work ---------------------------------------------------------------------------------------------


class Loaded:
    """A model with what it takes to hear and to speak, which is opened when it is first needed."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.trained: Pretrained = load_trained(config.checkpoint, config.device)
        trained = self.trained
        self.generator = Generator(
            trained.model,
            trained.vocabulary,
            trained.config.model,
            trained.config.data.patching,
            device=config.device,
            context=config.context or trained.config.data.units_per_sequence,
        )
        self._encoder: UnitEncoder | None = None

    def listen(self, path: Path) -> np.ndarray:
        """An audio file → (F,) units of the model's codebook."""
        config = self.config
        if self._encoder is None:
            self._encoder = open_units(
                self.trained,
                codebook=config.codebook,
                hubert=config.hubert,
                layer=config.layer,
                device=config.device,
            )
        return audio_units(path, self._encoder, max_seconds=config.max_prompt_seconds)

    def voice(self) -> LogMelKMeans | UnitVoice | None:
        """What speaks the model's units; None, said on stderr, where nothing here does.

        Raises:
            UserError: a voice for other units, or one that does not know the speaker.
        """
        config = self.config
        path = config.voice or config.codebook or self.trained.codebook_file
        if path is None or (config.voice is None and config.hubert is not None):
            print("no sound is made: nothing here speaks the units; --voice", file=sys.stderr)
            return None
        voice = load_voice(path)
        self.speak(np.zeros(0, np.int16), voice)
        return voice

    def speak(self, units: np.ndarray, voice: LogMelKMeans | UnitVoice) -> np.ndarray:
        """(F,) units → (n,) float32 at 16 kHz."""
        codebook, speaker = self.trained.codebook, self.config.speaker
        return sound_of(units, voice, codebook=codebook, speaker=speaker)

    def tokens(self, request: Request) -> np.ndarray:
        """The prompt of a request.

        Raises:
            UserError: it is longer than the context.
        """
        trained, context = self.trained, self.generator.context
        try:
            tokens = prompt_tokens(
                request.spans,
                trained.vocabulary,
                trained.tokenizer,
                then=request.sampling.modality,
            )
        except UserError as error:
            raise UserError(f"{request.where}: {error}") from None
        strategy = self.generator.strategy
        patches = len(
            patch_lengths(tokens, trained.vocabulary, strategy, aligned=NOTHING_ALIGNED)[0]
        )
        if context is not None and patches >= context:
            raise UserError(
                f"{request.where}: expected a prompt that leaves room in a context of {context} "
                f"units (--context), got one of {patches}"
            )
        return tokens


def generate(config: GenerateConfig) -> list[Result]:
    """Answer what a command asks for, and print or write it.

    Raises:
        UserError: options, files or a model that cannot be used. Nothing is written then.
    """
    if config.out is not None:
        expect_absent(config.out)
    loaded = Loaded(config)
    voice = None if config.out is None else loaded.voice()
    requests = _requests(config, loaded)
    prompts = [loaded.tokens(request) for request in requests]
    results = list(_answer(config, loaded, requests, prompts))
    if config.out is not None:
        _write(config.out, results, loaded, voice)
    elif config.prompts is not None:
        for result in results:
            print(json.dumps(result.to_json(), ensure_ascii=False))
    if config.prompts is None and config.num_samples > 1:
        for result in results:
            print(f"--- {result.sample}\n{text_of(result.spans)}")
    return results


def _requests(config: GenerateConfig, loaded: Loaded) -> list[Request]:
    trained = loaded.trained
    sampling = Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        modality=config.modality,
        max_tokens=config.max_tokens,
        stop=tuple(stop_ids(config.stop, trained.vocabulary, trained.tokenizer)),
        seed=config.seed,
    )
    if config.seconds is not None:
        if trained.vocabulary.speech_bpe is not None:
            raise UserError(
                "--seconds: expected a model of units, each 40 ms, got one of a speech BPE, whose "
                "pieces differ; --max-tokens"
            )
        frames = min(config.seconds * FRAMES_PER_SECOND, 2**62)  # as good as without end
        sampling = replace(sampling, max_tokens=max(1, round(frames)))
    if config.prompts is not None:
        return read_requests(config.prompts, sampling, loaded.listen)
    spans = [audio_or_text(part, loaded.listen) for part in config.prompt]
    return [Request(name="continuation", where="--prompt", spans=spans, sampling=sampling)]


def _answer(
    config: GenerateConfig,
    loaded: Loaded,
    requests: Sequence[Request],
    prompts: Sequence[np.ndarray],
) -> Iterator[Result]:
    vocabulary, tokenizer = loaded.trained.vocabulary, loaded.trained.tokenizer
    asked = (
        (request, prompt, sample)
        for request, prompt in zip(requests, prompts, strict=True)
        for sample in range(config.num_samples)
    )
    is_one = config.prompts is None and config.num_samples == 1
    reader = Reader(prompts[0], vocabulary, tokenizer) if is_one else None
    while batch := list(islice(asked, config.batch_size)):
        samplings = [
            replace(request.sampling, seed=request.sampling.seed + sample)
            for request, _, sample in batch
        ]
        made = loaded.generator.generate([p for _, p, _ in batch], samplings, on_token=reader)
        for (request, prompt, sample), continuation in zip(batch, made, strict=True):
            spans = spans_of(continuation.tokens, vocabulary, tokenizer, after=prompt)
            yield Result(
                request=request,
                sample=sample,
                prompt=prompt,
                continuation=continuation,
                spans=spans,
            )
            if reader is not None:
                reader.finish(text_of(spans))


# Files --------------------------------------------------------------------------------------------


def _write(
    out: Path, results: Sequence[Result], loaded: Loaded, voice: LogMelKMeans | UnitVoice | None
) -> None:
    """Make the folder: the one result in it, or one folder for each."""
    with making_folder(out) as folder:
        if len(results) == 1 and loaded.config.prompts is None:
            _write_result(folder, results[0], loaded, voice)
            return
        lines = []
        for number, result in enumerate(results):
            name = f"{number:05d}"
            (folder / name).mkdir()
            _write_result(folder / name, result, loaded, voice)
            lines.append(json.dumps(result.to_json() | {"folder": name}, ensure_ascii=False))
        write_atomically(folder / RESULTS, "".join(f"{line}\n" for line in lines))


def _write_result(
    folder: Path, result: Result, loaded: Loaded, voice: LogMelKMeans | UnitVoice | None
) -> None:
    trained, made = loaded.trained, result.continuation
    prompt = spans_of(result.prompt, trained.vocabulary, trained.tokenizer)
    write_atomically(folder / STORY, f"{text_of(result.spans)}\n")
    write_json(
        folder / UNITS,
        {
            "prompt": _spans_json(prompt),
            "continuation": _spans_json(result.spans),
            "stopped": made.stopped,
            "sampling": asdict(result.request.sampling) | {"sample": result.sample},
            "prompt_tokens": result.prompt.tolist(),
            "tokens": made.tokens.tolist(),
            "logprobs": made.logprobs.astype(float).tolist(),
            "patch_lengths": made.patch_lengths.tolist(),
        },
    )
    for name, spans in (("prompt.wav", prompt), ("continuation.wav", result.spans)):
        units = [span for span in spans if not isinstance(span, str)]
        if units and voice is not None:
            sound = [loaded.speak(each, voice) for each in units]
            write_wav(folder / name, np.concatenate(sound))


def main() -> None:
    generate(tyro.cli(GenerateConfig, prog="python -m lst.generate"))


if __name__ == "__main__":
    run_command(main)
