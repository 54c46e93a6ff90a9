"""``lst-1b`` made small enough for two CPU cores, with every share of its compute as it is there.

Every width, and the vocabulary, is an eighth; layers and sizes of heads are the same, and so there
are an eighth of the heads. Compute of products goes with the square of the width; for attention to
keep its share, documents and windows are an eighth as long, and for the heads the vocabulary an
eighth as large::

                     lst-1b                reduced
    global           25 layers of 2048     25 of 256     feed-forward 11/4 of the width
    encoder          1 of 1024             1 of 128
    decoder          9 of 1024             9 of 128
    vocabulary       32,000 + 501          4,000 + 63
    windows          512                   64
    a text           200 to 2,000 pieces   25 to 250
    interleaved      6 × 2 spans           1 × 2, for spans of words cannot be an eighth
    speech alone     158 words in the mean 20

tests/benchmarks/test_reduced.py holds the shares of the parts to those of ``lst-1b``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.mix import PAPER, Shape
from lst.data.batch import Batch, pack_documents
from lst.data.interleave import Document
from lst.data.patching import Aligned, NoPatching, Static, Strategy
from lst.model import LanguageModel, ModelConfig, StackConfig, build_model
from lst.presets import PRESETS
from lst.vocabulary import Vocabulary

__all__ = ["ARMS", "LST_1B", "REDUCED", "Arm", "Size", "make_batch", "make_model", "stack"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and the documents that it reads."""

    name: str
    config: ModelConfig
    shape: Shape
    num_tokens: int  # of a stream; enough for a mix to have the paper's shares


def stack(layers: int, dim: int, heads: int) -> StackConfig:
    return StackConfig(layers=layers, dim=dim, heads=heads, hidden=11 * dim // 4)


REDUCED = Size(
    name="lst-1b / 8",
    config=ModelConfig(
        encoder=stack(1, 128, 2),
        global_transformer=stack(25, 256, 2),
        decoder=stack(9, 128, 2),
        local_window=64,
        decoder_window=64,
    ),
    shape=Shape(
        vocabulary=Vocabulary(num_pieces=4000, num_units=63),
        text_pieces=(25, 250),
        spans=1,
        speech_words=20,
    ),
    num_tokens=3072,
)
# As many tokens as the four rows of 4,096 that a GPU has in the paper.
LST_1B = Size(name="lst-1b", config=PRESETS["lst-1b"].model, shape=PAPER, num_tokens=16_384)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way to model the same documents."""

    name: str
    strategy: Strategy
    changes: tuple[tuple[str, str], ...]  # of the model's configuration

    def config(self, size: Size) -> ModelConfig:
        return replace(size.config, **dict(self.changes))


def _patched(name: str, strategy: Strategy, path: str) -> Arm:
    return Arm(
        name=f"{name}, text {path}",
        strategy=strategy,
        changes=(("architecture", "lst"), ("text_path", path)),
    )


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(name="token-level", strategy=NoPatching(), changes=(("architecture", "token"),)),
        _patched("static 4", Static(size=4), "local"),
        _patched("static 4", Static(size=4), "global"),
        _patched("words", Aligned(), "local"),
        _patched("words", Aligned(), "global"),
    )
}


def make_model(arm: Arm, size: Size, device: torch.device | None = None) -> LanguageModel:
    torch.manual_seed(0)
    with device or torch.device("cpu"):
        return build_model(arm.config(size), size.shape.vocabulary)


def make_batch(arm: Arm, size: Size, content: Sequence[Document]) -> Batch:
    """Whole documents without a dead tail, which in so short a stream would be a large part."""
    return pack_documents(content, size.shape.vocabulary, arm.strategy, arm.config(size).plan())
