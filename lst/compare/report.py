"""The runs of a study as tables in the shape of the paper's Tables 3 and 4, curves, and a page.

An accuracy is a mean over seeds, with their sample deviation where there are several. A difference
of two arms counts as *shown* where it is larger than 1.96 standard errors; the error of an arm's
accuracy p over n items and s seeds is √(p·(1−p)/n + v/s) with v the variance over seeds: items are
the same for all seeds, so more seeds do not make more items. That treats two arms as independent
though they answer the same questions, which makes it harder to show a difference, not easier.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lst.compare.arms import ARMS
from lst.compare.study import Budget, Result, Study, run_folder
from lst.errors import UserError
from lst.files import make_folder, replacing, write_atomically, write_json
from lst.train.metrics import read_metrics

TASKS = {"hellaswag": "HellaSwag", "storycloze": "StoryCloze", "topicstorycloze": "TopicStoryCloze"}
MODES = ("S→S", "T→T")
MEASURE = "sum"  # log-probability of the whole ending
Z_95 = 1.96

TITLES: dict[Budget, str] = {
    "compute": "Compute-controlled: the same steps, the same units a step",
    "data": "Data-controlled: the same speech and text",
}

Runs = Mapping[Budget, Mapping[str, Sequence[Result]]]  # by budget and arm, one for each seed


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Of one arm in one task and mode, in per cent."""

    mean: float
    deviation: float | None  # over seeds; None: one seed
    error: float  # standard, over items and seeds
    chance: float

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:.1f}{spread}"


def accuracy(results: Sequence[Result], task: str, mode: str) -> Accuracy | None:
    """None where the arm's stories have no such task or mode."""
    found = [
        score
        for result in results
        for score in result.scores
        if (score["task"], score["mode"], score["measure"]) == (task, mode, MEASURE)
    ]
    if not found:
        return None
    shares = [score["accuracy"] for score in found]
    share = mean(shares)
    variance = stdev(shares) ** 2 if len(shares) > 1 else 0.0
    error = sqrt(share * (1 - share) / found[0]["num_items"] + variance / len(shares))
    return Accuracy(
        mean=100 * share,
        deviation=100 * sqrt(variance) if len(shares) > 1 else None,
        error=100 * error,
        chance=100 * found[0]["chance"],
    )


# Tables -------------------------------------------------------------------------------------------


def format_table(runs: Mapping[str, Sequence[Result]]) -> str:
    """One budget's runs as a Markdown table, an arm to a row."""
    columns = [(task, mode) for task in TASKS for mode in MODES]
    head = ["model", "seeds", "steps", "units", "speech", "text", "TFLOPs", "saved", "minutes"]
    head += [f"{TASKS[task]} {mode}" for task, mode in columns]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    before = mean(r.flops for r in runs["baseline"]) if "baseline" in runs else None
    for name, results in runs.items():
        units, speech, text, flops, seconds = (
            mean(getattr(result, key) for result in results)
            for key in ("units", "speech_units", "text_tokens", "flops", "seconds")
        )
        cells = [ARMS[name].title, str(len(results)), f"{results[0].steps:,}"]
        cells += [f"{units:,.0f}", f"{speech:,.0f}", f"{text:,.0f}", f"{flops / 1e12:,.2f}"]
        cells += ["–" if before is None else f"{1 - flops / before:.1%}", f"{seconds / 60:.1f}"]
        cells += [str(accuracy(results, *column) or "–") for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_UNITS = {"bits/text token": "bits_text", "bits/s of speech": "bits_per_second"}


def format_losses(runs: Mapping[str, Sequence[Result]]) -> str:
    """Bits per text token, and per second of speech, on the validation sets."""
    sets = sorted({name for results in runs.values() for r in results for name in r.valid})
    lines = [
        "| model | " + " | ".join(f"{name} {unit}" for name in sets for unit in _UNITS) + " |",
        "|---" + "|---:" * (len(_UNITS) * len(sets)) + "|",
    ]
    for name, results in runs.items():
        cells = [_mean_of(results, each, key) for each in sets for key in _UNITS.values()]
        lines.append(f"| {ARMS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean_of(results: Sequence[Result], split: str, key: str) -> str:
    values = [r.valid[split][key] for r in results if r.valid.get(split, {}).get(key) is not None]
    return f"{mean(values):.3f}" if values else "–"


# What was and was not shown -----------------------------------------------------------------------


def compare(ours: Accuracy, theirs: Accuracy) -> tuple[str, float, float]:
    """Better, worse or not told apart; the difference, and its 95 % half-width, in points."""
    difference = ours.mean - theirs.mean
    half = Z_95 * sqrt(ours.error**2 + theirs.error**2)
    if abs(difference) <= half:
        return "not told apart", difference, half
    return ("better" if difference > 0 else "worse"), difference, half


def format_differences(runs: Mapping[str, Sequence[Result]]) -> str:
    """Every arm less the baseline, in points of accuracy, as a Markdown table."""
    columns = [(task, mode) for task in TASKS for mode in MODES]
    lines = [
        "| less the baseline | " + " | ".join(f"{TASKS[t]} {m}" for t, m in columns) + " |",
        "|---" + "|---:" * len(columns) + "|",
    ]
    for name, results in runs.items():
        if name != "baseline":
            cells = [_difference(results, runs["baseline"], *column) for column in columns]
            lines.append(f"| {ARMS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(ours: Sequence[Result], theirs: Sequence[Result], task: str, mode: str) -> str:
    first, second = accuracy(ours, task, mode), accuracy(theirs, task, mode)
    if first is None or second is None:
        return "–"
    verdict, difference, half = compare(first, second)
    told = "" if verdict == "not told apart" else f", **{verdict}**"
    return f"{difference:+.1f} ± {half:.1f}{told}"


def at_chance(runs: Runs) -> list[str]:
    """Task and mode in which no arm of any budget is above chance."""
    found = []
    for task, title in TASKS.items():
        for mode in MODES:
            accuracies = [
                each
                for arms in runs.values()
                for results in arms.values()
                if (each := accuracy(results, task, mode)) is not None
            ]
            if accuracies and all(a.mean - Z_95 * a.error <= a.chance for a in accuracies):
                found.append(f"{title} {mode}")
    return found


def page(
    study: Study,
    runs: Runs,
    missing: Sequence[str],
    about: Mapping[str, Any],
    *,
    curves: bool,
) -> str:
    """The page of text: what was run, what came out, and what that does and does not show."""
    parts = [f"# {study.name}: a controlled comparison", study.claim]
    if missing:
        parts.append(
            f"**Not finished.** {len(missing)} runs are missing, and rows that need them are left "
            f"out or rest on fewer seeds: {', '.join(missing)}."
        )
    for budget, title in TITLES.items():
        if runs.get(budget):
            parts += [
                f"## {title}",
                "Units of the global transformer, speech units of 40 ms and text tokens read; "
                "TFLOPs of training with everything counted, and the share of the baseline's "
                "saved; minutes of training and validation on the machine below. Accuracy in per "
                "cent, by the summed log-probability of an ending: mean and deviation over seeds.",
                format_table(runs[budget]),
                "Loss on the validation sets, mean over seeds:",
                format_losses(runs[budget]),
            ]
            if curves:
                parts.append(f"![learning curves, {budget}-controlled](curves-{budget}.png)")
    parts.append("## What was and was not shown")
    flat = at_chance(runs)
    if flat:
        parts.append(f"No arm is above chance in {', '.join(flat)}: these say nothing of any arm.")
    for budget, title in TITLES.items():
        if "baseline" in runs.get(budget, {}):
            parts += [f"{title}, in points of accuracy:", format_differences(runs[budget])]
    parts += [
        "A difference is called better or worse where it is larger than 1.96 standard errors over "
        "items and seeds, which is what stands behind ±; all others are not told apart. Nothing is "
        "corrected for the number of comparisons: of twenty differences that are nothing, one will "
        "look like something.",
        "Made on: " + ", ".join(_facts(about)),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(about: Mapping[str, Any]) -> Iterator[str]:
    for key, value in about.items():
        if isinstance(value, dict):
            yield from _facts(value)
        else:
            yield f"{key} {value}"


# Curves -------------------------------------------------------------------------------------------

_LOSSES = (("valid/text", "bits_text"), ("valid/speech", "bits_per_second"))
_AXES = {"steps": "step", "tokens (M)": "tokens", "training TFLOPs": "flops"}


def draw_curves(runs: Mapping[str, Sequence[Result]], out: Path, path: Path) -> bool:
    """Validation loss of each arm's first seed against steps, tokens and FLOPs.

    False where matplotlib is missing: a report that took hours shall not lack its tables for it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name} is drawn: pip install 'lst[plots]'", flush=True)
        return False
    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.subplots(2, 3, sharey="row")
    for color, (name, results) in enumerate(runs.items()):
        folder = run_folder(out, ARMS[name], results[0].steps, results[0].seed)
        for row, (split, loss) in zip(grid, _LOSSES, strict=True):
            points = curve(folder, split)
            for axes, (label, key) in zip(row, _AXES.items(), strict=True):
                xy = [(p[key], p[loss]) for p in points if p.get(loss) is not None]
                axes.plot(*zip(*xy, strict=True), ".-", color=f"C{color}", label=ARMS[name].title)
                axes.set_xlabel(label)
                axes.grid(alpha=0.3)
    for row, (split, loss) in zip(grid, _LOSSES, strict=True):
        row[0].set_ylabel(f"{split}, {loss.replace('_', ' ')}")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def curve(folder: Path, split: str) -> list[dict[str, Any]]:
    """The validation lines of one set, with how much had been read and computed by then."""
    path = folder / "metrics.jsonl"
    lines = [line for line in read_metrics(path) if line.get("split") == split]
    try:
        return [
            {**line, "tokens": (line["seen_text_tokens"] + line["seen_speech_units"]) / 1e6}
            | {"flops": line["flops"] / 1e12}
            for line in lines
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected every {split} line to tell what was seen, got none of {error}"
        ) from None


# All of it ----------------------------------------------------------------------------------------


def write_report(study: Study, runs: Runs, missing: Sequence[str], out: Path, about: Any) -> Path:
    """Write ``results.json``, ``curves-*.png`` and ``report.md`` into ``out``; the last's path."""
    held = {
        budget: {name: [asdict(each) for each in results] for name, results in arms.items()}
        for budget, arms in runs.items()
    }
    make_folder(out)
    values = {"study": study.name, "machine": about, "missing": list(missing), "runs": held}
    write_json(out / "results.json", values)
    curves = [
        draw_curves(arms, out, out / f"curves-{budget}.png")
        for budget, arms in runs.items()
        if arms
    ]
    path = out / "report.md"
    write_atomically(path, page(study, runs, missing, about, curves=all(curves)))
    return path
