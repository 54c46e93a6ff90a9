"""What tests of several parts share."""

import json
import os
import shutil
import signal
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


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """The next test has the usual ones: a command called in this process has its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
    pytest.importorskip("build.__main__")  # a folder of that name would do for "build"
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
    (tmp_path / "packages").mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("lst", "__pycache__")):
            (tmp_path / "packages" / path.name).symlink_to(path)
    return {
        "PATH": f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        # As a path, so without the .pth file that would lead to the checkout.
        "PYTHONPATH": str(tmp_path / "packages"),
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


# --- a language model with random weights, and all that goes with a trained one -------------------


@pytest.fixture(scope="session")
def make_trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``make_trained(model={…}, patching={…}, speech_bpe=False)``: a Pretrained, as if a run had
    made it. Its codebook of 20 units lies beside its tokenizer."""
    from dataclasses import replace

    import numpy as np
    import torch

    from lst.data.loader import DataConfig
    from lst.data.patching import PatchingConfig
    from lst.model import ModelConfig, StackConfig, build_model
    from lst.pretrained import Pretrained
    from lst.speech.units import LogMelKMeans
    from lst.speech_bpe import train_speech_bpe
    from lst.train.config import TrainConfig
    from lst.vocabulary import Vocabulary, train_tokenizer

    folder, num_units = tmp_path_factory.mktemp("trained"), 20
    tokenizer = train_tokenizer(
        ["the small red fox went over the hills and told a story"] * 20,
        folder / "tokenizer.model",
        num_pieces=300,
    )
    rng = np.random.default_rng(0)
    codebook = LogMelKMeans(
        rng.integers(-200, 200, (num_units, 26)).astype(np.int16),
        rng.normal(-4, 2, (num_units, 2, 40)).astype(np.float32),
    )
    codebook.save(folder / "codebook.safetensors")
    base = TrainConfig(
        name="tiny",
        model=ModelConfig(
            encoder=StackConfig(layers=1, dim=16, heads=1),
            global_transformer=StackConfig(layers=2, dim=32, heads=2),
            decoder=StackConfig(layers=1, dim=16, heads=1),
            local_window=16,
            decoder_window=8,
        ),
        data=DataConfig(
            corpus=str(folder),
            rows=1,
            units_per_sequence=64,
            patching=PatchingConfig(strategy="static"),
        ),
        steps=6,
    )

    def make(
        *,
        model: dict[str, Any] | None = None,
        patching: dict[str, Any] | None = None,
        speech_bpe: bool = False,
    ) -> Pretrained:
        data = replace(base.data, patching=replace(base.data.patching, **(patching or {})))
        config = replace(base, model=replace(base.model, **(model or {})), data=data)
        pieces = None
        if speech_bpe:
            repeated = [np.repeat(rng.integers(0, num_units, 40), 2) for _ in range(20)]
            pieces = train_speech_bpe(repeated, num_units=num_units, num_pieces=40)
        vocabulary = Vocabulary(tokenizer.num_pieces, num_units, pieces)
        torch.manual_seed(0)
        return Pretrained(
            model=build_model(config.model, vocabulary),
            config=config,
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            step=6,
            codebook=codebook.fingerprint,
            codebook_file=folder / "codebook.safetensors",
        )

    return make
