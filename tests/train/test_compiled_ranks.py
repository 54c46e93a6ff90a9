"""Blocks that are compiled before the model is shared learn what one process learns without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lst.train.config import ParallelConfig, TrainConfig, to_json
from lst.train.loop import train

# What each rank runs, with the path of the configuration. Traced and differentiated as for
# Inductor, which would take a minute to compile and adds nothing to what ranks share.
RANK = """
import functools, sys
from pathlib import Path
from lst.train import blocks, metrics
from lst.train.config import read_config
from lst.train.loop import train
metrics.plot_losses = lambda *_: None
blocks.compile_blocks = functools.partial(blocks.compile_blocks, backend="aot_eager")
blocks.check_compiler = lambda *_: None  # that backend needs none
train(read_config(Path(sys.argv[1])))
"""


def losses(config: TrainConfig) -> list[Any]:
    lines = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["split"], line["loss"]) for line in lines]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_compiled_ranks_learn_what_one_does(
    tiny: Callable[..., TrainConfig], tmp_path: Path, fork: Callable[..., Any], strategy: Any
) -> None:
    one = tiny("one", steps=3)
    two = tiny("two", steps=3, compile=True, parallel=ParallelConfig(strategy=strategy))
    train(one)
    (tmp_path / "config.json").write_text(json.dumps(to_json(two)))
    fork(RANK, tmp_path / "config.json", ranks=2).succeed()
    got, expected = losses(two), losses(one)
    assert [line[:2] for line in got] == [line[:2] for line in expected]
    assert [line[2] for line in got] == pytest.approx([line[2] for line in expected], rel=1e-5)
