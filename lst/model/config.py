"""What a model is made of, as typed values."""

from dataclasses import dataclass, field
from typing import Literal

from lst.data.batch import PlanConfig
from lst.errors import UserError


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of transformer layers."""

    layers: int
    dim: int  # width of the residual stream
    heads: int  # attention heads of dim / heads features each

    def __post_init__(self) -> None:
        if self.layers < 1 or self.dim < 1 or self.heads < 1:
            raise UserError(f"model: layers, dim and heads must be positive, got {self}")
        if self.dim % (2 * self.heads):
            raise UserError(
                f"model: dim {self.dim} does not split into {self.heads} heads of an even size "
                "(rotary embeddings turn pairs of features)"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


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
    local_window: int = 512  # tokens that a local layer reads, the query's own counted
    decoder_window: int | None = 512  # patches that a token reads; None: all of its document
    rope_theta: float = 5e5
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.encoder.dim != self.decoder.dim:
            raise UserError(
                f"model: the decoder continues the encoder's stream, so their widths must agree; "
                f"got encoder {self.encoder.dim} and decoder {self.decoder.dim}"
            )
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
        )
