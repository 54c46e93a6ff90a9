"""Fixed patches in the manner of MegaByte: a large model over patches, a small one within each.

    python docs/examples/megabyte_patches.py          # under a minute on two cores, no download

    bytes → patches of 4 → global model → shifted to the next patch → local model → next byte

A byte is told of all patches before its own by the global model (`patch_expand` with shift 1), and
of the bytes before it in its patch by the local model, to which every patch is a document of its
own. Documents may have any length: a last patch that its document cuts short is ragged, not padded.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lst_kernels import PatchLayout, block_causal_attention, patch_expand, patch_pool

SIZE, WIDTH, HEADS = 4, 64, 4


class Block(nn.Module):
    """Causal attention among the units that share a document, and a feed-forward.

    Ranges of keys are made in every call; of more layers, `ranges=` lets all share one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, cu_units: Tensor, max_length: int) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).unflatten(1, (3, HEADS, -1)).unbind(1)
        x = x + self.mix(block_causal_attention(*qkv, cu_units, max_length=max_length).flatten(1))
        return x + self.feed(x)


class MegaByte(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, WIDTH), nn.Embedding(SIZE, WIDTH)
        self.to_patch = nn.Embedding(256 * SIZE, WIDTH)  # a byte's part of its patch, by its place
        self.patch_position = nn.Embedding(64, WIDTH)
        self.over_patches = nn.ModuleList(Block() for _ in range(2))
        self.within = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, layout: PatchLayout) -> Tensor:
        """(T,) bytes → (T, 256) logits of the byte after each."""
        place = layout.token_positions % SIZE
        # A patch's bytes side by side through one matrix, as a sum: it works for a short patch too.
        patches = patch_pool(self.to_patch(tokens + 256 * place), layout, "sum")
        patches = patches + self.patch_position(layout.patch_positions)
        for block in self.over_patches:
            patches = block(patches, layout.cu_documents, layout.max_document_patches)
        own = self.embed(tokens) + self.position(place)
        h = patch_expand(patches, layout, shift=1, residual=own)
        for block in self.within:
            h = block(h, layout.cu_patches, layout.max_patch_length)
        return self.head(h)


def documents(generator: torch.Generator) -> list[Tensor]:
    """Lines that count on from a random number: hard to guess at their start, easy from there."""
    lines = []
    for _ in range(16):
        first = int(torch.randint(100, (), generator=generator))
        count = 8 + int(torch.randint(8, (), generator=generator))
        line = " ".join(f"{(first + i) % 100:02d}" for i in range(count))
        lines.append(torch.tensor(list(line.encode())))
    return lines


def train(steps: int = 250) -> tuple[float, float]:
    """Mean loss in bits a byte of the first and of the last ten steps."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), MegaByte()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        lines = documents(generator)
        layout = PatchLayout.static([len(line) - 1 for line in lines], SIZE)
        logits = model(torch.cat([line[:-1] for line in lines]), layout)
        loss = F.cross_entropy(logits, torch.cat([line[1:] for line in lines]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        if step % 50 == 49:
            print(f"step {step + 1}: {losses[-1]:.2f} bits a byte in {layout.num_patches} patches")
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


if __name__ == "__main__":
    first, last = train()
    print(f"first steps {first:.2f}, last steps {last:.2f} bits a byte")
    assert last < first / 3, "the model did not learn"
