"""Where text belongs to the global transformer alone, a run is a run like any other."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lst.model import StackConfig
from lst.train.checkpoint import load_model
from lst.train.config import ParallelConfig, TrainConfig, to_json
from lst.train.loop import train

SECONDS = 120  # that two ranks may take

# What each rank runs, with the path of the configuration.
RANK = """
import sys
from pathlib import Path
from lst.train import metrics
from lst.train.config import read_config
from lst.train.loop import train
metrics.plot_losses = lambda *_: None
train(read_config(Path(sys.argv[1])))
"""


def global_text(config: TrainConfig) -> TrainConfig:
    """With everything that a Llama may bring: tied weights, shared heads of keys, any width."""
    large = StackConfig(layers=2, dim=32, heads=4, kv_heads=2, hidden=48)
    model = replace(config.model, text_path="global", tied=True, global_transformer=large)
    return replace(config, model=model)


def losses(config: TrainConfig) -> list[Any]:
    lines = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["split"], line["loss"]) for line in lines]


@pytest.mark.usefixtures("undrawn", "stories")
def test_a_run_learns_stops_goes_on_and_completes_stories(
    tiny: Callable[..., TrainConfig],
) -> None:
    whole, parts = global_text(tiny("whole", steps=8)), global_text(tiny("parts", steps=8))
    train(whole)
    assert (whole.out / "story_completion.json").exists()
    train(parts)
    for folder in sorted((parts.out / "checkpoints").iterdir())[1:]:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
    train(parts, resume=True)
    assert losses(parts) == losses(whole)
    assert losses(whole)[-1][2] < losses(whole)[0][2]
    model, config, *_ = load_model(parts.out, "cpu")
    assert config == parts
    assert model.head.weight is model.embedding.weight


@pytest.mark.timeout(SECONDS)
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_does(
    tiny: Callable[..., TrainConfig], tmp_path: Path, fork: Callable[..., Any], strategy: Any
) -> None:
    one, two = global_text(tiny("one", steps=4)), global_text(tiny("two", steps=4))
    two = replace(two, parallel=ParallelConfig(strategy=strategy))
    train(one)
    (tmp_path / "config.json").write_text(json.dumps(to_json(two)))
    fork(RANK, tmp_path / "config.json", ranks=2).succeed()
    got, expected = losses(two), losses(one)
    assert [line[:2] for line in got] == [line[:2] for line in expected]
    assert [line[2] for line in got] == pytest.approx([line[2] for line in expected], rel=1e-5)
