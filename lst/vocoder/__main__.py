"""``python -m lst.vocoder COMMAND``: train what speaks units, and let it speak."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from lst.errors import UserError, run_command
from lst.speech.audio import SAMPLE_RATE, write_wav
from lst.speech.sound import load_voice, sound_of
from lst.vocoder.recordings import RecordingsConfig, write_recordings
from lst.vocoder.train import TrainVocoderConfig, train_vocoder

app = tyro.extras.SubcommandApp()
Options = tyro.conf.arg(name="")


@dataclass(frozen=True, kw_only=True)
class SynthesiseConfig:
    """What to say."""

    vocoder: Path  # its folder; or the file of a log-mel codebook, which is inverted
    units: Path  # numbers with blanks between them, as text; or a .npy file of integers
    out: Path  # the .wav file to write
    speaker: str | None = None  # of a vocoder of several; the first where none is named
    predict_durations: bool = False  # how often a unit is repeated does not count


@app.command
def train(config: Annotated[TrainVocoderConfig, Options]) -> None:
    """Train a vocoder on recordings of any source of audio. Ctrl-C stops it, nothing is lost."""
    print(train_vocoder(config))


@app.command
def synthesise(config: Annotated[SynthesiseConfig, Options]) -> None:
    """Units to a WAV file."""
    units = read_units(config.units)
    voice = load_voice(config.vocoder)
    if config.predict_durations:
        from lst.vocoder.vocoder import Vocoder

        if not isinstance(voice, Vocoder):
            raise UserError("--predict-durations: expected a vocoder, got a codebook")
        samples = voice.speak(units, speaker=config.speaker, predict_durations=True)
    else:
        samples = sound_of(units, voice, speaker=config.speaker)
    write_wav(config.out, samples)
    print(f"{config.out}: {len(samples) / SAMPLE_RATE:.2f} s of {len(units)} units")


@app.command
def recordings(config: Annotated[RecordingsConfig, Options]) -> None:
    """Speak a dataset of the demo corpus again, as WAV files and a manifest to train on."""
    print(write_recordings(config))


def read_units(path: Path) -> np.ndarray:
    """(F,) integers. Raises UserError where the file holds something else."""
    try:
        if path.suffix == ".npy":
            units = np.load(path, allow_pickle=False)
        else:
            units = np.array([int(word) for word in path.read_text().split()], np.int64)
    except Exception as error:  # NumPy's own, and those of what reads the header of its files
        raise UserError(f"{path}: expected speech units ({error})") from None
    if units.ndim != 1 or not np.issubdtype(units.dtype, np.integer):
        got = f"{units.dtype} of shape {units.shape}"
        raise UserError(f"{path}: expected speech units, whole numbers in a row, got {got}")
    return units


def main() -> None:
    app.cli(prog="python -m lst.vocoder", description="Train what speaks units; let it speak.")


if __name__ == "__main__":
    run_command(main)
