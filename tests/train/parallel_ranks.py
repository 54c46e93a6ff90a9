"""What each rank of ``test_parallel.py`` runs: ``parallel_ranks.py FOLDER PORT…``.

Trains every ``*.json`` configuration of FOLDER in turn, the one named ``parts`` again from its
checkpoint of step 2; then looks at what one step of each strategy sends, and how a model lies. What
it sees goes to ``FOLDER/rank-R``.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lst.data.loader import TrainLoader
from lst.model import build_model
from lst.train import metrics
from lst.train.config import ParallelConfig, TrainConfig, read_config
from lst.train.corpus import open_corpus
from lst.train.distributed import World, start_world
from lst.train.loop import train
from lst.train.parallel import initialise_weights, parallelise
from lst.train.step import backward

STRATEGIES = {"ddp": None, "fsdp": None, "hsdp": 2}  # replicas


def main(folder: Path, ports: list[str]) -> None:
    metrics.plot_losses = lambda *_: None
    meetings = iter(ports)  # a meeting place of its own for every run
    for path in sorted(folder.glob("*.json")):
        config = read_config(path)
        os.environ["MASTER_PORT"] = next(meetings)
        train(config)
        if path.stem == "parts":
            if os.environ["RANK"] == "0":
                for step in (4, 6):
                    shutil.rmtree(config.out / "checkpoints" / f"step-{step:08d}")
            os.environ["MASTER_PORT"] = next(meetings)
            train(config, resume=True)
    os.environ["MASTER_PORT"] = next(meetings)
    with start_world("cpu") as world:
        seen = {name: look(name, config, world) for name in STRATEGIES}
        (folder / f"rank-{world.rank}").write_text(json.dumps(seen))


def look(strategy: str, config: TrainConfig, world: World) -> dict[str, Any]:
    """Of one strategy in bfloat16: what a step sends, and what a rank holds."""
    parallel = ParallelConfig(strategy=strategy, replicas=STRATEGIES[strategy])  # type: ignore[arg-type]
    config = replace(config, parallel=parallel, precision="bfloat16")
    corpus = open_corpus(config.data)
    with torch.device("meta"):
        model = build_model(config.model, corpus.vocabulary)
    passes = parallelise(model, config, world)
    initialise_weights(model, config.seed)
    loader = TrainLoader(
        replace(config.data, rows=8),
        corpus.vocabulary,
        corpus.tokenizer,
        config.model.plan(),
        seed=0,
        total_steps=6,
        rank=world.rank,
        world_size=world.size,
        accumulation=4,
    )
    batches, _ = next(iter(loader))

    def step(micro_batches: int) -> None:
        part = batches[:micro_batches]
        backward(passes, part, targets=1, precision=config.precision, world=world)

    for _ in range(2):
        step(1)  # DDP lays out its buckets after the first
    reductions, types = [], {}
    for micro_batches in (1, 2, 4):
        with Travelling() as travelling:
            step(micro_batches)
        reductions.append(sum("reduce" in name for name, _ in travelling.seen))
        for name, dtype in travelling.seen:
            types.setdefault("reduced" if "reduce" in name else name, set()).add(dtype)
    tensors = dict(model.named_parameters())
    held = (t.to_local() if isinstance(t, DTensor) else t for t in tensors.values())
    return {
        "reductions": reductions,
        "types": {name: sorted(seen) for name, seen in types.items()},
        "sharded": sum(isinstance(tensor, DTensor) for tensor in tensors.values()),
        "names": list(tensors),
        "held": sum(tensor.numel() for tensor in held),
        "kept": sorted({str(t.dtype) for each in tensors.values() for t in (each, each.grad)}),
    }


class Travelling(TorchDispatchMode):
    """Notes every collective in the block: its name and the type of what it sends."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.seen.append((func.__name__, str(tensors[0].dtype)))
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
