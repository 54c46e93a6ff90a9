"""One table of ratios at the end of a run, whatever the number of files.

``--results DIR`` also writes each file's rows to ``DIR/<question>-<device>-<date>.json``, with
machine, versions, commit and, where shares of them are told, the machine's limits:
``python -m benchmarks.report`` makes docs/performance.md of them. A benchmark that fails for
another reason than a ratio that is too low has no rows, and is named in the file; of a run that is
broken off, those files are written whose benchmarks have all run. ``--compare BASE`` runs the
benchmarks of this tree and of another revision side by side (`benchmarks.compare`).
"""

import json
import statistics
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

from benchmarks.compare import compare, without_option
from benchmarks.limits import Limits, measure_limits
from lst.errors import UserError
from lst.files import make_folder, write_atomically, writing
from lst.machine import describe_machine, file_stem

HEADER = ("case", "ours", "peer", "peer's", "ratio", "at least", "")

AddRow = Callable[..., "Row"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: how many times less ours takes than the peer."""

    question: str  # of the file that asks it
    case: str
    peer: str
    ours: str
    theirs: str
    ratio: float
    floor: float | None  # the least ratio that passes; None where the ratio is only reported
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # numbers for the report

    @property
    def passed(self) -> bool:
        return self.floor is None or self.ratio >= self.floor

    @property
    def device(self) -> str:
        return "cuda" if "device" in self.facts else "cpu"

    def cells(self) -> tuple[str, ...]:
        floor = "" if self.floor is None else f"{self.floor:g}"
        verdict = self.note if self.passed else f"TOO LOW  {self.note}"
        return (
            self.case, self.ours, self.peer, self.theirs, f"{self.ratio:.2f}", floor, verdict,
        )  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder of the result files")
    parser.addoption("--compare", metavar="BASE", help="a revision to run side by side with")


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """With ``--compare``, this process runs no benchmark itself."""
    revision = config.getoption("--compare")
    if revision is None:
        return None
    try:
        return compare(revision, without_option(config.invocation_params.args))
    except UserError as error:
        raise pytest.UsageError(str(error)) from None


@dataclass
class Found:
    """What the run has come to so far."""

    rows: list[Row] = field(default_factory=list)
    waiting: list[pytest.Item] = field(default_factory=list)  # have not run
    failed: dict[str, dict[str, str]] = field(default_factory=dict)  # question → benchmark → why
    written: list[str] = field(default_factory=list)  # lines on the files


_found = pytest.StashKey[Found]()
_rows = pytest.StashKey[list[Row]]()  # of one benchmark
_limits = pytest.StashKey[dict[str, Limits]]()


def pytest_configure(config: pytest.Config) -> None:
    """That results can be written is known before anything is measured."""
    config.stash[_found] = Found()
    folder = config.getoption("--results")
    if folder is None or config.getoption("--compare") is not None:
        return
    try:
        make_folder(folder)
        with writing(folder), tempfile.TemporaryFile(dir=folder):
            pass
    except UserError as error:
        raise pytest.UsageError(f"--results: {error}") from None


def pytest_collection_finish(session: pytest.Session) -> None:
    benchmarks = [
        item for item in session.items if "benchmark" in getattr(item, "fixturenames", ())
    ]
    session.config.stash[_found].waiting = benchmarks


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Rows count when their benchmark has ended, and well: what is wrong has no figure. Only of one
    that is too low, which the row itself says, they count all the same."""
    report = yield
    found, rows = item.config.stash[_found], item.stash.get(_rows, [])
    if report.failed and (report.when != "call" or all(row.passed for row in rows)):
        why = str(call.excinfo.value if call.excinfo else "").strip() or "without a reason"
        found.failed.setdefault(_question(item), {})[item.name] = why.splitlines()[0]
    elif report.when == "call":
        found.rows += rows
    if report.when == "teardown" and item in found.waiting:
        found.waiting.remove(item)
    return report


def _question(item: pytest.Item) -> str:
    """What the file of a benchmark asks: ``kernels`` in test_kernels_cpu.py."""
    return item.path.stem.removeprefix("test_").removesuffix("_cpu")


@pytest.fixture
def add_row(request: pytest.FixtureRequest) -> AddRow:
    """Rows added by it are printed when the run ends."""
    rows = request.node.stash.setdefault(_rows, [])

    def add(**values: Any) -> Row:
        row = Row(question=_question(request.node), **values)
        rows.append(row)
        return row

    return add


@pytest.fixture(scope="session")
def limits_of(request: pytest.FixtureRequest) -> Callable[[str], Limits]:
    """What "cpu" or "cuda" copies and multiplies at best, measured once in this run."""
    found = request.config.stash.setdefault(_limits, {})

    def limits(device: str) -> Limits:
        if device not in found:
            found[device] = measure_limits(torch.device(device))
        return found[device]

    return limits


@pytest.fixture
def report_memory(add_row: AddRow) -> Callable[[str, float], None]:
    """Add a row for a peak of memory, given as a multiple of inputs and outputs."""

    def report(case: str, share: float) -> None:
        add_row(
            case=f"{case}: peak memory",
            peer="2 x inputs and outputs",
            ours=f"{share:.2f} x",
            theirs="2.00 x",
            ratio=2 / share,
            floor=1.0,
        )

    return report


@pytest.fixture
def compare_memory(add_row: AddRow) -> Callable[..., None]:
    """Add a row for the peak of memory of ours and of a peer, in bytes."""

    def report(case: str, ours: float, peer: str, theirs: float, **facts: Any) -> None:
        add_row(
            case=f"{case}: peak memory",
            peer=peer,
            ours=f"{ours / 1e6:,.0f} MB",
            theirs=f"{theirs / 1e6:,.0f} MB",
            ratio=theirs / ours,
            floor=None,
            facts={"bytes": ours, "peer_bytes": theirs, **facts},
        )

    return report


@pytest.fixture
def outrun(benchmark, add_row: AddRow) -> Callable[..., None]:
    """Time ours, and assert how many times faster it is than the sound that it works on."""

    def run(case: str, ours: Callable[[], object], *, seconds: float, floor: float) -> None:
        benchmark(ours)
        if benchmark.stats is None:  # --benchmark-disable: it ran once, and was not timed
            return
        best = benchmark.stats.stats.min
        row = add_row(
            case=case,
            peer="real time",
            ours=_milliseconds(best),
            theirs=_milliseconds(seconds),
            ratio=seconds / best,
            floor=floor,
            facts={"seconds": best, "peer_seconds": seconds},
        )
        assert row.passed, f"{case}: {row.ratio:.0f} < {floor:g} times real time"

    return run


@pytest.fixture
def keep_pace(benchmark, add_row: AddRow) -> Callable[..., None]:
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
        row = add_row(
            case=case,
            peer="1,000,000 tokens/s",
            ours=_milliseconds(statistics.median(times)),
            theirs=_milliseconds(statistics.median(tokens) / 1e6),
            ratio=rate / 1e6,
            floor=None if floor is None else floor / 1e6,
            note=f"{rate:,.0f} tokens/s, {min(rates):,.0f} to {max(rates):,.0f}",
            facts={"tokens_per_second": rate},
        )
        benchmark.extra_info["tokens_per_second"] = rate
        assert row.passed, f"{case}: {rate:,.0f} < {floor:,.0f} tokens/s"

    return run


@pytest.fixture
def take_turns(benchmark) -> Callable[..., dict[str, list[float]]]:
    """Time several calls in turn, in one process; the first of them is what the plugin lists."""

    def run(
        calls: Mapping[str, Callable[[], object]], rounds: int, slow_rounds: int | None = None
    ) -> dict[str, list[float]]:
        """Seconds of every round of every call; no round where nothing is to be timed.

        Args:
            calls: each does the whole work once.
            rounds: how often each is timed. Before it is timed each runs once untimed, so that none
                pays for what another left in the caches and the allocator.
            slow_rounds: for all but the first, where they take seconds: timed so often only, and
                always cold.
        """
        (first, ours), *others = calls.items()
        times: dict[str, list[float]] = {name: [] for name in calls}

        def run_others() -> None:
            for name, other in others:
                if slow_rounds is None:
                    other()
                if slow_rounds is None or len(times[name]) < slow_rounds:
                    times[name].append(_seconds(other))
            ours()

        benchmark.pedantic(ours, setup=run_others, rounds=rounds)
        if benchmark.stats is None:  # --benchmark-disable: everything ran once
            return {name: [] for name in calls}
        return times | {first: list(benchmark.stats.stats.data)}

    return run


@pytest.fixture
def race(benchmark, add_row: AddRow, take_turns, limits_of) -> Callable[..., dict[str, float]]:
    """Time ours and its peers in turn, in one process, and assert the ratios of the minima."""

    def run(
        case: str,
        ours: Callable[[], object],
        peers: Mapping[str, Callable[[], object]],
        *,
        floors: Mapping[str, float],
        rounds: int = 10,
        slow_rounds: int | None = None,
        flops: float | None = None,
        nbytes: float | None = None,
        facts: Mapping[str, Any] | None = None,
        check: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """The least seconds of "ours" and of every peer; nothing where nothing is timed.

        Args:
            case: what is raced, for the table.
            ours, peers: each does the whole work once.
            floors: the least ratio against a peer; those of other peers are only reported.
            rounds, slow_rounds: as of `take_turns`; slow are the peers.
            flops, nbytes: what ours computes, and reads and writes at least, for its share of the
                machine's limits.
            facts: more numbers for the report.
            check: raises where a result of what was timed is wrong; then there is no row.
        """
        known: dict[str, Any] = dict(facts or {})
        limits = limits_of("cpu") if flops or nbytes else None
        times = take_turns({"ours": ours, **peers}, rounds, slow_rounds)
        if check is not None:
            check()
        if not times["ours"]:
            return {}
        least = {name: min(taken) for name, taken in times.items()}
        best = least["ours"]
        note = ""
        if limits is not None:
            work = (flops or 0, nbytes or 0)
            known |= {"flops": flops, "bytes": nbytes, "floor_seconds": limits.floor(*work)}
            rate = f"{work[1] / best / 1e9:.1f} GB/s"
            if limits.bound(*work) == "FLOPs":
                rate = f"{work[0] / best / 1e9:.0f} GFLOP/s"
            note = f"{rate}, {known['floor_seconds'] / best:.0%} of the limit"
        rows = [
            add_row(
                case=case,
                peer=name,
                ours=_milliseconds(best),
                theirs=_milliseconds(least[name]),
                ratio=least[name] / best,
                floor=floors.get(name),
                note=note,
                facts={"seconds": best, "peer_seconds": least[name], **known},
            )
            for name in peers
        ]
        benchmark.extra_info["ratios"] = {row.peer: row.ratio for row in rows}
        low = [
            f"{row.ratio:.2f} < {row.floor:g} against {row.peer}" for row in rows if not row.passed
        ]
        assert not low, f"{case}: {'; '.join(low)}"
        return least

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A file of every question, and device, that has rows and whose benchmarks have all run."""
    config, found = session.config, session.config.stash[_found]
    folder = config.getoption("--results")
    if folder is None:
        return
    for question, device in dict.fromkeys((row.question, row.device) for row in found.rows):
        if waiting := [item.name for item in found.waiting if _question(item) == question]:
            found.written.append(f"not written: {question}, for {', '.join(waiting)} did not run")
            continue
        about = _about(device)
        own = [row for row in found.rows if (row.question, row.device) == (question, device)]
        result: dict[str, Any] = {
            "machine": about,
            "question": question,
            "rows": [asdict(row) | {"passed": row.passed} for row in own],
        }
        if question in found.failed:
            result["failed"] = found.failed[question]
        if device in config.stash.get(_limits, {}):
            result["limits"] = asdict(config.stash[_limits][device])
        path = folder / f"{question}-{file_stem(about)}.json"
        try:
            write_atomically(path, json.dumps(result, indent=2) + "\n")
            found.written.append(f"written to {path}")
        except UserError as error:
            found.written.append(f"not written: {error}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    found = config.stash[_found]
    for device in dict.fromkeys(row.device for row in found.rows):
        cells = [row.cells() for row in found.rows if row.device == device]
        widths = [max(map(len, column)) for column in zip(HEADER, *cells, strict=True)]
        terminalreporter.section("ratios")
        terminalreporter.write_line(_machine(_about(device)))
        for line in (HEADER, *cells):
            aligned = [
                cell.rjust(width) if number in (1, 3, 4, 5) else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            terminalreporter.write_line("  ".join(aligned).rstrip())
    for line in found.written:
        terminalreporter.write_line(line)


def _about(device: str) -> dict[str, Any]:
    return describe_machine(torch.device("cuda") if device == "cuda" else None)


def _seconds(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _machine(about: dict[str, Any]) -> str:
    """What the figures are of: the processor, how busy it was, the versions and the commit."""
    busy = f"{about['threads']} threads, load {about['load']:.1f}, " if "load" in about else ""
    return f"{about['device']}, {busy}torch {about['torch']}, commit {about['commit']}"
