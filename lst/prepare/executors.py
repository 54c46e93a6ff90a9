"""Preparation as a ``datatrove`` pipeline: tasks on this machine, or a SLURM array.

    plan here → one task a rank: its shards → the last one makes the dataset

A task is done when its shards are, which is found out anew each time: starting the same pipeline
again does what is missing.
"""

import shutil
from dataclasses import dataclass, replace
from typing import Any, Literal

from lst.errors import UserError, expect_not_negative, expect_positive
from lst.prepare.corpus import CorpusConfig, plan_corpus

__all__ = ["ExecutorConfig", "SlurmConfig", "make_executor"]


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What a task asks SLURM for."""

    partition: str = ""  # needed
    time: str = "24:00:00"
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 8
    gpus_per_task: int = 0  # one for HuBERT and the aligner, with --device cuda
    qos: str = "normal"
    setup: str = ""  # a shell command before the task, such as "source .venv/bin/activate"

    def __post_init__(self) -> None:
        expect_positive(self, "cpus_per_task", "mem_per_cpu_gb", within="slurm.")
        expect_not_negative(self, "gpus_per_task", within="slurm.")


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Who does the work."""

    executor: Literal["none", "local", "slurm"] = "none"
    """This process alone (or one of --world-size), tasks on this machine, or a SLURM array."""
    tasks: int = 1  # that the work is dealt out to; no more than there are shards
    workers: int = -1  # tasks at once; -1 for all of them
    slurm: SlurmConfig = SlurmConfig()


def make_executor(corpus: CorpusConfig, config: ExecutorConfig) -> Any:
    """Plan the corpus, and return a ``datatrove`` executor whose ``run()`` prepares it. Its logs
    are in ``OUT/logs``.

    Raises:
        UserError: bad options or sources; datatrove or SLURM is not installed.
    """
    expect_positive(config, "tasks")
    if config.workers < 1 and config.workers != -1:
        raise UserError(f"--workers: expected 1 or more, or -1 for all, got {config.workers}")
    if corpus.world_size > 1:
        raise UserError("--world-size: expected no ranks beside --executor, which makes its own")
    try:
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

        from lst.prepare.pipeline import PrepareShards
    except ImportError:
        raise UserError(
            f"--executor {config.executor} needs datatrove, which is not installed: "
            "pip install 'lst[scale]'"
        ) from None
    slurm = config.slurm
    if config.executor == "slurm" and not slurm.partition:
        raise UserError("--slurm.partition: expected the partition to run on, got none")
    if config.executor == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--executor slurm: expected SLURM's sbatch on this machine, got none")
    # Where tasks are submitted there may be no GPU.
    tasks = min(config.tasks, plan_corpus(replace(corpus, device="cpu")).num_shards)
    common = {
        "pipeline": [PrepareShards(corpus)],
        "tasks": tasks,
        "workers": min(config.workers, tasks),
        "logging_dir": str(corpus.out.absolute() / "logs"),
        "skip_completed": False,
    }
    if config.executor == "local":
        return LocalPipelineExecutor(**common)
    return SlurmPipelineExecutor(
        **common,
        partition=slurm.partition,
        time=slurm.time,
        cpus_per_task=slurm.cpus_per_task,
        mem_per_cpu_gb=slurm.mem_per_cpu_gb,
        gpus_per_task=slurm.gpus_per_task,
        qos=slurm.qos,
        env_command=slurm.setup or None,
        job_name=f"prepare-{corpus.out.name}",
    )
