"""How far transcriptions are from what was said: word and character error rates.

    error rate = (substitutions + deletions + insertions) / words, or characters, of the references

counted along the alignment with the fewest errors (jiwer), over all utterances together, after both
sides were normalised. Insertions can make it more than 1. The interval is that of a bootstrap over
utterances (M. Bisani and H. Ney, Bootstrap estimates for confidence intervals in ASR performance
evaluation, ICASSP 2004).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lst.errors import UserError

__all__ = ["ErrorRate", "Normaliser", "error_rates", "format_error_rates", "normaliser"]

# english, basic: those of Whisper (A. Radford et al. 2022, appendix C), which take out case,
# punctuation and, of English, what is only another way to write the same; none: as it is.
Normaliser = Literal["english", "basic", "none"]
DRAWS = 1000  # of the bootstrap
KINDS = ("substitute", "delete", "insert")


@dataclass(frozen=True, kw_only=True)
class ErrorRate:
    """Errors in all utterances together."""

    measure: Literal["WER", "CER"]
    rate: float
    low: float  # 95 % interval
    high: float
    substitutions: int
    deletions: int
    insertions: int
    reference_length: int  # words or characters
    num_utterances: int


def normaliser(name: Normaliser) -> Callable[[str], str]:
    """What is done to a reference and a hypothesis alike before they are compared.

    Raises:
        UserError: whisper-normalizer is not installed.
    """
    if name == "none":
        return str
    try:
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise _missing("whisper-normalizer") from None
    made: Any = EnglishTextNormalizer() if name == "english" else BasicTextNormalizer()
    return lambda text: str(made(text)).strip()


def error_rates(
    references: Sequence[str], hypotheses: Sequence[str], *, normalise: Callable[[str], str]
) -> tuple[ErrorRate, ErrorRate]:
    """WER and CER of one hypothesis for each reference. An empty one is that nothing was said.

    Raises:
        UserError: jiwer is not installed; nothing is left of any reference.
    """
    try:
        import jiwer
    except ImportError:
        raise _missing("jiwer") from None
    ours = [normalise(text) for text in references]
    theirs = [normalise(text) for text in hypotheses]
    if not any(text.split() for text in ours):
        raise UserError(
            f"expected references with words, got none in {len(ours)} after normalisation"
        )
    words = jiwer.process_words(ours, theirs)
    characters = jiwer.process_characters(ours, theirs)
    return _rate("WER", words), _rate("CER", characters)


def _missing(package: str) -> UserError:
    return UserError(f"{package} is needed for error rates: pip install 'lst[speech]'")


def _rate(measure: Literal["WER", "CER"], found: Any) -> ErrorRate:
    lengths = np.array([len(reference) for reference in found.references])
    counts = np.array([_counts(alignment) for alignment in found.alignments])  # (N, 3)
    errors = counts.sum(1)
    drawn = np.random.default_rng(0).integers(len(errors), size=(DRAWS, len(errors)))
    rates = errors[drawn].sum(1) / np.maximum(lengths[drawn].sum(1), 1)
    low, high = np.quantile(rates, (0.025, 0.975))
    substitutions, deletions, insertions = counts.sum(0).tolist()
    return ErrorRate(
        measure=measure,
        rate=float(errors.sum() / lengths.sum()),
        low=float(low),
        high=float(high),
        substitutions=substitutions,
        deletions=deletions,
        insertions=insertions,
        reference_length=int(lengths.sum()),
        num_utterances=len(errors),
    )


def _counts(alignment: Sequence[Any]) -> list[int]:
    """Substitutions, deletions and insertions of one utterance."""
    counts = dict.fromkeys(KINDS, 0)
    for chunk in alignment:
        if chunk.type in counts:
            spans = (
                chunk.ref_end_idx - chunk.ref_start_idx,
                chunk.hyp_end_idx - chunk.hyp_start_idx,
            )
            counts[chunk.type] += max(spans)
    return list(counts.values())


def format_error_rates(rates: Sequence[ErrorRate]) -> str:
    """As a Markdown table, in per cent."""
    lines = [
        "| measure | % | 95 % interval | substituted | deleted | inserted | of | utterances |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.measure} | {100 * r.rate:.1f} | {100 * r.low:.1f} – {100 * r.high:.1f} "
        f"| {r.substitutions:,} | {r.deletions:,} | {r.insertions:,} | {r.reference_length:,} "
        f"| {r.num_utterances:,} |"
        for r in rates
    ]
    return "\n".join(lines)
