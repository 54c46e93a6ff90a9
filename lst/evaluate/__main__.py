"""``python -m lst.evaluate CHECKPOINT --task NAME``: measure what a checkpoint can do."""

from dataclasses import asdict
from typing import Any

import tyro

from lst.errors import run_command
from lst.evaluate.tasks import TASKS, EvaluateConfig
from lst.files import write_json
from lst.machine import describe_machine
from lst.train.checkpoint import load_trained


def main() -> None:
    config = tyro.cli(EvaluateConfig, prog="python -m lst.evaluate")
    trained = load_trained(config.checkpoint, config.device)
    trained.model.eval()
    report = TASKS[config.task](config, trained)
    print(report.table)
    if config.json is not None:
        asked: dict[str, Any] = {
            name: str(value) if hasattr(value, "__fspath__") else value
            for name, value in asdict(config).items()
        }
        about = {"asked": asked, "machine": describe_machine()}
        write_json(config.json, about | report.values)


if __name__ == "__main__":
    run_command(main)
