"""What ``python -m lst.evaluate CHECKPOINT --task NAME`` can do with a checkpoint, by name.

A task is a function of what was asked for and of the model that is asked about; it returns a table
for people and values for the result file::

    TASKS["stories"](config, subject) -> Report
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lst.data.interleave import Mode
from lst.data.patching import PatchingConfig
from lst.data.records import read_items
from lst.errors import UserError
from lst.evaluate.story_completion import format_table, story_completion
from lst.files import Location
from lst.model import LanguageModel
from lst.train.checkpoint import load_model
from lst.train.config import TrainConfig
from lst.train.corpus import made_with
from lst.vocabulary import Tokenizer, Vocabulary

__all__ = ["TASKS", "EvaluateConfig", "Report", "Subject", "load_subject"]

MODES: dict[str, Mode] = {"S2S": "S→S", "T2T": "T→T", "S2T": "S→T", "T2S": "T→S"}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which checkpoint to evaluate, on what."""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # a run folder or one of its checkpoints
    task: str = "stories"  # what to do with it
    data: Path | None = None  # the task's data; None: that of the corpus trained on
    modes: tuple[Literal["S2S", "T2T", "S2T", "T2S"], ...] = ("S2S", "T2T")  # prompt to ending
    boundary_noise_ms: float | None = None  # of aligned patches; None: as in training
    device: str = "cpu"
    json: Path | None = None  # also write the result to this file

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise UserError(f"--task: expected one of {', '.join(TASKS)}, got {self.task!r}")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained model, and what it takes to use it."""

    model: LanguageModel
    trained: TrainConfig
    vocabulary: Vocabulary
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came out of a task."""

    table: str  # Markdown
    values: dict[str, Any]  # JSON


Task = Callable[[EvaluateConfig, Subject], Report]


def load_subject(config: EvaluateConfig) -> Subject:
    model, trained, vocabulary, tokenizer = load_model(config.checkpoint, config.device)
    return Subject(model=model.eval(), trained=trained, vocabulary=vocabulary, tokenizer=tokenizer)


def stories(config: EvaluateConfig, subject: Subject) -> Report:
    """The corpus's own stories, or those of another folder that ``write_items`` wrote."""
    corpus = Location(subject.trained.data.corpus)
    folder = corpus / "items" if config.data is None else Location(config.data)
    if not folder.exists():
        raise UserError(f"{folder}: expected a folder of stories to complete, got none; --data")
    items = read_items(folder, **made_with(corpus, subject.tokenizer))
    scores = story_completion(
        subject.model,
        items,
        subject.vocabulary,
        subject.tokenizer,
        subject.trained.model.plan(),
        patching=_patching(config, subject),
        modes=[MODES[mode] for mode in config.modes],
        device=config.device,
    )
    return Report(
        table=format_table(scores), values={"scores": [asdict(score) for score in scores]}
    )


def _patching(config: EvaluateConfig, subject: Subject) -> PatchingConfig:
    patching = subject.trained.data.patching
    if config.boundary_noise_ms is None:
        return patching
    if patching.strategy != "aligned":
        raise UserError(
            "--boundary-noise-ms: expected a model of aligned patches, got one of strategy "
            f"{patching.strategy!r}, which is evaluated without an aligner"
        )
    return replace(patching, boundary_noise_ms=config.boundary_noise_ms)


TASKS: dict[str, Task] = {"stories": stories}
