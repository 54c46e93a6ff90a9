"""What a model is made of, as typed values."""

import math
from dataclasses import dataclass, field
from typing import Literal

from lst.data.batch import PlanConfig
from lst.errors import UserError, expect_not_negative, expect_positive

# No model is so large: a number beyond is a slip of the hand, which would fill the memory.
WIDEST, DEEPEST = 2**20, 10_000


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of transformer layers."""

    layers: int  # number of transformer layers
    dim: int  # width of the residual stream
    heads: int  # attention heads of dim / heads features each
    kv_heads: int | None = None  # key and value heads (grouped-query attention); None: as heads
    hidden: int | None = None  # feed-forward width; None: 8/3 · dim, up to a multiple of 256

    def __post_init__(self) -> None:
        sizes = (self.layers, self.dim, self.heads, self.num_kv_heads, self.hidden_width)
        if not 1 <= min(sizes) <= max(sizes) <= WIDEST or self.layers > DEEPEST:
            raise UserError(
                f"model: expected every size of a stack to be 1 to {WIDEST:,}, and at most "
                f"{DEEPEST:,} layers, got {self}"
            )
        if self.heads % self.num_kv_heads:
            raise UserError(
                f"model: {self.num_kv_heads} heads of keys cannot be shared evenly by {self.heads}"
            )
        if self.dim % (2 * self.heads):
            raise UserError(
                f"model: dim {self.dim} does not split into {self.heads} heads of an even size "
                "(rotary embeddings turn pairs of features)"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden_width(self) -> int:
        return -(-(8 * self.dim // 3) // 256) * 256 if self.hidden is None else self.hidden


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are slowed down for contexts longer than a model was first trained on.

    "linear": all by ``factor``. "llama3": those that turn less than ``low`` times within
    ``original_length`` positions by ``factor``, those that turn more than ``high`` times not at
    all, and evenly in between (Llama 3.1).
    """

    kind: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        expect_positive(self, "factor", "original_length", within="model.rope-scaling.")
        if not self.low < self.high < math.inf:
            raise UserError(f"model: rotary scaling needs finite low < high, got {self}")


def _paper_local(layers: int) -> StackConfig:
    return StackConfig(layers=layers, dim=1024, heads=16)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The Latent Speech-Text Transformer, or its token-level baseline. Defaults: paper, Table 7."""

    architecture: Literal["lst", "token"] = "lst"  # "token": the global transformer alone
    encoder: StackConfig = field(default_factory=lambda: _paper_local(1))  # not in "token"
    global_transformer: StackConfig = field(
        default_factory=lambda: StackConfig(layers=25, dim=2048, heads=16)
    )
    decoder: StackConfig = field(default_factory=lambda: _paper_local(9))  # not in "token"
    # What embeds and predicts text. "local": encoder and decoder, as for speech. "global": the
    # global transformer alone; encoder and decoder see speech only. Not used by "token".
    text_path: Literal["local", "global"] = "local"
    local_window: int = 512  # window of encoder and decoder layers, in tokens, itself included
    decoder_window: int | None = 512  # last patches that a token of the decoder reads; None: all
    rope_theta: float = 5e5  # base of the rotary embeddings
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)  # of the global transformer
    norm_eps: float = 1e-5  # of RMSNorm
    tied: bool = False  # the head shares its weight with the embedding
    special_pieces: tuple[int, int] | None = None  # of <bos> and <eos> in the Llama it started from

    def __post_init__(self) -> None:
        if self.encoder.dim != self.decoder.dim:
            raise UserError(
                f"model: the decoder continues the encoder's stream, so their widths must agree; "
                f"got encoder {self.encoder.dim} and decoder {self.decoder.dim}"
            )
        sizes = ("local_window", "decoder_window", "rope_theta", "norm_eps")
        expect_positive(self, *sizes, within="model.")
        expect_not_negative(self, "special_pieces", within="model.")
        if self.global_transformer.dim % self.encoder.dim:
            raise UserError(
                "model: a patch is slots of the local width laid side by side, so the global width "
                f"{self.global_transformer.dim} must be a multiple of {self.encoder.dim}"
            )

    @property
    def slots(self) -> int:
        """Vectors that a patch has on the local side: d_global / d_local."""
        return self.global_transformer.dim // self.encoder.dim

    def plan(self) -> PlanConfig:
        """What a batch's plan must hold for this model."""
        return PlanConfig(
            slots=self.slots,
            local_window=self.local_window,
            decoder_window=self.decoder_window,
            local=self.architecture == "lst",
            text_path=self.text_path,
        )
