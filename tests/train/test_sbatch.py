"""The sbatch example trains, stops in time, goes back into the queue and ends there.

``srun`` and ``scontrol`` are stand-ins; the ranks, their signals and status.json are real.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "train.sbatch"
STEPS = 100
SECONDS = 120  # that a job may take before its test fails

# Two tasks, as SLURM numbers them. Where the time is short, it is over after the first step.
SRUN = """#!/bin/bash
[ "$TIME" != none ] || exit 7
while [[ "$1" == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
if [ "$TIME" = short ]; then
    until [ -s "$RUN/metrics.jsonl" ]; do
        kill -0 "${tasks[0]}" || exit 8
        sleep 0.05
    done
    kill -USR1 "${tasks[@]}"
fi
wait -n && wait -n
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo 127.0.0.1; echo elsewhere ;;
    requeue) echo "$2" >> "$RUN.requeued" ;;
esac
"""
TINY = [
    *("--data.rows", 2, "--data.units-per-sequence", 48, "--steps", STEPS, "--log-every", 1),
    *("--model.global-transformer.layers", 1, "--model.decoder.layers", 1),
    *("--validate-every", 1000, "--checkpoint-every", 1000, "--device", "cpu", "--no-evaluate"),
]


def run_job(run: Path, time: str, corpus: Path) -> subprocess.CompletedProcess[str]:
    """What SLURM would do with the script when its turn comes."""
    commands = run.with_name("bin")
    commands.mkdir(exist_ok=True)
    python = f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    own = {"PATH": f"{commands}:{os.environ['PATH']}", "TIME": time, "RUN": str(run)}
    process = subprocess.Popen(
        ["bash", SCRIPT, *map(str, ["demo", "--data.corpus", corpus, *TINY])],
        env={**os.environ, **slurm, **own, "MASTER_PORT": str(port)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def status(run: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads((run / "status.json").read_text())
    return values


@pytest.mark.timeout(3 * SECONDS)
def test_a_job_whose_time_is_over_goes_back_into_the_queue_until_it_is_finished(
    corpus: Path, tmp_path: Path
) -> None:
    run, requeued = tmp_path / "run", tmp_path / "run.requeued"
    done = run_job(run, "short", corpus)
    assert done.returncode == 0, done.stderr
    told = status(run)
    assert (told["state"], told["signal"], told["processes"]) == ("stopped", "SIGUSR1", 2)
    assert told["checkpoint"] == f"checkpoints/step-{told['step']:08d}"
    assert requeued.read_text() == "4711\n"

    failed = run_job(run, "none", corpus)  # what status.json says is of the time before
    assert failed.returncode == 7
    assert requeued.read_text() == "4711\n"

    done = run_job(run, "long", corpus)
    assert done.returncode == 0, done.stderr
    assert (status(run)["state"], status(run)["step"]) == ("finished", STEPS)
    assert requeued.read_text() == "4711\n"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["split"] == "train"] == [*range(1, STEPS + 1)]


def test_the_script_is_bash_and_asks_slurm_for_what_it_needs() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    asked = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@300"} <= set(asked)
