"""One command at a time in a run folder, and ranks that do not come are named."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lst.errors import UserError
from lst.train.config import TrainConfig, to_json
from lst.train.loop import train
from lst.train.run_folder import LOCK, RunLock

Tiny = Callable[..., TrainConfig]
Fork = Callable[..., Any]
SECONDS = 60  # that anything may take before its test fails
pytestmark = [pytest.mark.timeout(3 * SECONDS), pytest.mark.usefixtures("undrawn")]

# Trains until it is killed, or as the configuration says.
RUN = """
import sys
from pathlib import Path
import lst.train.metrics
from lst.errors import run_command
from lst.train.config import read_config
from lst.train.loop import train
lst.train.metrics.plot_losses = lambda *_: None
config = read_config(Path(sys.argv[1]))
run_command(lambda: train(config, resume=config.out.exists()))
"""
HURRIED = "import lst.train.distributed as d, datetime; d.MEETING = datetime.timedelta(seconds=2)\n"


def written(config: TrainConfig) -> Path:
    path = config.out.with_suffix(".json")
    path.write_text(json.dumps(to_json(config)))
    return path


def status(config: TrainConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((config.out / "status.json").read_text())
    return values


def wait_for(path: Path) -> None:
    until = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_second_command_in_the_same_folder_is_refused_and_changes_nothing(
    tiny: Tiny, fork: Fork, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tiny(steps=10**6, validate_every=10**6, checkpoint_every=1)
    running = fork(RUN, written(config))
    wait_for(config.out / "checkpoints" / "step-00000001")
    before = status(config)
    expected = f"another command trains here (process {before['pid']} on {before['host']})"
    for ranks in (1, 2):
        second = fork(RUN, written(config), ranks=ranks)
        assert second.codes == [2] * ranks
        assert f"error: {config.out}: {expected}\n" in second.printed(0)
    assert status(config)["pid"] == before["pid"] == running.pids[0]
    assert status(config)["state"] == "running"
    os.kill(running.pids[0], signal.SIGTERM)
    running.succeed()
    assert status(config)["state"] == "stopped"


def test_the_lock_of_a_command_that_was_killed_is_free(tiny: Tiny, fork: Fork) -> None:
    config = tiny(steps=10**6, validate_every=10**6, checkpoint_every=10**6)
    running = fork(RUN, written(config))
    wait_for(config.out / "metrics.jsonl")
    with pytest.raises(UserError, match="another command trains here"):
        RunLock().take(config.out)
    running.kill()
    assert running.codes == [-9]
    RunLock().take(config.out)


def test_a_run_lets_its_lock_go_and_data_workers_do_not_keep_it(tiny: Tiny) -> None:
    config = tiny(steps=1)
    train(config)
    lock = RunLock()
    lock.take(config.out)
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(SECONDS,))
    worker.start()
    lock.release()
    RunLock().take(config.out)
    worker.kill()
    worker.join()


def test_of_new_runs_that_start_at_once_one_gets_the_folder(tiny: Tiny, fork: Fork) -> None:
    """Whichever moment the others come at: the folder is there, and no run in it yet."""
    config = tiny()
    config.out.mkdir()
    lock = RunLock()
    lock.take(config.out)
    with pytest.raises(UserError, match=f"^{config.out}: another command trains here$"):
        train(config)
    assert [path.name for path in config.out.iterdir()] == [LOCK]
    lock.release()
    train(config)


def test_ranks_that_do_not_come_are_named_within_the_time_of_a_meeting(
    tiny: Tiny, fork: Fork
) -> None:
    config = tiny()
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps(to_json(config)))
    alone = f"import os; os.environ['WORLD_SIZE'] = '3'\n{HURRIED}"
    ranks = fork(alone + RUN, written(config), ranks=2)
    assert ranks.codes == [2, 2]
    said = ranks.printed(0)
    assert "expected 3 processes to meet within 2 s, got " in said
    assert said.count("\n") == 1, said
    assert status(config)["state"] == "failed"
    assert "expected 3 processes to meet" in status(config)["reason"]
