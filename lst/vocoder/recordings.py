"""The demo corpus spoken again, as files: a corpus keeps units, a vocoder learns from sound.

The synthesiser says the same text in the same voice the same way each time, so that the recordings
are those that the corpus's units were made of, but for their 16 bits.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lst.data.records import FRAMES_PER_SECOND, Dataset
from lst.errors import UserError, expect_option
from lst.files import make_folder, write_atomically
from lst.speech.audio import write_wav
from lst.speech.synthesis import HELD_OUT_VOICE, TRAINING_VOICES, synthesize

__all__ = ["RecordingsConfig", "write_recordings"]

MANIFEST = "manifest.csv"


@dataclass(frozen=True, kw_only=True)
class RecordingsConfig:
    """What to speak again."""

    corpus: Path  # a dataset of the demo corpus, such as data/demo/train/speech
    out: Path  # the folder to write WAV files and manifest.csv to
    minutes: float = float("inf")  # at most, from the first record on

    def __post_init__(self) -> None:
        expect_option(self.minutes > 0, "minutes", "more than 0", self.minutes)


def write_recordings(config: RecordingsConfig) -> str:
    """Write a WAV file for each record, and at last a manifest. Files that are there are kept.

    Returns:
        A line on what was written.

    Raises:
        UserError: not a dataset of the demo corpus; it cannot be written.
    """
    voices = {voice.name: voice for voice in (*TRAINING_VOICES, HELD_OUT_VOICE)}
    dataset = Dataset.open(config.corpus)
    make_folder(config.out)
    rows, frames = [], 0
    for record in tqdm(dataset, desc="recordings", disable=None):
        if frames >= config.minutes * 60 * FRAMES_PER_SECOND:
            break
        if record.units is None or record.text is None or record.speaker not in voices:
            raise UserError(
                f"{config.corpus}: record {record.id!r} was not spoken by a voice of the demo "
                f"corpus, got speaker {record.speaker!r}"
            )
        name = f"{record.id}.wav"
        path = config.out / name
        if not path.is_file():
            make_folder(path.parent)
            write_wav(path, synthesize(record.text, voices[record.speaker]).waveform)
        rows.append({"audio": name, "speaker": record.speaker, "text": record.text})
        frames += len(record.units)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["audio", "speaker", "text"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(config.out / MANIFEST, text.getvalue())
    minutes = frames / FRAMES_PER_SECOND / 60
    return f"{config.out / MANIFEST}: {len(rows)} recordings, {minutes:.1f} minutes"
