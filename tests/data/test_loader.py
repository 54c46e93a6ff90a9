"""The global batches are the same for any number of ranks, workers and micro-batches, and after
any interruption."""

import json
import multiprocessing
import shutil
from dataclasses import fields, is_dataclass, replace
from itertools import chain, islice

import fsspec
import numpy as np
import pytest
import torch

from lst.data.batch import IGNORE, PlanConfig
from lst.data.loader import DataConfig, TrainLoader, validation_batches
from lst.data.patching import PatchingConfig
from lst.data.records import Dataset
from lst.errors import UserError
from lst.vocabulary import EOS, Vocabulary

PLAN = PlanConfig(slots=2, local_window=32, decoder_window=16)
ROWS, UNITS = 4, 48


@pytest.fixture
def make_loader(corpus):
    def make(
        plan=PLAN, states=None, total_steps=40, rank=0, world_size=1, accumulation=1, **options
    ):
        defaults = {"corpus": str(corpus.folder), "rows": ROWS, "units_per_sequence": UNITS}
        return TrainLoader(
            DataConfig(**(defaults | options)),
            corpus.vocabulary,
            corpus.tokenizer,
            plan,
            seed=3,
            total_steps=total_steps,
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            states=states,
        )

    return make


def live(batch):
    """Everything of a batch but its dead tail: tokens, targets, patch and document offsets."""
    layout = batch.layout
    return (
        batch.tokens[: batch.num_tokens].tolist(),
        batch.targets[: batch.num_tokens].tolist(),
        torch.diff(layout.cu_patches)[: batch.num_units].tolist(),
        layout.closed_late[: batch.num_units].tolist(),
        torch.diff(layout.cu_documents)[: len(batch.record_ids)].tolist(),
        list(batch.record_ids),
    )


def joined(batches):
    """The live parts of several streams, end to end."""
    return tuple(list(chain(*parts)) for parts in zip(*map(live, batches), strict=True))


def steps(loader, count):
    return [
        ([live(batch) for batch in batches], states) for batches, states in islice(loader, count)
    ]


def test_a_batch_has_exactly_its_units(make_loader):
    for number, ((batch,), states) in enumerate(islice(make_loader(), 10)):
        assert batch.layout.num_patches == ROWS * UNITS
        assert batch.num_units == ROWS * (UNITS - 1)
        assert batch.layout.num_tokens % 256 == 0
        assert batch.step == number
        assert sorted(states) == list(range(ROWS))
        assert all(state["row"] == number + 1 for state in states.values())


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_the_global_batch_does_not_depend_on_ranks_and_micro_batches(
    make_loader, world_size, accumulation
):
    whole = list(islice(make_loader(), 5))
    ranks = [
        list(islice(make_loader(rank=r, world_size=world_size, accumulation=accumulation), 5))
        for r in range(world_size)
    ]
    for step, ((batch,), states) in enumerate(whole):
        parts = [part for rank in ranks for part in rank[step][0]]
        assert len(parts) == world_size * accumulation
        assert joined(parts) == live(batch)
        assert {k: v for rank in ranks for k, v in rank[step][1].items()} == states
        for name in ("num_targets", "num_speech_targets", "num_speech_tokens", "num_tokens"):
            assert sum(getattr(part, name) for part in parts) == getattr(batch, name)


@pytest.mark.parametrize(("rows", "world_size", "accumulation"),
                         [(1, 1, 1), (3, 3, 1), (4, 2, 2), (8, 4, 1), (8, 1, 4)])  # fmt: skip
def test_an_epoch_reads_every_record_of_every_shard_once(
    corpus, make_loader, rows, world_size, accumulation
):
    """Whatever the number of lanes, ranks and micro-batches: 41 texts in 5 shards, 10 in each."""
    ranks = [
        iter(make_loader(mixture={"text": 1.0}, rows=rows, rank=rank, world_size=world_size,
                         accumulation=accumulation))
        for rank in range(world_size)
    ]  # fmt: skip
    seen = {lane: [] for lane in range(rows)}
    unfinished = set(seen)
    while unfinished:
        for rank in ranks:
            micro_batches, states = next(rank)
            lanes = iter(sorted(states))
            for batch in micro_batches:
                for ids, lane in zip(rows_of(batch, UNITS - 1), lanes, strict=False):
                    # What goes on from the row before was counted there.
                    opened = seen[lane] and seen[lane][-1] == ids[0]
                    seen[lane] += ids[1:] if opened else ids
                    if states[lane]["sources"]["text"]["epoch"] > 0:
                        unfinished.discard(lane)
    sizes = [len(range(lane, 41, rows)) for lane in range(rows)]
    first_epoch = [name for lane in seen for name in seen[lane][: sizes[lane]]]
    assert sorted(first_epoch) == sorted(corpus.records["text"])


def rows_of(batch, units):
    """The record ids of each row of a batch."""
    rows, filled = [[]], 0
    for name, patches in zip(
        batch.record_ids, torch.diff(batch.layout.cu_documents).tolist(), strict=False
    ):
        if filled == units:
            rows.append([])
            filled = 0
        rows[-1].append(name)
        filled += patches
    return rows


@pytest.mark.parametrize("mixture_in", ["tokens", "units"])
def test_a_run_goes_on_where_it_stopped_while_workers_were_ahead(make_loader, mixture_in):
    """A worker makes batches ahead; the states are those of the batch that was taken."""
    options = {"mixture": {"text": 2.0, "speech:speech": 1.0, "speech": 1.0}}
    options |= {"mixture_in": mixture_in, "accumulation": 2}
    whole = steps(make_loader(**options), 12)
    ahead = iter(make_loader(**options, num_workers=1))
    taken = [next(ahead) for _ in range(7)]
    states = {int(k): v for k, v in json.loads(json.dumps(taken[-1][1])).items()}
    del ahead
    assert [([live(b) for b in batches], after) for batches, after in taken] == whole[:7]
    assert steps(make_loader(**options, states=states), 5) == whole[7:]


def test_a_run_goes_on_where_it_stopped(make_loader):
    """Past the ends of epochs, and with another number of ranks."""
    whole = steps(make_loader(), 40)
    assert whole[-1][1][0]["sources"]["text"]["epoch"] > 0
    for stop in (1, 7, 20, 33):
        states = {int(k): v for k, v in json.loads(json.dumps(whole[stop - 1][1])).items()}
        assert steps(make_loader(states=states), 3) == whole[stop : stop + 3]
        ranks = [make_loader(states=states, rank=r, world_size=2) for r in range(2)]
        first = [next(iter(rank))[0][0] for rank in ranks]
        assert joined(first) == whole[stop][0][0]


def test_worker_processes_change_nothing(make_loader):
    """One after another: two workers, then one, then none. They are steps ahead when stopped."""
    whole = steps(make_loader(accumulation=2), 9)
    torch.manual_seed(0)
    generator = torch.get_rng_state()
    two = steps(make_loader(num_workers=2, accumulation=2), 3)
    one = steps(make_loader(num_workers=1, accumulation=2, states=two[-1][1]), 3)
    none = steps(make_loader(num_workers=0, accumulation=2, states=one[-1][1]), 3)
    assert two + one + none == whole
    assert torch.equal(torch.get_rng_state(), generator)
    assert not multiprocessing.active_children()


def test_a_batch_from_a_worker_is_whole_and_one_buffer(make_loader):
    (here,), _ = next(iter(make_loader()))
    (there,), _ = next(iter(make_loader(num_workers=1)))
    tensors = tensors_of(there)
    assert len({tensor.untyped_storage().data_ptr() for _, tensor in tensors}) == 1
    assert [name for name, _ in tensors] == [name for name, _ in tensors_of(here)]
    for (name, tensor), (_, expected) in zip(tensors, tensors_of(here), strict=True):
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name
    assert there.record_ids == here.record_ids


def tensors_of(value, name="batch"):
    """[(dotted name, tensor)] of nested dataclasses."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if not is_dataclass(value):
        return []
    inner = [(field.name, getattr(value, field.name)) for field in fields(value)]
    return [found for each, part in inner for found in tensors_of(part, f"{name}.{each}")]


def test_a_damaged_shard_is_one_line_before_the_first_batch(
    corpus, make_loader, tmp_path, monkeypatch
):
    shutil.copytree(corpus.folder / "train", tmp_path / "train")
    path = tmp_path / "train" / "text" / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[::-1])
    monkeypatch.setenv("LST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^\S*shard-00001\.parquet: expected content of SHA"):
        make_loader(corpus=str(tmp_path))


def test_a_record_that_cannot_be_read_is_one_line_from_a_worker_too(
    make_loader, tmp_path, monkeypatch
):
    monkeypatch.setenv("LST_CACHE", str(tmp_path / "cache"))
    make_loader()
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    for num_workers in (0, 1):
        loader = make_loader(num_workers=num_workers)
        with pytest.raises(UserError, match=r"^\S*\.arrow: expected the content that was"):
            steps(loader, 20)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("kind", "need"),
    [("text", "text"), ("interleaved", "words"), ("speech-to-text", "text")],
)
def test_a_record_that_is_not_of_the_kind_is_named_before_the_first_step(make_loader, kind, need):
    message = rf"'bare:{kind}' .* {need} in every record, .*bare/shard-00000\.parquet, row \d;"
    with pytest.raises(UserError, match=message):
        make_loader(mixture={f"bare:{kind}": 1.0})


def test_a_corpus_is_read_from_a_url_too(corpus, make_loader):
    fs = fsspec.filesystem("memory")
    fs.put(str(corpus.folder / "train"), "/remote/train", recursive=True)
    try:
        assert steps(make_loader(corpus="memory://remote"), 3) == steps(make_loader(), 3)
        fs.rm("/remote/train/text/shard-00001.parquet")
        with pytest.raises(UserError, match=r"^memory://remote/train/text/shard-00001\.parq"):
            make_loader(corpus="memory://remote")
    finally:
        fs.rm("/remote", recursive=True)


def test_a_token_level_model_has_every_token_as_a_unit(make_loader):
    loader = make_loader(plan=PlanConfig(local=False), patching=PatchingConfig(strategy="none"))
    ((batch,), _), *_ = islice(loader, 1)
    assert batch.num_tokens == batch.num_units == ROWS * (UNITS - 1)


BAD_CONFIGS = {
    "rows": ({"rows": 0}, "--data.rows: expected 1 or more, got 0"),
    "units": ({"units_per_sequence": 3}, "--data.units-per-sequence: expected 4 or more .* got 3"),
    "all rows": ({"rows": 2**31}, r"--data.rows, .*: expected at most 1,048,576 rows, .* got 2147"),
    "all units": (
        {"units_per_sequence": 2**31},
        r"fewer than 2\^31 units in all, got 4 × 21474836",
    ),
    "mixture": ({"mixture": {}}, "expected a mixture of at least one dataset"),
    "weight": ({"mixture": {"text": 0.0}}, "expected a weight above 0 for 'text', got 0.0"),
    "negative": ({"mixture": {"text": -1.0}}, "expected a weight above 0 for 'text', got -1.0"),
    "NaN": ({"mixture": {"text": float("nan")}}, "expected a weight above 0 for 'text', got nan"),
    "infinite": ({"mixture": {"text": float("inf")}}, "a weight above 0 for 'text', got inf"),
    "kind": ({"mixture": {"text:song": 1.0}}, "expected a mixture of DATASET or DATASET:KIND"),
    "no speech": ({"mixture": {"text:speech": 1.0}}, "'text:speech' .* expected units in every"),
    "twins": ({"mixture": {"text": 1.0, "text:auto": 1.0}}, "'text:auto' and 'text' .* the same"),
    "workers": ({"num_workers": -1}, "--data.num-workers: expected 0 or more, got -1"),
    "folder": ({"mixture": {"songs": 1.0}}, "train/songs: expected a dataset folder"),
    "baseline": ({"plan": PlanConfig(local=False)}, "expected the patching strategy 'none'"),
    "ranks": ({"world_size": 3}, "rows that divide by 3 processes × 1 micro-batches, got 4"),
    "micro": (
        {"world_size": 2, "accumulation": 4},
        "rows that divide by 2 processes × 4 micro-batches, got 4",
    ),
    "states": ({"states": {1: {}}}, r"expected the states of lanes 0 … 3, .* got those of \[1\]"),
    "more states": ({"states": {lane: {} for lane in range(5)}}, r"got those of \[0, 1, 2, 3, 4\]"),
    "no state": ({"states": {lane: {} for lane in range(4)}}, "expected the state of a lane"),
}


@pytest.mark.parametrize(("options", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configurations_are_refused_before_the_first_batch(make_loader, options, message):
    with pytest.raises(UserError, match=message):
        make_loader(**options)


def test_units_of_another_codebook_are_refused(corpus):
    config = DataConfig(corpus=str(corpus.folder), rows=1, units_per_sequence=16)
    other = Vocabulary(num_pieces=300, num_units=501)
    with pytest.raises(UserError, match="units of a codebook of 501, got one of 50"):
        TrainLoader(config, other, corpus.tokenizer, PLAN, seed=0, total_steps=1)


def validation(corpus, name="speech", **options):
    dataset = Dataset.open(corpus.folder / "train" / name)
    return list(
        validation_batches(
            dataset, corpus.vocabulary, corpus.tokenizer, PLAN, PatchingConfig(size=4),
            **({"units_per_batch": 100, "seed": 1} | options),
        )
    )  # fmt: skip


def test_validation_reads_every_record_once_and_whole(corpus):
    batches = validation(corpus)
    assert [id for batch in batches for id in batch.record_ids] == list(corpus.records["speech"])
    for batch in batches:
        assert batch.num_units <= 100 or len(batch.record_ids) == 1
        assert batch.layout.num_dead_patches == 0
        ends = batch.layout.cu_tokens[1:] - 1
        assert (batch.tokens[ends] == EOS).all()
        assert (batch.targets[ends] == IGNORE).all()
        assert batch.num_targets == batch.num_tokens - len(batch.record_ids)
    assert list(map(live, batches)) == list(map(live, validation(corpus)))


def test_ranks_share_the_validation_documents(corpus):
    whole = joined(validation(corpus))
    parts = [joined(validation(corpus, rank=r, world_size=3)) for r in range(3)]
    assert sorted(chain(*(part[-1] for part in parts))) == sorted(whole[-1])
    assert sum(len(part[0]) for part in parts) == len(whole[0])


def test_a_loader_can_be_read_again_from_its_start(make_loader):
    loader = make_loader()
    assert steps(loader, 2) == steps(loader, 2)


def test_the_seed_decides(corpus, make_loader):
    config = DataConfig(corpus=str(corpus.folder), rows=ROWS, units_per_sequence=UNITS)
    other = TrainLoader(
        replace(config), corpus.vocabulary, corpus.tokenizer, PLAN, seed=4, total_steps=40
    )
    tokens = [np.array(step[0][0][0]) for step in (steps(other, 1)[0], steps(make_loader(), 1)[0])]
    assert not np.array_equal(*tokens)
