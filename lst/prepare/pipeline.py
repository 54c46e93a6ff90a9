"""Preparation as a step of a ``datatrove`` pipeline; needs ``lst[scale]`` to be imported.

LocalPipelineExecutor([PrepareShards(config)], tasks=8).run()
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from datatrove.pipeline.base import PipelineStep

from lst.prepare.corpus import CorpusConfig, prepare_corpus

__all__ = ["PrepareShards"]


class PrepareShards(PipelineStep):
    """A task prepares the shards of its rank; no documents come in or go out."""

    name = "records"
    type = "lst.prepare"

    def __init__(self, config: CorpusConfig) -> None:
        super().__init__()
        self.config = config

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        with self.track_time("task"):
            made = prepare_corpus(replace(self.config, rank=rank, world_size=world_size))
        self.stat_update("records", value=made.num_records, unit="task")
        self.stat_update("frames", value=made.num_frames, unit="task")
        self.stat_update("skipped", value=made.num_skipped, unit="task")
        yield from ()
