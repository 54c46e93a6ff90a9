"""How long words and silences are, in frames of 40 ms: what alignment patches are made of.

    word      the frames of a word that has any
    silence   frames of no word, between two words or at an end
    merged    a word with the silence around it: all frames by all words that have any

The table of lst.data.statistics tells the same of patches, beside the paper's figures.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lst.data.records import Dataset, Record
from lst.data.statistics import format_table, patch_statistics, usual_strategies
from lst.errors import UserError, expect_not_negative, expect_positive
from lst.files import Location, write_json
from lst.speech_bpe import SPEECH_BPE_INFO, read_speech_bpe
from lst.vocabulary import Tokenizer

__all__ = ["StatsConfig", "WordLengths", "describe_dataset", "word_lengths"]


@dataclass(frozen=True, kw_only=True)
class WordLengths:
    """Counts over the records that have aligned words."""

    num_records: int
    num_words: int  # that have frames
    num_empty_words: int  # too short to have any
    num_silences: int
    word_frames: int
    silence_frames: int

    @property
    def means(self) -> dict[str, float]:
        """Frames per word, per silence, and per word with its silence; 0 where there is none."""
        words, silences = max(1, self.num_words), max(1, self.num_silences)
        return {
            "word": self.word_frames / words,
            "silence": self.silence_frames / silences,
            "merged": (self.word_frames + self.silence_frames) / words if self.num_words else 0.0,
        }


def word_lengths(records: Iterable[Record]) -> WordLengths:
    """Measure the records that have aligned words; others count for nothing."""
    num_records = 0
    words: list[int] = []
    silences: list[int] = []
    for record in records:
        if not record.words or record.units is None:
            continue
        num_records += 1
        end = 0
        for word in record.words:
            silences.append(word.start - end)
            words.append(word.stop - word.start)
            end = word.stop
        silences.append(len(record.units) - end)
    num_words = sum(length > 0 for length in words)
    return WordLengths(
        num_records=num_records,
        num_words=num_words,
        num_empty_words=len(words) - num_words,
        num_silences=sum(length > 0 for length in silences),
        word_frames=sum(words),
        silence_frames=sum(silences),
    )


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """What a dataset holds, how long its words and silences are, and how it would be patched."""

    dataset: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """A folder with a dataset.json, such as data/demo/train/speech."""
    sample: int = 2_000  # records to look at, spread over the dataset
    sizes: tuple[int, ...] = (4, 6, 9)  # of static patches, in units
    max_patch_length: int | None = None  # units of an aligned patch; None: as long as it is
    boundary_noise_ms: float = 0.0  # by up to so much aligned boundaries are moved
    tokenizer: Path | None = None  # a file or its folder; None: that of the dataset's corpus
    json: Path | None = None  # a file for the counts that the table is made from

    def __post_init__(self) -> None:
        expect_positive(self, "sample", "sizes", "max_patch_length")
        expect_not_negative(self, "boundary_noise_ms")
        if not self.sizes:
            raise UserError("--sizes: expected at least one, got none")


def describe_dataset(config: StatsConfig) -> str:
    """What is in a dataset, and a table of patch lengths of records spread over it.

    Raises:
        UserError: no dataset, or a damaged one; no tokenizer where one is named; the file of counts
            cannot be written.
    """
    dataset = Dataset.open(config.dataset)
    info = dataset.info
    rows = range(0, len(dataset), -(-len(dataset) // config.sample))
    records = f"{config.dataset}: {info.num_records:,} records"
    characters = f"{info.num_characters:,} characters"
    if not dataset.has_speech:
        return f"{records}, {characters}"
    lengths = word_lengths(dataset.read(rows))
    lines = [
        f"{records}, {info.hours:,.2f} hours, {info.num_frames:,} units of {info.num_units}, "
        f"{characters}",
        f"{lengths.num_records:,} of {len(rows):,} records looked at have aligned words: "
        f"{lengths.num_words:,} words, {lengths.num_empty_words:,} without a frame of their own, "
        f"{lengths.num_silences:,} silences",
        "",
        _patch_table(config, dataset, rows),
    ]
    return "\n".join(lines)


def _patch_table(config: StatsConfig, dataset: Dataset, rows: range) -> str:
    corpus = Location(config.dataset.resolve().parent.parent)  # of corpus/train/NAME
    tokenizer = speech_bpe = None
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
    elif any((corpus / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        tokenizer = Tokenizer.load(corpus)
    if (corpus / SPEECH_BPE_INFO).exists():
        speech_bpe = read_speech_bpe(corpus, dataset.info.codebook)
    strategies = usual_strategies(
        sizes=config.sizes,
        max_patch_length=config.max_patch_length,
        boundary_noise_ms=config.boundary_noise_ms,
        pieces=tokenizer is not None,
        speech_bpe=speech_bpe is not None,
    )
    counts = patch_statistics(
        dataset.read(rows), dataset.info.num_units, tokenizer, strategies, speech_bpe=speech_bpe
    )
    if not counts[0].num_records:
        return "none of the records looked at has speech"
    if config.json is not None:
        values = {"dataset": dataset.fingerprint, "patches": [asdict(each) for each in counts]}
        write_json(config.json, values)
    lines = [format_table(counts)]
    if tokenizer is None:
        lines.append(f"No pieces were aligned: {corpus} holds no tokenizer; --tokenizer names one.")
    return "\n".join(lines)
