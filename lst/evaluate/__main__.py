"""``python -m lst.evaluate CHECKPOINT``: score a checkpoint on story completion."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lst.data.interleave import Mode
from lst.data.records import read_items
from lst.errors import UserError, run_command
from lst.evaluate.story_completion import format_table, story_completion
from lst.files import Location, write_json
from lst.train.checkpoint import load_model
from lst.train.corpus import made_with

MODES: dict[str, Mode] = {"S2S": "S→S", "T2T": "T→T", "S2T": "S→T", "T2S": "T→S"}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Story completion of a trained checkpoint."""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # a run folder or one of its checkpoints
    items: Path | None = None  # folder of story items; None: that of the corpus trained on
    modes: tuple[Literal["S2S", "T2T", "S2T", "T2S"], ...] = ("S2S", "T2T")  # prompt to ending
    boundary_noise_ms: float | None = None  # of aligned patches; None: as in training
    device: str = "cpu"
    json: Path | None = None  # also write the scores to this file


def main() -> None:
    config = tyro.cli(EvaluateConfig, description=__doc__)
    model, trained, vocabulary, tokenizer = load_model(config.checkpoint, config.device)
    patching = trained.data.patching
    if config.boundary_noise_ms is not None:
        if patching.strategy != "aligned":
            raise UserError(
                "--boundary-noise-ms: expected a model of aligned patches, got one of strategy "
                f"{patching.strategy!r}, which is evaluated without an aligner"
            )
        patching = replace(patching, boundary_noise_ms=config.boundary_noise_ms)
    corpus = Location(trained.data.corpus)
    folder = corpus / "items" if config.items is None else Location(config.items)
    if not folder.exists():
        raise UserError(f"{folder}: expected a folder of stories to complete, got none; --items")
    items = read_items(folder, **made_with(corpus, tokenizer))
    scores = story_completion(
        model.eval(),
        items,
        vocabulary,
        tokenizer,
        trained.model.plan(),
        patching=patching,
        modes=[MODES[mode] for mode in config.modes],
        device=config.device,
    )
    print(format_table(scores))
    if config.json is not None:
        write_json(config.json, [asdict(score) for score in scores])


if __name__ == "__main__":
    run_command(main)
