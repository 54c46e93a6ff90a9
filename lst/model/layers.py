"""What the patch encoder, the global transformer and the patch decoder are all built from.

A layer is pre-normalised and its two branches are added once each::

    x = x + Wo · attention(rope(Wq · norm(x)), rope(Wk · norm(x)), Wv · norm(x))
    x = x + W2 · (silu(W1 · norm(x)) * W3 · norm(x))

Shapes are packed: T rows (tokens, or patches in the global transformer), no batch dimension.
Nothing here knows which rows may see each other; the attention is handed in.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lst.model.config import RopeScaling, StackConfig

# (q, k, v), of (T, Hq, D), (T, Hkv, D) and (T, Hkv, D), to the attention's output (T, Hq, D)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# fills a weight, in place, with random numbers of a deviation
Draw = Callable[[Tensor, float], None]


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, each (T, 1, D / 2) float32."""

    cos: Tensor
    sin: Tensor


def rotation(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Angles of rotary embeddings for ``positions`` (T,): position · theta^(−2i / D), scaled."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = theta ** (-exponents / head_dim)
    if scaling is not None:
        frequencies = scaled(frequencies, scaling)
    angles = positions.float()[:, None] * frequencies
    return Rotation(angles.cos()[:, None], angles.sin()[:, None])


def scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary ``frequencies`` (D / 2,), radians a position, slowed down as ``scaling`` says."""
    if scaling.kind == "none":
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_length * frequencies / (2 * math.pi)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * slow


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn ``x`` (T, H, D): feature i is paired with i + D/2, as in Llama checkpoints."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * by.cos - second * by.sin, second * by.cos + first * by.sin), dim=-1)
    return turned.to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """In the precision of its weight: float32, but for the weights that FSDP gathers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden_width, bias=False)
        self.down = nn.Linear(config.hidden_width, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class SelfAttention(nn.Module):
    """Projections around an attention over the rows themselves."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        heads = config.heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.dim, heads * config.head_dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, by: Rotation, attention: Attention) -> Tensor:
        heads = (self.config.heads, self.config.num_kv_heads, self.config.num_kv_heads)
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.config.head_dim)).split(heads, dim=1)
        return self.output(attention(rotate(q, by), rotate(k, by), v).flatten(1))


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, config: StackConfig, eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = RMSNorm(config.dim, eps=eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, by: Rotation, attention: Attention) -> Tensor:
        x = x + self.attention(self.attention_norm(x), by, attention)
        return x + self.feed(x)

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward branch."""
        return self.feed_forward(self.feed_forward_norm(x))


@torch.no_grad()
def truncated_normal(
    weight: Tensor, deviation: float, generator: torch.Generator | None = None
) -> None:
    """Fill ``weight``, in place, from a normal that is cut off at three deviations.

    By inverting the normal's distribution function: as quick as a plain uniform, where
    ``nn.init.trunc_normal_`` of torch 2.13 draws again and again, and alike in every release.
    """
    limit = math.erf(3 / math.sqrt(2))
    weight.uniform_(-limit, limit, generator=generator).erfinv_().mul_(math.sqrt(2) * deviation)


def initialise(module: nn.Module, residual_branches: int, draw: Draw = truncated_normal) -> None:
    """Draw matrices with a deviation of fan_in^−½, less where a branch ends on the stream.

    A stream that ``residual_branches`` branches add to keeps its scale when each is divided by the
    square root of their number (GPT-2, section 2.3). Norms are set to 1.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            deviation = child.in_features**-0.5
            if name.endswith(("output", "down")):
                deviation *= residual_branches**-0.5
            draw(child.weight, deviation)
        elif isinstance(child, nn.Embedding):
            draw(child.weight, child.embedding_dim**-0.5)
        elif isinstance(child, nn.RMSNorm):
            nn.init.ones_(child.weight)


def stream(embeddings: Tensor) -> Tensor:
    """Where the residual stream begins: under autocast in the precision of the products."""
    device = embeddings.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return embeddings.to(torch.get_autocast_dtype(device))
    return embeddings
