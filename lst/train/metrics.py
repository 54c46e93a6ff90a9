"""What a run says about itself: ``metrics.jsonl``, TensorBoard, a progress line, ``loss.png``.

Losses are means over targets, in nats and, divided by ln 2, in bits per token, all together and
split by what is predicted: a text token (or special), or a speech unit. A line tells of its own
step alone; rates are over the steps since the line before, the time of validation and checkpoints
left out. A unit is a position of the global transformer, a token one of the joint vocabulary.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lst.data.records import FRAMES_PER_SECOND
from lst.train.config import TrainConfig
from lst.train.run_folder import LOSS_PLOT, METRICS, TENSORBOARD, write_atomically, writing

TRAIN = "train"  # the split of training lines; others are valid/NAME


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Sums of token losses, in nats, and the numbers of targets that they are over."""

    text: float
    speech: float
    text_targets: int
    speech_targets: int

    def per_token(self) -> dict[str, float | None]:
        """``loss``, ``loss_text``, ``loss_speech`` and the same as ``bits``; None: no target."""
        means = {
            "": _mean(self.text + self.speech, self.text_targets + self.speech_targets),
            "_text": _mean(self.text, self.text_targets),
            "_speech": _mean(self.speech, self.speech_targets),
        }
        nats = {f"loss{part}": mean for part, mean in means.items()}
        return nats | {
            f"bits{part}": None if mean is None else mean / math.log(2)
            for part, mean in means.items()
        }


def _mean(total: float, number: int) -> float | None:
    return total / number if number else None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a global batch holds, its dead tail left out."""

    targets: int
    speech_targets: int
    tokens: int
    units: int
    speech_tokens: int


class MetricsLog:
    """Keeps the record of a run; does nothing on ranks other than 0.

    Args:
        step, seconds: where the run goes on from; lines after ``step`` are dropped.
    """

    def __init__(self, config: TrainConfig, *, step: int, seconds: float, active: bool) -> None:
        self._active, self._config, self._first_step = active, config, step
        self._started, self._seconds_before = time.perf_counter(), seconds
        self._rate_seconds = 0.0
        self._tokens = self._units = self._speech_tokens = 0  # in those seconds
        if not active:
            return
        self._path = config.out / METRICS
        self._lines = drop_lines_after(self._path, step)
        self._board = _open_board(config.out / TENSORBOARD, step)
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
        self, step: int, loss: Loss, counts: Counts, *, lr: float, grad_norm: float, seconds: float
    ) -> None:
        """Take note of a step that took ``seconds``; every few steps, write a line."""
        if not self._active:
            return
        self._rate_seconds += seconds
        self._tokens += counts.tokens
        self._units += counts.units
        self._speech_tokens += counts.speech_tokens
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if step % self._config.log_every and step != self._config.steps:
            return
        line = {
            **loss.per_token(),
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": self._tokens / self._rate_seconds,
            "units_per_second": self._units / self._rate_seconds,
            "speech_hours_per_second": (
                self._speech_tokens / FRAMES_PER_SECOND / 3600 / self._rate_seconds
            ),
        }
        self._rate_seconds = 0.0
        self._tokens = self._units = self._speech_tokens = 0
        self._write(step, TRAIN, line)
        self._show(step, line)

    def validation(self, step: int, losses: Mapping[str, Loss]) -> None:
        """Take note of the loss on each validation set, and draw all losses so far."""
        if not self._active:
            return
        for split, loss in losses.items():
            line = loss.per_token()
            self._write(step, split, line)
            self.say(f"step {step}  {split}  {_losses(line)}")
        self.plot()

    def say(self, message: str) -> None:
        """Print a line, clear of the progress bar."""
        if self._active and self._bar is not None:
            self._bar.write(message, file=sys.stdout)
        elif self._active:
            print(message, flush=True)

    def sync(self) -> None:
        """Push the lines so far to the disk, as a checkpoint after them will rely on them."""
        if self._active and self._path.exists():
            with writing(self._path), self._path.open("a") as file:
                os.fsync(file.fileno())

    def plot(self) -> None:
        """Draw ``loss.png``; without matplotlib, do nothing."""
        if self._active:
            plot_losses(self._lines, self._config.out / LOSS_PLOT)

    def close(self) -> None:
        if not self._active:
            return
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _write(self, step: int, split: str, values: dict[str, Any]) -> None:
        line = {"step": step, "split": split, **values, "seconds": self.seconds}
        with writing(self._path), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._lines.append(line)
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(f"{name}/{split}", value, step)
            self._board.flush()

    def _show(self, step: int, line: dict[str, Any]) -> None:
        rates = (
            f"{line['tokens_per_second']:,.0f} tokens/s  {line['units_per_second']:,.0f} units/s  "
            f"{line['speech_hours_per_second']:.3g} speech hours/s"
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


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut ``metrics.jsonl`` back to ``step``; the lines that are left.

    A run that was killed can have written lines after its last checkpoint, the last one torn.
    """
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["step"] <= step:
            lines.append(line)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _open_board(folder: Path, step: int) -> Any:
    """A TensorBoard writer that hides what an earlier try wrote after ``step``; None: absent."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("no TensorBoard events are written: pip install 'lst[log]'", flush=True)
        return None
    with writing(folder):
        return SummaryWriter(str(folder), purge_step=step + 1)


def plot_losses(lines: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss by step, for text and speech, in nats and bits per token."""
    try:
        from matplotlib.figure import Figure  # pyplot's state and backends are not needed
    except ImportError:
        print("no loss.png is drawn: pip install 'lst[plots]'", flush=True)
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2), ("text", "speech"), strict=True):
        for number, split in enumerate(sorted({line["split"] for line in lines})):
            points = [
                (line["step"], line[f"loss_{part}"])
                for line in lines
                if line["split"] == split and line[f"loss_{part}"] is not None
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
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(path)
