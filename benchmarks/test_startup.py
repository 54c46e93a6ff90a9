"""How long does it take until training begins: imports, the first step, compilation?

Each in processes of their own, as a user starts them, imports after one that is not timed. The
model is the reduced one (`benchmarks.reduced`). Compiled are the blocks of the model, one by one,
with an empty cache; the figure is the first compiled step.

    pytest benchmarks/test_startup.py --benchmark-only
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

IMPORTS = {"lst_kernels": "torch", "lst.train.__main__": "torch"}  # beside what they import
ROUNDS = 1

STEPS = """
import json, sys, time
from benchmarks.mix import MIX, documents
from benchmarks.reduced import ARMS, REDUCED, make_batch, make_model
from lst.train.parallel import blocks

arm = ARMS["static 4, text global"]
begun = time.perf_counter()
model = make_model(arm, REDUCED)
batch = make_batch(arm, REDUCED, documents(MIX, REDUCED.shape, REDUCED.num_tokens // 2, seed=0))
seconds = {"build": time.perf_counter() - begun}
if sys.argv[1] == "compiled":
    for block in blocks(model):
        block.compile(dynamic=True)
taken = []
for _ in range(4):
    begun = time.perf_counter()
    model(batch).sum().backward()
    taken.append(time.perf_counter() - begun)
    model.zero_grad()
print(json.dumps(seconds | {"first": taken[0], "steady": min(taken[1:])}))
"""


def run(code: str, *arguments: str, cache: Path | None = None) -> str:
    environment = os.environ | ({} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("module", IMPORTS)
def test_import(race, module: str):
    other = IMPORTS[module]
    race(
        f"import {module}",
        lambda: run(f"import {module}"),
        {f"import {other}": lambda: run(f"import {other}")},
        floors={},
        rounds=ROUNDS,
    )


def test_first_step(benchmark, add_row):
    found = benchmark.pedantic(lambda: json.loads(run(STEPS, "eager")), rounds=1)
    report(add_row, "first step", found["first"], "a later step", found["steady"])
    report(add_row, "making model and batch", found["build"], "a step", found["steady"])


def test_compilation(benchmark, add_row, tmp_path: Path):
    measure = lambda: json.loads(run(STEPS, "compiled", cache=tmp_path))  # noqa: E731
    found = benchmark.pedantic(measure, rounds=1)
    report(add_row, "first compiled step", found["first"], "a compiled step", found["steady"])


def report(
    add_row: Callable[..., object], case: str, seconds: float, peer: str, other: float
) -> None:
    add_row(
        case=f"lst-1b / 8: {case}",
        peer=peer,
        ours=f"{seconds * 1e3:.0f} ms",
        theirs=f"{other * 1e3:.0f} ms",
        ratio=other / seconds,
        floor=None,
        facts={"seconds": seconds, "peer_seconds": other},
    )
