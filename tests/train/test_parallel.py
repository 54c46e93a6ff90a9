"""Every way of sharing a model trains as one process does, and sends no more than it must.

Two ranks (``parallel_ranks.py``) train all configurations, on the CPU through gloo.
"""

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lst.errors import UserError
from lst.model import ModelConfig, build_model
from lst.train.checkpoint import load_model
from lst.train.config import ParallelConfig, TrainConfig, to_json
from lst.train.distributed import SharedError, World
from lst.train.dry_run import own_parameters
from lst.train.loop import train
from lst.train.parallel import (
    DDP_PARAMETERS,
    choose_strategy,
    initialise_weights,
    make_mesh,
    parallelise,
)
from lst.vocabulary import Vocabulary

Tiny = Callable[..., TrainConfig]
PROGRAM = Path(__file__).with_name("parallel_ranks.py")
RANK = f"import runpy; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
VOCABULARY = Vocabulary(num_pieces=40, num_units=5)
ALONE = World(0, 1, torch.device("cpu"))

# In float32, of one run by two ranks.
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": ParallelConfig(strategy="ddp")},
    "fsdp": {"parallel": ParallelConfig(strategy="fsdp")},
    "fsdp-accumulated": {"parallel": ParallelConfig(strategy="fsdp"), "accumulation": 2},
    "two-replicas": {"parallel": ParallelConfig(strategy="hsdp", replicas=2), "accumulation": 2},
    "one-replica": {"parallel": ParallelConfig(strategy="hsdp", replicas=1)},
    "parts": {"parallel": ParallelConfig(strategy="fsdp")},  # stops after step 2 and goes on
}
BFLOAT16: dict[str, dict[str, Any]] = {
    name: {**RUNS[name], "precision": "bfloat16"} for name in ("ddp", "fsdp-accumulated")
}


@dataclass(frozen=True)
class Ranks:
    one: TrainConfig  # trained by one process
    two: dict[str, TrainConfig]  # by two ranks
    seen: list[dict[str, Any]]  # by each rank


def lines(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]


def weights(config: TrainConfig) -> dict[str, Tensor]:
    return load_model(config.out, "cpu")[0].state_dict()


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny: Callable[..., TrainConfig],
    forking: Callable[[], Any],
) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    changes = RUNS | {f"{name}-bfloat16": values for name, values in BFLOAT16.items()}
    one = make_tiny(folder / "runs" / "one")
    train(one)
    two = {name: make_tiny(folder / "runs" / name, **values) for name, values in changes.items()}
    for name, config in two.items():
        (folder / f"{name}.json").write_text(json.dumps(to_json(config)))
    with forking() as fork:
        fork(RANK, folder, *free_ports(len(two) + 2), ranks=2).succeed()
    return Ranks(one, two, [json.loads((folder / f"rank-{rank}").read_text()) for rank in (0, 1)])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUNS)
def test_a_strategy_trains_and_validates_as_one_process_does(ranks: Ranks, name: str) -> None:
    config = ranks.two[name]
    got, expected = lines(config), lines(ranks.one)
    assert [(line["step"], line["split"]) for line in got] == [
        (line["step"], line["split"]) for line in expected
    ]
    for a, b in zip(got, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        if a["split"] == "train":  # what AdamW itself would not show: a gradient's scale
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    others = weights(ranks.one)
    for key, tensor in weights(config).items():
        torch.testing.assert_close(tensor, others[key], rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_stays_near_float32(ranks: Ranks, name: str) -> None:
    for a, b in zip(lines(ranks.two[f"{name}-bfloat16"]), lines(ranks.one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=3e-3)
        assert a["loss"] != b["loss"]


def test_a_sharded_run_goes_on_bit_for_bit_and_with_one_process(
    ranks: Ranks, undrawn: None
) -> None:
    whole, parts = ranks.two["fsdp"], ranks.two["parts"]
    keys = ("step", "split", "loss", "grad_norm")

    def told(config: TrainConfig) -> list[list[Any]]:
        return [[line.get(key) for key in keys] for line in lines(config)]

    assert told(parts) == told(whole)
    expected = weights(whole)
    for name, tensor in weights(parts).items():
        assert torch.equal(tensor, expected[name]), name

    for step in (4, 6):
        shutil.rmtree(parts.out / "checkpoints" / f"step-{step:08d}")
    train(parts, resume=True)
    for a, b in zip(lines(parts), lines(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_gradients_travel_once_a_step_however_many_micro_batches(
    ranks: Ranks, strategy: str
) -> None:
    for seen in ranks.seen:
        one, two, four = seen[strategy]["reductions"]
        assert one == two == four > 0


def test_weights_travel_as_bfloat16_and_gradients_as_float32(ranks: Ranks) -> None:
    for seen in ranks.seen:
        assert all(seen[strategy]["types"]["reduced"] == ["torch.float32"] for strategy in seen)
        (gathered,) = seen["fsdp"]["types"].keys() - {"reduced"}
        assert seen["fsdp"]["types"][gathered] == ["torch.bfloat16"]
        assert all(seen[strategy]["kept"] == ["torch.float32"] for strategy in seen)


def test_a_rank_holds_its_part_under_the_models_own_names(ranks: Ranks) -> None:
    model = build_model(ranks.one.model, load_model(ranks.one.out, "cpu")[2])
    names, total = (
        [name for name, _ in model.named_parameters()],
        sum(parameter.numel() for parameter in model.parameters()),
    )
    for seen in ranks.seen:
        assert all(seen[strategy]["names"] == names for strategy in seen)
        assert {s: seen[s]["sharded"] for s in seen} == {
            "ddp": 0,
            "fsdp": len(names),
            "hsdp": len(names),
        }
        assert seen["ddp"]["held"] == seen["hsdp"]["held"] == total
        assert seen["fsdp"]["held"] == pytest.approx(total / 2, rel=0.01)
    held = [seen["fsdp"]["held"] for seen in ranks.seen]
    assert sum(held) == total
    assert max(held) == own_parameters(model, 2)


@pytest.mark.parametrize("architecture", ["lst", "token"])
def test_every_weight_of_a_meta_model_is_filled_and_the_seed_says_how(
    tiny: Tiny, architecture: str
) -> None:
    config = tiny()

    def fill(seed: int) -> dict[str, Tensor]:
        with torch.device("meta"):
            model = build_model(
                ModelConfig(**{**vars(config.model), "architecture": architecture}), VOCABULARY
            )
        parallelise(model, config, ALONE)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        initialise_weights(model, seed)
        return model.state_dict()

    first, again, other = fill(0), fill(0), fill(1)
    for name, tensor in first.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, again[name]), name
        assert tensor.ndim < 2 or not torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    ("asked", "parameters", "processes", "expected"),
    [
        ("auto", 10**10, 1, "none"),
        ("fsdp", 10**10, 1, "none"),
        ("auto", DDP_PARAMETERS - 1, 2, "ddp"),
        ("auto", DDP_PARAMETERS, 2, "fsdp"),
        ("hsdp", 10, 2, "hsdp"),
        ("ddp", 10**10, 2, "ddp"),
    ],
)
def test_the_strategy_follows_the_models_size(
    asked: Any, parameters: int, processes: int, expected: str
) -> None:
    assert choose_strategy(ParallelConfig(strategy=asked), parameters, processes) == expected


def test_replicas_must_divide_the_processes() -> None:
    world = World(0, 6, torch.device("cpu"))
    with pytest.raises(SharedError, match="divides the 6 processes, got 4"):
        make_mesh("hsdp", ParallelConfig(strategy="hsdp", replicas=4), world)


@pytest.mark.parametrize(
    ("strategy", "replicas", "message"),
    [("hsdp", 0, "1 or more, got 0"), ("fsdp", 2, "it with hsdp alone, got strategy fsdp")],
)
def test_replicas_that_make_no_sense_are_refused(
    strategy: Any, replicas: int, message: str
) -> None:
    with pytest.raises(UserError, match=f"--parallel.replicas: expected {message}"):
        ParallelConfig(strategy=strategy, replicas=replicas)
