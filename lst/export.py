"""``python -m lst.export CHECKPOINT``: a trained model as a folder to share, ours or a Llama's."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from safetensors.torch import save_file

from lst.errors import UserError, expect_positive, run_command
from lst.files import making_folder
from lst.model.llama import CONFIG, WEIGHTS, to_llama
from lst.pretrained import save_pretrained
from lst.train.checkpoint import load_model, load_trained

__all__ = ["ExportConfig", "export", "export_llama", "export_pretrained"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained model for others to load: by lst.pretrained.from_pretrained, or, of a model
    that was started from a Llama, its global transformer as a Llama again."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run folder, a checkpoint, a pretrained folder, or the name of one on the hub."""
    pretrained: Path | None = None
    """A folder to make: all that any command here needs of a model."""
    codebook: Path | None = None
    """Of the model's speech units, for --pretrained; None: the one of its corpus."""
    llama: Path | None = None
    """A folder to make: config.json, model.safetensors and the tokenizer."""
    positions: int | None = None
    """Its max_position_embeddings, for --llama; None: units of a training sequence."""

    def __post_init__(self) -> None:
        if (self.pretrained is None) == (self.llama is None):
            given = "neither" if self.llama is None else "both"
            raise UserError(f"expected --pretrained or --llama, got {given}")
        if self.codebook is not None and self.pretrained is None:
            raise UserError("--codebook: expected it with --pretrained alone")
        if self.positions is not None and self.llama is None:
            raise UserError("--positions: expected it with --llama alone")
        expect_positive(self, "positions")


def export(options: ExportConfig) -> Path:
    """Export as the options say, and return the folder."""
    return export_llama(options) if options.pretrained is None else export_pretrained(options)


def export_pretrained(options: ExportConfig) -> Path:
    """Write a folder of :func:`lst.pretrained.save_pretrained`, and return it.

    Raises:
        UserError: no checkpoint; a codebook of other units; a folder that is there already or
            cannot be written.
    """
    assert options.pretrained is not None
    trained = load_trained(options.checkpoint, "cpu")
    if options.codebook is not None:
        trained = replace(trained, codebook_file=options.codebook)
    save_pretrained(trained, options.pretrained)
    return options.pretrained


def export_llama(options: ExportConfig) -> Path:
    """Write a Llama, and return the folder.

    Raises:
        UserError: no checkpoint, one that was not started from a Llama, or a folder that is there
            already or cannot be written.
    """
    assert options.llama is not None
    with making_folder(options.llama) as folder:
        model, config, vocabulary, tokenizer = load_model(options.checkpoint, "cpu")
        positions = options.positions or config.data.units_per_sequence
        try:
            values, weights = to_llama(
                config.model, vocabulary, model.weights(), positions=positions
            )
        except UserError as error:
            raise UserError(f"{options.checkpoint}: {error}") from None
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save(folder / tokenizer.file_name)
    return options.llama


def main() -> None:
    options = tyro.cli(ExportConfig, prog="python -m lst.export")
    print(f"written: {export(options)}")


if __name__ == "__main__":
    run_command(main)
