"""One table of ratios at the end of a run, whatever the number of files.

``--results DIR`` also writes the table to ``DIR/kernels-<processor>-<date>.json``, with machine,
versions and commit.
"""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from lst.machine import describe_machine, file_stem

HEADER = ("case", "ours", "peer", "peer's", "ratio", "at least", "")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: how many times less ours takes than the peer."""

    case: str
    peer: str
    ours: str
    theirs: str
    ratio: float
    floor: float | None  # the least ratio that passes; None where the ratio is only reported
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.floor is None or self.ratio >= self.floor

    def cells(self) -> tuple[str, ...]:
        floor = "" if self.floor is None else f"{self.floor:g}"
        verdict = self.note if self.passed else f"TOO LOW  {self.note}"
        return (
            self.case, self.ours, self.peer, self.theirs, f"{self.ratio:.2f}", floor, verdict,
        )  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder of the result file")


_rows = pytest.StashKey[list[Row]]()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[Row]:
    """Rows added here are printed when the run ends."""
    return request.config.stash.setdefault(_rows, [])


@pytest.fixture
def report_memory(table: list[Row]) -> Callable[[str, float], None]:
    """Add a row for a peak of memory, given as a multiple of inputs and outputs."""

    def report(case: str, share: float) -> None:
        table.append(
            Row(
                case=f"{case}: peak memory",
                peer="2 x inputs and outputs",
                ours=f"{share:.2f} x",
                theirs="2.00 x",
                ratio=2 / share,
                floor=1.0,
            )
        )

    return report


@pytest.fixture
def compare_memory(table: list[Row]) -> Callable[..., None]:
    """Add a row for the peak of memory of ours and of a peer, in bytes."""

    def report(case: str, ours: float, peer: str, theirs: float) -> None:
        table.append(
            Row(
                case=f"{case}: peak memory",
                peer=peer,
                ours=f"{ours / 1e6:,.0f} MB",
                theirs=f"{theirs / 1e6:,.0f} MB",
                ratio=theirs / ours,
                floor=None,
            )
        )

    return report


@pytest.fixture
def outrun(benchmark, table: list[Row]) -> Callable[..., None]:
    """Time ours, and assert how many times faster it is than the sound that it works on."""

    def run(case: str, ours: Callable[[], object], *, seconds: float, floor: float) -> None:
        benchmark(ours)
        if benchmark.stats is None:  # --benchmark-disable: it ran once, and was not timed
            return
        best = benchmark.stats.stats.min
        row = Row(
            case=case,
            peer="real time",
            ours=_milliseconds(best),
            theirs=_milliseconds(seconds),
            ratio=seconds / best,
            floor=floor,
        )
        table.append(row)
        assert row.passed, f"{case}: {row.ratio:.0f} < {floor:g} times real time"

    return run


@pytest.fixture
def keep_pace(benchmark, table: list[Row]) -> Callable[..., None]:
    """Time ours round by round, and assert the median of how many tokens a second it makes."""

    def run(case: str, ours: Callable[[], int], *, rounds: int, floor: float | None) -> None:
        """``ours`` works for a round and returns its tokens; ``floor``: tokens a second."""
        tokens: list[int] = []
        benchmark.pedantic(lambda: tokens.append(ours()), rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable: it ran once, and was not timed
            return
        times = benchmark.stats.stats.data
        rates = [made / taken for made, taken in zip(tokens[-len(times) :], times, strict=True)]
        rate = statistics.median(rates)
        row = Row(
            case=case,
            peer="1,000,000 tokens/s",
            ours=_milliseconds(statistics.median(times)),
            theirs=_milliseconds(statistics.median(tokens) / 1e6),
            ratio=rate / 1e6,
            floor=None if floor is None else floor / 1e6,
            note=f"{rate:,.0f} tokens/s, {min(rates):,.0f} to {max(rates):,.0f}",
        )
        benchmark.extra_info["tokens_per_second"] = rate
        table.append(row)
        assert row.passed, f"{case}: {rate:,.0f} < {floor:,.0f} tokens/s"

    return run


@pytest.fixture
def race(benchmark, table: list[Row]) -> Callable[..., None]:
    """Time ours and its peers in turn, in one process, and assert the ratios of the minima."""

    def run(
        case: str,
        ours: Callable[[], object],
        peers: Mapping[str, Callable[[], object]],
        *,
        floors: Mapping[str, float],
        rounds: int = 10,
        slow_rounds: int | None = None,
        work: tuple[float, str] | None = None,
    ) -> None:
        """Race them.

        Args:
            case: what is raced, for the table.
            ours, peers: each does the whole work once.
            floors: the least ratio against a peer; those of other peers are only reported.
            rounds: how often each is timed. Before it is timed each runs once untimed, so that none
                pays for what another left in the caches and the allocator.
            slow_rounds: for peers that take seconds: timed so often only, and always cold.
            work: what ours does, and its unit per second, for the table.
        """
        times: dict[str, list[float]] = {name: [] for name in peers}

        def run_peers() -> None:
            for name, peer in peers.items():
                if slow_rounds is None:
                    peer()
                if slow_rounds is None or len(times[name]) < slow_rounds:
                    times[name].append(_seconds(peer))
            ours()

        benchmark.pedantic(ours, setup=run_peers, rounds=rounds)
        if benchmark.stats is None:  # --benchmark-disable: everything ran once, nothing was timed
            return
        best = benchmark.stats.stats.min
        note = "" if work is None else f"{work[0] / best:.0f} {work[1]}"
        rows = [
            Row(
                case=case,
                peer=name,
                ours=_milliseconds(best),
                theirs=_milliseconds(min(taken)),
                ratio=min(taken) / best,
                floor=floors.get(name),
                note=note,
            )
            for name, taken in times.items()
        ]
        benchmark.extra_info["ratios"] = {row.peer: row.ratio for row in rows}
        table.extend(rows)
        low = [
            f"{row.ratio:.2f} < {row.floor:g} against {row.peer}" for row in rows if not row.passed
        ]
        assert not low, f"{case}: {'; '.join(low)}"

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(_rows, [])
    if not rows:
        return
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    about = describe_machine()
    terminalreporter.section("ratios")
    terminalreporter.write_line(_machine(about))
    for line in lines:
        cells = [
            cell.rjust(width) if number in (1, 3, 4, 5) else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        terminalreporter.write_line("  ".join(cells).rstrip())
    if folder := config.getoption("--results"):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"kernels-{file_stem(about)}.json"
        result = {"machine": about, "rows": [asdict(row) | {"passed": row.passed} for row in rows]}
        path.write_text(json.dumps(result, indent=2) + "\n")
        terminalreporter.write_line(f"written to {path}")


def _seconds(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _machine(about: dict[str, Any]) -> str:
    """What the figures are of: the processor, how busy it was, the versions and the commit."""
    return (
        f"{about['device']}, {about['threads']} threads, load {about['load']:.1f}, "
        f"torch {about['torch']}, commit {about['commit']}"
    )
