"""Story completion: which ending follows from a story's first sentences?

The items are those of a corpus of our own; :mod:`lst.evaluate.choice` says how they are scored.
"""

from collections.abc import Sequence

import torch

from lst.data.batch import PlanConfig
from lst.data.interleave import Mode
from lst.data.patching import PatchingConfig
from lst.data.records import StoryItem
from lst.evaluate.choice import Score, choice_scores, likelihoods
from lst.evaluate.questions import has_sides, of_items
from lst.model import LanguageModel
from lst.vocabulary import Tokenizer, Vocabulary


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
    scores = []
    for mode in modes:
        questions = [each for each in of_items(items) if has_sides(each, mode)]
        answers = likelihoods(
            model,
            questions,
            mode,
            vocabulary,
            tokenizer,
            plan,
            patching=patching,
            device=device,
            tokens_per_batch=tokens_per_batch,
        )
        scores += choice_scores(questions, list(answers), mode)
    return sorted(scores, key=lambda score: score.task)
