"""One vector per spoken word: the mean of its frames, with the gaps between words left out.

    python docs/examples/speech_segment_means.py          # under a minute on two cores, no download

    frames + aligned words (start, end) → layout with gaps → mean of each word → which word is it?

An aligner says where each word begins and ends, in frames; between words there are pauses that
belong to none. A layout covers every frame, so words and pauses are both patches of it, and `where`
says which patches are words. A dense way builds a (words, frames) mask for every utterance; here
each frame is read once. A word that was aligned to no frame is an empty patch: its mean is 0.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lst_kernels import PatchLayout, patch_expand, patch_pool

NUM_WORDS, FEATURES, WIDTH = 12, 16, 64


def layout_of(
    words: list[list[tuple[int, int]]], num_frames: list[int]
) -> tuple[PatchLayout, Tensor]:
    """The patches of a batch of utterances, and which of them are words, in order.

    ``words``: of each utterance, the first frame and the one past the last of every word.
    """
    lengths, per_utterance, where = [], [], []
    for spans, total in zip(words, num_frames, strict=True):
        at, before = 0, len(lengths)
        for start, stop in spans:
            lengths += [start - at, stop - start]  # a pause, perhaps of no frame, and a word
            where.append(len(lengths) - 1)
            at = stop
        lengths.append(total - at)
        per_utterance.append(len(lengths) - before)
    return PatchLayout.from_lengths(lengths, per_utterance), torch.tensor(where)


class WordClassifier(nn.Module):
    """Frames through a small network of their own, then one mean for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.per_frame = nn.Sequential(
            nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, NUM_WORDS)

    def forward(self, frames: Tensor, layout: PatchLayout, where: Tensor) -> Tensor:
        """(T, FEATURES) frames → (words, NUM_WORDS) logits."""
        return self.head(patch_pool(self.per_frame(frames), layout, "mean")[where])


def utterances(
    voices: Tensor, generator: torch.Generator
) -> tuple[Tensor, list[list[tuple[int, int]]], list[int], Tensor]:
    """Noisy frames, the words' spans, frames of each utterance, and what was said.

    A word is a sound of its own in loud noise, so that one frame says little; so is a pause, whose
    sound means nothing.
    """

    def below(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    frames, spans, totals, said = [], [], [], []
    for _ in range(8):
        at, own = 0, []
        for _ in range(6):
            pause, length, word = below(0, 6), below(4, 25), below(0, NUM_WORDS)
            frames += [
                voices[below(0, NUM_WORDS)].expand(pause, -1),
                voices[word].expand(length, -1),
            ]
            own.append((at + pause, at + pause + length))
            said.append(word)
            at += pause + length
        spans.append(own)
        totals.append(at)
    clean = torch.cat(frames)
    noise = 2.5 * torch.randn(clean.shape, generator=generator)
    return clean + noise, spans, totals, torch.tensor(said)


def train(steps: int = 150) -> tuple[float, float]:
    """Mean loss in bits a word of the first and of the last ten steps."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), WordClassifier()
    voices = torch.randn(NUM_WORDS, FEATURES, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        frames, spans, totals, said = utterances(voices, generator)
        layout, where = layout_of(spans, totals)
        logits = model(frames, layout, where)
        loss = F.cross_entropy(logits, said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        if step % 50 == 49:
            right = (logits.argmax(1) == said).float().mean()
            print(f"step {step + 1}: {losses[-1]:.2f} bits a word, {right:.0%} right")
    # What a word was taken for goes back to its frames the same way; a pause gets -1.
    guess = torch.full((layout.num_patches,), -1.0).index_copy(0, where, logits.argmax(1).float())
    per_frame = patch_expand(guess, layout)
    print("frames of the last utterance:", *map(int, per_frame[-totals[-1] :][:32].tolist()))
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


if __name__ == "__main__":
    first, last = train()
    print(f"first steps {first:.2f}, last steps {last:.2f} bits a word")
    assert last < first / 3, "the model did not learn"
