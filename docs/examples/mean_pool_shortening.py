"""Shortening by the mean of each group: a layer that makes the middle of a model cheap.

    python docs/examples/mean_pool_shortening.py          # under a minute on two cores, no download

    tokens → groups that end at spaces → mean → layers over groups → shifted back to tokens

Models with dynamic pooling build a matrix of weights with a row for each group and a column for
each token, and multiply with it. Here the groups are a `PatchLayout`, the two products `patch_pool`
and `patch_expand`, and the cost is that of reading the tokens once. A group ends at a space, so its
end is known at its last token, which may read it; tokens before the first end get a learnt vector.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lst_kernels import PatchLayout, block_causal_attention, patch_expand, patch_pool

WIDTH, HEADS, SPACE = 48, 4, ord(" ")
NAMES = ("anna", "boris", "clara", "david", "erik", "frida")


def group(documents: list[Tensor]) -> PatchLayout:
    """Each group ends at a space; the last of a document, which may lack it, is closed late."""
    lengths, per_document, late = [], [], []
    for document in documents:
        ends = (document == SPACE).nonzero().flatten().tolist()
        whole = bool(ends) and ends[-1] == len(document) - 1
        ends = ends if whole else [*ends, len(document) - 1]
        lengths += [b - a for a, b in zip([-1, *ends], ends, strict=False)]
        per_document.append(len(ends))
        late += [False] * (len(ends) - 1) + [not whole]
    return PatchLayout.from_lengths(lengths, per_document, closed_late=late)


class Shortened(nn.Module):
    """A layer over the means of groups, and its result for every token, shifted by one group."""

    def __init__(self) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.zeros(WIDTH))
        self.norm, self.to_qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, layout: PatchLayout) -> Tensor:
        means = patch_pool(x, layout, "mean")
        qkv = self.to_qkv(self.norm(means)).unflatten(1, (3, HEADS, -1)).unbind(1)
        read = block_causal_attention(
            *qkv, layout.cu_documents, max_length=layout.max_document_patches
        )
        means = means + self.mix(read.flatten(1))
        means = means + self.feed(means)
        unread = (layout.readable_ids < 0)[:, None]
        return patch_expand(means, layout, shift=1, residual=x + unread * self.null)


class Model(nn.Module):
    """Tokens know their last three neighbours; all that is farther comes through the groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(256, WIDTH) for _ in range(3))
        self.shortened = Shortened()
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, documents: list[Tensor], layout: PatchLayout) -> Tensor:
        near = [
            torch.cat([F.pad(document, (back, 0))[: len(document)] for document in documents])
            for back in range(3)
        ]
        x = sum(embed(tokens) for embed, tokens in zip(self.embed, near, strict=True))
        return self.head(self.shortened(x, layout))


def sentences(generator: torch.Generator) -> list[Tensor]:
    """Two names that greet each other in turn: the next name is the one two words before."""
    made = []
    for _ in range(24):
        a, b = torch.randperm(len(NAMES), generator=generator)[:2].tolist()
        turns = 4 + int(torch.randint(3, (), generator=generator))
        words = [NAMES[a], NAMES[b]] * turns
        made.append(torch.tensor(list(" ".join(words).encode())))
    return made


def train(steps: int = 200) -> tuple[float, float]:
    """Mean loss in bits a byte of the first and of the last ten steps."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        documents = sentences(generator)
        inputs = [document[:-1] for document in documents]
        layout = group(inputs)
        targets = torch.cat([document[1:] for document in documents])
        loss = F.cross_entropy(model(inputs, layout), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        if step % 50 == 49:
            shorter = layout.num_tokens / layout.num_patches
            print(f"step {step + 1}: {losses[-1]:.2f} bits a byte, {shorter:.1f} times shorter")
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


if __name__ == "__main__":
    first, last = train()
    print(f"first steps {first:.2f}, last steps {last:.2f} bits a byte")
    assert last < first / 3, "the model did not learn"
