"""What one way of sharing a model saves, every other loads bit for bit; a rank fails for all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lst.errors import UserError
from lst.train.checkpoint import ALONE, State, load_tensors, save_checkpoint
from lst.train.config import TrainConfig, to_json
from lst.train.corpus import open_corpus
from lst.train.distributed import World
from lst.train.optimizer import optimizer_tensors

WAYS = ("plain", "fsdp", "hsdp")


class Odd(nn.Module):
    """Rows that two ranks cannot share evenly, or at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3)
        self.second = nn.Linear(3, 1)
        self.cube = nn.Parameter(torch.randn(4, 3, 2))
        self.scale = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh()) * self.scale * self.cube.square().sum()
        return y

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


def trained(way: str, seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """An Odd and its AdamW after a step, shared by two ranks in that way."""
    torch.manual_seed(seed)
    model = Odd()
    if way != "plain":
        shape, names = ((2,), ("shard",)) if way == "fsdp" else ((2, 1), ("replicate", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 5)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def whole(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments, each as one tensor on every rank."""
    tensors = model.weights() | optimizer_tensors(model, optimizer)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def save(
    config: TrainConfig, step: int, model: Any, optimizer: torch.optim.Optimizer, world: World
) -> Path:
    corpus = open_corpus(config.data)
    state = State(step=step, lanes={world.rank: {}}, vocabulary=corpus.vocabulary, datasets={})
    moments = optimizer_tensors(model, optimizer)
    return save_checkpoint(config, state, corpus.tokenizer, model.weights(), moments, world)


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


# Both ranks: import this file, save in each way, and load all that is there in each way.
PROGRAM = """
import importlib.util, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from lst.train.checkpoint import load_tensors
from lst.train.config import read_config
from lst.train.distributed import start_world

spec = importlib.util.spec_from_file_location("resharding", sys.argv[1])
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
config = read_config(Path(sys.argv[2]))
out = config.out
with start_world("cpu") as world:
    for step, way in enumerate(here.WAYS, start=1):
        model, optimizer = here.trained(way, seed=step)
        here.save(config, step, model, optimizer, world.aside())
        expected = here.whole(model, optimizer)
        if world.is_main:
            save_file(expected, out / f"{step}.safetensors")
    world.gather(None)
    for step in range(len(here.WAYS) + 1):
        expected = load_file(out / f"{step}.safetensors")
        for way in here.WAYS:
            model, optimizer = here.trained(way, seed=99)
            load_tensors(out / "checkpoints" / f"step-{step:08d}", model, optimizer)
            here.assert_equal(here.whole(model, optimizer), expected)
"""


@pytest.mark.timeout(120)
def test_what_one_way_saves_every_way_loads(
    tiny: Callable[..., TrainConfig], fork: Callable[..., Any]
) -> None:
    config = tiny()
    out = config.out
    model, optimizer = trained("plain", seed=0)
    save(config, 0, model, optimizer, ALONE)
    save_file(whole(model, optimizer), out / "0.safetensors")
    (out / "config.json").write_text(json.dumps(to_json(config)))
    fork(PROGRAM, __file__, out / "config.json", ranks=2).succeed()
    for step in range(len(WAYS) + 1):
        folder = out / "checkpoints" / f"step-{step:08d}"
        expected = load_file(out / f"{step}.safetensors")
        model, optimizer = trained("plain", seed=99)
        load_tensors(folder, model, optimizer)
        assert_equal(whole(model, optimizer), expected)
        weights = load_file(folder / "model" / "model.safetensors")
        assert_equal(weights, {name: expected[name] for name in model.weights()})
        shards = sorted((folder / "optimizer").iterdir())
        assert len(shards) == (1 if step == 0 else 2)
        shards[-1].unlink()  # what it held would be left as it was
        with pytest.raises(UserError, match=r"optimizer: does not fit the model: expected \d+ v"):
            load_tensors(folder, model, optimizer)


# Rank 1 alone cannot write at first.
ONE_FAILS = """
import importlib.util, resource, sys
from pathlib import Path
from lst.train.checkpointer import Checkpointer
from lst.train.checkpoint import State
from lst.train.config import read_config
from lst.train.corpus import open_corpus
from lst.train.distributed import start_world

spec = importlib.util.spec_from_file_location("resharding", sys.argv[1])
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
config = read_config(Path(sys.argv[2]))
corpus = open_corpus(config.data)

class Log:
    def __init__(self):
        self.said = []
    def say(self, message):
        self.said.append(message)
    def event(self, step, values):
        pass

log = Log()

with start_world("cpu") as world:
    checkpoints = Checkpointer(config, corpus.tokenizer, world, log, resumed=(None, 0))
    model, optimizer = here.trained("fsdp", seed=0)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2):
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200 if step == 1 else hard, hard))
        state = State(step=step, vocabulary=corpus.vocabulary, datasets={})
        checkpoints.save(state, model, optimizer)
        while checkpoints._thread is not None:
            checkpoints.poll(step)
        log.say(f"saved: {checkpoints.saved}")
    print(*log.said, sep="\\n")
"""


@pytest.mark.timeout(120)
def test_what_one_rank_cannot_write_no_rank_believes_to_be_saved(
    tiny: Callable[..., TrainConfig], fork: Callable[..., Any]
) -> None:
    config = tiny()
    preset = config.out.with_suffix(".json")
    preset.write_text(json.dumps(to_json(config)))
    running = fork(ONE_FAILS, __file__, preset, ranks=2)
    running.succeed()
    second = config.out / "checkpoints" / "step-00000002"
    assert list(second.parent.iterdir()) == [second]
    for rank in (0, 1):
        told, saved, told_again, saved_again = running.printed(rank).splitlines()
        assert told.startswith("the checkpoint of step 1 was not saved: ")
        assert told.endswith("cannot be written (File too large); trying again after step 11")
        assert saved == "saved: None"
        assert told_again == "the checkpoint of step 2 is saved"
        assert saved_again == f"saved: {second}"
