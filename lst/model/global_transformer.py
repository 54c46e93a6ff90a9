"""The large part: block-causal attention over patches, rotary by a patch's place in its document.

In the token-level baseline every token is a patch, and this is the whole model.
"""

from torch import Tensor, nn

from lst.data.batch import Batch
from lst.model.config import ModelConfig
from lst.model.layers import Layer, Rotation, rotation
from lst_kernels import block_causal_attention


class GlobalTransformer(nn.Module):
    """Layers over patches (P, d_global); the stream is handed on without a last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stack, self.config = config.global_transformer, config
        self.layers = nn.ModuleList(Layer(stack, config.norm_eps) for _ in range(stack.layers))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        layout = batch.layout
        by = self.rotation(layout.patch_positions)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return block_causal_attention(
                q,
                k,
                v,
                layout.cu_documents,
                max_length=layout.max_document_patches,
                ranges=batch.global_ranges,
            )

        for layer in self.layers:
            x = layer(x, by, attention)
        return x

    def rotation(self, positions: Tensor) -> Rotation:
        """Rotary angles of patches by their positions (P,) in their documents."""
        config = self.config
        head_dim = config.global_transformer.head_dim
        return rotation(positions, head_dim, config.rope_theta, config.rope_scaling)
