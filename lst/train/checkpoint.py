"""Checkpoints: complete or absent, self-contained, and loaded without running any code.

::

    checkpoints/step-00000100/
        model/*.safetensors         weights            \\ torch.distributed.checkpoint with its
        optimizer/*.safetensors     AdamW's moments    / safetensors storage: no pickle
        config.json                 the run's configuration
        tokenizer.model             or tokenizer.json
        state.json                  the rest (State), and every other file's size

A checkpoint is written under a temporary name, pushed to the disk and renamed. It counts as
complete where ``state.json``, written last, is there and every file that it lists has its size.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from lst.errors import UserError
from lst.model import LanguageModel, build_model
from lst.train.config import TrainConfig, read_config, to_json
from lst.train.distributed import SharedError, World
from lst.train.optimizer import optimizer_tensors
from lst.train.run_folder import (
    CHECKPOINTS,
    CONFIG,
    fsync,
    remove_folder,
    write_json,
    writing,
)
from lst.vocabulary import Tokenizer, Vocabulary

FORMAT = 1  # of state.json; raised when an older reader would misread a newer checkpoint
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class State:
    """What a run needs beside its tensors to go on as if it had never stopped."""

    step: int = 0  # optimizer steps taken
    validated: int = 0  # the step of the last validation
    seconds: float = 0.0  # of the run so far
    lanes: dict[int, dict[str, Any]] = field(default_factory=dict)  # where each stands in the data
    vocabulary: Vocabulary
    datasets: dict[str, str]  # fingerprints of what it trains on


# Saving -------------------------------------------------------------------------------------------


def save_checkpoint(
    config: TrainConfig,
    state: State,
    tokenizer: Tokenizer,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    world: World,
) -> Path:
    """Write a checkpoint and remove all but the newest ``config.keep``; every rank calls it.

    Args:
        state: ``lanes`` are the rank's own; those of all ranks are written.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: it cannot be written; the checkpoints before it are still there.
    """
    folder = config.out / CHECKPOINTS / f"step-{state.step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    with world.together():
        if world.is_main:
            for left_over in folder.parent.glob(".step-*.tmp"):  # by a save that died
                remove_folder(left_over)
            with writing(temporary):
                temporary.mkdir(parents=True)
    _save_tensors(temporary / "model", model.state_dict())
    _save_tensors(temporary / "optimizer", optimizer_tensors(model, optimizer))
    lanes = {lane: value for part in world.gather(state.lanes) for lane, value in part.items()}
    with world.together():
        if world.is_main:
            write_json(temporary / CONFIG, to_json(config))
            with writing(temporary):
                tokenizer.save(temporary / tokenizer.file_name)
                files = _sync_files(temporary)
            write_json(temporary / STATE, _state_json(state, lanes, files))
            remove_folder(folder)  # where it exists it is incomplete, or this very step again
            with writing(folder):
                temporary.rename(folder)
                fsync(folder.parent)
            _remove_old(config.out, config.keep)
    return folder


def _save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    with _quiet_alone():
        try:
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
        except CheckpointException as error:
            for cause in error.failures.values():
                if isinstance(cause[0], OSError):
                    reason = cause[0].strerror
                    raise SharedError(f"{folder}: cannot be written ({reason})") from None
            raise


def _sync_files(folder: Path) -> dict[str, int]:
    """Push everything in ``folder`` to the disk; sizes of its files by relative name."""
    paths = sorted(folder.rglob("*"))
    for path in [*paths, folder]:
        fsync(path)
    return {str(p.relative_to(folder)): p.stat().st_size for p in paths if p.is_file()}


def _state_json(state: State, lanes: dict[int, Any], files: dict[str, int]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": state.step,
        "validated": state.validated,
        "seconds": state.seconds,
        "vocabulary": asdict(state.vocabulary),
        "datasets": state.datasets,
        "lanes": {str(lane): lanes[lane] for lane in sorted(lanes)},
        "files": files,
    }


def _remove_old(out: Path, keep: int) -> None:
    for folder in complete_checkpoints(out)[:-keep]:
        remove_folder(folder)


# Finding ------------------------------------------------------------------------------------------


def complete_checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    folders = sorted((out / CHECKPOINTS).glob("step-*"))
    return [folder for folder in folders if _missing(folder) is None]


def newest_checkpoint(out: Path) -> Path:
    """The newest complete checkpoint of a run folder. Raises UserError where there is none."""
    complete = complete_checkpoints(out)
    if not complete:
        raise UserError(f"{out}: expected a complete checkpoint in {CHECKPOINTS}/, got none")
    return complete[-1]


def _missing(folder: Path) -> str | None:
    """What keeps a checkpoint from being complete; None where nothing does."""
    try:
        files = json.loads((folder / STATE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"no readable {STATE}"
    for name, size in files.items():
        path = folder / name
        got = path.stat().st_size if path.is_file() else None
        if got != size:
            return f"{name}: expected {size} bytes, got {'no file' if got is None else got}"
    return None


def find_checkpoint(path: Path) -> Path:
    """``path`` itself where it is a checkpoint, the newest of its own where it is a run folder."""
    if not path.is_dir():
        raise UserError(f"{path}: expected a checkpoint or a run folder, got no folder")
    if not (path / STATE).exists():
        return newest_checkpoint(path)
    missing = _missing(path)
    if missing is not None:
        raise UserError(f"{path}: expected a complete checkpoint, got one where {missing}")
    return path


# Loading ------------------------------------------------------------------------------------------


def read_state(folder: Path) -> State:
    """Read ``state.json`` of a complete checkpoint."""
    path = folder / STATE
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise UserError(f"{path}: expected format {FORMAT}, got {values['format']}")
        return State(
            step=values["step"],
            validated=values["validated"],
            seconds=values["seconds"],
            lanes={int(lane): state for lane, state in values["lanes"].items()},
            vocabulary=Vocabulary(**values["vocabulary"]),
            datasets=values["datasets"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a checkpoint's state, got {error!r}") from None


def load_tensors(
    folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Fill the weights, and the optimizer's moments, in place from a complete checkpoint."""
    _load_tensors(folder / "model", model.state_dict())
    if optimizer is not None:
        _load_tensors(folder / "optimizer", optimizer_tensors(model, optimizer))


def _load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    with _quiet_alone():
        try:
            # no_dist: every rank reads for itself, so no rank waits for one that failed.
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:
            cause = str(next(iter(error.failures.values()))[0]).splitlines()[0]
            raise UserError(
                f"{folder}: does not fit the model of its config.json: {cause}"
            ) from None


def load_model(
    path: Path | str, device: torch.device | str
) -> tuple[LanguageModel, TrainConfig, Vocabulary, Tokenizer]:
    """A trained model, and what it takes to use it; nothing but ``path`` is read.

    Args:
        path: a checkpoint's folder, or a run folder for its newest complete checkpoint.

    Raises:
        UserError: no complete checkpoint there.
    """
    folder = find_checkpoint(Path(path))
    config = read_config(folder / CONFIG)
    vocabulary = read_state(folder).vocabulary
    model = build_model(config.model, vocabulary)
    load_tensors(folder, model)
    return model.to(device), config, vocabulary, Tokenizer.load(folder)


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """Without the warning that a single process is single."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
