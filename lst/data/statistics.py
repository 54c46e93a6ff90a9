"""How long patches are, and how many of them an hour of speech makes, by strategy.

    words or pieces   patches in which one is spoken; "merged": with its silence
    silences          patches in which none is
    all               mean of all patches = 25 Hz units per position of the global transformer
    units per hour    positions of the global transformer for an hour of speech; token by token
                      they are 90,000, and that divided by them is the compression, again ``all``

The speech of each record is looked at whole, as a document of its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lst.data.alignment import aligned_spans, pieces_are_estimated, with_noise
from lst.data.interleave import stable_rng
from lst.data.patching import Aligned, PatchingConfig, patch_lengths, strategy_at
from lst.data.records import FRAMES_PER_SECOND, Record
from lst.speech_bpe import SpeechBPE
from lst.vocabulary import Tokenizer, Vocabulary

__all__ = [
    "PatchStatistics",
    "describe_patching",
    "format_table",
    "patch_statistics",
    "usual_strategies",
]

UNITS_PER_HOUR = 3600 * FRAMES_PER_SECOND  # of the codebook
# Mean lengths in the paper (Tables 6 and 8): of words or pieces, and of silences beside them.
PAPER = {
    ("words", "separate"): "5.8 and 3.7",
    ("words", "merged"): "9.4",
    ("pieces", "separate"): "5.0 and 3.7",
}


@dataclass(frozen=True, kw_only=True)
class PatchStatistics:
    """Patches of speech, and the 25 Hz units in them.

    Attributes:
        text_patches, text_units: those in which an aligned word or piece is spoken.
        silence_patches, silence_units: those of an aligned document in which none is.
        num_unaligned: records without aligned words, patched statically for want of them.
        num_estimated: records whose pieces are split in proportion, for want of characters.
    """

    patching: PatchingConfig
    num_records: int = 0
    num_patches: int = 0
    num_units: int = 0
    text_patches: int = 0
    text_units: int = 0
    silence_patches: int = 0
    silence_units: int = 0
    num_unaligned: int = 0
    num_estimated: int = 0

    def __add__(self, other: "PatchStatistics") -> "PatchStatistics":
        names = [name for name in vars(self) if name != "patching"]
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def compression(self) -> float:
        """Units per patch."""
        return self.num_units / self.num_patches

    @property
    def patches_per_hour(self) -> float:
        return UNITS_PER_HOUR / self.compression


def usual_strategies(
    *,
    sizes: Sequence[int] = (4, 6, 9),
    max_patch_length: int | None = None,
    boundary_noise_ms: float = 0.0,
    pieces: bool = True,
    speech_bpe: bool = False,
) -> list[PatchingConfig]:
    """Those of the paper's tables: static of every size, aligned and mixed ones, the baselines.

    A curriculum goes over from the aligned patches to the static ones of the first size.

    Args:
        pieces: a tokenizer is there to align its pieces.
        speech_bpe: the corpus has one.
    """
    aligned = [
        PatchingConfig(
            strategy="aligned",
            size=sizes[0],
            aligned_by="pieces" if by_pieces else "words",
            silence="merged" if merged else "separate",
            max_patch_length=max_patch_length,
            boundary_noise_ms=boundary_noise_ms,
        )
        for by_pieces in (False, True)[: 1 + pieces]
        for merged in (False, True)
    ]
    return [
        PatchingConfig(strategy="none"),
        *([PatchingConfig(strategy="speech-bpe")] if speech_bpe else []),
        *(PatchingConfig(strategy="static", size=size) for size in sizes),
        *aligned,
        replace(aligned[0], strategy="mixed"),
    ]


def patch_statistics(
    records: Iterable[Record],
    num_units: int,
    tokenizer: Tokenizer | None,
    strategies: Sequence[PatchingConfig],
    *,
    speech_bpe: SpeechBPE | None = None,
) -> list[PatchStatistics]:
    """Count the patches of the records that have units, by every strategy.

    Args:
        num_units: of the codebook.
        tokenizer: whose pieces are aligned; None where no strategy needs one.
        strategies: a curriculum counts as at its first step, where it is aligned.
        speech_bpe: for the strategy of that name.

    Returns:
        As many as strategies; without records of speech, counts of 0.
    """
    totals = [PatchStatistics(patching=patching) for patching in strategies]
    plain = Vocabulary(num_pieces=0, num_units=num_units)  # text has no part in this
    pieces = replace(plain, speech_bpe=speech_bpe)
    for record in records:
        if record.units is None or not len(record.units):
            continue
        for place, patching in enumerate(strategies):
            vocabulary = pieces if patching.strategy == "speech-bpe" else plain
            totals[place] += _statistics(record, vocabulary, tokenizer, patching)
    return totals


def _statistics(
    record: Record, vocabulary: Vocabulary, tokenizer: Tokenizer | None, patching: PatchingConfig
) -> PatchStatistics:
    assert record.units is not None
    tokens = vocabulary.encode_units(record.units)
    rng = stable_rng("statistics", record.id)
    strategy = strategy_at(patching, 0, 1, rng)
    spans = np.zeros((0, 2), np.int32)
    if isinstance(strategy, Aligned):
        spans = aligned_spans(record, tokenizer, patching.alignment)
        spans = with_noise(spans, len(tokens), patching.boundary_noise_ms, rng)
    lengths, _ = patch_lengths(tokens, vocabulary, strategy, aligned=spans)
    firsts = np.cumsum(lengths) - lengths
    units = np.add.reduceat(vocabulary.num_frames(tokens), firsts)
    counts = PatchStatistics(
        patching=patching,
        num_records=1,
        num_patches=len(lengths),
        num_units=len(record.units),
    )
    if not isinstance(strategy, Aligned):
        return counts
    if not len(spans):
        return replace(counts, num_unaligned=1)
    edges = np.zeros(len(tokens) + 1, np.int32)
    edges[spans[:, 0]] += 1
    edges[spans[:, 1]] -= 1
    is_spoken = np.maximum.reduceat(np.cumsum(edges)[:-1], firsts) > 0
    return replace(
        counts,
        text_patches=int(is_spoken.sum()),
        text_units=int(units[is_spoken].sum()),
        silence_patches=int((~is_spoken).sum()),
        silence_units=int(units[~is_spoken].sum()),
        num_estimated=int(patching.aligned_by == "pieces" and pieces_are_estimated(record)),
    )


def describe_patching(patching: PatchingConfig) -> str:
    """A strategy with its options, in a few words."""
    if patching.strategy == "none":
        return "none (token by token)"
    if patching.strategy == "speech-bpe":
        return "speech BPE"
    if patching.strategy == "static":
        return f"static, {patching.size}"
    words = [f"aligned by {patching.aligned_by}, silence {patching.silence}"]
    if patching.max_patch_length is not None:
        words.append(f"at most {patching.max_patch_length}")
    if patching.boundary_noise_ms:
        words.append(f"± {patching.boundary_noise_ms:g} ms")
    if patching.strategy != "aligned":
        words = [f"{patching.strategy}: static, {patching.size}, or {', '.join(words)}"]
    return ", ".join(words)


def format_table(statistics: Sequence[PatchStatistics]) -> str:
    """A Markdown table, the paper's lengths beside those that it tells, and what to know of it."""
    lines = [
        "| patching | words or pieces | silences | all = compression | units per hour | paper |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for each in statistics:
        patching = each.patching
        told = PAPER.get((patching.aligned_by, patching.silence), "")
        lines.append(
            f"| {describe_patching(patching)} | {_mean(each.text_units, each.text_patches)} "
            f"| {_mean(each.silence_units, each.silence_patches)} "
            f"| {each.compression:.2f} | {each.patches_per_hour:,.0f} "
            f"| {told if patching.strategy == 'aligned' else ''} |"
        )
    unaligned = max(each.num_unaligned for each in statistics)
    estimated = max(each.num_estimated for each in statistics)
    records = max(each.num_records for each in statistics)
    lines += ["", f"Mean lengths in units of 40 ms, over {records:,} records with speech."]
    if unaligned:
        lines.append(f"{unaligned:,} of them have no aligned words: their patches are static.")
    if estimated:
        lines.append(
            f"Pieces of {estimated:,} of them are estimated: without aligned characters, words are "
            "split in proportion to the letters of their pieces."
        )
    return "\n".join(lines)


def _mean(units: int, patches: int) -> str:
    return f"{units / patches:.2f}" if patches else "–"
