"""Story completion: which ending does the model find most probable after the prompt?

Every ending of an item follows the same prompt in a document of its own. The score of an ending is
the log-probability of its tokens, the prompt and ``<eos>`` left out::

    sum        Σ log p(token | before)                 as HellaSwag's "acc"
    per token  the same divided by the number of text pieces or 25 Hz speech units

A piece of a speech BPE counts as the units that it stands for, so that a model over such pieces is
measured on the same speech in the same way. Its ending is encoded apart from the prompt.

In mode "S→S" prompt and ending are speech; in "T→T" both are text (paper, section 4.1). An item
counts as right when its true ending scores strictly highest; a tie among n best counts 1/n.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lst.data.batch import PlanConfig, pack_documents
from lst.data.interleave import Document, Mode, item_document
from lst.data.patching import PatchingConfig, final_strategy
from lst.data.records import StoryItem
from lst.model import LanguageModel
from lst.vocabulary import Tokenizer, Vocabulary

TASKS = ("hellaswag", "storycloze", "topicstorycloze")
MEASURES = ("sum", "per token")
Z_95 = 1.959963984540054  # two-sided 95 % of the standard normal


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often a model picks the true ending."""

    task: str
    mode: str  # "S→S", "T→T", …: modality of prompt and ending
    measure: str  # "sum" or "per token"
    num_items: int
    accuracy: float  # in [0, 1]
    low: float  # 95 % interval (Wilson)
    high: float
    chance: float  # mean of 1 / number of endings


def story_completion(
    model: LanguageModel,
    items: Sequence[StoryItem],
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    plan: PlanConfig,
    *,
    patching: PatchingConfig,
    modes: Sequence[Mode] = ("S→S", "T→T"),
    device: torch.device | str = "cpu",
    tokens_per_batch: int = 16384,
) -> list[Score]:
    """Score ``items`` in every mode.

    Args:
        model: gives token losses for a batch.
        items: prompts with endings; one without units is left out of the modes that need speech.
        patching: what the model was trained with; speech is in patches of its final strategy.
        plan: the model's (``ModelConfig.plan``).
        tokens_per_batch: documents are packed up to about this many tokens.

    Returns:
        One score for every task, mode and measure that has items, in that order.
    """
    strategy = final_strategy(patching)
    scores = []
    for mode in modes:
        spoken = "S" in mode
        chosen = [item for item in items if not spoken or item.prompt.units is not None]
        documents = (
            item_document(
                item.prompt, ending, mode, vocabulary, tokenizer, alignment=patching.alignment
            )
            for item in chosen
            for ending in item.endings
        )
        sums: list[float] = []
        counts: list[int] = []
        for group in _groups(documents, tokens_per_batch):
            batch = pack_documents(group, vocabulary, strategy, plan)
            targets = batch.targets.numpy()
            sizes = np.maximum(vocabulary.num_frames(targets), 1) * (targets >= 0)
            with torch.no_grad():
                losses = model(batch.to(device)).double().cpu()
            cuts = batch.layout.cu_tokens.tolist()
            for start, stop in itertools.pairwise(cuts):
                sums.append(-float(losses[start:stop].sum()))
                counts.append(int(sizes[start:stop].sum()))
        scores += _scores(chosen, mode, np.array(sums), np.array(counts))
    order = {task: place for place, task in enumerate(TASKS)}
    return sorted(scores, key=lambda score: order.get(score.task, len(order)))


def _groups(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    tokens = 0
    for document in documents:
        if group and tokens + len(document.tokens) > size:
            yield group
            group, tokens = [], 0
        group.append(document)
        tokens += len(document.tokens)
    if group:
        yield group


def _scores(
    items: Sequence[StoryItem], mode: str, sums: np.ndarray, counts: np.ndarray
) -> list[Score]:
    """Accuracy by task from the endings' log-probabilities, laid end to end over the items."""
    stops = np.cumsum([len(item.endings) for item in items])
    scores = []
    for task in sorted({item.task for item in items}):
        for measure, values in zip(MEASURES, (sums, sums / counts), strict=True):
            hits, chances = [], []
            for item, stop in zip(items, stops, strict=True):
                if item.task != task:
                    continue
                endings = values[stop - len(item.endings) : stop]
                best = endings == endings.max()
                hits.append(best[item.answer] / best.sum())
                chances.append(1 / len(endings))
            accuracy = float(np.mean(hits))
            low, high = wilson_interval(accuracy, len(hits))
            scores.append(
                Score(
                    task=task,
                    mode=mode,
                    measure=measure,
                    num_items=len(hits),
                    accuracy=accuracy,
                    low=low,
                    high=high,
                    chance=float(np.mean(chances)),
                )
            )
    return scores


def wilson_interval(share: float, number: int) -> tuple[float, float]:
    """95 % interval of a proportion seen in ``number`` trials (Wilson 1927)."""
    z2 = Z_95**2
    centre = (share + z2 / (2 * number)) / (1 + z2 / number)
    half = Z_95 * (share * (1 - share) / number + z2 / (4 * number**2)) ** 0.5 / (1 + z2 / number)
    return max(0.0, centre - half), min(1.0, centre + half)


def format_table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table, in per cent."""
    lines = [
        "| task | mode | score | items | accuracy % | 95 % interval | chance % |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {s.task} | {s.mode} | {s.measure} | {s.num_items} | {100 * s.accuracy:.1f} "
        f"| {100 * s.low:.1f} – {100 * s.high:.1f} | {100 * s.chance:.1f} |"
        for s in scores
    ]
    return "\n".join(lines)
