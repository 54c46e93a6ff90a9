"""Which runs a comparison is made of, and running them one after the other.

*Compute-controlled*: every arm takes the same number of steps over the same number of units (paper,
Table 3). *Data-controlled*: every arm reads as much speech and text as the static arm did in that
many steps (Table 4); an arm that reads fewer tokens in a unit takes more steps. How many follows
from what its own compute-controlled run read, as a step reads the same amount throughout (a
curriculum's does not, but its whole run does, whatever its length).

A run is named by what it is, ``ARM-STEPS-seedN``, so an arm that both budgets give the same number
of steps is run once; and a study that was stopped goes on with the runs that are not finished.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lst.compare.arms import ARMS, Arm
from lst.errors import UserError
from lst.evaluate.choice import Score
from lst.prepare.demo import DemoConfig
from lst.strict_json import read_json, read_strictly
from lst.train.config import TrainConfig
from lst.train.metrics import read_metrics

__all__ = [
    "BUDGETS",
    "REFERENCE",
    "Budget",
    "Planned",
    "Result",
    "Study",
    "plan",
    "read_result",
    "run_folder",
    "steps_of",
]

Budget = Literal["compute", "data"]
BUDGETS: tuple[Budget, ...] = ("compute", "data")
REFERENCE = "static"  # the arm whose tokens are the data budget
SAME = 0.01  # budgets that differ by less than this share of the steps are one


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison."""

    name: str
    claim: str  # what its results can and cannot say
    corpus: DemoConfig  # its ``out`` is ignored
    base: TrainConfig  # what all arms have in common
    speech_pieces: int = 1000  # of the BPE arm
    seeds: Mapping[str, int] = field(default_factory=dict)  # by arm, where it is not 1

    def __post_init__(self) -> None:
        for name, seeds in self.seeds.items():
            if name not in ARMS:
                raise UserError(f"seeds: expected arms of {', '.join(ARMS)}, got {name!r}")
            if seeds < 1:
                raise UserError(f"seeds: expected 1 or more for {name!r}, got {seeds}")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a study: it may serve both budgets."""

    arm: Arm
    budget: Budget
    seed: int

    def __str__(self) -> str:
        return f"{self.arm.name}, {self.budget}-controlled, seed {self.seed}"


def plan(study: Study, arms: tuple[Arm, ...]) -> Iterator[Planned]:
    """The runs in order: every arm once before any arm again, compute before data."""
    for seed in range(max(study.seeds.get(arm.name, 1) for arm in arms)):
        for budget in BUDGETS:
            for arm in arms:
                if seed < study.seeds.get(arm.name, 1):
                    yield Planned(arm=arm, budget=budget, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one finished run came to."""

    arm: str
    seed: int
    steps: int
    units: int  # of the global transformer, read in training
    text_tokens: int
    speech_units: int  # of 40 ms, for the BPE arm too
    flops: float  # of training, counted as lst.flops counts
    seconds: float  # of training and validation
    valid: dict[str, dict[str, Any]]  # last validation line of each set
    scores: list[dict[str, Any]]  # as story_completion.json holds them

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.speech_units


def run_folder(out: Path, arm: Arm, steps: int, seed: int) -> Path:
    return out / "runs" / f"{arm.name}-{steps}-seed{seed}"


def steps_of(planned: Planned, study: Study, out: Path) -> int | None:
    """The optimizer steps of a run; None where a run that it follows from is not finished."""
    steps = study.base.steps
    if planned.budget == "compute":
        return steps
    reference = read_result(out, ARMS[REFERENCE], steps, 0)
    own = read_result(out, planned.arm, steps, planned.seed)
    if reference is None or own is None:
        return None
    ratio = reference.tokens / own.tokens
    return steps if abs(ratio - 1) < SAME else max(1, round(ratio * steps))


_OF_TRAINING = {
    "steps": "step",
    "units": "seen_units",
    "text_tokens": "seen_text_tokens",
    "speech_units": "seen_speech_units",
    "flops": "flops",
    "seconds": "seconds",
}  # fields of Result, and what metrics.jsonl calls them


def read_result(out: Path, arm: Arm, steps: int, seed: int) -> Result | None:
    """What a run came to; None where it is not finished. Raises UserError where it is damaged."""
    folder = run_folder(out, arm, steps, seed)
    stories = folder / "story_completion.json"
    if not stories.exists():
        return None
    metrics, scores = folder / "metrics.jsonl", read_json(stories)
    last = {line["split"]: line for line in read_metrics(metrics) if "split" in line}
    train = last.pop("train", None)
    if train is None:
        raise UserError(f"{metrics}: expected the metrics of a finished run, got no training")
    if not isinstance(scores, list):
        raise UserError(f"{stories}: expected a list of scores, got {type(scores).__name__}")
    values = {name: train[key] for name, key in _OF_TRAINING.items() if key in train}
    values |= {"arm": arm.name, "seed": seed, "valid": last}
    values["scores"] = [asdict(read_strictly(Score, each, str(stories))) for each in scores]
    return read_strictly(Result, values, str(metrics))
