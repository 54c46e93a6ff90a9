"""Patches back to tokens.

::

    kv = W · norm(slots of z)                  (P·S, layers · 2 · d)    all layers at once
    each layer:
        h = h + Wo · range_attention(Wq · norm(h), k, v)     patches readable at the token
        h = self-attention over the sliding window, then SwiGLU

A token reads the slots of the last ``decoder_window`` patches that are readable at it, never those
of a patch that goes on after it. T counts the tokens that pass the local modules, P the patches
that they may read: all, or (``text_path``) speech and what lies before it in its documents.
"""

from torch import Tensor, nn

from lst.data.batch import Batch
from lst.model.config import ModelConfig
from lst.model.layers import Attention, Layer, RMSNorm, Rotation
from lst.model.patch_encoder import token_attention, token_rotation
from lst_kernels import KeyRanges, range_attention


class DecoderLayer(nn.Module):
    """Cross-attention from the tokens to the patches, then a transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stack = config.decoder
        dim = self.stack.dim
        self.cross_norm = RMSNorm(dim, eps=config.norm_eps)
        self.cross_query = nn.Linear(dim, dim, bias=False)
        self.cross_output = nn.Linear(dim, dim, bias=False)
        self.layer = Layer(self.stack, config.norm_eps)

    def forward(
        self, h: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges, by: Rotation, attention: Attention
    ) -> Tensor:
        q = self.cross_query(self.cross_norm(h)).unflatten(
            -1, (self.stack.heads, self.stack.head_dim)
        )
        read = range_attention(q, k, v, ranges)
        h = h + self.cross_output(read.flatten(1))
        return self.layer(h, by, attention)


class PatchDecoder(nn.Module):
    """Continues the encoder's token states (T, d) with what the global transformer made of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stack, self.config = config.decoder, config
        self.patch_norm = RMSNorm(stack.dim, eps=config.norm_eps)
        self.key_value = nn.Linear(stack.dim, stack.layers * 2 * stack.dim, bias=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(stack.layers))

    def forward(self, h: Tensor, z: Tensor, batch: Batch) -> Tensor:
        """(T, d) from token states h (T, d) and patches z (P, S·d)."""
        by = token_rotation(batch, self.config, self.config.decoder.head_dim)
        attention = token_attention(batch, self.config)
        assert batch.decoder_ranges is not None, "the batch was planned for a token-level model"
        for layer, kv in zip(self.layers, self.keys_values(z).unbind(1), strict=True):
            k, v = kv.unbind(1)
            h = layer(h, k, v, batch.decoder_ranges, by, attention)
        return h

    def keys_values(self, z: Tensor) -> Tensor:
        """What every layer reads of patches z (P, S·d): (P·S, layers, 2, H, D)."""
        stack = self.config.decoder
        slots = self.patch_norm(z.view(-1, stack.dim))
        return self.key_value(slots).unflatten(-1, (stack.layers, 2, stack.heads, stack.head_dim))
