"""Tokens to patches.

::

    h = layers(embeddings)                     (T, d)        sliding window, rotary
    q = slots of W · patch_pool(h, "max")      (P·S, d)
    u = q + Wo · range_attention(Wq · norm(q), Wk · norm(h), Wv · norm(h))
    patches = S slots side by side             (P, S·d)

A slot reads the tokens of its own patch and nothing else. T and P count what passes the local
modules: everything, or speech alone (``text_path``).
"""

from torch import Tensor, nn

from lst.data.batch import Batch
from lst.model.config import ModelConfig
from lst.model.layers import Attention, Layer, RMSNorm, Rotation, rotation
from lst_kernels import (
    KeyRanges,
    PatchLayout,
    patch_pool,
    range_attention,
    sliding_window_attention,
)


def token_rotation(batch: Batch, config: ModelConfig, head_dim: int) -> Rotation:
    """Rotary angles of every token, by its position in its document."""
    return rotation(_layout(batch).token_positions, head_dim, config.rope_theta)


def token_attention(batch: Batch, config: ModelConfig) -> Attention:
    """Attention of every token to the last ``local_window`` tokens of its document."""
    layout = _layout(batch)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sliding_window_attention(
            q,
            k,
            v,
            layout.cu_tokens,
            window=config.local_window,
            max_length=layout.max_document_tokens,
            ranges=batch.local_ranges,
        )

    return attention


def _layout(batch: Batch) -> PatchLayout:
    assert batch.local_layout is not None, "the batch was planned for a token-level model"
    return batch.local_layout


class PatchEncoder(nn.Module):
    """Local layers over the tokens, then cross-attention from every patch's slots to its tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stack, self.config = config.encoder, config
        self.layers = nn.ModuleList(Layer(stack, config.norm_eps) for _ in range(stack.layers))
        self.slot_queries = nn.Linear(stack.dim, config.slots * stack.dim, bias=False)
        self.query_norm = RMSNorm(stack.dim, eps=config.norm_eps)
        self.token_norm = RMSNorm(stack.dim, eps=config.norm_eps)
        self.query = nn.Linear(stack.dim, stack.dim, bias=False)
        self.key_value = nn.Linear(stack.dim, 2 * stack.dim, bias=False)
        self.output = nn.Linear(stack.dim, stack.dim, bias=False)

    def forward(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token states (T, d) and patches (P, S·d) from embeddings (T, d)."""
        by = token_rotation(batch, self.config, self.config.encoder.head_dim)
        attention = token_attention(batch, self.config)
        for layer in self.layers:
            x = layer(x, by, attention)
        assert batch.encoder_ranges is not None, "the batch was planned for a token-level model"
        return x, self.patches(x, _layout(batch), batch.encoder_ranges)

    def patches(self, h: Tensor, layout: PatchLayout, ranges: KeyRanges) -> Tensor:
        """One vector a patch (P, S·d) from the token states ``h`` (T, d).

        ``ranges``: the layout's ``patches_read_tokens``, P·S × T.
        """
        stack, slots = self.config.encoder, self.config.slots
        q = self.slot_queries(patch_pool(h, layout, "max")).view(-1, stack.dim)
        q = q.to(h.dtype)  # the patches' stream keeps the tokens' precision under autocast
        heads = (stack.heads, stack.head_dim)
        k, v = self.key_value(self.token_norm(h)).unflatten(-1, (2, *heads)).unbind(1)
        read = range_attention(self.query(self.query_norm(q)).unflatten(-1, heads), k, v, ranges)
        # Views are added: compiled code would tell a stream that is a view from one that is none.
        wide = (-1, slots * stack.dim)
        return q.view(wide) + self.output(read.flatten(1)).view(wide)
