"""Dynamic chunking in the manner of H-Net: a byte model that learns where to cut.

    python docs/examples/h_net_chunking.py          # under a minute on two cores, no download

    bytes → router → boundaries → layout → pool → network over chunks → smooth → expand → next byte

A router compares neighbouring positions: where they differ, a chunk begins. The layout of these
chunks is made where the model runs, without asking the device for their number. A chunk is its
first position; the main network sees chunks alone. On the way back every chunk is mixed with the
ones before it by how sure the router was (`segment_scan`), so that the router has a gradient, and
every byte takes its own chunk (`patch_expand`).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lst_kernels import (
    PatchLayout,
    block_causal_attention,
    patch_expand,
    patch_pool,
    segment_scan,
    sliding_window_attention,
)

WIDTH, HEADS, LENGTH, DOCUMENTS = 64, 4, 96, 16
MAX_CHUNKS = DOCUMENTS * LENGTH // 2  # an upper bound: the layout is padded with empty chunks
BYTES_PER_CHUNK = 4.0


class Block(nn.Module):
    """Attention within documents, and a feed-forward.

    Ranges of keys are made in every call; of more layers, `ranges=` lets all share one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, cu: Tensor, max_length: int, window: int | None) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).unflatten(1, (3, HEADS, -1)).unbind(1)
        if window is None:
            read = block_causal_attention(*qkv, cu, max_length=max_length)
        else:
            read = sliding_window_attention(*qkv, cu, window=window, max_length=max_length)
        x = x + self.mix(read.flatten(1))
        return x + self.feed(x)


class Router(nn.Module):
    """How likely each position begins a chunk: (1 - cosine of it and the one before) / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.before = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        for projection in (self.here, self.before):
            nn.init.eye_(projection.weight)

    def forward(self, h: Tensor, cu_tokens: Tensor) -> tuple[Tensor, Tensor]:
        cosine = F.cosine_similarity(self.here(h[1:]), self.before(h[:-1]))
        p = F.pad((1 - cosine) / 2, (1, 0)).clamp(0, 1)
        p = p.index_fill(0, cu_tokens[:-1].long(), 1.0)  # a document begins a chunk
        return p, p >= 0.5


class HNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(256, WIDTH), Router()
        self.encoder, self.decoder = Block(), Block()
        self.main = nn.ModuleList(Block() for _ in range(2))
        self.skip, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, cu_tokens: Tensor) -> tuple[Tensor, Tensor, PatchLayout]:
        """Logits (T, 256), the router's loss, and the chunks of T bytes."""
        h = self.encoder(self.embed(tokens), cu_tokens, LENGTH, window=8)
        p, starts = self.router(h, cu_tokens)
        layout = PatchLayout.from_boundaries(starts, max_patches=MAX_CHUNKS, cu_tokens=cu_tokens)
        z = patch_pool(h, layout, "first")
        for block in self.main:
            z = block(z, layout.cu_documents, layout.max_document_patches, window=None)
        sure = patch_pool(p, layout, "first")
        z = segment_scan(sure[:, None] * z, 1 - sure, layout.cu_documents)
        # Straight through: the value is 1, the gradient that of the router's choice.
        choice = torch.where(starts, p, 1 - p)
        choice = choice + (1 - choice).detach()
        h = self.skip(h) + choice[:, None] * patch_expand(z, layout)
        logits = self.head(self.decoder(h, cu_tokens, LENGTH, window=8))
        return logits, self.ratio_loss(p, starts), layout

    def ratio_loss(self, p: Tensor, starts: Tensor) -> Tensor:
        """Least where one position in BYTES_PER_CHUNK begins a chunk."""
        n, chosen, likely = BYTES_PER_CHUNK, starts.float().mean(), p.mean()
        return n / (n - 1) * ((n - 1) * chosen * likely + (1 - chosen) * (1 - likely))


def documents(generator: torch.Generator) -> Tensor:
    """Sentences of eight words in random order: hard to guess at a word's start, easy within."""
    words = ("harbour", "lantern", "meadow", "orchard", "pebble", "quarry", "thistle", "willow")
    rows = []
    for _ in range(DOCUMENTS):
        order = torch.randint(len(words), (LENGTH // 4,), generator=generator).tolist()
        rows.append(" ".join(words[i] for i in order).encode()[: LENGTH + 1])
    return torch.tensor([list(row) for row in rows])


def train(steps: int = 120) -> tuple[float, float]:
    """Mean loss in bits a byte of the first and of the last ten steps."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), HNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    cu_tokens = torch.arange(0, DOCUMENTS * LENGTH + 1, LENGTH, dtype=torch.int32)
    losses = []
    for step in range(steps):
        rows = documents(generator)
        tokens, targets = rows[:, :-1].flatten(), rows[:, 1:].flatten()
        logits, ratio, layout = model(tokens, cu_tokens)
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        (loss + 0.03 * ratio).backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        if step % 30 == 29:
            cuts = layout.cu_patches[: int(layout.cu_documents[1]) + 1].tolist()
            text = bytes(rows[0, :-1].tolist()).decode()
            chunks = [text[a:b] for a, b in pairwise(cuts)]
            print(f"step {step + 1}: {losses[-1]:.2f} bits a byte  {'|'.join(chunks)[:70]}")
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


if __name__ == "__main__":
    first, last = train()
    print(f"first steps {first:.2f}, last steps {last:.2f} bits a byte")
    assert last < first / 2, "the model did not learn"
