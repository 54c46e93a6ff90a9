"""docs/vocoder.md, done as a reader does it, with fewer steps."""

import json
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lst.speech.audio import read_audio

PAGE = (Path(__file__).parents[2] / "docs/vocoder.md").read_text()
BLOCKS = re.findall(r"^```(console|python)\n(.*?)^```$", PAGE, re.M | re.S)
QUICK = ["--steps", "1", "--alone-steps", "1", "--batch", "1", "--stretch-units", "2"]


def test_every_command_and_every_block_of_code_of_the_page_works(
    tiny_corpus, tmp_path, monkeypatch
):
    pytest.importorskip("soundfile")
    from lst.vocoder.__main__ import main

    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/demo").symlink_to(tiny_corpus)
    Path("units.txt").write_text("3 1 4 1 5")
    waveform = 0.1 * np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    names = {"waveform": waveform, "other": waveform / 2}
    done = []
    for language, text in BLOCKS:
        if language == "python":
            if "unit_hifigan" in text:
                imported("runs/vocoder", "unit_hifigan")
                names["units"] = np.array([3, 3, 1])
            exec(text, names)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ python -m lst.vocoder "))
            if words[0] == "train":
                if "cuda" in words:  # its options are checked with those of all pages
                    continue
                words += QUICK
            if words[0] == "recordings":
                words[words.index("--minutes") + 1] = "2"
            monkeypatch.setattr(sys, "argv", ["lst.vocoder", *words])
            with redirect_stdout(StringIO()):
                main()
            done.append(words[0])
    assert done == ["synthesise", "recordings", "train"]
    assert len(read_audio("said.wav")) == 5 * 640
    assert len(read_audio("again.wav")) == 16_000
    assert names["samples"].shape[0] % 640 == 0
    assert names["decibels"] < 1


def imported(ours, folder):
    """A vocoder of ours as if of a public checkpoint that predicts durations and has numbers for
    speakers: the page's is not here."""
    from lst.vocoder.config import DurationConfig
    from lst.vocoder.generator import DurationPredictor

    shutil.copytree(ours, folder, ignore=shutil.ignore_patterns("c[hl]*", "s*", "m*", "t*", ".*"))
    about = json.loads(Path(folder, "config.json").read_text())
    sizes = {"encoder_embed_dim": 64, "var_pred_hidden_dim": 8}
    about |= {"dur_predictor_params": sizes, "speakers": None, "codebook": None}
    Path(folder, "config.json").write_text(json.dumps(about))
    predictor = DurationPredictor(DurationConfig(**sizes)).state_dict()
    weights = load_file(Path(folder, "generator.safetensors"))
    weights |= {f"dur_predictor.{name}": tensor for name, tensor in predictor.items()}
    save_file(weights, Path(folder, "generator.safetensors"))
