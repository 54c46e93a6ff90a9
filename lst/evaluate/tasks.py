"""What ``python -m lst.evaluate CHECKPOINT --task NAME`` can do with a checkpoint, by name.

A task is a function of what was asked for and of the model that is asked about; it returns a table
for people and values for the result file::

    TASKS["stories"](config, load_trained(config.checkpoint, config.device)) -> Report
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from lst.data.interleave import Mode
from lst.data.patching import PatchingConfig
from lst.data.records import FRAMES_PER_SECOND, Record, read_items
from lst.errors import UserError, expect_not_negative, expect_positive
from lst.evaluate.choice import choice_scores, format_table, likelihoods
from lst.evaluate.error_rate import Normaliser, error_rates, format_error_rates, normaliser
from lst.evaluate.progress import Progress
from lst.evaluate.questions import READERS, Question, has_sides, of_items, read_questions, sides
from lst.evaluate.speech import Speaker, check_recordings, find_voice
from lst.evaluate.speech_to_text import (
    Answer,
    generator_of,
    open_records,
    same_units,
    speak,
    transcribe,
)
from lst.files import Location, write_atomically
from lst.generate import Sampling
from lst.generate.prompt import open_units
from lst.pretrained import Pretrained
from lst.speech.synthesis import Voice
from lst.train.checkpoint import load_trained
from lst.train.config import to_json
from lst.train.corpus import made_with

__all__ = ["TASKS", "EvaluateConfig", "Report"]

MODES: dict[str, Mode] = {"S2S": "S→S", "T2T": "T→T", "S2T": "S→T", "T2S": "T→S"}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model on a benchmark."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, a checkpoint, a pretrained folder, or the name of one on the hub."""
    task: str = "stories"
    """stories (of the corpus), hellaswag, storycloze, topicstorycloze, swuggy, sblimp, asr, tts."""
    data: Path | None = None
    """The task's file or folder; None: the corpus's stories, or valid/speech for asr and tts."""
    modes: tuple[Literal["S2S", "T2T", "S2T", "T2S"], ...] | None = None
    """Of prompt and ending, S speech and T text. None: S2S and T2T, if the data has them."""
    espeak: str | None = None
    """Synthesise the written questions by a voice: ours (us-f4) or espeak's (en-us+f4)."""
    codebook: Path | None = None
    """The codebook of the model's speech units; None: that of the model or its corpus."""
    hubert: str | None = None
    """HuBERT that the codebook was made for: a folder or a hub name; with --layer."""
    layer: int | None = None
    """The HuBERT layer that the codebook was made for."""
    boundary_noise_ms: float | None = None
    """Move aligned boundaries at random by up to so much; None: as in training."""
    normaliser: Normaliser = "english"
    """For asr and tts, applied to both texts before comparison: Whisper's english or basic."""
    recogniser: str | None = None
    """For tts: a checkpoint that transcribes the generated speech."""
    temperature: float = 0.0
    """For tts; 0: always the most likely token."""
    seed: int = 0
    """For tts, of the sampling."""
    tokens_per_batch: int = 16384
    """Documents are packed into batches of about this many tokens."""
    device: str = "cpu"
    """Device that the model runs on, such as cuda."""
    json: Path | None = None
    """A file for the results. Answers are kept beside it, so that a stopped command can resume."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"--task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        if self.modes is not None and not self.modes:
            raise UserError("--modes: expected one or more, got none")
        out = self.json
        if out is not None and ((out.exists() and not out.is_file()) or not out.parent.is_dir()):
            raise UserError(f"--json {out}: expected a file to write, in a folder there is")
        expect_positive(self, "tokens_per_batch")
        expect_not_negative(self, "boundary_noise_ms", "temperature")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came out of a task."""

    table: str  # Markdown
    values: dict[str, Any]  # JSON


Task = Callable[[EvaluateConfig, Pretrained], Report]


# Choices between endings --------------------------------------------------------------------------


def choices(config: EvaluateConfig, trained: Pretrained) -> Report:
    """Questions with several endings: the corpus's own stories, or a benchmark's."""
    patching = _patching(config, trained)
    questions = _questions(config, trained)
    voice = None if config.espeak is None else find_voice(config.espeak)
    asked = _asked(config, questions, voice)
    spoken = [
        passage
        for mode, places in asked.items()
        for question in places.values()
        for side, passage in sides(question, mode)
        if side == "S"
    ]
    encoder = None
    if any(voice is not None or passage.record.units is None for passage in spoken):
        encoder = open_units(
            trained,
            codebook=config.codebook,
            hubert=config.hubert,
            layer=config.layer,
            device=config.device,
        )
        if voice is None:
            check_recordings(spoken)
    of = {
        "task": config.task,
        "data": _digest_of(questions),
        "voice": None if voice is None else asdict(voice),
        "codebook": None if encoder is None else encoder.fingerprint,
        "patching": asdict(patching),
        "model": config.json and _model_digest(trained),
    }
    speaker = {} if encoder is None else {"record_of": Speaker(encoder, voice).record}
    scores = []
    with Progress(config.json, of) as progress:
        for mode, places in asked.items():
            missing = [place for place in places if (mode, place) not in progress]
            found = likelihoods(
                trained.model,
                [places[place] for place in missing],
                mode,
                trained.vocabulary,
                trained.tokenizer,
                trained.config.model.plan(),
                patching=patching,
                device=config.device,
                tokens_per_batch=config.tokens_per_batch,
                **speaker,
            )
            bar = tqdm(found, desc=mode, total=len(missing), unit="question", disable=None)
            for place, endings in zip(missing, bar, strict=True):
                progress.add(mode, place, endings)
            answers = [progress[mode, place] for place in places]
            scores += choice_scores(list(places.values()), answers, mode)
    scores.sort(key=lambda score: score.task)
    values = {"of": of, "scores": [asdict(score) for score in scores]}
    return Report(table=format_table(scores), values=values)


def _questions(config: EvaluateConfig, trained: Pretrained) -> list[Question]:
    if config.task != "stories":
        if config.data is None:
            raise UserError(f"--task {config.task}: expected its file or folder, got none; --data")
        return read_questions(config.task, config.data)
    corpus = Location(trained.config.data.corpus)
    folder = corpus / "items" if config.data is None else Location(config.data)
    if not folder.exists():
        raise UserError(f"{folder}: expected a folder of stories to complete, got none; --data")
    made = made_with(corpus, trained.tokenizer)
    made["codebook"] = trained.codebook or made["codebook"]
    return of_items(read_items(folder, **made))


def _asked(
    config: EvaluateConfig, questions: list[Question], voice: Voice | None
) -> dict[Mode, dict[int, Question]]:
    """The questions that can be asked in each mode, by their places.

    Raises:
        UserError: a mode that was named, or every mode, has none.
    """
    names = ("S2S", "T2T") if config.modes is None else config.modes
    asked = {}
    for name in dict.fromkeys(names):
        mode = MODES[name]
        places = {
            place: question
            for place, question in enumerate(questions)
            if has_sides(question, mode, speakable=voice is not None)
        }
        if places:
            asked[mode] = places
        elif config.modes is not None:
            hint = "" if voice or "S" not in mode else "; --espeak speaks what is written"
            raise UserError(
                f"--modes {name}: expected prompts and endings for {mode}, which no question of "
                f"--task {config.task} has{hint}"
            )
    if not asked:
        raise UserError(f"--task {config.task}: no question has {' or '.join(names)}; --modes")
    return asked


def _patching(config: EvaluateConfig, trained: Pretrained) -> PatchingConfig:
    patching = trained.config.data.patching
    if config.boundary_noise_ms is None:
        return patching
    if patching.strategy != "aligned":
        raise UserError(
            "--boundary-noise-ms: expected a model of aligned patches, got one of strategy "
            f"{patching.strategy!r}, which is evaluated without an aligner"
        )
    return replace(patching, boundary_noise_ms=config.boundary_noise_ms)


# What answers depend on ---------------------------------------------------------------------------


def _model_digest(trained: Pretrained) -> str:
    """Of the weights and of everything that gives them a meaning."""
    model = to_json(trained.config)["model"]
    content = hashlib.sha256(
        f"{model} {trained.vocabulary} {trained.tokenizer.fingerprint}".encode()
    )
    for name, weight in sorted(trained.model.weights().items()):
        content.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        content.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{content.hexdigest()}"


def _digest_of(questions: Sequence[Question]) -> str:
    """Of texts, units and answers, and of the names and sizes of recordings."""
    content = hashlib.sha256()
    for question in questions:
        content.update(repr((question.id, question.scores, question.answer)).encode())
        for passage in (question.prompt, *question.endings):
            if passage is None:
                continue
            units, audio = passage.record.units, passage.audio
            size = audio.stat().st_size if audio is not None and audio.is_file() else None
            content.update(repr((passage.record.text, audio and audio.name, size)).encode())
            if units is not None:
                content.update(units.tobytes())
    return f"sha256:{content.hexdigest()}"


# Transcribing and speaking ------------------------------------------------------------------------


def asr(config: EvaluateConfig, trained: Pretrained) -> Report:
    """Transcribe every record of a dataset: word and character error rate."""
    folder, records = _records(config, trained)
    answers = transcribe(
        generator_of(trained, config.device),
        trained.tokenizer,
        [record.units for record in records if record.units is not None],
        tokens_per_batch=config.tokens_per_batch,
    )
    return _error_report(config, folder, records, answers, [answer.text for answer in answers])


def tts(config: EvaluateConfig, trained: Pretrained) -> Report:
    """Speak the text of every record, and transcribe what was spoken by another model."""
    if config.recogniser is None:
        raise UserError("--recogniser: expected a model that transcribes units, got none")
    folder, records = _records(config, trained)
    recogniser = load_trained(config.recogniser, config.device)
    same_units(trained, recogniser, str(config.recogniser))
    answers = speak(
        generator_of(trained, config.device),
        trained.tokenizer,
        [record.text or "" for record in records],
        sampling=Sampling(temperature=config.temperature, seed=config.seed),
        tokens_per_batch=config.tokens_per_batch,
    )
    spoken = [number for number, answer in enumerate(answers) if len(answer.units)]
    heard = transcribe(
        generator_of(recogniser, config.device),
        recogniser.tokenizer,
        [answers[number].units for number in spoken],
        tokens_per_batch=config.tokens_per_batch,
    )
    texts = [""] * len(answers)  # where nothing was spoken nothing is heard
    for number, each in zip(spoken, heard, strict=True):
        texts[number] = each.text
    return _error_report(config, folder, records, answers, texts)


def _records(config: EvaluateConfig, trained: Pretrained) -> tuple[Location, list[Record]]:
    corpus = Location(trained.config.data.corpus)
    folder = corpus / "valid" / "speech" if config.data is None else Location(config.data)
    return folder, open_records(folder, trained.codebook, trained.vocabulary)


def _error_report(
    config: EvaluateConfig,
    folder: Location,
    records: Sequence[Record],
    answers: Sequence[Answer],
    hypotheses: Sequence[str],
) -> Report:
    """Scores, and where they are written, what they are of beside them, a line a record."""
    references = [record.text or "" for record in records]
    rates = error_rates(references, hypotheses, normalise=normaliser(config.normaliser))
    seconds = sum(
        len(record.units if config.task == "asr" and record.units is not None else answer.units)
        for record, answer in zip(records, answers, strict=True)
    ) / FRAMES_PER_SECOND  # fmt: skip
    values = {
        "data": str(folder),
        "normaliser": config.normaliser,
        "scores": [asdict(rate) for rate in rates],
        "seconds_of_speech": seconds,
        "units": sum(answer.num_units for answer in answers),  # of the global transformer
        "not_ended": sum(answer.stopped != "eos" for answer in answers),
    }
    if config.json is not None:
        lines = [
            {
                "id": record.id,
                "reference": record.text,
                "hypothesis": hypothesis,
                "stopped": answer.stopped,
                **({"units": answer.units.tolist()} if config.task == "tts" else {}),
            }
            for record, answer, hypothesis in zip(records, answers, hypotheses, strict=True)
        ]
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(Path(f"{config.json}.answers.jsonl"), content)
    return Report(table=format_error_rates(rates), values=values)


TASKS: dict[str, Task] = {
    "stories": choices,
    **dict.fromkeys(READERS, choices),
    "asr": asr,
    "tts": tts,
}
