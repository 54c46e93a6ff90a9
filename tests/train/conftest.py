"""A corpus and a model small enough that a run takes a second."""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lst.data.loader import DataConfig
from lst.data.patching import PatchingConfig
from lst.data.records import Record, RecordWriter, StoryItem, Word, write_items
from lst.model import ModelConfig, StackConfig
from lst.train.config import OptimizerConfig, TrainConfig
from lst.vocabulary import train_tokenizer

NUM_UNITS = 20
RANKS_SECONDS = 180  # that processes of a program may take
WORDS = ["a", "story", "of", "the", "small", "red", "fox", "who", "went", "over", "hills"]


def spoken(name: str, rng: random.Random, words: int) -> Record:
    """A record whose words last 2 to 6 frames, with silences between some of them."""
    chosen, aligned, frame = rng.choices(WORDS, k=words), [], rng.randint(0, 3)
    for word in chosen:
        stop = frame + rng.randint(2, 6)
        aligned.append(Word(word, frame, stop))
        frame = stop + rng.choice([0, 0, 3])
    return Record(
        id=name,
        text=" ".join(chosen),
        units=np.array([rng.randrange(NUM_UNITS) for _ in range(frame)], np.int16),
        words=tuple(aligned),
        chars=None,
        speaker=None,
        source="test",
    )


def written(name: str, rng: random.Random, words: int) -> Record:
    return replace(spoken(name, rng, words), units=None, words=None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder with everything that training reads, but no stories."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) for _ in range(50)]
    tokenizer = train_tokenizer(lines, folder / "tokenizer.model", num_pieces=300)
    for split, records in (("train", 40), ("valid", 3)):
        for name, make in (("text", written), ("speech", spoken)):
            with RecordWriter(
                folder / split / name,
                codebook=None,
                tokenizer=tokenizer.fingerprint,
                num_units=NUM_UNITS,
            ) as writer:
                for index in range(records):
                    writer.write(make(f"{split}-{name}-{index}", rng, 40))
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ``loss.png``: drawing takes longer than a tiny run."""
    monkeypatch.setattr("lst.train.metrics.plot_losses", lambda *_: None)


@pytest.fixture
def stories(corpus: Path) -> Any:
    """Two stories in the corpus, for the length of a test."""
    rng = random.Random(1)
    items = [
        StoryItem(
            id=f"story-{index}",
            task="storycloze",
            prompt=spoken("prompt", rng, 8),
            endings=(spoken("true", rng, 4), spoken("false", rng, 4)),
            answer=0,
        )
        for index in range(2)
    ]
    folder = corpus / "items"
    write_items(folder, items, codebook=None, tokenizer=None, num_units=NUM_UNITS)
    yield items
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.fixture(scope="session")
def make_tiny(corpus: Path) -> Callable[..., TrainConfig]:
    """``make_tiny(folder, steps=6, …)``: a run in that folder, a line of metrics a step."""

    def make(out: Path, **changes: Any) -> TrainConfig:
        config = TrainConfig(
            name="tiny",
            model=ModelConfig(
                encoder=StackConfig(layers=1, dim=16, heads=1),
                global_transformer=StackConfig(layers=1, dim=32, heads=2),
                decoder=StackConfig(layers=1, dim=16, heads=1),
                local_window=16,
                decoder_window=8,
            ),
            data=DataConfig(
                corpus=str(corpus),
                rows=4,
                units_per_sequence=48,
                patching=PatchingConfig(strategy="curriculum"),
            ),
            optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
            steps=6,
            out=out,
            validate_every=3,
            checkpoint_every=2,
            keep=3,
            log_every=1,
            device="cpu",
        )
        return replace(config, **changes)

    return make


@pytest.fixture
def tiny(make_tiny: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., TrainConfig]:
    """``tiny("name", steps=6, …)``: the same in a folder of that name."""
    return lambda name="run", **changes: make_tiny(tmp_path / name, **changes)


class Ranks:
    """The processes of a program under way."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.pids: list[int] = self._read("pids")

    def _read(self, name: str) -> list[int]:
        path, until = self._log / name, time.monotonic() + RANKS_SECONDS
        while not path.exists():
            assert time.monotonic() < until, self.printed()
            time.sleep(0.01)
        numbers: list[int] = json.loads(path.read_text())
        return numbers

    def kill(self) -> None:
        """Kill −9, all at once; those that have ended already are left alone."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def ended(self) -> bool:
        """Whether all have."""
        return (self._log / "codes").exists()

    @functools.cached_property
    def codes(self) -> list[int]:
        """Exit codes, once all have ended; −9 of one that was killed."""
        return self._read("codes")

    def succeed(self) -> str:
        """Wait; what rank 0 printed. All must have ended well."""
        assert set(self.codes) == {0}, self.printed()
        return self.printed(0)

    def printed(self, *ranks: int) -> str:
        paths = [self._log / f"rank-{rank}.log" for rank in ranks]
        return "\n".join(path.read_text() for path in paths or sorted(self._log.glob("*.log")))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[subprocess.Popen[str]]:
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fork_server.py")],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield server
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.communicate()


@pytest.fixture
def fork(forking: Callable[[], Any]) -> Iterator[Callable[..., Ranks]]:
    """``fork(code, *arguments, ranks=1)``: run a program in processes of its own, see Ranks."""
    with forking() as start:
        yield start


@pytest.fixture(scope="session")
def forking(
    fork_server: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], contextlib.AbstractContextManager[Callable[..., Ranks]]]:
    """``with forking() as fork: …``, for fixtures that live longer than a test."""
    return functools.partial(start_programs, fork_server, tmp_path_factory)


@contextlib.contextmanager
def start_programs(
    fork_server: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Ranks]]:
    started = []

    def start(code: str, *arguments: object, ranks: int = 1) -> Ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = tmp_path_factory.mktemp("ranks")
        request = {
            "code": code,
            "arguments": list(map(str, arguments)),
            "environments": [
                {key: str(value) for key, value in {**common, "RANK": r, "LOCAL_RANK": r}.items()}
                for r in range(ranks)
            ],
            "log": str(log),
        }
        assert fork_server.stdin is not None
        fork_server.stdin.write(json.dumps(request) + "\n")
        fork_server.stdin.flush()
        started.append(Ranks(log))
        return started[-1]

    try:
        yield start
    finally:
        for ranks in started:  # a test that failed leaves none behind
            ranks.kill()
            ranks.codes  # noqa: B018  waits
