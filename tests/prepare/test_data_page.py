"""The commands of docs/data.md run as they stand there, on small corpora laid out as it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lst.data.loader import DataConfig
from lst.data.records import Dataset
from lst.prepare import __main__ as commands
from lst.speech.audio import SAMPLE_RATE
from lst.speech.synthesis import TRAINING_VOICES, synthesize
from lst.train.corpus import open_corpus

soundfile = pytest.importorskip("soundfile")

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def commands_of_page():
    blocks = re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert all(line.startswith("$ ") for line in lines)
    return [shlex.split(line.removeprefix("$ ")) for line in lines]


@pytest.fixture
def here(tmp_path, sentences, monkeypatch):
    """A folder with everything that the page's commands read."""
    monkeypatch.chdir(tmp_path)
    write_librispeech(Path("LibriSpeech"), sentences)
    write_mls(Path("MLS/mls_polish"), sentences)
    for index, sentence in enumerate(sentences):
        for folder in ("interviews", "radio"):
            write_audio(Path(folder) / f"{index}.flac", sentence.speech.waveform)
        Path(f"interviews/{index}.txt").write_text(sentence.text)
    rows = [f'interviews/0.flac,"{sentences[0].text}",ann', "interviews/1.flac,Hello.,bob"]
    Path("lectures.csv").write_text("\n".join(["audio,text,speaker", *rows]) + "\n")
    Path("books").mkdir()
    Path("books/a.txt").write_text("".join(each.text + "\n" for each in sentences) * 20)
    Path("mls.jsonl").write_text(
        '{"file_id": "a", "interleaved": "<LST MODE SEP>TEXT [SIL] <LST MODE SEP>HUBERT 99 99 '
        "<LST MODE SEP>TEXT hello <LST MODE SEP>HUBERT 7 7 7 <LST MODE SEP>TEXT you "
        '<LST MODE SEP>HUBERT 501"}\n'
    )
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    scripts = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{scripts}:{os.environ['PATH']}")
    return tmp_path


def write_audio(path, waveform):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, SAMPLE_RATE)


def write_librispeech(root, sentences):
    """Enough speech for 501 codes, with the alignments of the second part alone."""
    for part, voices in (("train-clean-5", TRAINING_VOICES[:4]), ("dev-clean-2", ())):
        for speaker, voice in enumerate(voices or TRAINING_VOICES[:1]):
            chapter = root / part / f"{speaker}" / "7"
            texts, aligned = [], []
            for index, sentence in enumerate(sentences):
                name = f"{speaker}-7-{index:04d}"
                speech = synthesize(sentence.text, voice)
                write_audio(chapter / f"{name}.flac", speech.waveform)
                texts.append(f"{name} {sentence.text.upper()}\n")
                ends = ",".join(f"{word.stop:.3f}" for word in speech.words)
                words = ",".join(word.label.strip(".,?").upper() for word in speech.words)
                aligned.append(f'{name} "{words}" "{ends}"\n')
            (chapter / f"{speaker}-7.trans.txt").write_text("".join(texts))
            (chapter / f"{speaker}-7.alignment.txt").write_text("".join(aligned))


def write_mls(root, sentences):
    for index, split in enumerate(("train", "dev", "test")):
        name = f"{index}_9_000000"
        write_audio(root / split / "audio" / f"{index}/9/{name}.flac", sentences[0].speech.waveform)
        (root / split / "transcripts.txt").write_text(f"{name}\t{sentences[0].text}\n")
    (root / "metainfo.txt").write_text("".join(f"{i} | F | train | 1 | 9 | x\n" for i in range(3)))


def run(arguments, monkeypatch):
    if arguments[:3] == ["python", "-m", "lst.prepare"] and "--executor" not in arguments:
        monkeypatch.setattr(sys, "argv", ["lst.prepare", *arguments[3:]])
        commands.main()
    else:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_the_pages_commands_make_what_it_says(here, monkeypatch, capsys):
    pytest.importorskip("datatrove")
    listed = commands_of_page()
    assert len(listed) >= 18
    for arguments in listed:
        run(arguments, monkeypatch)
    out = capsys.readouterr().out
    assert "data/corpus/train/librispeech: 24 records" in out
    assert "24 of 24 records looked at have aligned words" in out
    assert "2 words, 0 without a frame of their own, 1 silences" in out
    made = {path.parent.name: len(Dataset.open(path.parent)) for path in here.rglob("dataset.json")}
    assert made == {
        "librispeech": 24, "dev": 6, "books": 120, "mls": 2, "cuts": 6, "interviews": 6,
        "lectures": 2, "radio": 6, "mls-example": 1, "shared": 6, "tasks": 6,
    }  # fmt: skip
    assert "launch_pickled_pipeline" in Path("made/array/logs/launch_script.slurm").read_text()
    mixture = {"librispeech": 1.0, "books": 2.0, "mls": 1.0}
    corpus = open_corpus(
        DataConfig(corpus="data/corpus", mixture=mixture, rows=1, units_per_sequence=64)
    )
    assert corpus.vocabulary.num_units == 501
    assert np.unique([len(dataset) for dataset in corpus.valid.values()]).tolist() == [6]
