"""Pretrained folders: what comes back is what was saved, or one line says what is wrong."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lst.errors import UserError
from lst.export import ExportConfig, export
from lst.pretrained import FORMAT, Pretrained, from_pretrained, save_pretrained
from lst.speech.units import LogMelKMeans
from lst.train.checkpoint import (
    ALONE,
    State,
    load_model,
    load_trained,
    read_state,
    save_checkpoint,
)
from lst.vocabulary import train_tokenizer

Make = Callable[..., Pretrained]


def expect_same(loaded: Pretrained, saved: Pretrained) -> None:
    for name in ("config", "vocabulary", "step", "codebook"):
        assert getattr(loaded, name) == getattr(saved, name), name
    assert loaded.tokenizer.fingerprint == saved.tokenizer.fingerprint
    weights = loaded.model.weights()
    assert weights.keys() == saved.model.weights().keys()
    for name, tensor in saved.model.weights().items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize(
    ("model", "patching", "speech_bpe"),
    [
        ({}, {}, False),
        ({"text_path": "global", "tied": True}, {"strategy": "curriculum"}, False),
        ({"architecture": "token"}, {"strategy": "speech-bpe"}, True),
    ],
    ids=["lst", "tied", "bpe"],
)
def test_what_is_saved_comes_back(
    make_trained: Make, tmp_path: Path, model: Any, patching: Any, speech_bpe: bool
) -> None:
    trained = make_trained(model=model, patching=patching, speech_bpe=speech_bpe)
    save_pretrained(trained, tmp_path / "saved")
    # Nothing outside of the folder is needed.
    alone = (tmp_path / "saved").rename(tmp_path / "alone")
    loaded = from_pretrained(alone)
    expect_same(loaded, trained)
    assert loaded.codebook_file == alone / "codebook.safetensors"
    assert LogMelKMeans.load(loaded.codebook_file).fingerprint == trained.codebook
    save_pretrained(loaded, tmp_path / "again")
    for path in alone.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_is_made_of_plain_files(make_trained: Make, tmp_path: Path) -> None:
    trained, folder = make_trained(), tmp_path / "saved"
    save_pretrained(trained, folder)
    names = {"config.json", "model.safetensors", "tokenizer.model", "codebook.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    for name in names - {"config.json"}:
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert config["files"][name] == f"sha256:{digest}"
    assert config["codebook"] == config["files"]["codebook.safetensors"]
    assert config["vocabulary"] == {"num_pieces": 300, "num_units": 20}
    assert load_file(folder / "model.safetensors").keys() == trained.model.weights().keys()


def test_others_may_read_the_files_that_may_read_the_folder(
    make_trained: Make, tmp_path: Path
) -> None:
    """safetensors makes its own for the owner alone, which is no use to share."""
    folder, umask = tmp_path / "saved", os.umask(0o027)
    try:
        save_pretrained(make_trained(), folder)
    finally:
        os.umask(umask)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o640"}


def test_a_model_whose_codebook_is_no_file_is_saved_without(
    make_trained: Make, tmp_path: Path
) -> None:
    trained = replace(make_trained(), codebook="name:hubert-25hz-502", codebook_file=None)
    save_pretrained(trained, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert (loaded.codebook, loaded.codebook_file) == ("name:hubert-25hz-502", None)


# Half-written -------------------------------------------------------------------------------------


def test_nothing_is_left_of_a_folder_that_cannot_be_written(
    make_trained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lst.pretrained.save_file", full)
    with pytest.raises(UserError, match=r"saved: cannot be written \(No space left on device\)"):
        save_pretrained(make_trained(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(make_trained: Make, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(UserError, match="saved: expected a folder to make, got one that is there"):
        save_pretrained(make_trained(), folder)
    assert os.listdir(folder) == ["mine"]


def test_the_folder_appears_with_everything_in_it(
    make_trained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is given last, by a rename."""
    rename, seen = Path.rename, []

    def renamed(path: Path, target: Path) -> Path:
        assert not target.exists()
        seen.append({each.name for each in path.iterdir()})
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    save_pretrained(make_trained(), tmp_path / "saved")
    assert seen == [{each.name for each in (tmp_path / "saved").iterdir()}]


# Codebooks ----------------------------------------------------------------------------------------


def test_the_codebook_of_other_units_is_not_saved(make_trained: Make, tmp_path: Path) -> None:
    trained, other = make_trained(), tmp_path / "other.safetensors"
    codebook = LogMelKMeans.load(trained.codebook_file)
    LogMelKMeans(codebook.centroids + 1, codebook.log_mels).save(other)
    with pytest.raises(UserError, match=r"other.safetensors: expected the codebook of the model's"):
        save_pretrained(replace(trained, codebook_file=other), tmp_path / "saved")
    LogMelKMeans(codebook.centroids[:9], codebook.log_mels[:9]).save(other)
    with pytest.raises(UserError, match=r"of the model's 20 units, got one of 9"):
        save_pretrained(replace(trained, codebook=None, codebook_file=other), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# Bad folders --------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_trained: Make, tmp_path: Path) -> Path:
    save_pretrained(make_trained(), tmp_path / "saved")
    return tmp_path / "saved"


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retell(folder: Path, name: str) -> None:
    """Let config.json say what a file now is."""
    files = json.loads((folder / "config.json").read_text())["files"]
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(folder, files=files | {name: f"sha256:{digest}"})


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 7)


def truncate_and_retell(folder: Path) -> None:
    truncate("model.safetensors")(folder)
    retell(folder, "model.safetensors")


def other_tokenizer(folder: Path) -> None:
    train_tokenizer(["some other words"] * 9, folder / "tokenizer.model", num_pieces=270)


def other_tokenizer_retold(folder: Path) -> None:
    other_tokenizer(folder)
    retell(folder, "tokenizer.model")


def other_codebook(folder: Path) -> None:
    path = folder / "codebook.safetensors"
    codebook = LogMelKMeans.load(path)
    LogMelKMeans(codebook.centroids + 1, codebook.log_mels).save(path)


def other_codebook_retold(folder: Path) -> None:
    other_codebook(folder)
    retell(folder, "codebook.safetensors")


def other_weights(change_them: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        change_them(weights)
        save_file(weights, path)
        retell(folder, path.name)

    return apply


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove("model.safetensors"), r"saved/model.safetensors: expected a file of the pre"),
        (remove("tokenizer.model"), r"saved/tokenizer.model: expected a file of the pretrained"),
        (remove("codebook.safetensors"), r"saved/codebook.safetensors: expected a file of the"),
        (remove("config.json"), r"saved/config.json: cannot be read \(No such"),
        (truncate("config.json"), r"saved/config.json: expected JSON, got "),
        (truncate("model.safetensors"), r"model.safetensors: expected sha256:\w+, as config.json "),
        (truncate_and_retell, r"saved/model.safetensors: cannot be read \(.*incomplete"),
        (other_tokenizer, r"saved/tokenizer.model: expected sha256:\w+, .* got sha256:\w+: the"),
        (other_tokenizer_retold, r"tokenizer.model: expected a tokenizer of 300 pieces, got 270"),
        (other_codebook, r"saved/codebook.safetensors: expected sha256:\w+, .* got sha256:\w+: "),
        (other_codebook_retold, r"config.json: expected codebook.safetensors to be the codebook"),
        (lambda f: change(f, colour=1), r"saved/config.json: unknown key colour"),
        (lambda f: change(f, training={"x": 1}), r"saved/config.json: unknown key training.x"),
        (lambda f: change(f, step="six"), r"saved/config.json: expected step to be int, got"),
        (lambda f: change(f, format=FORMAT + 1), rf"expected format {FORMAT}, .* got {FORMAT + 1}"),
        (lambda f: change(f, format="one"), r"config.json: expected the description of a pretr"),
        (lambda f: change(f, files={}), r"config.json: expected model.safetensors among its files"),
        (lambda f: change(f, files={"../x": ""}), r"saved/config.json: unknown file \.\./x"),
        (
            lambda f: change(f, files={"model.safetensors": digest_of(f / "model.safetensors")}),
            r"config.json: expected tokenizer.model or tokenizer.json among its files, got neither",
        ),
        (
            lambda f: change(f, vocabulary={"num_pieces": 300, "num_units": -1}),
            r"saved/config.json: counts must not be negative",
        ),
        (other_weights(lambda w: w.pop("norm.weight")), r"expected weight norm.weight, got none"),
        (
            other_weights(lambda w: w.update(more=torch.ones(1))),
            r"model.safetensors: does not fit its model: expected no weight more, got one",
        ),
        (
            other_weights(lambda w: w.update({"norm.weight": torch.ones(3)})),
            r"does not fit its model: norm.weight: expected shape \(16,\), got \(3,\)",
        ),
    ],
)
def test_a_folder_that_is_not_as_it_was_saved_is_one_clear_line(
    folder: Path, harm: Callable[[Path], None], message: str
) -> None:
    harm(folder)
    with pytest.raises(UserError, match=message) as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value)


def digest_of(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_loading_reads_nothing_that_it_does_not_know(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least of all a pickle."""
    for name in ("pytorch_model.bin", "more.safetensors", "modeling.py"):
        (folder / name).write_bytes(b"cos\nabort\n(tR.")
    monkeypatch.setattr("torch.load", lambda *_: pytest.fail("unpickled"))
    from_pretrained(folder)


# The hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub that has ``owner/name``; what was asked of it."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "owner/name":
            raise OSError("404: no such repository\nsee the documentation")
        snapshot = tmp_path / "hub" / "snapshot"
        if not snapshot.exists():
            shutil.copytree(folder, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_name_on_the_hub_is_downloaded(make_trained: Make, hub: list[Any]) -> None:
    expect_same(from_pretrained("owner/name"), make_trained())
    ((name, patterns),) = hub
    assert name == "owner/name"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(patterns)
    assert not any("*" in pattern for pattern in patterns)


def test_commands_read_a_name_on_the_hub_as_well(make_trained: Make, hub: list[Any]) -> None:
    expect_same(load_trained(Path("owner/name"), "cpu"), make_trained())


def test_a_name_that_the_hub_does_not_have_is_one_line(hub: list[Any]) -> None:
    with pytest.raises(UserError, match=r"^owner/no: expected a folder or .*\(404: no such rep"):
        from_pretrained("owner/no")


def test_a_folder_comes_before_the_hub(folder: Path, hub: list[Any], tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "owner" / "name")
    from_pretrained("owner/name")
    assert hub == []


@pytest.mark.parametrize("name", ["saved", "saved/x", "/a/b", "a/b/c", "../a/b", "owner/na me"])
def test_a_path_that_is_mistyped_is_not_looked_for_on_the_hub(hub: list[Any], name: str) -> None:
    """Not even owner/name, where there is a folder ``owner``."""
    with pytest.raises(UserError, match=f"^{name}"):
        from_pretrained(name if name != "saved" else "saved/nothing/here")
    with pytest.raises(UserError, match="expected a checkpoint or a run folder"):
        load_model(name if name != "saved" else "nothing", "cpu")
    assert hub == []


def test_the_hub_without_its_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'lst\[hub\]'"):
        from_pretrained("owner/name")


# From a checkpoint --------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(make_trained: Make, tmp_path: Path) -> Path:
    """What a run of that model would have saved."""
    trained = make_trained()
    config = replace(trained.config, out=tmp_path / "run")
    state = State(
        step=trained.step,
        vocabulary=trained.vocabulary,
        datasets={},
        codebook=trained.codebook,
    )
    weights = trained.model.weights()
    moments = {"moment": torch.zeros(1)}
    return save_checkpoint(config, state, trained.tokenizer, weights, moments, ALONE)


def test_a_checkpoint_is_exported_and_read_by_whatever_reads_checkpoints(
    make_trained: Make, checkpoint: Path, tmp_path: Path
) -> None:
    saved = replace(make_trained(), config=replace(make_trained().config, out=tmp_path / "run"))
    expect_same(load_trained(checkpoint.parents[1], "cpu"), saved)
    out = export(ExportConfig(checkpoint=tmp_path / "run", pretrained=tmp_path / "out"))
    expect_same(from_pretrained(out), saved)
    expect_same(load_trained(out, "cpu"), saved)
    model, config, vocabulary, tokenizer = load_model(out, "cpu")
    assert (config, vocabulary) == (saved.config, saved.vocabulary)
    assert tokenizer.fingerprint == saved.tokenizer.fingerprint
    assert torch.equal(model.head.weight, saved.model.head.weight)
    # And once more, from the folder.
    export(ExportConfig(checkpoint=out, pretrained=tmp_path / "out2"))
    for path in out.iterdir():
        assert (tmp_path / "out2" / path.name).read_bytes() == path.read_bytes()


def test_a_checkpoint_takes_the_codebook_of_its_corpus_where_it_is_still_the_same(
    make_trained: Make, checkpoint: Path, tmp_path: Path
) -> None:
    trained = load_trained(checkpoint, "cpu")
    assert trained.codebook_file == make_trained().codebook_file
    state = read_state(checkpoint)
    assert state.codebook == trained.codebook
    other = replace(state, codebook="sha256:other")
    weights, moments = trained.model.weights(), {"moment": torch.zeros(1)}
    save_checkpoint(trained.config, other, trained.tokenizer, weights, moments, ALONE)
    assert load_trained(checkpoint, "cpu").codebook_file is None


def test_a_checkpoint_that_does_not_name_its_codebook_is_still_read(
    make_trained: Make, checkpoint: Path, tmp_path: Path
) -> None:
    state = checkpoint / "state.json"
    values = json.loads(state.read_text())
    del values["codebook"]
    state.write_text(json.dumps(values))
    assert read_state(checkpoint).codebook is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected --pretrained or --llama, got neither"),
        ({"pretrained": "a", "llama": "b"}, "expected --pretrained or --llama, got both"),
        ({"llama": "b", "codebook": "c"}, "--codebook: expected it with --pretrained alone"),
        ({"pretrained": "a", "positions": 9}, "--positions: expected it with --llama alone"),
    ],
)
def test_options_of_the_export_that_do_not_go_together(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ExportConfig(checkpoint=Path("run"), **options)


def test_the_codebook_may_be_named(checkpoint: Path, make_trained: Make, tmp_path: Path) -> None:
    moved = shutil.copy(make_trained().codebook_file, tmp_path / "moved.safetensors")
    options = ExportConfig(checkpoint=checkpoint, pretrained=tmp_path / "out", codebook=moved)
    assert from_pretrained(export(options)).codebook == make_trained().codebook
    np.testing.assert_array_equal(
        LogMelKMeans.load(tmp_path / "out" / "codebook.safetensors").centroids,
        LogMelKMeans.load(moved).centroids,
    )
