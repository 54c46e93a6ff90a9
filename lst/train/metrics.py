"""What a run says about itself: ``metrics.jsonl``, TensorBoard, a progress line, ``loss.png``.

Losses are means over targets, in nats and, divided by ln 2, in bits per token, all together and
split by what is predicted: a text token (or special), or a speech unit. Losses, ``lr`` and
``grad_norm`` are of the line's own step alone; seconds, rates and MFU are over the steps since the
line before, the time of validation and checkpoints left out; what was ``seen``, ``flops`` and
``skipped`` count from the first step on. A unit is a position of the global transformer, a token
one of the joint vocabulary. A number that is not finite is written as null.
"""

import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lst import flops
from lst.data.records import FRAMES_PER_SECOND
from lst.errors import UserError, tell
from lst.files import replacing, write_atomically, writing
from lst.model import ModelConfig
from lst.strict_json import parse_json, read_json_lines
from lst.train.config import TrainConfig, to_json
from lst.train.mfu import Peak
from lst.train.run_folder import (
    EVENTS,
    LOSS_PLOT,
    METRICS,
    TENSORBOARD,
    WANDB_ID,
)
from lst.vocabulary import Vocabulary

WANDB_SECONDS = 30  # that it may take to begin: less than what counts as a hang
TRAIN = "train"  # the split of training lines; others are valid/NAME


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Sums of token losses, in nats, and the numbers of targets that they are over."""

    text: float
    speech: float
    text_targets: int
    speech_targets: int
    units_to_predict: int  # that the speech targets stand for, 25 to the second

    def per_token(self) -> dict[str, float | None]:
        """``loss``, ``loss_text``, ``loss_speech`` and the same as ``bits``; None: no target.

        ``bits_per_second``, of speech, is the loss to compare models by whose speech tokens are of
        different lengths. Of a speech BPE it is an upper bound, as other pieces, whose
        probabilities are not added up, stand for the same units.
        """
        means = {
            "": _mean(self.text + self.speech, self.text_targets + self.speech_targets),
            "_text": _mean(self.text, self.text_targets),
            "_speech": _mean(self.speech, self.speech_targets),
        }
        nats = {f"loss{part}": mean for part, mean in means.items()}
        bits = {
            f"bits{part}": None if mean is None else mean / math.log(2)
            for part, mean in means.items()
        }
        seconds_bits = self.speech / math.log(2) * FRAMES_PER_SECOND
        return nats | bits | {"bits_per_second": _mean(seconds_bits, self.units_to_predict)}


def _mean(total: float, number: int) -> float | None:
    return total / number if number else None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a global batch holds, its dead tail left out."""

    targets: int
    speech_targets: int
    units_to_predict: int  # that those stand for, 25 to the second
    text_tokens: int  # pieces
    speech_units: int  # 25 to the second
    work: flops.Counts  # tokens, units and pairs


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a run has trained on since its first step, repetitions counted again."""

    tokens: int = 0
    units: int = 0
    text_tokens: int = 0  # pieces
    speech_units: int = 0  # 25 to the second
    flops: float = 0.0  # of training on all that (lst.flops)

    def after(self, counts: Counts, model: ModelConfig, vocabulary: Vocabulary) -> "Seen":
        """With one more global batch."""
        spent = flops.training_flops(model, vocabulary, counts.work)
        return Seen(
            tokens=self.tokens + int(counts.work.tokens),
            units=self.units + int(counts.work.units),
            text_tokens=self.text_tokens + counts.text_tokens,
            speech_units=self.speech_units + counts.speech_units,
            flops=self.flops + sum(spent.values()),
        )

    def to_line(self) -> dict[str, float]:
        """As ``metrics.jsonl`` has it."""
        return {
            "seen_units": self.units,
            "seen_tokens": self.tokens,
            "seen_text_tokens": self.text_tokens,
            "seen_speech_units": self.speech_units,
            "flops": self.flops,
        }


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """How long a step took on rank 0, in seconds."""

    seconds: float
    data: float  # of them, those until every rank had its micro-batches


class MetricsLog:
    """Keeps the record of a run; does nothing on ranks other than 0.

    A disk that is full does not end the run: what could not be written is told of once, kept, and
    written with what follows.

    Args:
        step, seconds, seen: where the run goes on from; lines after ``step`` are dropped.
        peak: of one of the ``num_devices``; None: no MFU.

    Raises:
        UserError: the run folder cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        step: int,
        seconds: float,
        seen: Seen,
        peak: Peak | None,
        num_devices: int,
        active: bool,
    ) -> None:
        self._active, self._config, self._first_step = active, config, step
        self._started, self._seconds_before = time.perf_counter(), seconds
        self._seen = seen  # at the line before, and since then:
        self._steps, self._rate_seconds, self._data_seconds = 0, 0.0, 0.0
        self._peak_flops = None if peak is None else peak.tflops * 1e12 * num_devices
        if not active:
            return
        self._lines = drop_lines_after(config.out / METRICS, step)
        drop_lines_after(config.out / EVENTS, step, check=_log_line)
        self._metrics = _LineFile(config.out / METRICS, self.say)
        self._events = _LineFile(config.out / EVENTS, self.say)
        self._board = _open_board(config.out / TENSORBOARD, step)
        self._wandb = _open_wandb(config)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=config.steps,
                initial=step,
                dynamic_ncols=True,
                bar_format="step {n}/{total} {bar:10} {elapsed}<{remaining}{postfix}",
            )

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, the times before it was resumed counted."""
        return self._seconds_before + time.perf_counter() - self._started

    def training_step(
        self,
        step: int,
        loss: Loss,
        seen: Seen,
        times: StepTimes,
        *,
        lr: float,
        grad_norm: float,
        skipped: int,
    ) -> None:
        """Take note of a step; every few steps, write a line."""
        if not self._active:
            return
        self._steps += 1
        self._rate_seconds += times.seconds
        self._data_seconds += times.data
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if step % self._config.log_every and step != self._config.steps:
            return
        line = {**loss.per_token(), "lr": lr, "grad_norm": grad_norm, "skipped": skipped}
        line |= self._rates(seen) | {"memory_gib": memory_gib()} | seen.to_line()
        self._seen, self._steps, self._rate_seconds, self._data_seconds = seen, 0, 0.0, 0.0
        self._show(step, self._write(step, TRAIN, line))

    def _rates(self, seen: Seen) -> dict[str, float | None]:
        """Of the steps since the line before."""
        seconds, before = self._rate_seconds, self._seen
        spent = (seen.flops - before.flops) / seconds
        hours = (seen.speech_units - before.speech_units) / FRAMES_PER_SECOND / 3600
        return {
            "step_seconds": seconds / self._steps,
            "data_seconds": self._data_seconds / self._steps,
            "tokens_per_second": (seen.tokens - before.tokens) / seconds,
            "units_per_second": (seen.units - before.units) / seconds,
            "speech_hours_per_second": hours / seconds,
            "flops_per_second": spent,
            "mfu": None if self._peak_flops is None else spent / self._peak_flops,
        }

    def validation(self, step: int, losses: Mapping[str, Loss], seen: Seen) -> None:
        """Take note of the loss on each validation set, and draw all losses so far."""
        if not self._active:
            return
        for split, loss in losses.items():
            line = self._write(step, split, loss.per_token() | seen.to_line())
            self.say(f"step {step}  {split}  {_losses(line)}")
        self.plot()

    def event(self, step: int, values: Mapping[str, Any]) -> None:
        """Take note of something that ought not to happen, in ``events.jsonl``."""
        if self._active:
            self._events.write({"step": step, **_finite(values)})

    def say(self, message: str) -> None:
        """Print a line, clear of the progress bar."""
        if self._active and self._bar is not None:
            with suppress(OSError):  # as tell() does
                self._bar.write(message, file=sys.stdout)
        elif self._active:
            tell(message)

    def sync(self) -> None:
        """Push the lines so far to the disk, as a checkpoint after them will rely on them."""
        if self._active:
            self._metrics.sync()
            self._events.sync()

    def plot(self) -> None:
        """Draw ``loss.png``; without matplotlib, do nothing."""
        if not self._active:
            return
        try:
            plot_losses(self._lines, self._config.out / LOSS_PLOT)
        except UserError as error:
            self.say(f"{error}; the run goes on")

    def close(self) -> None:
        if not self._active:
            return
        self.sync()
        self._to_board(lambda board: board.close())
        if self._wandb is not None:
            self._wandb.finish()
        if self._bar is not None:
            self._bar.close()

    def _write(self, step: int, split: str, values: dict[str, Any]) -> dict[str, Any]:
        line = {"step": step, "split": split, **_finite(values), "seconds": self.seconds}
        self._metrics.write(line)
        self._lines.append(line)
        numbers = {f"{k}/{split}": line[k] for k in values if line[k] is not None}
        self._to_board(lambda board: _add_scalars(board, numbers, step))
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)
        return line

    def _to_board(self, action: Callable[[Any], None]) -> None:
        """TensorBoard's writer does not outlive an error: from the first on it is left out."""
        if self._board is None:
            return
        try:
            action(self._board)
        except OSError as error:
            self._board = None
            self.say(
                f"{self._config.out / TENSORBOARD}: cannot be written "
                f"({error.strerror or error}); no more is; the run goes on"
            )

    def _show(self, step: int, line: dict[str, Any]) -> None:
        mfu = "" if line["mfu"] is None else f"  MFU {line['mfu']:.1%}"
        rates = (
            f"{line['tokens_per_second']:,.0f} tokens/s  {line['units_per_second']:,.0f} units/s  "
            f"{line['speech_hours_per_second']:.3g} speech hours/s  "
            f"{line['step_seconds']:.3g} s/step (data {line['data_seconds']:.2g}){mfu}  "
            f"{line['memory_gib']:.3g} GiB"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"{_losses(line)}  {rates}")
            return
        each = (time.perf_counter() - self._started) / (step - self._first_step)
        elapsed, left = (
            timedelta(seconds=round(s)) for s in (self.seconds, each * (self._config.steps - step))
        )
        done = f"step {step}/{self._config.steps}"
        self.say(f"{done}  {_losses(line)}  {rates}  {elapsed} elapsed  {left} left")


def _losses(line: dict[str, Any]) -> str:
    parts = [("loss", "loss"), ("text", "loss_text"), ("speech", "loss_speech")]
    return "  ".join(f"{name} {line[key]:.4f}" for name, key in parts if line[key] is not None)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def memory_gib() -> float:
    """The most that this process has held so far: on the GPU where it uses one, else in RAM."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class _LineFile:
    """JSON lines, added at the end of a file; those that the disk refuses wait for the next."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._waiting: list[str] = []
        self._told = False  # that the disk refuses

    def write(self, line: Mapping[str, Any]) -> None:
        self._waiting.append(json.dumps(line) + "\n")
        self._append()

    def sync(self) -> None:
        """Push all down to the disk."""
        if self._waiting or self._path.exists():
            self._append(sync=True)

    def _append(self, *, sync: bool = False) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                whole = file.tell()
                try:
                    _write_all(file, "".join(self._waiting).encode())
                except OSError:
                    file.truncate(whole)  # no torn line is left before the next
                    raise
                self._waiting.clear()
                self._told = False
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            if not self._told:
                self._told = True
                self._say(
                    f"{self._path}: cannot be written ({error.strerror}); the run goes on, "
                    "and its lines are kept until they can be"
                )


def _write_all(file: FileIO, data: bytes) -> None:
    while data:  # a disk that fills up takes a part
        data = data[file.write(data) :]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``: a step, and by name numbers, None, or the name of a split.

    Raises:
        UserError: a line, which it names, is none; it cannot be read.
    """
    return [_metrics_line(values, where) for _, where, values in read_json_lines(path)]


def _log_line(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise UserError(f"{where}: expected an object with a step, got {json.dumps(values)[:80]}")
    return values


def _metrics_line(values: Any, where: str) -> dict[str, Any]:
    values = _log_line(values, where)
    for name, value in values.items():
        kind, what = (str, "a name") if name == "split" else (int | float | None, "a number")
        if not isinstance(value, kind):
            raise UserError(f"{where}: expected {name} to be {what}, got {json.dumps(value)}")
    return values


def drop_lines_after(
    path: Path, step: int, *, check: Callable[[Any, str], dict[str, Any]] = _metrics_line
) -> list[dict[str, Any]]:
    """Cut ``metrics.jsonl`` or ``events.jsonl`` back to ``step``; the lines that are left.

    A run that was killed can have written lines after its last checkpoint, the last one torn.

    Args:
        check: gives a line from its values and where it is; a UserError is damage.

    Raises:
        UserError: a line that is not after ``step`` is damaged; it cannot be read or written.
    """
    if not path.exists():
        return []
    lines, damage = [], None
    with writing(path):
        content = path.read_bytes()
    for number, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = check(parse_json(text, where), where)
        except UserError as error:
            damage = damage or error
            continue
        if line["step"] <= step:
            if damage is not None:
                raise damage
            lines.append(line)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _open_board(folder: Path, step: int) -> Any:
    """A TensorBoard writer that hides what an earlier try wrote after ``step``; None: absent."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tell("no TensorBoard events are written: pip install 'lst[log]'")
        return None
    with writing(folder):
        return SummaryWriter(str(folder), purge_step=step + 1)


def _add_scalars(board: Any, numbers: Mapping[str, float], step: int) -> None:
    for name, value in numbers.items():
        board.add_scalar(name, value, step)
    board.flush()


def expect_wandb(config: TrainConfig) -> None:
    """Raise UserError where Weights & Biases is asked for and not installed."""
    if config.wandb is not None and find_spec("wandb") is None:
        raise UserError("--wandb: expected the package wandb: pip install 'lst[wandb]'")


def _open_wandb(config: TrainConfig) -> Any:
    """A run of Weights & Biases, the same again when a run goes on; None: not asked for.

    Raises:
        UserError: it cannot be begun: no key, no network, no right to the project.
    """
    if config.wandb is None:
        return None
    import wandb

    path = config.out / WANDB_ID
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    online = os.environ.get("WANDB_MODE", "online") == "online"
    try:
        # Its own question after a key would wait for ever, as if the run hung.
        if online and not wandb.login(timeout=WANDB_SECONDS):
            raise ConnectionError("no key; run `wandb login` first, or set WANDB_MODE=offline")
        return wandb.init(
            project=config.wandb,
            name=config.out.name,
            id=path.read_text(),
            resume="allow",
            dir=str(config.out),
            config=to_json(config),
            settings=wandb.Settings(init_timeout=WANDB_SECONDS),
        )
    except Exception as error:  # of its own kinds, and of those of what it is made of
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"--wandb: expected a run of project {config.wandb!r} to begin, got {lines[0]}"
        ) from error


def plot_losses(lines: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss by step, for text and speech, in nats and bits per token."""
    try:
        from matplotlib.figure import Figure  # pyplot's state and backends are not needed
    except ImportError:
        tell("no loss.png is drawn: pip install 'lst[plots]'")
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    splits = sorted({line["split"] for line in lines if "split" in line})
    for axes, part in zip(figure.subplots(1, 2), ("text", "speech"), strict=True):
        for number, split in enumerate(splits):
            points = [
                (line["step"], line[f"loss_{part}"])
                for line in lines
                if line.get("split") == split and line.get(f"loss_{part}") is not None
            ]
            marks: dict[str, Any] = {"linewidth": 1} if split == TRAIN else {"marker": "o"}
            if points:
                axes.plot(*zip(*points, strict=True), label=split, color=f"C{number}", **marks)
        axes.set_title(f"{part} tokens")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        bits = axes.secondary_yaxis(
            "right", functions=(lambda y: y / math.log(2), lambda y: y * math.log(2))
        )
        bits.set_ylabel("bits per token")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
