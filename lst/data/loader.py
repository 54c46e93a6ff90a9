"""The loader: lanes, worker processes and ranks, put together into batches.

    records -> interleave -> patching -> packing -> batch
    [                      all of it in a worker                     ]

    lanes     0   1   2   3   4   5   6   7          rows of the global batch
    ranks     0               1                      contiguous
    micro     0       1       0       1              with accumulation=2
    workers   a       b       a       b              each makes whole micro-batches, with their plan

A micro-batch's stream holds its lanes in order. Neither the number of ranks, nor that of workers,
nor accumulation changes what is in a lane, so the global batches stay the same. A batch comes with
the states of its lanes after it, so a run goes on with the very rows it would have had, however far
ahead the workers were.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lst.data.batch import Batch, PlanConfig, make_batch, plan_batch
from lst.data.encoded import EncodedDataset
from lst.data.interleave import NEEDS, TASKS, Task, record_document, stable_rng
from lst.data.lanes import Lane, LaneState, Source
from lst.data.packing import MIN_ROOM, Packed, concatenate, patch_document
from lst.data.patching import NoPatching, PatchingConfig, final_strategy
from lst.data.records import Dataset
from lst.data.workers import in_step
from lst.errors import UserError, expect_not_negative, expect_positive
from lst.files import Location
from lst.vocabulary import Tokenizer, Vocabulary

__all__ = ["DataConfig", "TrainLoader", "expect_patching", "validation_batches"]


MOST_ROWS = 2**20  # each takes memory before the first step


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and in what portions."""

    corpus: str = "data/demo"  # made by python -m lst.prepare; a folder or a URL
    # Datasets under corpus/train and their shares. A name is DATASET or DATASET:KIND, where KIND
    # is interleaved, speech, text, speech-to-text, text-to-speech, asr or tts (docs/patching.md).
    mixture: dict[str, float] = field(default_factory=lambda: {"text": 2.0, "speech": 1.0})
    # What the shares count: tokens (text pieces and speech units), or units (patches).
    mixture_in: Literal["tokens", "units"] = "tokens"
    rows: int  # sequences in the global batch, over all processes
    units_per_sequence: int  # length of a sequence in patches (tokens for a baseline)
    patching: PatchingConfig = field(default_factory=PatchingConfig)
    # Worker processes per rank that make batches ahead; more than accumulation have no effect. 0:
    # the rank makes each batch when it needs it.
    num_workers: int = 0

    def __post_init__(self) -> None:
        if not self.mixture:
            raise UserError("data: expected a mixture of at least one dataset, got none")
        for name, weight in self.mixture.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"data: expected a weight above 0 for {name!r}, got {weight}")
        sources: dict[Source, str] = {}
        for name in self.mixture:
            twin = sources.setdefault(Source.parse(name), name)
            if twin != name:
                raise UserError(f"data: {name!r} and {twin!r} of the mixture are the same")
        expect_positive(self, "rows", "units_per_sequence", within="data.")
        expect_not_negative(self, "num_workers", within="data.")
        if self.units_per_sequence < MIN_ROOM + 1:
            raise UserError(
                f"--data.units-per-sequence: expected {MIN_ROOM + 1} or more (a document that is "
                f"split costs two, the dead tail one), got {self.units_per_sequence}"
            )

        if self.rows > MOST_ROWS or self.rows * self.units_per_sequence >= 2**31:
            raise UserError(
                f"--data.rows, --data.units-per-sequence: expected at most {MOST_ROWS:,} rows, and "
                f"fewer than 2^31 units in all, got {self.rows} × {self.units_per_sequence}"
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        """The datasets that the mixture is of, each once."""
        return tuple(dict.fromkeys(Source.parse(name).dataset for name in self.mixture))

    @property
    def task(self) -> Task | None:
        """What is learnt, where documents of one task are in the mixture."""
        kinds = {Source.parse(name).kind for name in self.mixture}
        tasks = [task for task in TASKS if task in kinds]
        return tasks[0] if len(tasks) == 1 else None


def expect_patching(patching: PatchingConfig, plan: PlanConfig) -> None:
    """Raise UserError where a model without local modules would have to read longer patches."""
    if not plan.local and final_strategy(patching) != NoPatching():
        raise UserError(
            "data: a token-level model reads every token as a patch: expected the patching "
            f"strategy 'none' or 'speech-bpe', got {patching.strategy!r}"
        )


class TrainLoader:
    """Endless batches for one rank, with the states to go on from.

    Args:
        plan: the model's.
        seed: of the order of records, of interleaving and of the curriculum.
        total_steps: of the whole run; the curriculum reads it.
        accumulation: micro-batches that a rank takes for one step.
        pin: whether batches come in pinned memory, from where a GPU copies on its own.
        states: lane → state as an earlier loader yielded it; those of other ranks are passed over.
            None starts afresh.

    Attributes:
        awaited: the worker process whose micro-batch is being waited for; None: none is.

    Raises:
        UserError: rows that do not divide, a dataset that does not fit the vocabulary, a lane
            without a state, or patched data for a model without local modules.
    """

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        tokenizer: Tokenizer,
        plan: PlanConfig,
        *,
        seed: int,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        pin: bool = False,
        states: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        if config.rows % (world_size * accumulation):
            raise UserError(
                f"data: expected rows that divide by {world_size} processes × {accumulation} "
                f"micro-batches, got {config.rows}"
            )
        expect_patching(config.patching, plan)
        self.awaited: int | None = None
        self._num_workers, self._pin = config.num_workers, pin
        datasets = _open_datasets(config, vocabulary, tokenizer)
        per_rank = config.rows // world_size
        lanes = [
            Lane(
                number=number,
                num_lanes=config.rows,
                weights=config.mixture,
                weights_in=config.mixture_in,
                datasets=datasets,
                vocabulary=vocabulary,
                row_units=config.units_per_sequence - 1,
                patching=config.patching,
                total_steps=total_steps,
                seed=seed,
            )
            for number in range(rank * per_rank, (rank + 1) * per_rank)
        ]
        firsts = [_state_of(lane, states) for lane in lanes]
        rows = per_rank // accumulation
        self._micro_batches = [
            _MicroBatches(lanes[at : at + rows], firsts[at : at + rows], vocabulary, plan)
            for at in range(0, per_rank, rows)
        ]

    def __iter__(self) -> Iterator[tuple[tuple[Batch, ...], dict[int, dict[str, Any]]]]:
        """Yields the micro-batches of a step, and the states of the rank's lanes after it.

        Starts from the states given to the constructor. Workers end when the iterator does.
        """
        for items in in_step(
            self._micro_batches,
            num_workers=self._num_workers,
            pin=self._pin,
            await_worker=self._await,
        ):
            states = {lane: state for item in items for lane, state in item.states.items()}
            yield tuple(item.batch for item in items), states

    def _await(self, pid: int | None) -> None:
        self.awaited = pid


@dataclass(frozen=True, kw_only=True, slots=True)
class _MicroBatch:
    """A batch, and the states of its lanes after it as JSON."""

    batch: Batch
    states: dict[int, dict[str, Any]]

    def pin_memory(self) -> "_MicroBatch":
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True, slots=True)
class _MicroBatches:
    """One micro-batch of every step, from a row of each of some lanes."""

    lanes: list[Lane]
    states: list[LaneState]
    vocabulary: Vocabulary
    plan: PlanConfig

    def __iter__(self) -> Iterator[_MicroBatch]:
        streams = [lane.rows(state) for lane, state in zip(self.lanes, self.states, strict=True)]
        while True:
            rows, states = zip(*map(next, streams), strict=True)
            numbers = [lane.number for lane in self.lanes]
            yield _MicroBatch(
                batch=make_batch(
                    rows,
                    self.vocabulary,
                    self.plan,
                    step=states[0].row - 1,
                    units=sum(lane.row_units + 1 for lane in self.lanes),
                ),
                states=dict(zip(numbers, (state.to_json() for state in states), strict=True)),
            )


def _open_datasets(
    config: DataConfig, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> dict[str, EncodedDataset]:
    datasets = {}
    for name in config.datasets:
        folder = Location(config.corpus) / "train" / name
        dataset = Dataset.open(folder, tokenizer=tokenizer.fingerprint)
        if dataset.has_speech and dataset.info.num_units != vocabulary.num_units:
            raise UserError(
                f"{folder}: expected units of a codebook of {vocabulary.num_units}, "
                f"got one of {dataset.info.num_units}"
            )
        datasets[name] = dataset
    by = config.patching.aligned_by
    encoded = {name: EncodedDataset(each, tokenizer, by) for name, each in datasets.items()}
    for key in config.mixture:
        source = Source.parse(key)
        records = encoded[source.dataset]
        for need in NEEDS[source.kind]:  # told now, not by the run that comes to such a record
            lacking = records.first_without(need)
            if lacking is not None:
                raise UserError(
                    f"data: {key!r} of the mixture: expected {need} in every record, got "
                    f"none in {records.where(lacking)}; {source.dataset!r} without a kind makes "
                    "of each what it can"
                )
    return encoded


def _state_of(lane: Lane, states: Mapping[int, Mapping[str, Any]] | None) -> LaneState:
    if states is None:
        return lane.first_state()
    if lane.number not in states or max(states) >= lane.num_lanes:
        raise UserError(
            f"data: expected the states of lanes 0 … {lane.num_lanes - 1}, one for each row, got "
            f"those of {sorted(states)}"
        )
    return LaneState.from_json(states[lane.number])


def validation_batches(
    dataset: Dataset,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    plan: PlanConfig,
    patching: PatchingConfig,
    *,
    units_per_batch: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    task: Task | None = None,
) -> Iterator[Batch]:
    """Every record of a dataset once, as whole documents; the same at every call. Speech is in
    patches of the final strategy.

    Of a ``task`` documents are made of the records that have both text and units, and there may be
    none.

    Rank r takes records r, r + world_size, …, so ranks may get different numbers of batches. A
    batch holds at most ``units_per_batch`` units, or one longer document alone.
    """
    strategy = final_strategy(patching)
    parts: list[Packed] = []
    units = 0
    for index in range(rank, len(dataset), world_size):
        record = dataset[index]
        if task is not None and (record.text is None or record.units is None):
            continue
        rng = stable_rng(seed, "validation", record.id)
        document = record_document(
            record, vocabulary, tokenizer, rng, task or "auto", alignment=patching.alignment
        )
        part = patch_document(document, vocabulary, strategy)
        if parts and units + len(part.lengths) > units_per_batch:
            yield plan_batch(concatenate(parts), vocabulary, plan)
            parts, units = [], 0
        parts.append(part)
        units += len(part.lengths)
    if parts:
        yield plan_batch(concatenate(parts), vocabulary, plan)
