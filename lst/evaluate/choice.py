"""Which of several endings does a model find most probable?

Every ending of a question follows the same prompt in a document of its own. The score of an ending
is the log-probability of its tokens, markers and ``<eos>`` left out::

    sum            Σ log p(token | before)             as "acc" of most benchmarks
    per token      the same divided by the number of text pieces or 25 Hz speech units
    per character  the same divided by the characters of its text, as "acc_norm" of lm-eval
    whole mean     Σ over prompt and ending, divided by the tokens of both

A piece of a speech BPE counts as the units that it stands for, so that a model over such pieces is
measured on the same speech in the same way. Its ending is encoded apart from the prompt. Characters
are those of what is written, also where it is spoken: what is divided by does not depend on the
voice. Speech of which no text is known has no score per character.

In mode "S→S" prompt and ending are speech; in "T→T" both are text (paper, section 4.1). A question
counts as right when its true ending scores strictly highest; a tie among n best counts 1/n. Scores
tie within a hundred-thousandth: where a document lies in its stream moves them by rounding, so that
endings that are the same would else win by chance.

Documents lie end to end in one stream without padding, so there is nothing to gain from sorting
them. Of a prompt the log-probability is read once, before its first ending.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lst.data.batch import PlanConfig, pack_documents
from lst.data.interleave import Document, Mode, item_document
from lst.data.patching import PatchingConfig, final_strategy
from lst.data.records import Record
from lst.errors import UserError
from lst.evaluate.questions import Passage, Question
from lst.model import LanguageModel
from lst.vocabulary import Tokenizer, Vocabulary

__all__ = ["Likelihood", "Score", "choice_scores", "format_table", "likelihoods"]

TIE = 1e-5  # of a score; what float32 leaves of the same document elsewhere is some 1e-6
Z_95 = 1.959963984540054  # two-sided 95 % of the standard normal


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often a model picks the true ending."""

    task: str
    mode: str  # "S→S", "T→T", …: modality of prompt and ending
    measure: str  # of MEASURES
    num_items: int
    accuracy: float  # in [0, 1]
    low: float  # 95 % interval (Wilson)
    high: float
    chance: float  # mean of 1 / number of endings

    def __post_init__(self) -> None:
        shares = (self.accuracy, self.low, self.high, self.chance)
        if self.num_items < 1 or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"expected shares of one item or more, got {self}")


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one ending after its prompt: log-probabilities in nats, and what they are sums over."""

    ending: float
    tokens: int  # text pieces and speech units
    characters: int | None  # of the ending's text
    prompt: float = 0.0
    prompt_tokens: int = 0


MEASURES: dict[str, Callable[[Likelihood], float | None]] = {
    "sum": lambda of: of.ending,
    "per token": lambda of: of.ending / of.tokens,
    "per character": lambda of: None if of.characters is None else of.ending / of.characters,
    "whole mean": lambda of: (of.ending + of.prompt) / (of.tokens + of.prompt_tokens),
}


# From documents to log-probabilities --------------------------------------------------------------


def likelihoods(
    model: LanguageModel,
    questions: Sequence[Question],
    mode: Mode,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    plan: PlanConfig,
    *,
    patching: PatchingConfig,
    record_of: Callable[[Passage, bool], Record] = lambda passage, spoken: passage.record,
    device: torch.device | str = "cpu",
    tokens_per_batch: int = 16384,
) -> Iterator[list[Likelihood]]:
    """The likelihoods of every question's endings, question by question.

    Args:
        model: gives token losses for a batch.
        questions: that have what the mode needs.
        plan: the model's (``ModelConfig.plan``).
        patching: what the model was trained with; speech is in patches of its final strategy.
        record_of: ``(passage, whether it is spoken)`` → its record, then with units.
        tokens_per_batch: documents are packed up to about this many tokens; a question is never
            split.

    Raises:
        UserError: an ending of no token.
    """
    strategy = final_strategy(patching)

    def documents(question: Question) -> list[Document]:
        prompt = None
        if question.prompt is not None:
            prompt = record_of(question.prompt, mode[0] == "S")
        return [
            item_document(
                prompt,
                record_of(ending, mode[2] == "S"),
                mode,
                vocabulary,
                tokenizer,
                alignment=patching.alignment,
            )
            for ending in question.endings
        ]

    for group in _groups(((each, documents(each)) for each in questions), tokens_per_batch):
        # The first document of a question scores its prompt as well.
        whole = [
            document._replace(score_from=document.score_from if place else 0)
            for _, of_question in group
            for place, document in enumerate(of_question)
        ]
        batch = pack_documents(whole, vocabulary, strategy, plan)
        targets = batch.targets.numpy()
        sizes = np.where(vocabulary.is_special(targets), 0, vocabulary.num_frames(targets))
        sizes[vocabulary.is_piece(targets)] = 1
        with torch.no_grad():
            losses = model(batch.to(device)).double().cpu().numpy()
        losses[sizes == 0] = 0
        cuts = itertools.pairwise(batch.layout.cu_tokens.tolist())
        for question, of_question in group:
            yield [
                Likelihood(*scored)
                for scored in _read_question(question, of_question, cuts, losses, sizes)
            ]


def _read_question(
    question: Question,
    documents: Sequence[Document],
    cuts: Iterator[tuple[int, int]],
    losses: np.ndarray,
    sizes: np.ndarray,
) -> Iterator[tuple[float, int, int | None, float, int]]:
    """The fields of Likelihood for each ending, from (T,) losses and what each target counts as."""
    prompt, prompt_tokens = 0.0, 0
    for place, (document, passage) in enumerate(zip(documents, question.endings, strict=True)):
        start, stop = next(cuts)
        middle = start + document.score_from - 1  # here the ending's first token is predicted
        if place == 0:
            prompt = -float(losses[start:middle].sum())
            prompt_tokens = int(sizes[start:middle].sum())
        tokens = int(sizes[middle:stop].sum())
        if not tokens:
            raise UserError(
                f"question {question.id!r}: expected endings of at least one token, got "
                f"{passage.record.text!r}"
            )
        text = passage.record.text
        characters = None if text is None else len(text)
        yield -float(losses[middle:stop].sum()), tokens, characters, prompt, prompt_tokens


def _groups(
    questions: Iterator[tuple[Question, list[Document]]], size: int
) -> Iterator[list[tuple[Question, list[Document]]]]:
    group: list[tuple[Question, list[Document]]] = []
    tokens = 0
    for question, documents in questions:
        more = sum(len(document.tokens) for document in documents)
        if group and tokens + more > size:
            yield group
            group, tokens = [], 0
        group.append((question, documents))
        tokens += more
    if group:
        yield group


# From log-probabilities to accuracies -------------------------------------------------------------


def choice_scores(
    questions: Sequence[Question], answers: Sequence[Sequence[Likelihood]], mode: Mode
) -> list[Score]:
    """Accuracies by score and measure, in the order of the questions' scores.

    Args:
        answers: for each question the likelihoods of its endings.
    """
    names = dict.fromkeys(name for question in questions for name in question.scores)
    return [
        score
        for name in names
        for measure in MEASURES
        if (score := _score(name, mode, measure, questions, answers)) is not None
    ]


def _score(
    name: str,
    mode: Mode,
    measure: str,
    questions: Sequence[Question],
    answers: Sequence[Sequence[Likelihood]],
) -> Score | None:
    """One accuracy; None where a question has no such measure."""
    hits, chances = defaultdict(list), []
    for question, endings in zip(questions, answers, strict=True):
        if name not in question.scores:
            continue
        values = [value for ending in endings if (value := MEASURES[measure](ending)) is not None]
        if len(values) < len(endings):
            return None
        best = np.isclose(values, max(values), rtol=TIE, atol=0)
        hits[question.group].append(best[question.answer] / best.sum())
        chances.append(1 / len(values))
    accuracy = float(np.mean([np.mean(of_group) for of_group in hits.values()]))
    low, high = wilson_interval(accuracy, len(hits))
    return Score(
        task=name,
        mode=mode,
        measure=measure,
        num_items=len(hits),
        accuracy=accuracy,
        low=low,
        high=high,
        chance=float(np.mean(chances)),
    )


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
