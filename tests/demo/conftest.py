"""Models of random weights, small enough that a document takes no time, and what goes with them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from lst.data.loader import DataConfig
from lst.data.patching import PatchingConfig
from lst.model import ModelConfig, StackConfig, build_model
from lst.pretrained import Pretrained
from lst.speech.units import LogMelKMeans
from lst.speech_bpe import train_speech_bpe
from lst.train.config import TrainConfig
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Tokenizer, Vocabulary, train_tokenizer

NUM_UNITS = 20
MODEL = ModelConfig(
    encoder=StackConfig(layers=1, dim=16, heads=2),
    global_transformer=StackConfig(layers=1, dim=32, heads=2),
    decoder=StackConfig(layers=1, dim=16, heads=2),
    local_window=16,
    decoder_window=8,
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = ["a story of the small red fox who went over the hills & far away"] * 20
    return train_tokenizer(lines, tmp_path_factory.mktemp("pieces") / "t.model", num_pieces=300)


@pytest.fixture(scope="session")
def codebook() -> LogMelKMeans:
    """Codes at random; each has a sound."""
    rng = np.random.default_rng(0)
    return LogMelKMeans(
        rng.integers(-200, 200, (NUM_UNITS, 26)).astype(np.int16),
        rng.normal(-4, 2, (NUM_UNITS, 2, 40)).astype(np.float32),
    )


@pytest.fixture(scope="session")
def make_trained(
    tokenizer: Tokenizer, codebook: LogMelKMeans, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Pretrained]:
    """``make_trained(kind, context=512, corpus="nowhere")``: kind is a text path, "token" or "bpe",
    which is token-level over pieces of speech."""
    codebook_file = tmp_path_factory.mktemp("codebook") / "codebook.safetensors"
    codebook.save(codebook_file)

    def make(kind: str = "local", *, context: int = 512, corpus: str = "nowhere") -> Pretrained:
        model, speech_bpe = MODEL, None
        patching = PatchingConfig(strategy="static")
        if kind == "global":
            model = replace(MODEL, text_path="global")
        if kind in ("token", "bpe"):
            model = replace(MODEL, architecture="token")
            patching = PatchingConfig(strategy="none")
        if kind == "bpe":
            patching = PatchingConfig(strategy="speech-bpe")
            units = np.random.default_rng(0).integers(0, NUM_UNITS, (40, 60)).astype(np.int16)
            speech_bpe = train_speech_bpe([*units], num_units=NUM_UNITS, num_pieces=60)
        vocabulary = Vocabulary(tokenizer.num_pieces, NUM_UNITS, speech_bpe)
        torch.manual_seed(0)
        return Pretrained(
            model=build_model(model, vocabulary).eval(),
            config=TrainConfig(
                name="tiny",
                model=model,
                data=DataConfig(
                    corpus=corpus, rows=1, units_per_sequence=context, patching=patching
                ),
                steps=3,
            ),
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            step=3,
            codebook=codebook.fingerprint,
            codebook_file=codebook_file,
        )

    return make


@pytest.fixture(scope="session")
def story(tokenizer: Tokenizer) -> Callable[..., np.ndarray]:
    """``story(trained, spans)``: a document of texts and of as many units as numbers say."""

    def make(trained: Pretrained, spans: list[str | int]) -> np.ndarray:
        vocabulary, rng = trained.vocabulary, np.random.default_rng(len(spans))
        tokens = [BOS]
        for span in spans:
            if isinstance(span, str):
                tokens += [TEXT, *(vocabulary.piece_to_id(p) for p in tokenizer.encode(span))]
            else:
                units = rng.integers(0, NUM_UNITS, span).astype(np.int16)
                tokens += [SPEECH, *vocabulary.encode_units(units).tolist()]
        return np.array([*tokens, EOS], np.int32)

    return make
