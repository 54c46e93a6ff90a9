"""A small corpus that takes no speech synthesis: stories of a few words, and made-up units."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lst.data.records import Record, RecordWriter, Word
from lst.vocabulary import Tokenizer, Vocabulary, train_tokenizer

STORY = "once upon a time there was little girl named lily who loved to play with her dog"
WORDS = STORY.split()
NUM_UNITS = 50


@dataclass(frozen=True)
class Corpus:
    folder: Path
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    records: dict[str, dict[str, Record]]  # by source and id


def make_text(rng, id):
    text = " ".join(rng.choice(WORDS, rng.integers(3, 40)))
    return Record(id, text, None, None, None, None, "test")


def make_speech(rng, id, num_words):
    words, frame = [], int(rng.integers(0, 4))
    for word in rng.choice(WORDS, num_words):
        stop = frame + int(rng.integers(0, 9))
        words.append(Word(str(word), frame, stop))
        frame = stop + int(rng.integers(0, 3))
    units = rng.integers(0, NUM_UNITS, frame + 2).astype(np.int16)
    return Record(id, " ".join(w.word for w in words), units, tuple(words), None, "f1", "test")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """41 texts; 23 speech records, one of them longer than several rows; 3 without alignment."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, folder / "tokenizer.model", num_pieces=300)
    texts = [make_text(rng, f"t{i}") for i in range(41)]
    speech = [make_speech(rng, f"s{i}", int(rng.integers(1, 40))) for i in range(22)]
    speech.append(make_speech(rng, "long", 400))
    bare = [
        Record(f"b{i}", None, rng.integers(0, NUM_UNITS, 30 + i).astype(np.int16), None, None,
               None, "test") for i in range(3)
    ]  # fmt: skip
    sources = {"text": texts, "speech": speech, "bare": bare}
    for name, records in sources.items():
        spoken = name != "text"
        with RecordWriter(
            folder / "train" / name,
            codebook="sha256:cc" if spoken else None,
            tokenizer=tokenizer.fingerprint,
            num_units=NUM_UNITS,
            rows_per_shard=10,
        ) as writer:
            for record in records:
                writer.write(record)
    return Corpus(
        folder=folder,
        tokenizer=tokenizer,
        vocabulary=Vocabulary(num_pieces=300, num_units=NUM_UNITS),
        records={name: {r.id: r for r in records} for name, records in sources.items()},
    )
