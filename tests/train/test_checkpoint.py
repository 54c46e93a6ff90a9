"""A checkpoint is complete or does not count, and holds all it takes to use the model."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lst.train.checkpoint as checkpoint
from lst.errors import UserError
from lst.model import LanguageModel, build_model
from lst.train.checkpoint import (
    ALONE,
    FORMAT,
    State,
    complete_checkpoints,
    load_model,
    load_tensors,
    newest_checkpoint,
    read_state,
    remove_left_overs,
    remove_old,
    save_checkpoint,
)
from lst.train.config import TrainConfig
from lst.train.corpus import open_corpus
from lst.train.manifest import size_faults
from lst.train.optimizer import build_optimizer, optimizer_tensors
from lst.vocabulary import Vocabulary

Tiny = Callable[..., TrainConfig]


def save(config: TrainConfig, step: int, model: LanguageModel | None = None) -> Path:
    corpus = open_corpus(config.data)
    model = model or build_model(config.model, corpus.vocabulary)
    state = State(
        step=step,
        lanes={3: {"row": step}},
        vocabulary=corpus.vocabulary,
        datasets=corpus.fingerprints,
    )
    moments = optimizer_tensors(model, build_optimizer(model, config.optimizer))
    folder = save_checkpoint(config, state, corpus.tokenizer, model.state_dict(), moments, ALONE)
    remove_old(config, folder)
    return folder


def test_load_model_needs_nothing_but_the_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny()
    corpus = open_corpus(config.data)
    model = build_model(config.model, corpus.vocabulary)
    folder = save(config, 7, model)
    alone = tmp_path / "elsewhere"
    folder.rename(alone)
    loaded, read, vocabulary, tokenizer = load_model(alone, "cpu")
    assert read == config
    assert vocabulary == corpus.vocabulary
    assert tokenizer.fingerprint == corpus.tokenizer.fingerprint
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    state = read_state(alone)
    assert (state.step, state.lanes, state.datasets) == (
        7,
        {3: {"row": 7}},
        corpus.fingerprints,
    )


def test_a_checkpoint_holds_json_safetensors_and_the_tokenizer_alone(tiny: Tiny) -> None:
    folder = save(tiny(), 1)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
        ".model",
    }


@pytest.mark.parametrize("file_bytes", [1 << 28, 1 << 16])
def test_weights_and_moments_come_back_from_one_file_or_many(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    monkeypatch.setattr("lst.train.checkpoint.FILE_BYTES", file_bytes)
    config = tiny()
    model = build_model(config.model, open_corpus(config.data).vocabulary)
    optimizer = build_optimizer(model, config.optimizer)
    for tensor in optimizer_tensors(model, optimizer).values():
        tensor.copy_(torch.rand_like(tensor))
    corpus = open_corpus(config.data)
    state = State(step=1, vocabulary=corpus.vocabulary, datasets={})
    moments = optimizer_tensors(model, optimizer)
    folder = save_checkpoint(config, state, corpus.tokenizer, model.state_dict(), moments, ALONE)
    other = build_model(config.model, corpus.vocabulary)
    filled = build_optimizer(other, config.optimizer)
    load_tensors(folder, other, filled)
    for name, tensor in optimizer_tensors(other, filled).items():
        assert torch.equal(tensor, moments[name]), name
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    sizes = [file.stat().st_size for file in (folder / "optimizer").iterdir()]
    size = sum(moment.nbytes for moment in moments.values())
    assert len(sizes) == 1 if size < file_bytes else len(sizes) > size / file_bytes / 2
    largest = max(moment.nbytes for moment in moments.values())
    assert max(sizes) < file_bytes + largest + (1 << 14)  # a header


@pytest.mark.parametrize(
    "call",
    [
        "lst.train.checkpoint._save_tensors",
        "lst.train.checkpoint._join_shards",
        "lst.train.checkpoint._state_json",
        "lst.train.checkpoint.write_manifest",
        "lst.train.checkpoint._publish",
        "shutil.rmtree",
    ],
)
def test_a_crash_while_saving_leaves_the_one_before(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    config = tiny(keep=1)
    first = save(config, 1)
    removing = call == "shutil.rmtree"  # of the first, after the second is complete

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(call, crash)
        with pytest.raises(KeyboardInterrupt):
            save(config, 2)
    left = complete_checkpoints(config.out)
    assert left == [first.with_name("step-00000002") if removing else first]
    assert [p for p in first.parent.iterdir() if not p.name.startswith(".")] == left
    load_model(config.out, "cpu")
    remove_left_overs(config.out)  # as the next run does
    assert list(first.parent.iterdir()) == left


def test_a_full_disk_is_named_and_the_one_before_is_kept(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    first = save(config, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lst.train.checkpoint.HuggingFaceStorageWriter.write_data", full)
    with pytest.raises(UserError, match=r"model: cannot be written \(No space left on device\)"):
        save(config, 2)
    assert newest_checkpoint(config.out) == first


FILES = ["state.json", "config.json", "tokenizer.model", "model/*", "optimizer/*"]


def harm(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[-2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["removed", "truncated", "altered"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    tiny: Tiny, name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny()
    first, second = save(config, 1), save(config, 2)
    file = next(second.glob(name))
    size, name = file.stat().st_size, str(file.relative_to(second))
    harm(file, how)
    message = {
        "removed": f"{name}: expected {size} bytes, got no file",
        "truncated": f"{name}: expected {size} bytes, got {size // 2}",
        "altered": f"{name}: expected SHA-256 ",
    }[how]
    message = f"{second}: expected a complete checkpoint; {message}"
    with pytest.raises(UserError) as caught:
        load_model(second, "cpu")
    assert str(caught.value).startswith(message)
    said: list[str] = []
    assert newest_checkpoint(config.out, say=said.append) == first
    assert said == [f"passed over: {caught.value}"]
    load_model(config.out, "cpu")
    assert capsys.readouterr().err == f"passed over: {caught.value}\n"


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"files": {"config.json": 3}}'])
def test_a_checkpoint_without_a_readable_manifest_does_not_count(
    tiny: Tiny, text: str | None
) -> None:
    config = tiny()
    folder = save(config, 1)
    manifest = folder / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    assert complete_checkpoints(config.out) == []
    with pytest.raises(UserError, match=r"every checkpoint in it is damaged; .*manifest.json: ex"):
        newest_checkpoint(config.out)
    with pytest.raises(UserError, match=r"manifest.json: expected a manifest, got none"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("kind", ["file", "pipe", "link to nowhere", "folder"])
def test_tensors_that_were_not_written_are_not_read(tiny: Tiny, kind: str) -> None:
    """The storage reads every file of its kind, so a stranger among them is refused."""
    folder = save(tiny(), 1)
    stranger = folder / "model" / "stranger.safetensors"
    if kind == "file":
        stranger.write_bytes(next(folder.glob("model/*")).read_bytes())
    elif kind == "pipe":  # whoever reads it waits for ever
        os.mkfifo(stranger)
    elif kind == "folder":
        stranger.mkdir()
    else:
        stranger.symlink_to(folder / "nowhere")
    said = ["model/stranger.safetensors: expected no such file, got one"]
    assert size_faults(folder) == said
    with pytest.raises(UserError, match=said[0]):
        load_model(folder, "cpu")


@pytest.mark.parametrize("absolute", [True, False])
def test_a_manifest_reaches_no_further_than_its_folder(
    tiny: Tiny, absolute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny(), 1)
    outside = folder.parent / "secret"
    outside.write_text("secret")
    name = str(outside) if absolute else "../secret"
    manifest = folder / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    files[name] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    manifest.write_text(json.dumps({"files": files}))
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("a file was read"))
    with pytest.raises(UserError, match=f"; {name}: expected a file of this folder$"):
        load_model(folder, "cpu")


def test_the_manifest_holds_size_and_hash_of_every_other_file(tiny: Tiny) -> None:
    folder = save(tiny(), 1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    paths = {path for path in folder.rglob("*") if path.is_file()} - {folder / "manifest.json"}
    assert {folder / name for name in files} == paths
    for name, file in files.items():
        content = (folder / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_weights_are_plain_safetensors(tiny: Tiny) -> None:
    config = tiny()
    model = build_model(config.model, open_corpus(config.data).vocabulary)
    folder = save(config, 1, model)
    weights = load_file(folder / "model" / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_loading_unpickles_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what lies where other checkpoints have their pickles."""
    folder = save(tiny(), 1)
    bomb = b"cos\nabort\n(tR."
    for place in (folder, folder / "model", folder / "optimizer"):
        for name in (".metadata", "__0_0.distcp", "model.bin"):
            (place / name).write_bytes(bomb)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    model, config, _, _ = load_model(folder, "cpu")
    load_tensors(folder, model, build_optimizer(model, config.optimizer))


@pytest.mark.parametrize(
    ("keep", "keep_every", "kept"),
    [(2, None, [5, 6]), (1, 3, [3, 6]), (2, 2, [2, 4, 5, 6]), (1, 4, [4, 6]), (9, 1, range(1, 7))],
)
def test_the_newest_are_kept_and_every_nth(
    tiny: Tiny, keep: int, keep_every: int | None, kept: Sequence[int]
) -> None:
    config = tiny(keep=keep, keep_every=keep_every)
    for step in range(1, 7):
        save(config, step)
    expected = [f"step-{step:08d}" for step in kept]
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == expected


def test_of_checkpoints_that_are_kept_elsewhere_only_the_links_go(
    tiny: Tiny, tmp_path: Path
) -> None:
    """One that is old, and one that is in the way of a new one, as it is not there any more."""
    config, elsewhere = tiny(keep=1), tmp_path / "elsewhere"
    first = save(config, 1)
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    load_model(config.out, "cpu")
    names = sorted(path.name for path in elsewhere.rglob("*"))
    second = first.with_name("step-00000002")
    second.symlink_to(tmp_path / "nowhere")
    save(config, 2)
    assert list(first.parent.iterdir()) == [second]
    assert not second.is_symlink()
    assert sorted(path.name for path in elsewhere.rglob("*")) == names


def test_a_newer_one_that_is_damaged_does_not_push_out_a_good_one(tiny: Tiny) -> None:
    config = tiny(keep=1)
    save(config, 8)
    good = save(config, 6)
    assert good.exists()


def test_weights_of_another_shape_are_refused(tiny: Tiny) -> None:
    config = tiny()
    folder = save(config, 1)
    with pytest.raises(UserError, match="does not fit the model"):
        load_tensors(folder, build_model(config.model, Vocabulary(num_pieces=1, num_units=1)))


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_what_went_bad_while_it_was_written_is_no_checkpoint(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A disk that loses the end of a file and does not say so."""
    config = tiny()
    first = save(config, 1)
    real = checkpoint._save_tensors

    def lossy(folder: Path, *args: Any) -> None:
        real(folder, *args)
        for file in folder.iterdir():
            if folder.name == part:
                harm(file, "truncated")

    monkeypatch.setattr(checkpoint, "_save_tensors", lossy)
    with pytest.raises(UserError, match=rf"{part}: cannot be read \(Error while deserializing"):
        save(config, 2)
    assert list(first.parent.iterdir()) == [first]


def test_a_state_of_another_format_is_refused(tiny: Tiny) -> None:
    folder = save(tiny(), 1)
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match=f"state.json: expected format {FORMAT}, got 99"):
        read_state(folder)


def test_a_path_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: expected a checkpoint or a run folder"):
        load_model(tmp_path / "nowhere", "cpu")
    with pytest.raises(
        UserError, match=r"expected a complete checkpoint in checkpoints/, got none"
    ):
        load_model(tmp_path, "cpu")
