"""Are a thousand stories scored in less than three minutes by the demo model?

The questions are those of the demo corpus. It has 720; the first ones are asked a second time, as
new ones, to make a thousand. Weights are random: what a pass costs does not depend on them. Every
document, a prompt with one ending, is one pass over all of its tokens.

    python -m lst.prepare demo --out data/demo
    pytest benchmarks/test_scoring.py --benchmark-only
"""

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conftest import AddRow
from lst.data.interleave import Mode, item_document
from lst.evaluate import story_completion
from lst.model import build_model
from lst.presets import PRESETS
from lst.train.corpus import open_corpus

CORPUS = Path(__file__).parents[1] / "data" / "demo"
QUESTIONS, TRIED = 1000, 4  # asked, and asked where nothing is timed
SECONDS = 180

pytestmark = pytest.mark.skipif(
    not (CORPUS / "items").exists(), reason="there is no corpus: python -m lst.prepare demo"
)


@pytest.mark.parametrize(
    "modes", [("S→S", "T→T"), ("S→T", "T→S")], ids=["one modality", "across modalities"]
)
def test_a_thousand_stories_take_less_than_three_minutes(
    benchmark: Any, add_row: AddRow, modes: tuple[Mode, ...]
) -> None:
    preset = PRESETS["demo"]
    corpus = open_corpus(preset.data)
    torch.manual_seed(0)
    model = build_model(preset.model, corpus.vocabulary).eval()
    items = list(islice(cycle(corpus.items), TRIED if benchmark.disabled else QUESTIONS))

    def score() -> None:
        scores = story_completion(
            model,
            items,
            corpus.vocabulary,
            corpus.tokenizer,
            preset.model.plan(),
            patching=preset.data.patching,
            modes=modes,
        )
        assert {score.mode for score in scores} == set(modes)

    benchmark.pedantic(score, rounds=1, iterations=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.min
    documents = [
        item_document(item.prompt, ending, mode, corpus.vocabulary, corpus.tokenizer)
        for mode in modes
        for item in items
        for ending in item.endings
    ]
    tokens = sum(len(document.tokens) for document in documents)
    row = add_row(
        case=f"{len(items):,} stories in {' and '.join(modes)}",
        peer="three minutes",
        ours=f"{seconds:.1f} s",
        theirs=f"{SECONDS} s",
        ratio=SECONDS / seconds,
        floor=1.0,
        note=f"{len(documents):,} documents, {tokens / seconds:,.0f} tokens/s",
        facts={
            "seconds": seconds,
            "peer_seconds": SECONDS,
            "distinct_questions": len(corpus.items),
            "documents": len(documents),
            "tokens": tokens,
        },
    )
    assert row.passed, f"{row.case}: {seconds:.0f} s > {SECONDS} s"
