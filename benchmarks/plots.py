"""The plots of docs/performance.md, each of one result file:

roofline      FLOP/s of our kernels over FLOPs a byte, under the limits measured in the same run
throughput    tokens a second over the share of speech, a line for every size of patches
length        seconds over the length of a sequence, ours and its peers
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.result_file import Result, reading
from lst.errors import UserError
from lst.files import make_folder
from lst.machine import device_stem

PICTURES = {  # name: the section that shows it, what it shows
    "throughput": ("model", "Tokens a second over the share of speech, by size of patches"),
    "roofline": ("kernels", "The kernels under the machine's limits"),
    "length": ("blt", "Seconds over the length of a sequence, ours and its peers"),
}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """All plots that the results have data for.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("no plots can be drawn: pip install 'lst[plots]'") from None
    style = {
        "svg.hashsalt": "lst",  # the same ids in every run
        "svg.fonttype": "path",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    drawn = []
    with matplotlib.rc_context(style):
        for result in results:
            for name, (question, _) in PICTURES.items():
                if result.question != question:
                    continue
                path = folder / f"{name}-{device_stem(result.machine)}.svg"
                with reading(result.path):
                    if _DRAWERS[name](result, path):
                        drawn.append(path)
    return drawn


def _axes(width: float = 7.5) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # pyplot's state and backends are not needed

    figure = Figure(figsize=(width, 4.8), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, result: Result, path: Path) -> bool:
    source = textwrap.fill(result.source(), 100)  # what the narrowest figure holds
    figure.supxlabel(source, fontsize=7, color="#555555")
    make_folder(path.parent)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    # matplotlib leaves blanks at the ends of lines
    path.write_text(re.sub(r"[ \t]+$", "", path.read_text(), flags=re.M))
    return True


COLOURS = ("#1f5fa8", "#d1711b", "#2e8540", "#8b3fa0", "#777777", "#b03030", "#0f8a8a", "#a08000")
MARKERS = "osD^vP*X"


def draw_roofline(result: Result, path: Path) -> bool:
    rows = result.facts("flops", "bytes", "seconds")
    if not rows or "limits" not in result.content:
        return False
    limits = result.content["limits"]
    bandwidth, rate = limits["bytes_per_second"], limits["flops_per_second"]
    figure, axes = _axes(8.5)
    every = [row["facts"] for row in rows]
    points = [(each["flops"] / each["bytes"], each["flops"] / each["seconds"]) for each in every]
    ends = [min(x for x, _ in points) / 2, max(*(x for x, _ in points), rate / bandwidth) * 2]
    corner = rate / bandwidth
    roof = [ends[0], corner, ends[1]]
    axes.plot(roof, [min(rate, bandwidth * x) / 1e9 for x in roof], color="#222222", linewidth=1.5)
    axes.annotate(
        f"copy {bandwidth / 1e9:.1f} GB/s", (ends[0], bandwidth * ends[0] / 1e9),
        xytext=(14, 0), textcoords="offset points", fontsize=8, va="center",
    )  # fmt: skip
    axes.annotate(
        f"product {rate / 1e9:.0f} GFLOP/s", (ends[1], rate / 1e9),
        xytext=(0, 4), textcoords="offset points", fontsize=8, ha="right",
    )  # fmt: skip
    kernels: list[str] = []  # each has a colour of its own; forward alone is hollow
    for (x, y), row in zip(points, rows, strict=True):
        kernel, _, what = row["case"].rpartition(": ")
        if kernel not in kernels:
            kernels.append(kernel)
        number = kernels.index(kernel)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            x, y / 1e9, linestyle="none", marker=MARKERS[number % len(MARKERS)], markersize=7,
            markerfacecolor="white" if what == "forward" else colour, color=colour,
            label=row["case"],
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    axes.legend(loc="lower right", fontsize=7)
    return _save(figure, result, path)


def draw_throughput(result: Result, path: Path) -> bool:
    rows = result.facts("sweep", "speech_share", "patch_size", "tokens_per_second")
    if not rows:
        return False
    figure, axes = _axes()
    sizes = sorted({row["facts"]["patch_size"] for row in rows})
    for number, size in enumerate(sizes):
        line = sorted(
            (row["facts"]["speech_share"], row["facts"]["tokens_per_second"])
            for row in rows
            if row["facts"]["patch_size"] == size
        )
        axes.plot(
            [100 * share for share, _ in line], [rate for _, rate in line],
            marker=MARKERS[number], color=COLOURS[number],
            label="token-level" if size == 1 else f"static patches of {size}, text global",
        )  # fmt: skip
    axes.set(xlabel="share of speech in the tokens, %", ylabel="tokens/s, forward + backward")
    axes.set_ylim(bottom=0)
    axes.legend()
    return _save(figure, result, path)


def draw_length(result: Result, path: Path) -> bool:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    rows = [
        row
        for row in result.rows
        if {"length", "seconds", "peer_seconds"} <= row.get("facts", {}).keys()
    ]
    if not rows:
        return False
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        facts = row["facts"]
        lines.setdefault("ours", {})[facts["length"]] = facts["seconds"]
        lines.setdefault(row["peer"], {})[facts["length"]] = facts["peer_seconds"]
    figure, axes = _axes()
    for number, (name, line) in enumerate(lines.items()):
        axes.plot(
            list(line), list(line.values()), marker=MARKERS[number], color=COLOURS[number],
            label="with lst_kernels" if name == "ours" else f"transformers, {name}",
        )  # fmt: skip
    lengths = sorted(lines["ours"])
    axes.set(xscale="log", yscale="log", xlabel="bytes in a sequence", ylabel="seconds")
    axes.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend()
    return _save(figure, result, path)


_DRAWERS = {"roofline": draw_roofline, "throughput": draw_throughput, "length": draw_length}
