"""Are a thousand stories scored in less than three minutes by the demo model?

Asked is every third of the 720 questions of the demo corpus, in its share of the time. Weights are
random: what a pass costs does not depend on them. Every document, a prompt with one ending, is one
pass over all of its tokens.

    python -m lst.prepare demo --out data/demo
    pytest benchmarks/test_scoring.py --benchmark-only
"""

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
TRIED = 4  # questions, where nothing is timed
PACE = 180 / 1000  # seconds a question

pytestmark = pytest.mark.skipif(
    not (CORPUS / "items").exists(), reason="there is no corpus: python -m lst.prepare demo"
)


@pytest.mark.parametrize(
    "modes", [("S→S", "T→T"), ("S→T", "T→S")], ids=["one modality", "across modalities"]
)
def test_stories_at_the_pace_of_a_thousand_in_three_minutes(
    benchmark: Any, add_row: AddRow, modes: tuple[Mode, ...]
) -> None:
    preset = PRESETS["demo"]
    corpus = open_corpus(preset.data)
    torch.manual_seed(0)
    model = build_model(preset.model, corpus.vocabulary).eval()
    items = corpus.items[::3][: TRIED if benchmark.disabled else None]

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
    seconds, allowed = benchmark.stats.stats.min, PACE * len(items)
    documents = [
        item_document(item.prompt, ending, mode, corpus.vocabulary, corpus.tokenizer)
        for mode in modes
        for item in items
        for ending in item.endings
    ]
    tokens = sum(len(document.tokens) for document in documents)
    row = add_row(
        case=f"{len(items):,} stories in {' and '.join(modes)}",
        peer="a thousand in 3 minutes",
        ours=f"{seconds:.1f} s",
        theirs=f"{allowed:.1f} s",
        ratio=allowed / seconds,
        floor=1.0,
        note=f"{len(documents):,} documents, {tokens / seconds:,.0f} tokens/s",
        facts={
            "seconds": seconds,
            "peer_seconds": allowed,
            "questions": len(items),
            "documents": len(documents),
            "tokens": tokens,
        },
    )
    assert row.passed, f"{row.case}: {seconds:.0f} s > {allowed:.0f} s"
