"""From a document to patches: what the global transformer sees as one.

    records -> interleave -> [patching] -> packing -> batch

Only speech is patched; a text token or a special is a patch of its own. A patch never crosses a
switch of modality, and every run of speech units starts anew. Ten units, one word at [2, 5) and
one at [6, 9), opened by ``<s>`` and closed by ``<eos>``:

    static, 4            <s> | 0 1 2 3 | 4 5 6 7 | 8 9 | <eos>
    aligned, separate    <s> | 0 1 | 2 3 4 | 5 | 6 7 8 | 9 | <eos>
    aligned, merged      <s> | 0 1 2 3 4 5 | 6 7 8 9 | <eos>
    merged, at most 4    <s> | 0 1 2 3 | 4 5 | 6 7 8 9 | <eos>

"mixed" and "curriculum" draw static or aligned patches for each document. For the token-level
baselines, "none" and "speech-bpe", every token is a patch.

Patching is a pure function of the tokens, the aligned ranges held fixed (they are side information
from the aligner, known before the speech is read). A patch whose end nothing tells at its last
token, here each one that ``<eos>`` cuts short, is *closed late*: it may be read only from the
token after it, or the model would be told that the span ends.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lst.data.alignment import Alignment
from lst.errors import UserError, expect_not_negative, expect_positive
from lst.vocabulary import Vocabulary

__all__ = [
    "Aligned",
    "NoPatching",
    "PatchingConfig",
    "Static",
    "Strategy",
    "aligned_probability",
    "final_strategy",
    "patch_lengths",
    "strategy_at",
]

Silence = Literal["separate", "merged"]

OPTIONS = "data.patching."  # how the names of those of training begin
MIXED = 0.5  # probability of aligned patches in "mixed"; the paper names none


@dataclass(frozen=True, kw_only=True, slots=True)
class NoPatching:
    """Every token is a patch: the token-level baselines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Static:
    """Patches of ``size`` units, counted from the start of each run; the last may be shorter."""

    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligned:
    """A patch for each aligned word or piece, and for each silence ("separate"). "merged": a
    silence belongs to the word before it, or to the first word of the run.

    Attributes:
        max_length: a longer patch is cut, from its start, into patches of so many units.
        size: units of a patch in a document in which nothing is aligned, as of :class:`Static`.
    """

    silence: Silence = "separate"
    max_length: int | None = None
    size: int = 4


Strategy = NoPatching | Static | Aligned


@dataclass(frozen=True, kw_only=True)
class PatchingConfig:
    """How speech is patched in the course of training (paper, sections 3.1 and 4.2).

    "mixed" draws static or aligned patches for each document, with equal probability. "curriculum"
    goes from aligned to static patches: aligned up to the first fraction of the run, static from
    the second on, drawn per document in between. Models of both are evaluated with static patches.
    "speech-bpe" replaces speech units by pieces of several units, for a token-level model.
    """

    strategy: Literal["none", "static", "aligned", "mixed", "curriculum", "speech-bpe"] = (
        "curriculum"
    )
    size: int = 4  # units of a static patch
    aligned_by: Literal["words", "pieces"] = "words"  # what aligned patches follow
    silence: Silence = "separate"  # a patch of its own, or merged with the word before it
    max_patch_length: int | None = None  # longer aligned patches are cut; in units; None: no limit
    boundary_noise_ms: float = 0.0  # move aligned boundaries at random by up to so much
    curriculum: tuple[float, float] = (1 / 3, 2 / 3)  # fractions of the run: τ₁, τ₂

    def __post_init__(self) -> None:
        expect_positive(self, "size", "max_patch_length", within=OPTIONS)
        expect_not_negative(self, "boundary_noise_ms", within=OPTIONS)
        if self.strategy not in ("aligned", "mixed", "curriculum"):
            for name in ("max_patch_length", "boundary_noise_ms"):
                if getattr(self, name):
                    raise UserError(
                        f"patching: {name} is of aligned patches, which the strategy "
                        f"{self.strategy!r} does not make"
                    )
        first, last = self.curriculum
        if not 0 <= first <= last <= 1:
            raise UserError(
                "patching: expected curriculum fractions 0 <= first <= last <= 1, "
                f"got {first} and {last}"
            )

    @property
    def alignment(self) -> Alignment:
        return Alignment(by=self.aligned_by, noise_ms=self.boundary_noise_ms)

    @property
    def aligned(self) -> Aligned:
        return Aligned(silence=self.silence, max_length=self.max_patch_length, size=self.size)


def strategy_at(
    config: PatchingConfig, row: int, total_steps: int, rng: np.random.Generator
) -> Strategy:
    """The strategy of one document, drawn where the configuration leaves a choice.

    Args:
        row: the training step that reads the document's first token, counted from 0. It is all
            that the curriculum knows of time, so that neither a loader that is ahead of training
            nor a resumed run shifts it.
        total_steps: of the whole run.
    """
    if config.strategy not in ("mixed", "curriculum"):
        return final_strategy(config)
    probability = MIXED
    if config.strategy == "curriculum":
        probability = aligned_probability(config, row, total_steps)
    # Drawn even where it is certain: what else comes from rng must not depend on the step.
    if rng.random() < probability:
        return config.aligned
    return Static(size=config.size)


def aligned_probability(config: PatchingConfig, row: int, total_steps: int) -> float:
    """P(u) of the paper's curriculum, at step u = ``row``."""
    first, last = (fraction * total_steps for fraction in config.curriculum)
    if row < first:
        return 1.0
    if row < last:
        return 1 - (row - first) / (last - first)
    return 0.0


def final_strategy(config: PatchingConfig) -> Strategy:
    """The strategy with which a model is validated and evaluated: its last, and of the two that
    "mixed" draws from the static one, which needs no aligner (paper, section 5)."""
    if config.strategy in ("none", "speech-bpe"):
        return NoPatching()
    if config.strategy == "aligned":
        return config.aligned
    return Static(size=config.size)


def patch_lengths(
    tokens: np.ndarray,
    vocabulary: Vocabulary,
    strategy: Strategy,
    *,
    aligned: np.ndarray,
    breaks: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one document into patches.

    Args:
        tokens: (T,) integer joint ids, T > 0.
        aligned: (A, 2) non-empty half-open token ranges, in order and disjoint; read by
            :class:`Aligned` alone. Units in none of them are silence. Where there is none at all,
            patches are static: without an aligner, all of the speech would be one silence.
        breaks: positions in (0, T) where a patch starts whatever the strategy; a run of units is
            two runs there.

    Returns:
        lengths: (P,) int32, the tokens of each patch; their sum is T.
        closed_late: (P,) bool, True for a patch whose end is not known at its last token.
    """
    num_tokens = len(tokens)
    if isinstance(strategy, NoPatching) or not (is_unit := vocabulary.is_unit(tokens)).any():
        return np.ones(num_tokens, np.int32), np.zeros(num_tokens, bool)
    starts = np.ones(num_tokens + 1, bool)  # at T: of what comes after the document
    starts[1:-1] = ~(is_unit[1:] & is_unit[:-1])
    for position in breaks:
        starts[position] = True
    if isinstance(strategy, Aligned) and len(aligned):
        longest = strategy.max_length
        known = _known_ends(strategy.silence, aligned, is_unit, starts)
        starts |= known
    else:
        longest = strategy.size
        known = np.zeros(num_tokens + 1, bool)
    if longest is not None:
        starts[:-1] |= (np.arange(num_tokens) - _run_starts(starts)) % longest == 0
    (edges,) = starts.nonzero()
    firsts = edges[:-1]
    lengths = (edges[1:] - firsts).astype(np.int32)
    is_known = known[edges[1:]]  # or else a patch ends when it is as long as one can be
    if longest is not None:
        is_known |= lengths == longest
    return lengths, is_unit[firsts] & ~is_known


def _run_starts(starts: np.ndarray) -> np.ndarray:
    """(T,) the last start at or before each token, of (T+1,) starts; the first token is one."""
    return np.maximum.accumulate(np.arange(len(starts) - 1) * starts[:-1])


def _known_ends(
    silence: Silence, aligned: np.ndarray, is_unit: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """(T+1,) bool, True at i where the aligned ranges say that a patch ends before token i.

    Nothing here may depend on tokens from i on, so that this end is known at token i - 1.
    """
    known = np.zeros(len(is_unit) + 1, bool)
    if silence == "separate":
        known[aligned.ravel()] = True
        return known
    # A word's start ends the patch before it, but where only silence came before it in this run.
    word_starts, stops_before = aligned[1:, 0], aligned[:-1, 1]
    before = word_starts - 1
    known[word_starts] = is_unit[before] & (stops_before > _run_starts(starts)[before])
    return known
