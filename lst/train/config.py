"""What a training run is made of, as typed values, and the same as strict JSON.

A run's ``config.json`` says everything that its results depend on, and is read by
:mod:`lst.strict_json`.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lst.data.loader import DataConfig
from lst.errors import (
    UserError,
    expect_not_negative,
    expect_option,
    expect_positive,
    expect_text,
)
from lst.model import ModelConfig
from lst.strict_json import YOUNGER, read_json, read_strictly


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW under a linear warm-up and a cosine (defaults: paper, section A.2)."""

    lr: float = 4e-4  # peak learning rate, reached at the end of the warm-up
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the two moments of AdamW
    weight_decay: float = 0.1  # of matrices only, not of norms, biases and embeddings
    warmup_steps: int = 2000  # steps of linear warm-up
    min_lr_ratio: float = 0.01  # learning rate at the end of the run, as a share of lr
    clip: float = 1.0  # gradients are scaled down to at most this global norm

    def __post_init__(self) -> None:
        expect_positive(self, "lr", within="optimizer.")
        for beta in self.betas:
            expect_option(0 <= beta < 1, "optimizer.betas", "numbers in [0, 1)", self.betas)
        expect_not_negative(self, "weight_decay", "warmup_steps", within="optimizer.")
        ratio = self.min_lr_ratio
        expect_option(0 <= ratio <= 1, "optimizer.min_lr_ratio", "[0, 1]", ratio)
        expect_option(self.clip > 0, "optimizer.clip", "more than 0", self.clip)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of a run share the model; each has its own rows in any case.

    "auto" is "ddp" for a model of less than 10⁹ parameters and "fsdp" for a larger one
    (lst.train.parallel); one process alone holds everything.
    """

    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    replicas: int | None = None  # hsdp: groups that each hold the whole model; None: one a machine

    def __post_init__(self) -> None:
        expect_positive(self, "replicas", within="parallel.")
        if self.replicas is not None:
            expect_option(
                self.strategy == "hsdp",
                "parallel.replicas",
                "it with hsdp alone",
                f"strategy {self.strategy}",
            )


Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    name: str  # of the run, in its log; by default the preset's
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int  # number of optimizer steps
    accumulation: int = 1  # micro-batches per process and step
    seed: int = 0  # for the initial weights, the order of the data and the interleaving
    out: Path = Path("runs/lst")  # the run folder
    validate_every: int = 500  # steps between validations
    checkpoint_every: int = 500  # steps between checkpoints
    keep: int = 2  # number of newest checkpoints to keep
    keep_every: int | None = None  # also keep the checkpoints at multiples of so many steps
    log_every: int = 10  # steps between lines of metrics.jsonl and the console
    precision: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights are float32
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is a GPU, else cpu
    compile: bool = False  # compile every transformer block; changes rounding only
    # Activations that are recomputed in the backward pass to save memory. selective: those of the
    # feed-forward branches; full: all within a block.
    checkpointing: Checkpointing = "none"
    float8: bool = False  # in products of the global transformer; GPUs of compute capability 8.9
    profile: bool = False  # trace three steps after the first four, into profile/ of the run folder
    evaluate: bool = True  # score story completion at the end of the run
    max_skipped: int = 5  # the run ends at this number of non-finite steps in a row
    hang_timeout: float = 45.0  # seconds without progress after which the run ends; 0: never
    peak_tflops: float | None = None  # peak of one device, for MFU; None: known from its name
    # A Llama checkpoint to take the global transformer, its shape and weights, from. Read only when
    # a run starts, not when it is resumed.
    warm_start: Path | None = None
    # A run or checkpoint to take the initial weights from; optimizer and schedule start afresh.
    # Model, vocabulary and codebook must be the same. Read only when a run starts.
    init_from: Path | None = field(default=None, metadata=YOUNGER)
    wandb: str | None = None  # a project of Weights & Biases to log to

    def __post_init__(self) -> None:
        counts = ("steps", "accumulation", "max_skipped", "keep", "keep_every")
        intervals = ("validate_every", "checkpoint_every", "log_every")
        expect_positive(self, *counts, *intervals, "peak_tflops")
        expect_not_negative(self, "hang_timeout", "seed")
        expect_text(self, "name", "out", "wandb")
        if self.init_from is not None and self.warm_start is not None:
            raise UserError("--init-from: expected it or --warm-start, got both")


# What a run may be resumed with another value of: where things are and how often it tells of them.
FREE_ON_RESUME = frozenset(
    {
        "name",
        "out",
        "data.corpus",
        "data.num_workers",
        "accumulation",
        "validate_every",
        "checkpoint_every",
        "keep",
        "keep_every",
        "log_every",
        "device",
        "compile",
        "checkpointing",
        "profile",
        "parallel.strategy",
        "parallel.replicas",
        "evaluate",
        "max_skipped",
        "hang_timeout",
        "peak_tflops",
        "wandb",
    }
)


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass such as TrainConfig as JSON values: paths as strings, tuples as lists."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def from_json(values: Any, where: str) -> TrainConfig:
    """Read what :func:`to_json` gave; ``where`` (the file) opens the message of a UserError."""
    return read_strictly(TrainConfig, values, where)


def read_config(path: Path) -> TrainConfig:
    """Read a ``config.json``. Raises UserError where it is not one."""
    return from_json(read_json(path), str(path))


def differences(first: TrainConfig, second: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(dotted key, first's value, second's value) wherever two configurations differ."""
    a, b = _flatten(to_json(first)), _flatten(to_json(second))
    keys = [*a, *(key for key in b if key not in a)]
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def check_same_run(started: TrainConfig, asked: TrainConfig, where: str) -> None:
    """Raise UserError where a run would be resumed as another than it was started as."""
    for key, before, now in differences(started, asked):
        if key not in FREE_ON_RESUME:
            raise UserError(
                f"{where}: expected {key} = {before}, as the run was started, got {now}"
            )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat.update(inner or {f"{prefix}{name}": value})
    return flat
