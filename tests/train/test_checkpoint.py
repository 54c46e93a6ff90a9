"""A checkpoint is complete or does not count, and holds all it takes to use the model."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lst.errors import UserError
from lst.model import LanguageModel, build_model
from lst.train.checkpoint import (
    State,
    complete_checkpoints,
    load_model,
    load_tensors,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from lst.train.config import TrainConfig
from lst.train.corpus import open_corpus
from lst.train.distributed import World
from lst.train.optimizer import build_optimizer, optimizer_tensors
from lst.vocabulary import Vocabulary

Tiny = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"))


def save(config: TrainConfig, step: int, model: LanguageModel | None = None) -> Path:
    corpus = open_corpus(config.data)
    model = model or build_model(config.model, corpus.vocabulary)
    state = State(
        step=step,
        lanes={3: {"row": step}},
        vocabulary=corpus.vocabulary,
        datasets=corpus.fingerprints,
    )
    optimizer = build_optimizer(model, config.optimizer)
    return save_checkpoint(config, state, corpus.tokenizer, model, optimizer, ALONE)


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


def test_moments_of_the_optimizer_come_back(tiny: Tiny) -> None:
    config = tiny()
    model = build_model(config.model, open_corpus(config.data).vocabulary)
    optimizer = build_optimizer(model, config.optimizer)
    for tensor in optimizer_tensors(model, optimizer).values():
        tensor.copy_(torch.rand_like(tensor))
    corpus = open_corpus(config.data)
    state = State(step=1, vocabulary=corpus.vocabulary, datasets={})
    folder = save_checkpoint(config, state, corpus.tokenizer, model, optimizer, ALONE)
    other = build_model(config.model, corpus.vocabulary)
    filled = build_optimizer(other, config.optimizer)
    load_tensors(folder, other, filled)
    expected = optimizer_tensors(model, optimizer)
    for name, tensor in optimizer_tensors(other, filled).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "call",
    [
        "lst.train.checkpoint._save_tensors",
        "lst.train.checkpoint._sync_files",
        "lst.train.checkpoint._state_json",
        "pathlib.Path.rename",
    ],
)
def test_a_crash_while_saving_leaves_the_one_before(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    config = tiny()
    first = save(config, 1)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(call, crash)
        with pytest.raises(KeyboardInterrupt):
            save(config, 2)
    assert newest_checkpoint(config.out) == first
    load_model(config.out, "cpu")
    second = save(config, 3)
    assert complete_checkpoints(config.out) == [first, second]
    assert sorted(path.name for path in second.parent.iterdir()) == [first.name, second.name]


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


@pytest.mark.parametrize("name", ["state.json", "config.json", "model", "optimizer"])
@pytest.mark.parametrize("truncate", [False, True])
def test_a_checkpoint_that_lacks_something_does_not_count(
    tiny: Tiny, name: str, truncate: bool
) -> None:
    config = tiny()
    first, second = save(config, 1), save(config, 2)
    path = second / name
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    content = file.read_bytes()
    if truncate:
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    assert newest_checkpoint(config.out) == first
    with pytest.raises(UserError, match="step-00000002: expected a c"):
        load_model(second, "cpu")


def test_only_the_newest_are_kept(tiny: Tiny) -> None:
    config = tiny(keep=2)
    for step in (1, 2, 3):
        save(config, step)
    assert [folder.name for folder in complete_checkpoints(config.out)] == [
        "step-00000002",
        "step-00000003",
    ]


def test_weights_of_another_shape_are_refused(tiny: Tiny) -> None:
    config = tiny()
    folder = save(config, 1)
    with pytest.raises(UserError, match="does not fit the model"):
        load_tensors(folder, build_model(config.model, Vocabulary(num_pieces=1, num_units=1)))


def test_a_state_of_another_format_is_refused(tiny: Tiny) -> None:
    folder = save(tiny(), 1)
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match=r"state.json: expected format 1, got 99"):
        read_state(folder)


def test_a_path_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: expected a checkpoint or a run folder"):
        load_model(tmp_path / "nowhere", "cpu")
    with pytest.raises(
        UserError, match=r"expected a complete checkpoint in checkpoints/, got none"
    ):
        load_model(tmp_path, "cpu")
