"""What is left of speech that was units: inverted centroids beside a vocoder that a CPU trained.

    python -m lst.prepare demo
    python -m benchmarks.alignment --out benchmarks/results     # trains the recogniser, 10 minutes
    python -m benchmarks.vocoder --out benchmarks/results

The demo corpus's training stories are spoken again for a vocoder of size ``tiny`` to learn from.
Held-out stories, by the voices that it knows and by one that it does not (and answers in another),
become units and sound again, and are compared with what they were:

    distortion   mel cepstral, in dB, over all windows and over those within words
    characters   share of wrong ones, by the greedy reading of the CTC model of
                 benchmarks/alignment.py, which learnt from the known voices' own sound
    units        that come out when the sound is encoded again

The vocoder goes on where it was stopped; how long it learnt is in the result.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alignment import CHARACTERS, VOCABULARY, Utterance, spoken
from lst.data.records import FRAMES_PER_SECOND
from lst.errors import UserError, expect_positive, run_command
from lst.files import make_folder, write_json
from lst.machine import describe_machine, file_stem
from lst.speech.alignment import CTCAligner
from lst.speech.audio import SAMPLE_RATE
from lst.speech.distortion import HOP, mel_cepstral_distances
from lst.speech.sound import sound_of
from lst.speech.units import FRAME_SAMPLES, LogMelKMeans
from lst.vocoder import Vocoder, load_vocoder
from lst.vocoder.recordings import MANIFEST, RecordingsConfig, write_recordings
from lst.vocoder.train import METRICS, TrainVocoderConfig, train_vocoder

BLANK = VOCABULARY["<pad>"]
LETTERS = {number: token for token, number in VOCABULARY.items()}


def training(options: argparse.Namespace) -> TrainVocoderConfig:
    return TrainVocoderConfig(
        manifest=(options.recordings / MANIFEST,),
        codebook=options.corpus / "codebook.safetensors",
        out=options.vocoder,
        size="tiny",
        by_speaker=True,
        batch=8,
        stretch_units=16,
        learning_rate=4e-3,
        half_life=600,
        alone_steps=1200,
        steps=options.steps,
        report_every=50,
        save_every=400,
    )


def as_written(text: str) -> str:
    """The characters that the recogniser knows."""
    kept = "".join(each for each in text.upper() if each in CHARACTERS or each.isspace())
    return " ".join(kept.split())


def as_heard(aligner: CTCAligner, waveforms: Sequence[np.ndarray]) -> list[str]:
    """The likeliest label of each frame, repetitions once, blanks left out."""
    texts = []
    for waveform in waveforms:
        (emissions,) = aligner.emissions([waveform])
        labels = [label for label, _ in groupby(np.asarray(emissions).argmax(1))]
        letters = "".join(LETTERS[label] for label in labels if label != BLANK)
        texts.append(" ".join(letters.replace("|", " ").split()))
    return texts


def in_words(story: Utterance, num_windows: int) -> np.ndarray:
    """Which windows of the distortion are centred within a word."""
    centres = np.arange(num_windows) * HOP / SAMPLE_RATE
    inside = np.zeros(num_windows, bool)
    for word in story.speech.words:
        inside |= (word.start <= centres) & (centres < word.stop)
    return inside


def level(waveform: np.ndarray) -> float:
    return 20 * np.log10(max(1e-6, float(np.sqrt(np.mean(np.square(waveform))))))


def measure(
    stories: Sequence[Utterance],
    say: Callable[[Utterance, np.ndarray], np.ndarray] | None,
    codebook: LogMelKMeans,
    aligner: CTCAligner,
) -> dict[str, Any]:
    """``say`` makes sound of a story's units; None is the sound as it was."""
    import jiwer

    said, seconds, everywhere, within, kept = [], 0.0, [], [], []
    for story in stories:
        waveform = story.speech.waveform
        units = codebook.encode(waveform)
        waveform = np.pad(waveform, (0, len(units) * FRAME_SAMPLES - len(waveform)))
        began = time.perf_counter()
        made = waveform if say is None else say(story, units)
        seconds += time.perf_counter() - began
        if made.shape != waveform.shape or not np.isfinite(made).all():
            raise UserError(f"expected {waveform.shape} finite samples, got {made.shape}")
        distances = mel_cepstral_distances(waveform, made)
        everywhere.append(distances)
        within.append(distances[in_words(story, len(distances))])
        kept.append(codebook.encode(made) == units)
        said.append(made)
    texts = [as_written(story.text) for story in stories]
    duration = sum(map(len, said)) / SAMPLE_RATE
    louder = np.mean(list(map(level, said)))
    louder -= np.mean([level(story.speech.waveform) for story in stories])
    return {
        "distortion_db": round(float(np.concatenate(everywhere).mean()), 3),
        "distortion_db_in_words": round(float(np.concatenate(within).mean()), 3),
        "character_error_rate": round(jiwer.cer(texts, as_heard(aligner, said)), 4),
        "share_of_units_kept": round(float(np.concatenate(kept).mean()), 4),
        "level_db_above_the_original": round(float(louder), 2),
        "largest_sample": round(float(max(np.abs(made).max() for made in said)), 3),
        "times_real_time": None if say is None else round(duration / seconds, 1),
    }


def compare(
    folder: Path, stories: int, codebook: LogMelKMeans, vocoder: Vocoder, aligner: CTCAligner
) -> dict[str, Any]:
    found = list(islice(spoken(folder, float("inf")), stories))

    def by_vocoder(story: Utterance, units: np.ndarray) -> np.ndarray:
        known = story.speaker if story.speaker in vocoder.speakers else None
        return sound_of(units, vocoder, codebook=codebook.fingerprint, speaker=known)

    def by_inversion(_: Utterance, units: np.ndarray) -> np.ndarray:
        return sound_of(units, codebook)

    ways = {"original": None, "inversion": by_inversion, "vocoder": by_vocoder}
    seconds = sum(len(story.speech.waveform) for story in found) / SAMPLE_RATE
    return {
        "stories": len(found),
        "seconds": round(seconds, 1),
        **{name: measure(found, say, codebook, aligner) for name, say in ways.items()},
    }


def learnt(config: TrainVocoderConfig) -> dict[str, Any]:
    """What the folder of the run tells of it."""
    lines = [json.loads(line) for line in (config.out / METRICS).read_text().splitlines()]
    held_out = [line for line in lines if line["split"] == "held out"][-1]
    last = [line for line in lines if line["split"] == "train"][-1]
    stretch = config.batch * config.stretch_units / FRAMES_PER_SECOND
    return {
        **config.settings,
        "steps": held_out["step"],
        "seconds": last["seconds"],
        "seconds_heard": round(held_out["step"] * stretch, 1),
        "losses": {name: last[name] for name in last if name not in ("step", "split", "seconds")},
        "held_out_mel": held_out["mel"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the result file")
    parser.add_argument("--corpus", type=Path, default=Path("data/demo"))
    parser.add_argument("--recordings", type=Path, default=Path("runs/recordings"))
    parser.add_argument("--minutes", type=float, default=60, help="of them")
    parser.add_argument("--vocoder", type=Path, default=Path("runs/vocoder"), help="its folder")
    parser.add_argument("--steps", type=int, default=1500, help="of its training")
    parser.add_argument("--aligner", type=Path, default=Path("runs/aligner"))
    parser.add_argument("--stories", type=int, default=32, help="of each held-out part")
    options = parser.parse_args()
    expect_positive(options, "minutes", "steps", "stories")
    about = describe_machine()
    for needed, made_by in (
        (options.corpus / "corpus.json", "lst.prepare demo"),
        (options.aligner / "training.json", "benchmarks.alignment"),
    ):
        if not needed.is_file():
            raise UserError(f"{needed}: not here yet: python -m {made_by}")
    make_folder(options.out)
    if not (options.recordings / MANIFEST).is_file():
        corpus = options.corpus / "train/speech"
        recordings = RecordingsConfig(
            corpus=corpus, out=options.recordings, minutes=options.minutes
        )
        print(write_recordings(recordings))
    config = training(options)
    print(train_vocoder(config))
    codebook = LogMelKMeans.load(config.codebook)
    aligner = CTCAligner.load(str(options.aligner))
    vocoder = load_vocoder(config.out)
    parts = {"known_voices": "valid/speech", "unknown_voice": "valid/voice"}
    result = {
        "machine": about,
        "question": "vocoder",
        "load_at_the_end": os.getloadavg()[0],
        "training": learnt(config),
        "recogniser": json.loads((options.aligner / "training.json").read_text()),
        **{
            name: compare(options.corpus / part, options.stories, codebook, vocoder, aligner)
            for name, part in parts.items()
        },
    }
    path = options.out / f"vocoder-{file_stem(about)}.json"
    write_json(path, result)
    print(json.dumps({name: result[name] for name in parts}, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    run_command(main)
