"""What a model makes of a document: its patches, what each costs, how probable each token was.

    tokens (T,) → one packed pass → log p(token | before), patch by patch, with shares of compute

A document's patches in order, runs of speech apart from the rest::

    text    <bos> | <t> | ▁Once | ▁upon | ▁a | <s>
    speech  17 17 203 5 | 8 8 41 41 | 7 7              0.00–0.16 s | 0.16–0.32 s | 0.32–0.40 s
    text    <eos>
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import Document
from lst.data.patching import PatchingConfig, final_strategy
from lst.flops import forward_flops, patch_counts
from lst.generate.passes import NOTHING_ALIGNED
from lst.model import LanguageModel, ModelConfig
from lst.vocabulary import Tokenizer, Vocabulary

__all__ = ["Analysis", "Patch", "Run", "Token", "analyse"]

SPECIALS = ("<pad>", "<bos>", "<eos>", "<t>", "<s>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One id of the joint vocabulary.

    Attributes:
        position: in the document.
        label: a special's name, the text of a piece, or the numbers of the units it stands for.
        logprob: in nats, given all tokens before; None for the first.
    """

    position: int
    label: str
    logprob: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """What the global transformer sees as one.

    Attributes:
        number: in the document, from 0.
        frames: [start, stop) within its run of speech, 25 to the second; of text (0, 0).
        share: of the FLOPs of a forward pass over the document.
    """

    number: int
    kind: Literal["special", "text", "speech"]
    tokens: tuple[Token, ...]
    frames: tuple[int, int]
    share: float

    @property
    def logprob(self) -> float | None:
        """Mean of its tokens that have one."""
        known = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Patches of speech, or of anything else, one after the other.

    Attributes:
        units: (F,) int16, what is spoken; empty where nothing is.
    """

    is_speech: bool
    patches: tuple[Patch, ...]
    units: np.ndarray

    @property
    def tokens(self) -> tuple[Token, ...]:
        return tuple(token for patch in self.patches for token in patch.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """A document as the model sees it.

    Attributes:
        prompt: how many of the tokens were given.
        flops: of one forward pass over the document, as ``lst.flops`` counts them.
    """

    runs: tuple[Run, ...]
    prompt: int
    flops: float

    @property
    def patches(self) -> tuple[Patch, ...]:
        return tuple(patch for run in self.runs for patch in run.patches)

    @property
    def tokens(self) -> tuple[Token, ...]:
        return tuple(token for patch in self.patches for token in patch.tokens)


def analyse(
    tokens: np.ndarray,
    prompt: int,
    model: LanguageModel,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    config: ModelConfig,
    patching: PatchingConfig,
    *,
    device: torch.device | str = "cpu",
) -> Analysis:
    """Take a document apart.

    Args:
        tokens: (T,) int32 joint ids from ``<bos>`` on, T > 0.
        prompt: how many of them were given to the model; the others it chose.
        patching: what the model was trained with; speech is in patches of its final strategy.
    """
    document = Document(
        tokens=np.asarray(tokens, np.int32),
        aligned=NOTHING_ALIGNED,
        breaks=(),
        score_from=1,
        score_eos=True,
        record_id="",
    )
    batch = pack_documents([document], vocabulary, final_strategy(patching), config.plan())
    with torch.no_grad():
        losses = model(batch.to(device)).double().cpu().tolist()  # of each token's successor
    logprobs = [None, *(-loss for loss in losses[:-1])]
    flops = [sum(forward_flops(config, vocabulary, each).values()) for each in patch_counts(batch)]
    labels = token_labels(document.tokens, vocabulary, tokenizer)
    frames = np.concatenate(([0], np.cumsum(vocabulary.num_frames(document.tokens))))
    is_unit = vocabulary.is_unit(document.tokens)
    is_special = vocabulary.is_special(document.tokens)
    cuts = batch.layout.cu_patches.tolist()

    runs = []
    numbers = groupby(range(len(flops)), key=lambda number: bool(is_unit[cuts[number]]))
    for is_speech, group in numbers:
        members = list(group)
        first, last = cuts[members[0]], cuts[members[-1] + 1]
        patches = []
        for number in members:
            start, stop = cuts[number], cuts[number + 1]
            patches.append(
                Patch(
                    number=number,
                    kind="speech" if is_speech else "special" if is_special[start] else "text",
                    tokens=tuple(
                        Token(position=at, label=labels[at], logprob=logprobs[at])
                        for at in range(start, stop)
                    ),
                    frames=(int(frames[start] - frames[first]), int(frames[stop] - frames[first])),
                    share=flops[number] / sum(flops),
                )
            )
        units = vocabulary.decode_units(document.tokens[first : last if is_speech else first])
        runs.append(Run(is_speech=is_speech, patches=tuple(patches), units=units))
    return Analysis(runs=tuple(runs), prompt=prompt, flops=sum(flops))


def token_labels(
    tokens: np.ndarray, vocabulary: Vocabulary, tokenizer: Tokenizer
) -> tuple[str, ...]:
    """What each token stands for, (T,). A piece's blank is kept; of a character that is in several
    byte pieces the last has all of it, and the others have nothing."""
    kinds = np.where(vocabulary.is_unit(tokens), 2, np.where(vocabulary.is_special(tokens), 0, 1))
    labels: list[str] = []
    for kind, group in groupby(range(len(tokens)), key=lambda at: int(kinds[at])):
        ids = tokens[list(group)]
        if kind == 0:
            labels += [SPECIALS[id] for id in ids]
        elif kind == 1:
            labels += _piece_texts(vocabulary.id_to_piece(ids).tolist(), tokenizer)
        else:
            labels += [
                " ".join(map(str, vocabulary.decode_units(ids[at : at + 1])))
                for at in range(len(ids))
            ]
    return tuple(labels)


def _piece_texts(pieces: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each piece, read after another one: the first piece of a text loses its blank."""
    before = tokenizer.encode("a")
    known = len(tokenizer.decode(before))
    texts, start = [], 0
    for stop in range(1, len(pieces) + 1):
        text = tokenizer.decode([*before, *pieces[start:stop]])[known:]
        # At most four bytes are a character; what is none of UTF-8 is shown as it is decoded.
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and stop - start < 4
        texts.append("" if unfinished and stop < len(pieces) else text)
        if texts[-1]:
            start = stop
    return texts
