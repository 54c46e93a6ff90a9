"""Spoken sentences and a codebook for them, and folders of audio as corpora lay them out."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from lst.data.records import Dataset
from lst.prepare.corpus import CorpusConfig, prepare_corpus
from lst.speech.audio import SAMPLE_RATE
from lst.speech.synthesis import TRAINING_VOICES, Speech, synthesize
from lst.speech.units import LogMelKMeans

SENTENCES = (
    "Once upon a time, there was a dog.",
    "The boat was late.",
    "She found a red ball in the park.",
    "It rained.",
    "Tom and his mother went home.",
    "Where is the little bird now?",
)


@dataclass(frozen=True)
class Sentence:
    text: str
    speech: Speech


@pytest.fixture(scope="session")
def sentences() -> list[Sentence]:
    pytest.importorskip("espeakng_loader")
    return [
        Sentence(text, synthesize(text, TRAINING_VOICES[index % 2]))
        for index, text in enumerate(SENTENCES)
    ]


@pytest.fixture(scope="session")
def codebook(sentences, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("units") / "codebook.safetensors"
    waveforms = [sentence.speech.waveform for sentence in sentences]
    LogMelKMeans.fit(waveforms, num_units=20).save(path)
    return path


@pytest.fixture
def spoken_folder(sentences, tmp_path) -> Path:
    """A folder of audio with transcripts beside it."""
    folder = tmp_path / "spoken"
    write_folder(folder, sentences)
    return folder


def write_folder(folder, sentences):
    import soundfile

    for index, sentence in enumerate(sentences):
        path = folder / f"book{index % 2}" / f"{index}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sentence.speech.waveform, SAMPLE_RATE)
        path.with_suffix(".txt").write_text(sentence.text + "\n")


@pytest.fixture
def prepare(tmp_path, codebook):
    """prepare(**options) → the records in order."""

    def prepare(out=None, **options):
        out = tmp_path / "made" if out is None else out
        if not {"text", "authors"} & set(options):
            options.setdefault("codebook", codebook)
        assert prepare_corpus(CorpusConfig(out=out, **options)).dataset
        dataset = Dataset.open(out)
        return [dataset[row] for row in range(len(dataset))]

    return prepare
