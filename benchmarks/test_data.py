"""Does one core make batches faster than GPUs eat them: a million tokens a second?

    records -> interleave -> patching -> packing -> batch with its plan

A GPU trains the paper's 1B model at about 75,000 tokens a second. Batches are of 4 rows of 4,096
units, as a GPU has them in the paper. Stories of about 60 pieces are the hard case for text, for
what a document costs does not depend on its length; long texts are 16 of them joined. Speech has
the paper's 5.8 frames a word and 3.7 a silence, in records of one story. Before anything is timed,
batches are held against those made of records read from Parquet and tokenized one by one. One
thread, in this process; then the same by a worker process, which sends its batches here.

    pytest benchmarks/test_data.py --benchmark-only
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map_only

from lst.data.batch import Batch, PlanConfig, make_batch
from lst.data.encoded import EncodedRecord, encode_record
from lst.data.lanes import Lane
from lst.data.loader import DataConfig, TrainLoader
from lst.data.patching import PatchingConfig
from lst.data.records import Dataset, Record, RecordWriter, Word
from lst.prepare.stories import generate_stories
from lst.vocabulary import Tokenizer, Vocabulary, train_tokenizer

NUM_UNITS = 501
STORIES, STORIES_PER_TEXT = 12_000, 16
FLOOR = 1e6  # tokens a second
ROUNDS, BATCHES_PER_ROUND = 9, 5
STEPS = 1000  # of the run, whose curriculum is in its middle third

MIXTURES = {
    "interleaved speech": {"speech": 1.0},
    "text, stories": {"stories": 1.0},
    "text, long": {"long": 1.0},
    "the paper's mix, stories": {"stories": 2.0, "speech": 1.0},
    "the paper's mix, long": {"long": 2.0, "speech": 1.0},
}


@dataclass(frozen=True)
class Corpus:
    folder: Path
    tokenizer: Tokenizer
    vocabulary: Vocabulary


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [story.text for story in generate_stories(0, STORIES)]
    tokenizer = train_tokenizer(texts[:2000], folder / "tokenizer.model", num_pieces=2000)
    rng = np.random.default_rng(0)
    long = [" ".join(texts[at : at + STORIES_PER_TEXT]) for at in range(0, STORIES, 16)]
    parts = {
        "stories": [written(f"s{n}", text) for n, text in enumerate(texts)],
        "long": [written(f"l{n}", text) for n, text in enumerate(long)],
        "speech": [spoken(f"u{n}", text, rng) for n, text in enumerate(texts[: STORIES // 4])],
    }
    for name, records in parts.items():
        with RecordWriter(
            folder / "train" / name, codebook=None, tokenizer=None, num_units=NUM_UNITS
        ) as writer:
            for record in records:
                writer.write(record)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LST_CACHE", str(folder / "cache"))
        yield Corpus(folder, tokenizer, Vocabulary(tokenizer.num_pieces, NUM_UNITS))
    torch.set_num_threads(threads)


def written(name: str, text: str) -> Record:
    return Record(name, text, None, None, None, None, "benchmark")


def spoken(name: str, text: str, rng: np.random.Generator) -> Record:
    words, frame = [], 0
    for word in text.split():
        start = frame + int(rng.geometric(1 / 4.7)) - 1  # 3.7 frames of silence
        frame = start + 1 + int(rng.poisson(4.8))
        words.append(Word(word, start, frame))
    units = rng.integers(0, NUM_UNITS, frame + 4).astype(np.int16)
    return Record(name, text, units, tuple(words), None, "f1", "benchmark")


def config(corpus: Corpus, mixture: dict[str, float], num_workers: int = 0) -> DataConfig:
    return DataConfig(
        corpus=str(corpus.folder),
        mixture=mixture,
        rows=4,
        units_per_sequence=4096,
        patching=PatchingConfig(curriculum=(0.0, 1.0)),
        num_workers=num_workers,
    )


def batches(corpus: Corpus, mixture: dict[str, float], num_workers: int = 0) -> Iterator[Any]:
    loader = TrainLoader(
        config(corpus, mixture, num_workers),
        corpus.vocabulary,
        corpus.tokenizer,
        PlanConfig(),
        seed=0,
        total_steps=STEPS,
    )
    return (batch for (batch,), _ in loader)


class Plain:
    """A dataset read and tokenized record by record."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer) -> None:
        self._dataset, self._tokenizer = dataset, tokenizer

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> EncodedRecord:
        record = self._dataset[index]
        encoded = encode_record(record, self._tokenizer)
        if record.words is None:
            return encoded
        parts = [self._tokenizer.encode(word.word) for word in record.words]
        cuts = np.cumsum([0, *map(len, parts)]).astype(np.int32)
        return encoded._replace(pieces=np.concatenate(parts).astype(np.int32), cuts=cuts)


def plain_batches(corpus: Corpus, mixture: dict[str, float]) -> Iterator[Any]:
    data = config(corpus, mixture)
    lanes = [
        Lane(
            number=number,
            num_lanes=data.rows,
            weights=mixture,
            datasets={
                name: Plain(Dataset.open(corpus.folder / "train" / name), corpus.tokenizer)  # type: ignore[misc]
                for name in mixture
            },
            vocabulary=corpus.vocabulary,
            row_units=data.units_per_sequence - 1,
            patching=data.patching,
            total_steps=STEPS,
            seed=0,
        )
        for number in range(data.rows)
    ]
    streams = [lane.rows(lane.first_state()) for lane in lanes]
    for step, rows in enumerate(zip(*streams, strict=True)):
        yield make_batch([row for row, _ in rows], corpus.vocabulary, PlanConfig(), step=step)


def plain(batch: Batch) -> Any:
    return tree_map_only(torch.Tensor, lambda x: (x.dtype, x.tolist()), asdict(batch))


@pytest.mark.parametrize("case", MIXTURES)
def test_a_core_makes_a_million_tokens_a_second(keep_pace, corpus: Corpus, case: str):
    made = batches(corpus, MIXTURES[case])
    for one, other in islice(zip(made, plain_batches(corpus, MIXTURES[case]), strict=False), 2):
        assert plain(one) == plain(other)

    def work() -> int:
        return sum(batch.num_tokens for batch in islice(made, BATCHES_PER_ROUND))

    keep_pace(f"{case}: 4 x 4,096 units", work, rounds=ROUNDS, floor=FLOOR)


def test_a_worker_process_hands_over_what_it_makes(keep_pace, corpus: Corpus):
    """Reported: whether sending batches from one process to another costs much of it."""
    mixture = MIXTURES["the paper's mix, long"]
    made = batches(corpus, mixture, num_workers=1)
    for one, other in islice(zip(made, plain_batches(corpus, mixture), strict=False), 2):
        assert plain(one) == plain(other)

    def work() -> int:
        return sum(batch.num_tokens for batch in islice(made, BATCHES_PER_ROUND))

    keep_pace("the paper's mix, long: from a worker process", work, rounds=ROUNDS, floor=None)
