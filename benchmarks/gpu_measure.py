"""Timing on a GPU, and the file that results go to as soon as they are known."""

import contextlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Report", "Timer", "Timing"]

#: A call to be timed. The argument counts the rounds, so that inputs can take turns.
Run = Callable[[int], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds on the device, over so many rounds."""

    median: float
    low: float  # quartiles
    high: float
    rounds: int


class Timer:
    """Times calls on a CUDA device with events, in turn, each with cold caches.

    Before a call the device sleeps, for twice as long as Python takes over it, so that everything
    the call launches is queued by the time it starts: what is measured is the device's time, not
    Python's. Then a buffer of four times the L2 cache is read. (Read, not written: dirty lines
    would be written back on the call's time.)
    """

    WARM_UP = 3
    CYCLES = 2e9  # of the device's clock in a second, about
    SLEEP = 1e-3, 20e-3  # seconds: at least, at most
    BUDGET = 400.0  # ms for the rounds of one call, if its rounds are not bound otherwise
    MOST_ROUNDS, FEWEST_ROUNDS = 30, 3

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        l2 = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self._cold = torch.ones(l2, dtype=torch.float32, device=device)  # 4 bytes each

    def race(self, runs: Mapping[str, Run]) -> dict[str, Timing]:
        """Time each of ``runs``, one round of each after the other."""
        sleeps = {name: self._warm_up(run) for name, run in runs.items()}
        estimates = {name: self._once(run, 0, sleeps[name]) for name, run in runs.items()}
        rounds = {
            name: min(max(int(self.BUDGET / max(ms, 1e-3)), self.FEWEST_ROUNDS), self.MOST_ROUNDS)
            for name, ms in estimates.items()
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(max(rounds.values())):
            for name, run in runs.items():
                if number < rounds[name]:
                    taken[name].append(self._once(run, number, sleeps[name]))
        return {name: _timing(times) for name, times in taken.items()}

    def _warm_up(self, run: Run) -> int:
        """Cycles of sleep before each call of ``run``: twice the time of Python's part in it."""
        for number in range(self.WARM_UP):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            run(number)
            seconds = time.perf_counter() - begun
        least, most = self.SLEEP
        return int(self.CYCLES * min(max(2 * seconds, least), most))

    def _once(self, run: Run, number: int, sleep: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(sleep)
        self._cold.sum()
        start.record()
        run(number)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)


def _timing(times: list[float]) -> Timing:
    if len(times) < 4:
        return Timing(statistics.median(times), min(times), max(times), len(times))
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high, len(times))


@dataclass
class Report:
    """What was found so far, on the disk after every part. An interrupted run keeps it."""

    path: Path
    machine: dict[str, Any]
    minutes: float
    checks: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    _begun: float = field(default_factory=time.monotonic)

    def seconds_left(self) -> float:
        """Of the time that the whole run may take."""
        return self.minutes * 60 - (time.monotonic() - self._begun)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that fails is a line in the report; the parts after it run."""
        begun = time.monotonic()
        print(f"-- {name}", flush=True)
        entry: dict[str, Any] = {"part": name, "outcome": "done"}
        try:
            yield
        except Exception as error:
            entry |= {"outcome": one_line(error), "traceback": traceback.format_exc()}
            print(f"   failed: {one_line(error)}", flush=True)
        except BaseException:
            entry["outcome"] = "interrupted"
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - begun, 1)
            self.parts.append(entry)
            self.save()
        torch.cuda.empty_cache()  # raises where a kernel broke the device for this process

    def check(self, op: str, case: str, outcome: str, **facts: Any) -> None:
        """``outcome`` is "passed" or what is wrong. One wrong check stops all figures of the op."""
        self.checks.append({"op": op, "case": case, "outcome": outcome, **facts})
        print(f"   check {op}, {case}: {outcome}", flush=True)
        self.save()

    def failed_check(self, op: str) -> str | None:
        """Why the op gets no figures: its first check that failed, or that there was none."""
        own = [check for check in self.checks if check["op"] == op]
        if not own:
            return "it was not checked"
        wrong = [check for check in own if check["outcome"] != "passed"]
        return f"its check failed: {wrong[0]['case']}: {wrong[0]['outcome']}" if wrong else None

    def skip(self, what: str, reason: str) -> None:
        """Something has no figure, for a reason."""
        self.not_measured.append({"what": what, "reason": reason})
        print(f"   not measured: {what}: {reason}", flush=True)
        self.save()

    def figure(self, name: str, timing: Timing | None, **facts: Any) -> None:
        """One measured figure, with all that it depends on."""
        entry: dict[str, Any] = {"name": name, **facts}
        if timing is not None:
            entry["milliseconds"] = vars(timing)
        self.figures.append(entry)

    def target(
        self, name: str, got: float, case: str, *,
        at_least: float | None = None, at_most: float | None = None,
    ) -> None:  # fmt: skip
        """A figure beside the least, or the most, that it should be."""
        entry: dict[str, Any] = {"target": name, "case": case, "got": got}
        if at_least is not None:
            entry |= {"at_least": at_least, "met": got >= at_least}
        if at_most is not None:
            entry |= {"at_most": at_most, "met": got <= at_most}
        self.targets.append(entry)

    def save(self) -> None:
        """Write the file anew, whole or not at all."""
        kept = ("machine", "targets", "checks", "figures", "not_measured", "parts")
        values = {name: getattr(self, name) for name in kept}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(values, indent=1) + "\n")
        partial.replace(self.path)

    def table(self) -> str:
        """Each target beside the worst of its figures, and how it all went."""
        lines = [("target", "", "got", "", "worst of")]
        for name in dict.fromkeys(each["target"] for each in self.targets):
            own = [each for each in self.targets if each["target"] == name]
            worst = min(own, key=_margin)
            bound = (
                f">= {worst['at_least']:g}" if "at_least" in worst else f"<= {worst['at_most']:g}"
            )
            verdict = "met" if worst["met"] else "NOT MET"
            cases = f"{len(own)}: {worst['case']}"
            lines.append((name, bound, f"{worst['got']:.3g}", verdict, cases))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        wrong = [check for check in self.checks if check["outcome"] != "passed"]
        text.append(f"{len(self.checks) - len(wrong)} checks passed, {len(wrong)} did not")
        text += [f"  {each['op']}, {each['case']}: {each['outcome'][:120]}" for each in wrong]
        text += [f"not measured: {e['what']}: {e['reason'][:120]}" for e in self.not_measured]
        text += [f"part {p['part']}: {p['outcome']}" for p in self.parts if p["outcome"] != "done"]
        return "\n".join(text)


def _margin(target: dict[str, Any]) -> float:
    """How well a target is met; 1 is just so."""
    if "at_least" in target:
        return target["got"] / target["at_least"]
    return target["at_most"] / target["got"]


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300]}" if said else type(error).__name__
