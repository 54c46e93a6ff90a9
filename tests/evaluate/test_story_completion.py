"""The score of an ending is the log-probability of its own tokens, however items are batched."""

import numpy as np
import pytest
import torch
from torch import nn

from lst.data.batch import PlanConfig
from lst.data.patching import PatchingConfig
from lst.data.records import Record, StoryItem
from lst.evaluate import format_table, story_completion
from lst.evaluate.choice import MEASURES, wilson_interval
from lst.speech_bpe import train_speech_bpe
from lst.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_pieces=26, num_units=20)
PLAN = PlanConfig(slots=2, local_window=8, decoder_window=4)


class Letters:
    """A tokenizer of one piece a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text.replace(" ", "")]


class Priced(nn.Module):
    """Says that the loss of a token is its price, whatever came before."""

    def __init__(self, prices: dict[int, float], vocabulary: Vocabulary = VOCABULARY) -> None:
        super().__init__()
        self.prices = torch.ones(vocabulary.size, dtype=torch.float64)
        for token, price in prices.items():
            self.prices[token] = price

    def forward(self, batch):
        losses = self.prices[batch.targets.clamp(min=0)]
        return losses.masked_fill(batch.targets < 0, 0).float()


def record(text: str, units: list[int] | None = None) -> Record:
    return Record(
        id=text,
        text=text,
        units=None if units is None else np.array(units, np.int16),
        words=None,
        chars=None,
        speaker=None,
        source="test",
    )


def item(prompt: str, endings: list[str], answer: int, task: str = "storycloze") -> StoryItem:
    def spoken(text: str) -> Record:
        return record(text, [(ord(letter) - ord("a")) % 20 for letter in text])

    return StoryItem(
        id=prompt,
        task=task,
        prompt=spoken(prompt),
        endings=tuple(spoken(ending) for ending in endings),
        answer=answer,
    )


def scores(model, items, **options):
    found = story_completion(
        model,
        items,
        VOCABULARY,
        Letters(),
        PLAN,
        patching=PatchingConfig(strategy="static", size=3),
        **options,
    )
    return {(s.task, s.mode, s.measure): s for s in found}


def letter(name: str) -> int:
    return VOCABULARY.first_piece + ord(name) - ord("a")


def test_the_cheaper_ending_wins_and_the_measures_differ_where_lengths_do():
    items = [item("abc", ["dd", "eee"], 0)]  # sum: 2·1 < 3·0.8; per token: 1 > 0.8
    found = scores(Priced({letter("e"): 0.8}), items, modes=("T→T",))
    assert found["storycloze", "T→T", "sum"].accuracy == 1
    assert found["storycloze", "T→T", "per token"].accuracy == 0


def test_the_prompt_and_eos_are_not_counted():
    items = [item("aaaa", ["b", "c"], 1)]
    model = Priced({letter("a"): 1e6, letter("b"): 2.0, 2: 1e6})
    assert scores(model, items, modes=("T→T",))["storycloze", "T→T", "sum"].accuracy == 1


def test_speech_is_scored_by_its_units():
    items = [item("abc", ["de", "fg"], 1)]
    model = Priced({VOCABULARY.unit_to_id(3): 9.0})  # the unit that stands for "d"
    assert scores(model, items, modes=("S→S",))["storycloze", "S→S", "sum"].accuracy == 1
    items = [item("abc", ["de", "fg"], 0)]
    assert scores(model, items, modes=("S→S",))["storycloze", "S→S", "sum"].accuracy == 0


def test_a_tie_counts_a_share():
    items = [item("a", ["b", "c", "d", "e"], 2, task="hellaswag")]
    score = scores(Priced({letter("b"): 5.0}), items, modes=("T→T",))["hellaswag", "T→T", "sum"]
    assert score.accuracy == pytest.approx(1 / 3)
    assert score.chance == 0.25


@pytest.mark.parametrize(("apart", "accuracy"), [(2e-6, 0.5), (2e-4, 0.0)])
def test_what_rounding_moves_a_score_by_is_a_tie(apart: float, accuracy: float):
    """The same document elsewhere in a stream differs in its last bits."""
    items = [item("a", ["b", "c"], 0)]
    model = Priced({letter("b"): 8.0 * (1 + apart), letter("c"): 8.0})
    for measure in ("sum", "per token", "per character"):
        assert (
            scores(model, items, modes=("T→T",))["storycloze", "T→T", measure].accuracy == accuracy
        )


@pytest.mark.parametrize("mode", ["T→T", "S→S", "S→T", "T→S"])
def test_scores_do_not_depend_on_the_batch(mode):
    rng = np.random.default_rng(0)
    words = [
        "".join(chr(97 + c) for c in rng.integers(0, 20, rng.integers(1, 9))) for _ in range(60)
    ]
    items = [
        item(a, [b, c], 0) for a, b, c in zip(words[::3], words[1::3], words[2::3], strict=True)
    ]
    model = Priced({token: float(p) for token, p in enumerate(rng.random(VOCABULARY.size))})
    large = scores(model, items, modes=(mode,))
    small = scores(model, items, modes=(mode,), tokens_per_batch=1)
    assert large == small
    assert 0 < large["storycloze", mode, "sum"].accuracy < 1


def test_text_items_are_left_out_of_speech():
    items = [StoryItem(id="a", task="storycloze", prompt=record("a"), answer=0,
                       endings=(record("b"), record("c")))]  # fmt: skip
    found = scores(Priced({}), items, modes=("S→S", "T→T"))
    assert {mode for _, mode, _ in found} == {"T→T"}


def test_wilson_interval_is_that_of_the_literature():
    # 8 of 10 (Newcombe 1998 and every table since): 0.4902 to 0.9433
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(1.0, 5)[1] == 1.0


def test_table_names_task_mode_items_and_interval():
    table = format_table(list(scores(Priced({}), [item("a", ["b", "c"], 0)]).values()))
    assert "| storycloze | S→S | sum | 1 | 50.0 |" in table
    assert table.count("\n") == 1 + 2 * len(MEASURES)


def test_speech_pieces_are_scored_on_the_same_speech():
    """The sum is over pieces; per token it is divided by the units that they stand for."""
    runs = np.tile([1, 1, 1, 1, 2, 3], 30)
    bpe = train_speech_bpe([runs], num_units=20, num_pieces=24)
    vocabulary = Vocabulary(num_pieces=26, num_units=20, speech_bpe=bpe)

    def spoken(text, units):
        return StoryItem("i", "storycloze", record("p", [2, 1]), tuple(map(record, text, units)), 0)

    # The true ending is one piece of four units, the other one of two pieces, each of one.
    question = spoken(["a", "b"], [[1, 1, 1, 1], [5, 6]])
    lengths = [len(vocabulary.encode_units(ending.units)) for ending in question.endings]
    assert lengths == [1, 2]
    (true,) = vocabulary.encode_units(question.endings[0].units)
    prices = {int(true): 3.0}  # more than two pieces at 1, but less per unit
    scores = story_completion(
        Priced(prices, vocabulary),
        [question],
        vocabulary,
        Letters(),
        PlanConfig(local=False),
        patching=PatchingConfig(strategy="speech-bpe"),
        modes=("S→S",),
    )
    found = {score.measure: score.accuracy for score in scores}
    assert (found["sum"], found["per token"]) == (0, 1)
