"""How long words and silences are, in frames of 40 ms: what alignment patches are made of.

    word      the frames of a word that has any
    silence   frames of no word, between two words or at an end
    merged    a word with the silence around it: all frames by all words that have any

The paper measures 5.8, 3.7 and 9.4.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lst.data.records import Dataset, Record

__all__ = ["WordLengths", "describe_dataset", "word_lengths"]

PAPER = {"word": 5.8, "silence": 3.7, "merged": 9.4}


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


def describe_dataset(folder: Path, sample: int) -> str:
    """What is in a dataset, and the word lengths of up to ``sample`` records spread over it.

    Raises:
        UserError: no dataset, or a damaged one.
    """
    dataset = Dataset.open(folder)
    info = dataset.info
    rows = range(0, len(dataset), -(-len(dataset) // sample))
    lengths = word_lengths(dataset[row] for row in rows)
    lines = [
        f"{folder}: {info.num_records:,} records, {info.hours:,.2f} hours, "
        f"{info.num_frames:,} units of {info.num_units}, {info.num_characters:,} characters"
    ]
    if not lengths.num_words:
        return lines[0] + "\nno aligned words"
    lines += [
        f"{lengths.num_records:,} of {len(rows):,} records looked at have aligned words: "
        f"{lengths.num_words:,} words, {lengths.num_empty_words:,} without a frame of their own, "
        f"{lengths.num_silences:,} silences",
        f"{'frames of 40 ms':18}{'here':>8}{'paper':>8}",
    ]
    for name, mean in lengths.means.items():
        lines.append(f"{name:18}{mean:8.2f}{PAPER[name]:8.1f}")
    return "\n".join(lines)
