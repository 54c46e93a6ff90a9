"""The tutorials, done as a reader does them: every command and every block of code of a page, in
order, and what the page shows as printed is printed."""

import doctest
import json
import re
import runpy
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(name):
    """[(language, text, line)] of a page."""
    page = (TUTORIALS / f"{name}.md").read_text()
    found = [(b[1], b[2], page.count("\n", 0, b.start(2))) for b in BLOCK.finditer(page)]
    assert {language for language, _, _ in found} <= {"console", "python", "text", "diff", "json"}
    return found


def commands(text):
    lines = text.replace("\\\n", " ").splitlines()
    assert all(line.startswith("$ ") for line in lines), "console blocks hold commands alone"
    return [line.removeprefix("$ ") for line in lines]


def follow(name, command, code, other=None):
    """Do a page: ``command(line)`` and ``code(source, line)`` return what is printed.

    A ``text`` block is what the block before it prints; ``...`` in it stands for anything.
    """
    printed = ""
    for language, text, line in blocks(name):
        if language == "console":
            printed = "".join(command(each) for each in commands(text))
        elif language == "python":
            printed = code(text, line)
        elif language == "text":
            alike = doctest.OutputChecker().check_output
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert alike(text, printed, flags), f"{name}.md:{line} shows\n{text}\ngot\n{printed}"
        else:
            other(text)


class InProcess:
    """Commands and code in this process, all code in one namespace."""

    def __init__(self, page):
        self.page, self.names = page, {"__name__": "tutorial"}

    def command(self, line):
        words = shlex.split(line, comments=True)
        assert words[:2] == ["python", "-m"]
        argv, sys.argv = sys.argv, words[2:]
        try:
            with redirect_stdout(StringIO()) as out:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if ended.code:
                raise AssertionError(f"{line} ended with exit code {ended.code}") from ended
        finally:
            sys.argv = argv
        return out.getvalue()

    def code(self, source, line):
        # the empty lines make a traceback show the line of the page
        code = compile("\n" * line + source, str(TUTORIALS / f"{self.page}.md"), "exec")
        with redirect_stdout(StringIO()) as out:
            exec(code, self.names)
        return out.getvalue()


def follow_here(page):
    reader = InProcess(page)
    follow(page, reader.command, reader.code)


def test_every_tutorial_is_followed_here():
    pages = {path.stem for path in TUTORIALS.glob("*.md")}
    assert pages == {"own-audio", "own-model", "patching-strategy", "results"}


# --- train on your own audio ----------------------------------------------------------------------


def write_recordings(folder):
    """Half a minute of speech to train on and some to hold out, with transcripts beside it."""
    import soundfile

    from lst.speech.audio import SAMPLE_RATE
    from lst.speech.synthesis import TRAINING_VOICES, synthesize

    said = [
        "Once upon a time, there was a dog.",
        "The boat was late, and it rained.",
        "She found a red ball in the park.",
        "Tom and his mother went home.",
        "Where is the little bird now?",
        "Nobody had seen the old man since the summer.",
    ]
    for part, voices in (("train", TRAINING_VOICES[:2]), ("held-out", TRAINING_VOICES[2:3])):
        for number, voice in enumerate(voices):
            for index, text in enumerate(said):
                path = folder / part / f"{number}-{index}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, synthesize(text, voice).waveform, SAMPLE_RATE)
                path.with_suffix(".txt").write_text(text)
    return said


def test_train_on_your_own_audio(tmp_path, monkeypatch, save_ctc):
    for name in ("espeakng_loader", "scipy", "sklearn", "soundfile", "transformers"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    said = write_recordings(Path("recordings"))
    Path("texts").mkdir()
    Path("texts/stories.txt").write_text("".join(f"{line}\n" for line in said) * 30)
    # A folder of this name comes before the hub: a small model of random weights.
    save_ctc(Path("facebook/wav2vec2-base-960h"))
    follow_here("own-audio")


# --- read a results table -------------------------------------------------------------------------


def test_read_a_results_table(monkeypatch):
    monkeypatch.chdir(ROOT)
    follow_here("results")


# --- the kernels in your model --------------------------------------------------------------------


def test_the_kernels_in_your_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    follow_here("own-model")


# --- add a patching strategy ----------------------------------------------------------------------


def test_add_a_patching_strategy(run, tmp_path, tiny_corpus):
    """In a copy of the repository: the page changes it."""
    for name in ("lst", "lst_kernels", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "conftest.py", "tests/conftest.py", "tests/data"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(tiny_corpus)
    here = InProcess("patching-strategy")

    def command(line):
        words = [sys.executable, *shlex.split(line)[1:]]
        return run(*words, cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")

    def change(diff):
        (tmp_path / "change.diff").write_text(diff)
        run(
            "git",
            "apply",
            "change.diff",
            cwd=tmp_path,
            GIT_CEILING_DIRECTORIES=str(tmp_path.parent),
        )

    follow("patching-strategy", command, here.code, change)
    config = json.loads((tmp_path / "runs/demo/config.json").read_text())
    assert config["data"]["patching"]["strategy"] == "repeats"


# --- use a model (a guide, but one to follow) -----------------------------------------------------


def test_use_a_model(tmp_path, monkeypatch, make_trained):
    """Of random weights: what it says is not shown."""
    pytest.importorskip("soundfile")
    pytest.importorskip("scipy")
    import numpy as np

    from lst.pretrained import save_pretrained
    from lst.speech.audio import write_wav

    monkeypatch.chdir(tmp_path)
    save_pretrained(make_trained(), "runs/demo")
    time = np.arange(16_000) / 16_000
    write_wav("story.wav", 0.3 * np.sin(1400 * time) * (1 + np.sin(9 * time)))
    reader = InProcess("../generation")

    def command(line):
        """As a shell: what is after > goes to that file."""
        line, _, file = line.partition(" > ")
        printed = reader.command(line)
        if file:
            Path(file).write_text(printed)
        return printed

    def requests(text):
        Path("requests.jsonl").write_text(text)

    follow("../generation", command, reader.code, requests)
    files = {"continuation.txt", "units.json", "prompt.wav", "continuation.wav"}
    assert {path.name for path in Path("heard").iterdir()} == files
    printed = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    written = [json.loads(line) for line in Path("answers/results.jsonl").read_text().splitlines()]
    assert [result["id"] for result in printed] == ["1", "dog"]
    assert written == [
        result | {"folder": f"{number:05d}"} for number, result in enumerate(printed)
    ]
