"""The reduced model spends its compute where ``lst-1b`` does, and streams are what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.mix import MIX, PAPER, SPEECH_ONLY, TEXT_ONLY, documents, fill, random_batch
from benchmarks.reduced import ARMS, LST_1B, REDUCED, make_batch
from lst.data.patching import Static
from lst.flops import batch_counts, forward_flops
from lst.presets import PRESETS


def shares(arm, size, mix, num_tokens):
    """Of each part in the FLOPs of a forward pass."""
    batch = make_batch(arm, size, documents(mix, size.shape, num_tokens, seed=0))
    flops = forward_flops(arm.config(size), size.shape.vocabulary, batch_counts(batch))
    total = sum(flops.values())
    return {part: value / total for part, value in flops.items()}


@pytest.mark.parametrize("mix", [MIX, SPEECH_ONLY, TEXT_ONLY], ids=["mix", "speech", "text"])
@pytest.mark.parametrize("arm", ARMS.values(), ids=list(ARMS))
def test_parts_have_their_shares_of_the_1b_model(arm, mix):
    reduced = shares(arm, REDUCED, mix, 12_000)
    for part, share in shares(arm, LST_1B, mix, 96_000).items():
        assert reduced[part] == pytest.approx(share, abs=0.02), part


def test_the_mix_is_that_of_table_13():
    for shape in (PAPER, REDUCED.shape):
        content = documents(MIX, shape, 60_000, seed=0)
        tokens = np.concatenate([document.tokens for document in content])
        assert len(tokens) == 60_000
        assert shape.vocabulary.is_unit(tokens).mean() == pytest.approx(0.77 / 3, abs=0.015)


def test_words_and_silences_have_the_papers_lengths():
    words, units = 0, 0
    for document in documents(SPEECH_ONLY, PAPER, 60_000, seed=0):
        lengths = document.aligned[:, 1] - document.aligned[:, 0]
        assert (lengths > 0).all()
        assert (document.aligned[1:, 0] >= document.aligned[:-1, 1]).all()
        assert PAPER.vocabulary.is_unit(document.tokens[document.aligned[:, 0]]).all()
        words += len(lengths)
        units += int(PAPER.vocabulary.is_unit(document.tokens).sum())
    assert units / words == pytest.approx(5.8 + 3.7, rel=0.05)


def test_rows_have_exactly_so_many_units():
    rows = fill(MIX, REDUCED.shape, Static(size=4), [100, 257], seed=1)
    assert [len(row.lengths) for row in rows] == [100, 257]
    for name in ("lst-1b", "baseline-1b"):
        batch = random_batch(PRESETS[name].model, rows=2, units=512, seed=0)
        assert batch.num_units + batch.layout.num_dead_patches == 1024
