"""Small networks with random weights, saved as transformers saves the large ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

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
