"""What tests of several parts share."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where encoded records are kept, for the length of the run."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LST_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo corpus of three minutes of speech and 40,000 text tokens. Read it, don't write."""
    pytest.importorskip("espeakng_loader", reason="lst[speech] is not installed")
    from lst.prepare.demo import DemoConfig, prepare_demo

    return prepare_demo(
        DemoConfig(
            out=tmp_path_factory.mktemp("tiny") / "demo",
            hours=0.05,
            text_tokens=40_000,
            questions=8,
            validation=8,
            pieces=400,
            workers=1,
        )
    )


# --- packages, as they are built and installed ----------------------------------------------------


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """run(*command, cwd=None, **variables) → what it prints, with its errors. It must succeed."""

    def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources without anything built."""
    copy = tmp_path_factory.mktemp("tree")
    built = shutil.ignore_patterns("*.so", "*.dylib", "*.dll", "__pycache__")
    for package in ("lst", "lst_kernels"):
        shutil.copytree(ROOT / package, copy / package, ignore=built)
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="session")
def wheel(run: Callable[..., str], tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel in a folder ``dist``, built from the source distribution, so found complete."""
    pytest.importorskip("build")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    out = tmp_path_factory.mktemp("packages") / "dist"
    log = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree)
    assert "were not built" not in log, log
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def clean_shell(run: Callable[..., str], tmp_path: Path) -> dict[str, str]:
    """The variables of a shell in which a virtual environment without lst is active.

    What lst depends on is found in the environment of the tests, so nothing is downloaded.
    """
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    return {
        "PATH": f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        # As a path, so without the .pth file that would lead to the checkout.
        "PYTHONPATH": sysconfig.get_path("purelib"),
        "PIP_NO_INDEX": "1",
    }


# --- small networks with random weights, saved as transformers saves the large ones ---------------

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    # Random weights of the usual size give states that hardly depend on the waveform.
    "initializer_range": 0.2,
}
CONVOLUTIONS = {
    25: ((10, 3, 3, 3, 3, 2, 2, 2), (5, 2, 2, 2, 2, 2, 2, 2)),
    50: ((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)),
}
CHARACTERS = "|ETAOINSHRDLUCMFWGYPBVKXJQZ'"


def convolutions(rate: int) -> dict[str, Any]:
    kernels, strides = CONVOLUTIONS[rate]
    return {
        "conv_kernel": list(kernels),
        "conv_stride": list(strides),
        "conv_dim": [16] * len(kernels),
        "num_feat_extract_layers": len(kernels),
    }


@pytest.fixture(scope="session")
def save_hubert():
    """Write a HuBERT model of random weights into a folder."""
    pytest.importorskip("transformers")
    import torch
    from transformers import HubertConfig, HubertModel

    def save(folder: Path, *, rate: int = 25, **settings: Any) -> Path:
        torch.manual_seed(0)
        HubertModel(HubertConfig(**TINY | convolutions(rate) | settings)).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def save_ctc():
    """Write a Wav2Vec2 model with a CTC head, and its tokenizer's files, into a folder."""
    pytest.importorskip("transformers")
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    def save(folder: Path, *, characters: str = CHARACTERS, **settings: Any) -> Path:
        vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *characters]
        sizes = {"vocab_size": len(vocabulary), "pad_token_id": 0}
        torch.manual_seed(0)
        model = Wav2Vec2ForCTC(Wav2Vec2Config(**TINY | convolutions(50) | sizes | settings))
        model.save_pretrained(folder)
        ids = {token: number for number, token in enumerate(vocabulary)}
        (folder / "vocab.json").write_text(json.dumps(ids))
        about = {"pad_token": "<pad>", "unk_token": "<unk>", "word_delimiter_token": "|"}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        return folder

    return save
