"""From a document to patches: what the global transformer sees as one.

    records -> interleave -> [patching] -> packing -> batch

Only speech is patched; a text token or a special is a patch of its own. A patch never crosses a
switch of modality, and every run of speech units starts anew. Ten units, one word at [2, 5) and
one at [6, 9), opened by ``<s>`` and closed by ``<eos>``:

    static, 4            <s> | 0 1 2 3 | 4 5 6 7 | 8 9 | <eos>
    aligned, separate    <s> | 0 1 | 2 3 4 | 5 | 6 7 8 | 9 | <eos>
    aligned, merged      <s> | 0 1 2 3 4 5 | 6 7 8 9 | <eos>

Patching is a pure function of the tokens, the aligned ranges held fixed (they are side information
from the aligner, known before the speech is read). A patch whose end nothing tells at its last
token, here each one that ``<eos>`` cuts short, is *closed late*: it may be read only from the
token after it, or the model would be told that the span ends.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lst.errors import UserError
from lst.vocabulary import Vocabulary

__all__ = [
    "Aligned",
    "NoPatching",
    "PatchingConfig",
    "Static",
    "Strategy",
    "final_strategy",
    "patch_lengths",
    "strategy_at",
]

Silence = Literal["separate", "merged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoPatching:
    """Every token is a patch: the token-level baseline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Static:
    """Patches of ``size`` units, counted from the start of each run; the last may be shorter."""

    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligned:
    """A patch for each aligned word, and for each silence ("separate"). "merged": a silence belongs
    to the word before it, or to the first word of the run."""

    silence: Silence = "separate"


Strategy = NoPatching | Static | Aligned


@dataclass(frozen=True, kw_only=True)
class PatchingConfig:
    """How speech is patched in the course of training.

    "curriculum" goes over from aligned to static patches: aligned up to the first fraction of the
    run, static from the second on, and drawn per document in between (paper, section 3.1).
    """

    strategy: Literal["none", "static", "aligned", "curriculum"] = "curriculum"
    size: int = 4  # units of a static patch
    silence: Silence = "separate"  # of aligned patches
    curriculum: tuple[float, float] = (1 / 3, 2 / 3)  # fractions of the run

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"patching: expected a size of at least 1 unit, got {self.size}")
        first, last = self.curriculum
        if not 0 <= first <= last <= 1:
            raise UserError(
                "patching: expected curriculum fractions 0 <= first <= last <= 1, "
                f"got {first} and {last}"
            )


def strategy_at(
    config: PatchingConfig, row: int, total_steps: int, rng: np.random.Generator
) -> Strategy:
    """The strategy of one document, drawn where the curriculum is between its two ends.

    Args:
        row: the training step, counted from 0.
        total_steps: of the whole run.
    """
    if config.strategy != "curriculum":
        return final_strategy(config)
    first, last = (fraction * total_steps for fraction in config.curriculum)
    if row < first:
        probability = 1.0
    elif row < last:
        probability = 1 - (row - first) / (last - first)
    else:
        probability = 0.0
    # Drawn even where it is certain: what else comes from rng must not depend on the step.
    if rng.random() < probability:
        return Aligned(silence=config.silence)
    return Static(size=config.size)


def final_strategy(config: PatchingConfig) -> Strategy:
    """The strategy at the end of training, with which a model is evaluated."""
    if config.strategy == "none":
        return NoPatching()
    if config.strategy == "aligned":
        return Aligned(silence=config.silence)
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
            :class:`Aligned` alone. Units in none of them are silence.
        breaks: positions in (0, T) where a patch starts whatever the strategy; a run of units is
            two runs there.

    Returns:
        lengths: (P,) int32, the tokens of each patch; their sum is T.
        closed_late: (P,) bool, True for a patch whose end is not known at its last token.
    """
    num_tokens = len(tokens)
    is_unit = vocabulary.is_unit(tokens)
    starts = np.ones(num_tokens, bool)
    starts[1:] = ~(is_unit[1:] & is_unit[:-1])
    starts[list(breaks)] = True
    if isinstance(strategy, Static):
        starts |= (np.arange(num_tokens) - _run_starts(starts)) % strategy.size == 0
        lengths = _lengths(starts)
        return lengths, is_unit[starts] & (lengths < strategy.size)
    if isinstance(strategy, Aligned):
        known = _known_ends(strategy.silence, aligned, is_unit, _run_starts(starts))
        starts |= known[:-1]
        lengths = _lengths(starts)
        return lengths, is_unit[starts] & ~known[np.cumsum(lengths)]
    return np.ones(num_tokens, np.int32), np.zeros(num_tokens, bool)


def _run_starts(starts: np.ndarray) -> np.ndarray:
    """(T,) the last start at or before each token."""
    return np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))


def _lengths(starts: np.ndarray) -> np.ndarray:
    return np.diff(np.flatnonzero(starts), append=len(starts)).astype(np.int32)


def _known_ends(
    silence: Silence, aligned: np.ndarray, is_unit: np.ndarray, run_starts: np.ndarray
) -> np.ndarray:
    """(T+1,) bool, True at i where the aligned ranges say that a patch ends before token i.

    Nothing here may depend on tokens from i on, so that this end is known at token i - 1.
    """
    known = np.zeros(len(is_unit) + 1, bool)
    if silence == "separate":
        known[aligned.ravel()] = True
        return known
    # A word's start ends the patch before it, but where only silence came before it in this run.
    starts, stops_before = aligned[1:, 0], aligned[:-1, 1]
    before = starts - 1
    known[starts] = is_unit[before] & (stops_before > run_starts[before])
    return known
