"""``python -m lst.export CHECKPOINT --llama OUT``: a trained model in another project's format."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from safetensors.torch import save_file

from lst.errors import UserError, run_command
from lst.files import fsync, writing
from lst.model.llama import CONFIG, WEIGHTS, to_llama
from lst.train.checkpoint import load_model

__all__ = ["ExportConfig", "export_llama"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write the global transformer of a model that was started from a Llama as a Llama again."""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # or a run folder, for its newest
    llama: Path  # the folder to make: config.json, model.safetensors and the tokenizer
    positions: int | None = None  # max_position_embeddings; None: units of a training sequence


def export_llama(options: ExportConfig) -> Path:
    """Export, and return the folder.

    Raises:
        UserError: no checkpoint, one that was not started from a Llama, or a folder that is there
            already or cannot be written.
    """
    out = options.llama
    if out.exists():
        raise UserError(f"{out}: expected a folder to make, got one that is there")
    model, config, vocabulary, tokenizer = load_model(options.checkpoint, "cpu")
    positions = options.positions or config.data.units_per_sequence
    try:
        values, weights = to_llama(config.model, vocabulary, model.weights(), positions=positions)
    except UserError as error:
        raise UserError(f"{options.checkpoint}: {error}") from None
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with writing(out):
            temporary.mkdir(parents=True)
            (temporary / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            tokenizer.save(temporary / tokenizer.file_name)
            for path in [*temporary.iterdir(), temporary]:
                fsync(path)
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def main() -> None:
    options = tyro.cli(ExportConfig, prog="python -m lst.export")
    print(f"written: {export_llama(options)}")


if __name__ == "__main__":
    run_command(main)
