"""What does the demo learn? Trains the demo presets, and writes one result file about all of them.

    python -m benchmarks.demo --out benchmarks/results [--presets demo demo-baseline] [--runs runs]

A run that is complete already is not trained again, so a stopped measurement goes on where it was
(after ``python -m lst.train --resume``, where a run was cut). The file holds, for each preset, the
time, the last training and validation losses and the story completion, with machine, versions and
commit.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lst.errors import UserError, run_command
from lst.files import make_folder, write_json
from lst.machine import describe_machine, file_stem
from lst.presets import PRESETS
from lst.train.loop import train


def outcome(name: str, folder: Path, corpus: Path) -> dict[str, Any]:
    """Train a preset in ``folder``, unless that is done, and read what came out."""
    stories = folder / "story_completion.json"
    if not folder.exists():
        preset = PRESETS[name]
        train(replace(preset, data=replace(preset.data, corpus=corpus), out=folder))
    if not stories.exists():
        raise UserError(f"{folder}: expected a finished run, got no {stories.name}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {line["split"]: line for line in lines}
    return {
        "preset": name,
        "steps": last["train"]["step"],
        "seconds": last["train"]["seconds"],
        "last_metrics": last,
        "story_completion": json.loads(stories.read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument(
        "--presets", nargs="+", default=["demo", "demo-baseline"], choices=list(PRESETS)
    )
    parser.add_argument("--corpus", type=Path, default=Path("data/demo"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    options = parser.parse_args()
    make_folder(options.out)
    about = describe_machine()
    runs = [outcome(name, options.runs / name, options.corpus) for name in options.presets]
    path = options.out / f"demo-{file_stem(about)}.json"
    corpus = json.loads((options.corpus / "corpus.json").read_text())
    write_json(path, {"machine": about, "corpus": corpus, "runs": runs})
    print(f"written to {path}")


if __name__ == "__main__":
    run_command(main)
