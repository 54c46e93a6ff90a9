"""Checkpoints: complete or absent, self-contained, and loaded without running any code.

::

    checkpoints/step-00000100/
        model/model.safetensors     the weights, whole, by the names of model.weights()
        optimizer/*.safetensors     AdamW's moments: every rank's, in files of 256 MiB
        config.json                 the run's configuration
        tokenizer.model             or tokenizer.json
        speech_bpe.model            where speech is in pieces of its own
        state.json                  the rest (State)
        manifest.json               size and SHA-256 of every other file, see manifest.py

Tensors go through torch.distributed.checkpoint and its safetensors storage: every rank writes what
it holds, and reads what it needs, whatever the number of ranks was. Nothing is ever unpickled.

A checkpoint is written under a temporary name, pushed to the disk and renamed; one that goes is
renamed before it is removed. Before anything in it is read, every file is checked against the
manifest.
"""

import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from lst.errors import UserError, tell
from lst.files import fsync, write_json, writing
from lst.machine import find_device
from lst.model import LanguageModel, build_model
from lst.pretrained import CODEBOOK, Pretrained, from_pretrained, is_pretrained
from lst.speech_bpe import SPEECH_BPE, SpeechBPE
from lst.strict_json import read_json
from lst.train.anomalies import Recent
from lst.train.config import TrainConfig, read_config, to_json
from lst.train.distributed import SharedError, World
from lst.train.manifest import (
    MANIFEST,
    faults,
    file_names,
    hash_files,
    size_faults,
    write_manifest,
)
from lst.train.metrics import Seen
from lst.train.optimizer import optimizer_tensors
from lst.train.run_folder import CHECKPOINTS, CONFIG
from lst.vocabulary import Tokenizer, Vocabulary, fingerprint

FORMAT = 3  # of state.json; raised when an older reader would misread a newer checkpoint
STATE = "state.json"
MODEL, OPTIMIZER = "model", "optimizer"
WEIGHTS = "model.safetensors"  # in MODEL
FILE_BYTES = 1 << 28  # and a tensor more, of what a rank writes
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class State:
    """What a run needs beside its tensors to go on as if it had never stopped."""

    step: int = 0  # optimizer steps taken
    validated: int = 0  # the step of the last validation
    seconds: float = 0.0  # of the run so far
    seen: Seen = field(default_factory=Seen)
    skipped: int = 0  # updates, for a loss or gradient that was not finite
    skipped_in_a_row: int = 0  # of them, those since the last update
    recent: Recent = field(default_factory=dict)  # what a loss that jumps is told by
    lanes: dict[int, dict[str, Any]] = field(default_factory=dict)  # where each stands in the data
    vocabulary: Vocabulary
    datasets: dict[str, str]  # fingerprints of what it trains on
    codebook: str | None = None  # of what made their units; None too where the file does not say


# Saving -------------------------------------------------------------------------------------------


def save_checkpoint(
    config: TrainConfig,
    state: State,
    tokenizer: Tokenizer,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    world: World,
) -> Path:
    """Write a checkpoint; every rank calls it.

    Args:
        state: ``lanes`` are the rank's own; those of all ranks are written.
        weights, moments: of ``model.weights()`` and :func:`optimizer_tensors`. Of a DTensor
            every rank writes its part; of another tensor one rank writes all.

    Returns:
        The checkpoint's folder.

    Raises:
        SharedError: it cannot be written. Nothing of it is left, and the ones before are as before.
    """
    folder = config.out / CHECKPOINTS / f"step-{state.step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        with world.together():
            if world.is_main:
                _remove(temporary)
                with writing(temporary):
                    temporary.mkdir(parents=True)
        _save_tensors(temporary / MODEL, weights, world)
        _save_tensors(temporary / OPTIMIZER, moments, world)
        lanes = {lane: value for part in world.gather(state.lanes) for lane, value in part.items()}
        with world.together():
            if world.is_main:
                _expect_whole(temporary / MODEL, weights)
                _expect_whole(temporary / OPTIMIZER, moments)
                _join_shards(temporary / MODEL, weights)
                write_json(temporary / CONFIG, to_json(config))
                with writing(temporary):
                    tokenizer.save(temporary / tokenizer.file_name)
                    if state.vocabulary.speech_bpe is not None:
                        state.vocabulary.speech_bpe.save(temporary / SPEECH_BPE)
                write_json(temporary / STATE, _state_json(state, lanes))
        hashes = hash_files(temporary, world.gather(file_names(temporary))[0], world)
        with world.together():
            if world.is_main:
                write_manifest(temporary, hashes)
                _publish(temporary, folder)
    except SharedError:
        if world.is_main:
            with suppress(UserError):  # the first error is the one to tell of
                _remove(temporary)
        raise
    return folder


def _save_tensors(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    _expect_a_single_process()
    files = _files(tensors, world.size)
    writer = HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=world.group)
    except CheckpointException as error:  # of every rank alike
        for cause in error.failures.values():
            if isinstance(cause[0], OSError):
                reason = cause[0].strerror
                raise SharedError(f"{folder}: cannot be written ({reason})") from None
        raise


def _files(tensors: dict[str, Tensor], num_ranks: int) -> dict[str, int]:
    """Which of a rank's files a tensor goes to, from 1 on.

    A file is put together in memory while no other thread runs Python: that of the next step waits.
    """
    files, size = {}, 0  # of what a rank has of the tensors before
    for name, tensor in tensors.items():
        files[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size() // num_ranks
    return files


def _join_shards(folder: Path, weights: dict[str, Tensor]) -> None:
    """Make the files that the ranks wrote one, which ``safetensors`` alone reads whole."""
    shards = sorted(folder.iterdir())
    path = folder / WEIGHTS
    with writing(path):
        if len(shards) == 1:
            shards[0].rename(path)
            return
        tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in weights.items()}
        _load_tensors(folder, tensors)
        for shard in shards:
            shard.unlink()
        try:
            save_file(tensors, path)
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be written ({error})") from None


def _state_json(state: State, lanes: dict[int, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": state.step,
        "validated": state.validated,
        "seconds": state.seconds,
        "seen": asdict(state.seen),
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
        "recent": state.recent,
        "vocabulary": {
            "num_pieces": state.vocabulary.num_pieces,
            "num_units": state.vocabulary.num_units,
        },
        "datasets": state.datasets,
        "codebook": state.codebook,
        "lanes": {str(lane): lanes[lane] for lane in sorted(lanes)},
    }


def _publish(temporary: Path, folder: Path) -> None:
    """Push a whole checkpoint to the disk and give it its name."""
    with writing(folder):
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        _remove(folder)  # where it exists it is damaged
        temporary.rename(folder)
        fsync(folder.parent)


# Removing -----------------------------------------------------------------------------------------


def remove_old(config: TrainConfig, newest: Path) -> None:
    """Of ``newest`` and those before it keep ``config.keep``, and every ``config.keep_every`` th.

    Raises:
        UserError: one cannot be removed.
    """
    complete = [folder for folder in complete_checkpoints(config.out) if folder <= newest]
    for folder in complete[: -config.keep]:
        if config.keep_every is None or _step(folder) % config.keep_every:
            _remove(folder)


def remove_left_overs(out: Path) -> None:
    """Remove what saving or removing left where it was killed. Raises UserError where it cannot."""
    for folder in (out / CHECKPOINTS).glob(".step-*.tmp"):
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, which is never seen there in part."""
    with writing(folder):
        if folder.is_symlink():  # somebody keeps it elsewhere
            folder.unlink()
            return
        if not folder.exists():
            return
        if not folder.name.startswith("."):
            hidden = folder.with_name(f".{folder.name}.old.tmp")
            if hidden.exists():
                shutil.rmtree(hidden)
            folder = folder.rename(hidden)
        shutil.rmtree(folder)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


# Finding ------------------------------------------------------------------------------------------


def complete_checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, that are complete by names and sizes."""
    return [folder for folder in _checkpoints(out) if not size_faults(folder)]


def newest_checkpoint(
    out: Path, world: World = ALONE, say: Callable[[str], None] | None = None
) -> Path | None:
    """The newest checkpoint of a run folder in which every file is as it was written.

    Args:
        world: every rank calls, and gets the same answer.
        say: gets a line for every newer one that is passed over; by default it goes to stderr.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        SharedError: every one is damaged.
    """
    first = ""
    for name in world.gather([folder.name for folder in _checkpoints(out)])[0][::-1]:
        folder = out / CHECKPOINTS / name
        damage = _damage(folder, world)
        if damage is None:
            return folder
        (say or _warn)(f"passed over: {damage}")
        first = first or damage
    if first:
        raise SharedError(f"{out}: every checkpoint in it is damaged; the newest: {first}")
    return None


def find_checkpoint(path: Path) -> Path:
    """``path`` itself where it is a checkpoint, the newest of its own where it is a run folder.

    Raises:
        UserError: there is none; it is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: expected a checkpoint or a run folder, got no folder")
    if not any((path / name).exists() for name in (MANIFEST, STATE, MODEL)):
        newest = newest_checkpoint(path)
        if newest is None:
            raise UserError(f"{path}: expected a complete checkpoint in {CHECKPOINTS}/, got none")
        return newest
    damage = _damage(path, ALONE)
    if damage is not None:
        raise UserError(damage)
    return path


def _checkpoints(out: Path) -> list[Path]:
    folders = (out / CHECKPOINTS).glob("step-*")
    return sorted(folder for folder in folders if folder.name.removeprefix("step-").isdigit())


def _damage(folder: Path, world: World) -> str | None:
    found = faults(folder, world)
    return f"{folder}: expected a complete checkpoint; {'; '.join(found)}" if found else None


def _warn(message: str) -> None:
    tell(message, sys.stderr)


# Loading ------------------------------------------------------------------------------------------


def read_state(folder: Path) -> State:
    """Read ``state.json`` of a checkpoint."""
    path, speech_bpe = folder / STATE, None
    if (folder / SPEECH_BPE).exists():
        speech_bpe = SpeechBPE.load(folder / SPEECH_BPE)
    try:
        values = read_json(path)
        if values["format"] != FORMAT:
            raise UserError(f"{path}: expected format {FORMAT}, got {values['format']}")
        return State(
            step=values["step"],
            validated=values["validated"],
            seconds=values["seconds"],
            seen=Seen(**values["seen"]),
            skipped=values["skipped"],
            skipped_in_a_row=values["skipped_in_a_row"],
            recent=values["recent"],
            lanes={int(lane): state for lane, state in values["lanes"].items()},
            vocabulary=Vocabulary(**values["vocabulary"], speech_bpe=speech_bpe),
            datasets=values["datasets"],
            codebook=values.get("codebook"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected a checkpoint's state, got {error!r}") from None


def load_tensors(
    folder: Path, model: LanguageModel, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Fill the weights, and the optimizer's moments, in place from a complete checkpoint."""
    _load_tensors(folder / MODEL, model.weights())
    if optimizer is not None:
        _load_tensors(folder / OPTIMIZER, optimizer_tensors(model, optimizer))


def _load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    _expect_a_single_process()
    _expect_whole(folder, tensors)
    try:
        # no_dist: every rank reads for itself, so no rank waits for one that failed.
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        cause = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise UserError(f"{folder}: does not fit the model of its config.json: {cause}") from None


def _expect_whole(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise UserError where the files in a folder do not make up the tensors.

    The storage takes what files it finds, and would leave the values of a missing one as they are.
    """
    try:
        saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: cannot be read ({error})") from None
    for name, tensor in tensors.items():
        got = sum(chunk.sizes.numel() for chunk in getattr(saved.get(name), "chunks", ()))
        if got != tensor.numel():
            raise UserError(
                f"{folder}: does not fit the model: expected {tensor.numel()} values of {name}, "
                f"got {got} (do all processes share this folder?)"
            )


def load_model(
    path: Path | str, device: torch.device | str
) -> tuple[LanguageModel, TrainConfig, Vocabulary, Tokenizer]:
    """A trained model, and what it takes to use it: the first things of :func:`load_trained`."""
    trained = load_trained(path, device)
    return trained.model, trained.config, trained.vocabulary, trained.tokenizer


def load_trained(path: Path | str, device: torch.device | str) -> Pretrained:
    """A trained model, and all that is known of it. Of what its path does not hold, only the
    codebook in the corpus that it was trained on is looked for.

    Args:
        path: a checkpoint's folder; a run folder, for its newest complete checkpoint; a folder of
            :func:`lst.pretrained.save_pretrained`, or the hub's name of one.

    Raises:
        UserError: nothing of the kind there, or it is damaged; no such device here.
    """
    device = find_device(device)
    if is_pretrained(path):
        return from_pretrained(path, device)
    folder = find_checkpoint(Path(path))
    config, state = read_config(folder / CONFIG), read_state(folder)
    model = build_model(config.model, state.vocabulary)
    load_tensors(folder, model)
    return Pretrained(
        model=model.to(device),
        config=config,
        vocabulary=state.vocabulary,
        tokenizer=Tokenizer.load(folder),
        step=state.step,
        codebook=state.codebook,
        codebook_file=_codebook_file(config, state),
    )


def _codebook_file(config: TrainConfig, state: State) -> Path | None:
    """The codebook of the corpus, where it is still there and still the same."""
    path = Path(config.data.corpus) / CODEBOOK
    is_the_same = path.is_file() and state.codebook in (None, fingerprint(path))
    return path if is_the_same else None


def _expect_a_single_process() -> None:
    """Hear no more of it that a single process is single.

    For good, as warnings.catch_warnings would change the filters of all threads back and forth.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
