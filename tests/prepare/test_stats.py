"""``python -m lst.prepare stats`` tells what a dataset holds and how it would be patched."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lst.data.records import Dataset, Record, RecordWriter, Word
from lst.data.statistics import PatchStatistics, format_table
from lst.errors import UserError
from lst.prepare.speech_bpe import SpeechBPEConfig, prepare_speech_bpe
from lst.prepare.stats import StatsConfig, describe_dataset
from lst.strict_json import read_strictly
from lst.vocabulary import train_tokenizer


def spoken(name):
    """Words of 6, 0 and 4 frames with silences of 3 and 5: 18 frames."""
    words = (Word("hello", 3, 9), Word("a", 14, 14), Word("world", 14, 18))
    units = (np.arange(18) % 6).astype(np.int16)
    return Record(name, "hello a world", units, words, None, None, "test")


def bare(name):
    return Record(name, None, np.zeros(8, np.int16), None, None, None, "test")


def table_of(path):
    """The table that a file of counts makes."""
    patches = json.loads(path.read_text())["patches"]
    return format_table([read_strictly(PatchStatistics, each, str(path)) for each in patches])


def written(name):
    return Record(name, "hello", None, None, None, None, "test")


@pytest.fixture
def write(tmp_path):
    def write(*records):
        folder = tmp_path / "corpus" / "train" / "speech"
        with RecordWriter(folder, codebook=None, tokenizer=None, num_units=6) as writer:
            for record in records:
                writer.write(record)
        return folder

    return write


def row_of(text, name):
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_a_dataset_is_told_with_its_patches(write):
    folder = write(*(spoken(f"r{i}") for i in range(10)), bare("b"), written("t"))
    train_tokenizer(["hello a world"] * 5, folder.parents[1] / "tokenizer.model", num_pieces=270)
    prepare_speech_bpe(SpeechBPEConfig(corpus=folder.parents[1], pieces=9))
    text = describe_dataset(StatsConfig(dataset=folder, sizes=(2, 6), max_patch_length=4))
    assert text.startswith(f"{folder}: 12 records, 0.00 hours, 188 units of 6, 135 characters\n")
    assert "10 of 12 records looked at have aligned words: 20 words, 10 without a frame" in text
    # Ten times 3, 4 2, 4 1, 4; the unaligned record gives four patches of two frames more.
    assert row_of(text, "aligned by words, silence separate, at most 4") == [
        "3.33", "2.67", "2.94", f"{90_000 * 64 / 188:,.0f}", "5.8 and 3.7"
    ]  # fmt: skip
    assert row_of(text, "static, 6")[2] == f"{188 / 32:.2f}"
    assert row_of(text, "speech BPE")[2] > "1.00"
    assert row_of(text, "aligned by pieces, silence separate, at most 4")[4] == "5.0 and 3.7"
    assert "over 11 records with speech" in text
    assert "1 of them have no aligned words: their patches are static." in text
    assert "Pieces of 10 of them are estimated" in text


def test_the_counts_of_a_file_are_those_of_the_table(write, tmp_path):
    folder = write(*(spoken(f"r{i}") for i in range(3)))
    text = describe_dataset(StatsConfig(dataset=folder, json=tmp_path / "counts.json"))
    assert table_of(tmp_path / "counts.json") in text
    dataset = json.loads((tmp_path / "counts.json").read_text())["dataset"]
    assert dataset == Dataset.open(folder).fingerprint


def test_the_table_of_the_page_is_that_of_its_file():
    docs = Path(__file__).parents[2] / "docs"
    assert table_of(docs / "patching.json") in (docs / "patching.md").read_text()


def test_a_sample_is_spread_over_the_dataset(write):
    folder = write(*(spoken(f"r{i}") for i in range(10)))
    text = describe_dataset(StatsConfig(dataset=folder, sample=3))
    assert "3 of 3 records looked at have aligned words" in text


def test_without_a_tokenizer_no_pieces_are_aligned(write, tmp_path):
    folder = write(spoken("r"))
    text = describe_dataset(StatsConfig(dataset=folder))
    assert "aligned by pieces" not in text
    assert f"No pieces were aligned: {folder.parents[1]} holds no tokenizer" in text
    train_tokenizer(["hello a world"] * 5, tmp_path / "other.model", num_pieces=270)
    named = describe_dataset(StatsConfig(dataset=folder, tokenizer=tmp_path / "other.model"))
    assert "aligned by pieces" in named


def test_a_dataset_at_the_root_of_the_files_has_no_corpus_above_it(write, monkeypatch):
    config = StatsConfig(dataset=write(spoken("r")))
    monkeypatch.setattr(Path, "resolve", lambda path: Path("/speech"))
    assert "No pieces were aligned: / holds no tokenizer" in describe_dataset(config)


def test_a_dataset_of_text_has_no_patches_to_tell_of(write):
    text = describe_dataset(StatsConfig(dataset=write(written("t"))))
    assert text.count("\n") == 0
    mixed = write(written("t"), spoken("r"))
    assert "none of the records looked at has speech" in describe_dataset(
        StatsConfig(dataset=mixed, sample=1)
    )


def test_mistakes_are_named_in_one_line(tmp_path):
    with pytest.raises(UserError, match="--sample: expected 1 or more, got 0"):
        StatsConfig(dataset=tmp_path, sample=0)
    with pytest.raises(UserError, match="--sizes: expected at least one, got none"):
        StatsConfig(dataset=tmp_path, sizes=())
    command = [sys.executable, "-m", "lst.prepare", "stats", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere: expected a dataset folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (4, 0)}, "--sizes: expected 1 or more, got 0"),
        ({"sizes": (10**20,)}, "--sizes: expected 1 or more, below 2^63, got 1"),
        ({"max_patch_length": 10**20}, "--max-patch-length: expected 1 or more, below 2^63"),
        ({"boundary_noise_ms": float("nan")}, "--boundary-noise-ms: expected 0 or more, got nan"),
    ],
)
def test_numbers_that_are_none_are_named_by_the_options_of_the_command(tmp_path, options, message):
    with pytest.raises(UserError, match=message.replace("^", r"\^")):
        StatsConfig(dataset=tmp_path, **options)


def test_noise_beyond_the_recording_is_that_of_its_length(write):
    folder = write(spoken("r"))
    config = StatsConfig(dataset=folder, boundary_noise_ms=1e308)
    as_long = StatsConfig(dataset=folder, boundary_noise_ms=18 * 40.0)
    assert describe_dataset(config).replace("1e+308", "720") == describe_dataset(as_long)
