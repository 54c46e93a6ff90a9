"""Result files to docs/performance.md and its plots. Nothing stands there that no file says.

    python -m benchmarks.report [--results benchmarks/results] [--out docs/performance.md]

Of each question and device the newest file counts. The same files give the same bytes. The plots
(`benchmarks.plots`) are written to the folder beside the page that is named as it is.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import PICTURES, draw
from benchmarks.result_file import Result, Row, reading
from lst.errors import UserError, run_command
from lst.files import make_folder, write_atomically
from lst.machine import device_stem
from lst.strict_json import read_json


def read_results(folder: Path) -> list[Result]:
    """The newest file of every question and device, in order of questions.

    Raises:
        UserError: there is none, or one is not a result file.
    """
    newest: dict[tuple[str, str], Result] = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        with reading(path):
            about = content["machine"]
            named = [about[name] for name in ("device", "torch", "python", "commit", "date")]
            question = _question(path, content)
            if not all(isinstance(each, str) for each in (question, *named)):
                raise ValueError(f"expected texts for the question and the machine, got {named}")
            dict(about["libraries"])
        result = Result(path=path, question=question, content=content)
        before = newest.get((question, about["device"]))
        if before is None or before.machine["date"] <= about["date"]:
            newest[question, about["device"]] = result
    if not newest:
        raise UserError(f"{folder}: expected result files (*.json), got none")
    order = list(SECTIONS)
    return sorted(
        newest.values(),
        key=lambda each: (
            order.index(each.question) if each.question in order else len(order),
            each.question,
            each.path.name,
        ),
    )


def _question(path: Path, content: dict[str, Any]) -> str:
    if "question" in content:
        return content["question"]
    if "figures" in content and "targets" in content:
        return "gpu"
    named = [name for name in SECTIONS if path.name.startswith(f"{name}-")]
    return named[0] if named else path.name.split("-")[0]


# --- the page -------------------------------------------------------------------------------------

PREAMBLE = """# Performance

`python -m benchmarks.report` generates this page from the [result files]({results}), made by

- `pytest benchmarks/ --benchmark-only --results benchmarks/results`: everything that needs no GPU;
- `python -m benchmarks.gpu --out benchmarks/results`: the kernels on a GPU;
- `pytest benchmarks/ -m gpu --benchmark-only --results benchmarks/results`: whole models on a GPU.

{gpu}Unless stated otherwise, a time is the shortest of several rounds. A ratio is the peer's time
(or memory) divided by ours, so above 1 ours is better; the two are measured in turn in one process.
A benchmark fails if a figure is below its "at least" or above its "at most".
"""
NO_GPU = "There are no results of a GPU yet.\n\n"


def render(results: Sequence[Result], out: Path, pictures: Sequence[Path]) -> str:
    """The page; links are relative to its folder."""
    folder = os.path.relpath(results[0].path.parent, out.parent)
    gpu = "" if any("cuda" in result.machine for result in results) else NO_GPU
    blocks = [PREAMBLE.format(results=Path(folder).as_posix(), gpu=gpu)]
    for question in dict.fromkeys(result.question for result in results):
        own = [result for result in results if result.question == question]
        title, body = SECTIONS.get(question, (question.capitalize(), generic_section))
        blocks.append(f"## {title}\n")
        for result in own:
            link = Path(os.path.relpath(result.path, out.parent)).as_posix()
            with reading(result.path):
                blocks.append(f"*{result.source()}* ([file]({link}))\n")
                for name, why in result.content.get("failed", {}).items():
                    blocks.append(f"**`{name}` failed, and has no figures:** {why}\n")
                blocks.extend(f"{block}\n" for block in body(result))
            for picture in pictures:
                kind = picture.stem.removesuffix(f"-{device_stem(result.machine)}")
                if PICTURES.get(kind, ("", ""))[0] == question and kind != picture.stem:
                    where = Path(os.path.relpath(picture, out.parent)).as_posix()
                    blocks.append(f"![{PICTURES[kind][1]}]({where})\n")
    return "\n".join(blocks)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table whose first ``left`` columns, and the last if its head is empty, are of words."""
    rules = ["---" if at < left else "---:" for at in range(len(header))]
    if not header[-1]:
        rules[-1] = "---"
    cells = [header, rules, *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def generic_section(result: Result) -> Iterator[str]:
    """The rows as they are."""
    if any("of the limit" in row.get("note", "") for row in result.rows):
        yield _limits(result)
    lines = []
    for row in result.rows:
        floor = "" if row["floor"] is None else f"{row['floor']:.3g}"
        missed = "" if row.get("passed", True) else "**too low** "
        lines.append(
            (
                row["case"], row["peer"], row["ours"], row["theirs"], f"{row['ratio']:.2f}",
                floor, (missed + row.get("note", "")).strip(),
            )
        )  # fmt: skip
    if lines:
        yield markdown(("case", "peer", "ours", "peer's", "ratio", "at least", ""), lines, left=2)


def _limits(result: Result) -> str:
    limits = result.content["limits"]
    dtype = "bfloat16" if "cuda" in result.machine else "float32"
    return (
        f"Limits measured in the same run: {limits['bytes_per_second'] / 1e9:.1f} GB/s in a large "
        f"copy (read + written), {limits['flops_per_second'] / 1e9:.0f} GFLOP/s in a {dtype} "
        "matrix product. What is still in the caches can be faster than a large copy."
    )


def data_section(result: Result) -> Iterator[str]:
    yield "Times and rates are medians of the rounds, beside the slowest and the fastest round."
    yield from generic_section(result)


def model_section(result: Result) -> Iterator[str]:
    """Costs beside the baseline, rates, memory."""
    rows = [row for row in result.facts("model", "what") if not row["facts"].get("sweep")]
    header = (
        "documents", "model", "FLOPs", "time", "at most", "ms", "tokens/s", "units/s",
        "hours of speech/s",
    )  # fmt: skip
    groups = (
        (
            "train",
            "content",
            "Forward + backward at the same content, beside the token-level model",
        ),
        ("forward", "content", "Forward alone at the same content"),
        ("train", "units", "Forward + backward at the same number of units; costs are per token"),
    )
    for what, same, told in groups:
        lines = []
        for row in rows:
            facts = row["facts"]
            if (facts["what"], facts["same"]) != (what, same):
                continue
            ceiling = "" if row["floor"] is None else f"{1 / row['floor']:.2f}"
            if not row["passed"]:
                ceiling = f"**{ceiling} missed**"
            lines.append(
                (
                    facts["content"], facts["model"], f"× {facts['flops_ratio']:.3f}",
                    f"× {facts['time_ratio']:.3f}", ceiling, f"{facts['seconds'] * 1e3:,.0f}",
                    f"{facts['tokens_per_second']:,.0f}", f"{facts['units_per_second']:,.0f}",
                    f"{facts['hours_per_second']:.4f}",
                )
            )  # fmt: skip
        if lines:
            yield f"**{told}**"
            yield markdown(header, lines, left=2)
    memory = [row for row in result.facts("bytes", "peer_bytes") if "model" in row["facts"]]
    if memory:
        yield "**Peak memory that a training pass adds to the weights**"
        yield markdown(
            ("documents", "model", "MB", "beside the token-level model"),
            (
                (
                    row["facts"]["content"], row["facts"]["model"],
                    f"{row['facts']['bytes'] / 1e6:,.0f}",
                    f"× {row['facts']['bytes'] / row['facts']['peer_bytes']:.2f}",
                )
                for row in memory
            ),
            left=2,
        )  # fmt: skip


def gap_section(result: Result) -> Iterator[str]:
    """The table that adds up: every part's time, its floor, and what would close the gap."""
    if "limits" in result.content:
        yield _limits(result)
    rows = result.facts("part", "kind", "step_seconds")
    lines = []
    total = floors = 0.0
    for row in rows:
        facts = row["facts"]
        total += facts["seconds"]
        floors += facts["floor_seconds"]
        lines.append(
            (
                facts["part"].replace("_", " "), facts["kind"],
                f"{facts['seconds'] * 1e3:.1f}", f"{facts['seconds'] / facts['step_seconds']:.1%}",
                f"{facts['floor_seconds'] * 1e3:.1f}",
                facts["bound"] if facts["floor_seconds"] else "", _times(facts),
                facts["remedy"],
            )
        )  # fmt: skip
    if rows:
        lines.append(
            (
                "**sum**", "", f"{total * 1e3:.1f}",
                f"{total / rows[0]['facts']['step_seconds']:.1%}", f"{floors * 1e3:.1f}", "",
                f"{total / floors:.2f}" if floors else "", "",
            )
        )  # fmt: skip
        step = rows[0]["facts"]["step_seconds"]
        model, *_ = rows[0]["case"].partition(",")
        yield (
            f"A training step of {rows[0]['facts']['tokens']:,} tokens of {model} takes "
            f"{step * 1e3:.0f} ms. Time over floor is 1 where nothing is lost."
        )
        if any(row["facts"]["seconds"] < 0 for row in rows):
            yield "**The operations took longer, watched, than the whole step: a busy machine.**"
        header = ("part", "kind", "ms", "share", "floor, ms", "by", "time over floor", "")
        yield markdown(header, lines, left=2)


def _times(facts: Row) -> str:
    floor = facts["floor_seconds"]
    return f"{facts['seconds'] / floor:.2f}" if floor else ""


def steps_section(result: Result) -> Iterator[str]:
    """Training steps of presets on a GPU."""
    lines = [
        (
            step["case"], f"{step['rows']} × {step['units_per_row']:,}",
            f"{step['seconds_per_step']['median'] * 1e3:,.0f}", f"{step['units_per_second']:,.0f}",
            f"{step['tokens_per_second']:,.0f}",
            "" if step["mfu"] is None else f"{step['mfu']:.1%}",
            f"{step['peak_memory_bytes'] / 2**30:.1f}",
        )
        for step in result.content.get("steps", [])
    ]  # fmt: skip
    if lines:
        yield markdown(
            ("case", "rows × units", "median ms", "units/s", "tokens/s", "MFU", "peak GiB"), lines
        )


def gpu_section(result: Result) -> Iterator[str]:
    """Targets of the kernels on a GPU, each with the worst of its cases."""
    lines = []
    targets = result.content["targets"]
    for name in dict.fromkeys(each["target"] for each in targets):
        own = [each for each in targets if each["target"] == name]
        worst = min(
            own,
            key=lambda each: (
                each["got"] / each["at_least"]
                if "at_least" in each
                else each["at_most"] / each["got"]
            ),
        )
        bound = f"≥ {worst['at_least']:g}" if "at_least" in worst else f"≤ {worst['at_most']:g}"
        met = "met" if worst["met"] else "**not met**"
        lines.append((name, worst["case"], bound, f"{worst['got']:.3g}", met))
    yield "Of each target the worst of its cases:"
    yield markdown(("target", "case", "bound", "got", ""), lines, left=2)
    wrong = [each for each in result.content["checks"] if each["outcome"] != "passed"]
    yield f"{len(result.content['checks']) - len(wrong)} checks passed, {len(wrong)} did not."
    yield "Medians of the device's time; shares are of the bandwidth of the copy:"
    yield markdown(
        ("case", "what", "by", "ms", "rate"),
        (
            (
                each.get("case", ""), each.get("what", ""), each["name"],
                f"{each['milliseconds']['median']:.3f}", _rate(each),
            )
            for each in result.content["figures"]
            if "milliseconds" in each
        ),
        left=3,
    )  # fmt: skip
    for each in result.content["not_measured"]:
        yield f"Not measured: {each['what']}: {each['reason']}"


def _rate(figure: dict[str, Any]) -> str:
    """By what a figure's op is bound."""
    if "gigabytes_per_second" in figure:
        return f"{figure['gigabytes_per_second']:,.0f} GB/s"
    if "share_of_copy" in figure:
        return f"{figure['share_of_copy']:.0%}"
    return f"{figure['tflops']:,.0f} TFLOP/s" if "tflops" in figure else ""


def vocoder_section(result: Result) -> Iterator[str]:
    """Speech that was units, beside what it was."""
    learnt = result.content["training"]
    yield (
        f"A vocoder of size `{learnt['size']}` learnt for {learnt['steps']:,} steps, "
        f"{learnt['seconds'] / 60:.0f} minutes on one thread of a machine that others used "
        f"(load {result.machine['load']:.1f}), {learnt['alone_steps']:,} of them without "
        f"discriminators; it heard {learnt['seconds_heard'] / 3600:.1f} hours of speech by "
        "eight voices. Distortion is mel cepstral, in dB; characters are read by the CTC model of "
        "`benchmarks/alignment.py`; units are what comes out when the sound is encoded again. "
        "The unknown voice is answered in a known one, so distance from it counts the change of "
        "voice."
    )
    header = (
        "held-out stories by", "sound", "distortion", "within words", "wrong characters",
        "units kept", "level, dB", "times real time",
    )  # fmt: skip
    lines = []
    for part in ("known_voices", "unknown_voice"):
        for way in ("original", "inversion", "vocoder"):
            got = result.content[part][way]
            speed = got["times_real_time"]
            lines.append(
                (
                    part.replace("_", " "), way, f"{got['distortion_db']:.2f}",
                    f"{got['distortion_db_in_words']:.2f}", f"{got['character_error_rate']:.1%}",
                    f"{got['share_of_units_kept']:.1%}",
                    f"{got['level_db_above_the_original']:+.1f}",
                    "" if speed is None else f"{speed:.1f}",
                )
            )  # fmt: skip
    yield markdown(header, lines, left=2)


def asr_section(result: Result) -> Iterator[str]:
    """Word error rates of fine-tuned models, after so many steps."""
    asked = result.content["asked"]
    begin = "From scratch" if asked["from_scratch"] else "From the demo's models"
    yield (
        f"{begin}, {asked['rows']} × {asked['units_per_row']} units a step, learning rate "
        f"{asked['lr']:g}, on sentences. Heard: hours of speech trained on, repetitions counted; "
        "TFLOPs: of that training, by lst.flops. In brackets 95 % intervals."
    )
    lines = []
    for run in result.content["runs"]:
        for point in run["points"]:
            words, characters = point["scores"]
            lines.append(
                (
                    run["preset"], point["set"], f"{point['step']:,}",
                    f"{point['hours_heard']:.1f}", f"{point['training_flops'] / 1e12:.1f}",
                    f"{words['rate']:.1%} ({words['low']:.1%} – {words['high']:.1%})",
                    f"{characters['rate']:.1%}",
                    f"{point['units_per_second_of_speech']:.1f}",
                )
            )  # fmt: skip
    header = (
        "model", "said", "steps", "heard", "TFLOPs", "WER", "CER", "units per second of speech"
    )  # fmt: skip
    yield markdown(header, lines, left=2)


def elsewhere(page: str) -> Callable[[Result], Iterator[str]]:
    def section(result: Result) -> Iterator[str]:
        yield f"See {page}."

    return section


SECTIONS: dict[str, tuple[str, Callable[[Result], Iterator[str]]]] = {
    "model": ("Whole models: patches beside token by token", model_section),
    "decode": ("Generating speech and text", generic_section),
    "gap": ("From kernels to the model: where a training step's time goes", gap_section),
    "kernels": ("Kernels on the CPU", generic_section),
    "gpu": ("Kernels on a GPU", gpu_section),
    "train-steps": ("Training steps on a GPU", steps_section),
    "blt": ("BLT in transformers, with our kernels and without", generic_section),
    "data": ("Reading: records to batches", data_section),
    "speech": ("Forced alignment", generic_section),
    "vocoder": ("Sound from units", vocoder_section),
    "startup": ("Starting up", generic_section),
    "alignment": ("How near alignments come", elsewhere("[data.md](data.md)")),
    "asr": ("Learning to transcribe: patches beside tokens", asr_section),
    "demo": ("What the demo learns", elsewhere("[the README](../README.md)")),
}


# --- python -m benchmarks.report ------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    if options.out.is_dir() or not options.out.suffix:  # the plots' folder has the name without
        raise UserError(f"--out {options.out}: expected a file to write, such as performance.md")
    results = read_results(options.results)
    make_folder(options.out.parent)
    folder = options.out.with_suffix("")
    pictures = draw(results, folder)
    for stale in set(folder.glob("*.svg")) - set(pictures):
        stale.unlink()
    write_atomically(options.out, render(results, options.out, pictures))
    print(f"written to {options.out}, {len(pictures)} plots in {folder}")


if __name__ == "__main__":
    run_command(main)
