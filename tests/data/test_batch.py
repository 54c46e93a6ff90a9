"""A batch holds its rows, and its plan is that of its layout; the dead tail touches nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from lst.data.batch import IGNORE, Batch, PlanConfig, make_batch, pack_documents
from lst.data.interleave import Document
from lst.data.packing import concatenate, patch_document
from lst.data.patching import Static
from lst.vocabulary import BOS, EOS, PAD, SPEECH, TEXT, Vocabulary

VOCABULARY = Vocabulary(num_pieces=10, num_units=10)
PLAN = PlanConfig(slots=2, local_window=5, decoder_window=3)


def make_document(pieces, units, id="r"):
    tokens = [BOS, TEXT, *[VOCABULARY.first_piece] * pieces]
    tokens += [SPEECH, *[VOCABULARY.first_unit] * units, EOS]
    none = np.zeros((0, 2), np.int32)
    return Document(np.array(tokens, np.int32), none, (), 0, True, id)


def make_row(*sizes):
    documents = [make_document(*size, id=f"r{size}") for size in sizes]
    return concatenate([patch_document(d, VOCABULARY, Static(size=4)) for d in documents])


ROWS = [make_row((2, 8), (1, 5)), make_row((3, 7)), make_row((1, 1), (2, 9))]


def test_a_training_batch_is_rounded_up_by_a_dead_tail():
    batch = make_batch(ROWS, VOCABULARY, PLAN, step=7)
    num_tokens = sum(len(row.tokens) for row in ROWS)
    num_units = sum(len(row.lengths) for row in ROWS)
    assert batch.layout.num_tokens == len(batch.tokens) == 256
    assert (batch.num_tokens, batch.num_units, batch.step) == (num_tokens, num_units, 7)
    assert batch.layout.num_patches == num_units + len(ROWS)  # a unit of each row
    assert batch.tokens[:num_tokens].tolist() == concatenate(ROWS).tokens.tolist()
    assert batch.targets[:num_tokens].tolist() == concatenate(ROWS).targets.tolist()
    assert set(batch.tokens[num_tokens:].tolist()) == {PAD}
    assert set(batch.targets[num_tokens:].tolist()) == {IGNORE}
    assert batch.record_ids == concatenate(ROWS).record_ids
    assert len(batch.record_ids) == batch.layout.num_documents - 1


@pytest.mark.parametrize("missing", [0, 1, 255])
def test_the_dead_tail_is_never_empty(missing):
    row = make_row((1, 512 - missing - 5))  # specials and the piece are 5 tokens
    batch = make_batch([row], VOCABULARY, PLAN, step=0)
    assert batch.layout.num_dead_tokens == (missing or 256)
    assert batch.layout.num_tokens % 256 == 0


def test_the_dead_tail_reads_nothing_and_is_read_by_nothing():
    batch = make_batch(ROWS, VOCABULARY, PLAN, step=0)
    live_tokens, live_units = batch.num_tokens, batch.num_units
    live = {"tokens": live_tokens, "patches": live_units, "slots": PLAN.slots * live_units}
    for ranges, queries, keys in (
        (batch.encoder_ranges, "slots", "tokens"),
        (batch.decoder_ranges, "tokens", "slots"),
        (batch.local_ranges, "tokens", "tokens"),
        (batch.global_ranges, "patches", "patches"),
    ):
        mask = ranges.dense_mask()
        assert not mask[live[queries] :].any()
        assert not mask[:, live[keys] :].any()
        assert mask[: live[queries]].any(1).all()  # <bos> is a patch: everything alive reads
    assert batch.layout.max_patch_length == 4


def test_the_plan_has_the_windows_that_were_asked_for():
    batch = make_batch(ROWS, VOCABULARY, PLAN, step=0)
    assert batch.local_ranges.max_keys == 5
    assert batch.decoder_ranges.max_keys == 3 * 2
    assert batch.encoder_ranges.max_keys == 4
    documents = [make_row(size) for size in ((2, 8), (1, 5), (3, 7), (1, 1), (2, 9))]
    assert batch.global_ranges.max_keys == max(len(each.lengths) for each in documents)
    whole = make_batch(ROWS, VOCABULARY, dataclasses.replace(PLAN, decoder_window=None), step=0)
    assert whole.decoder_ranges.max_keys > 6


def test_the_baseline_plans_no_local_modules():
    batch = make_batch(ROWS, VOCABULARY, PlanConfig(local=False), step=0)
    assert batch.encoder_ranges is batch.decoder_ranges is batch.local_ranges is None
    assert batch.global_ranges.num_keys == batch.layout.num_patches


def test_counts_are_those_of_the_tokens():
    batch = make_batch(ROWS, VOCABULARY, PLAN, step=0)
    assert batch.num_targets == int((batch.targets != IGNORE).sum())
    # Every token but <bos> is predicted, and units are told from the rest.
    assert batch.num_targets == batch.num_tokens - 5
    assert batch.num_speech_tokens == 8 + 5 + 7 + 1 + 9 == batch.num_speech_targets
    units = VOCABULARY.is_unit(batch.targets)
    assert torch.equal(batch.speech_targets, units)


def test_documents_for_evaluation_have_no_dead_tail():
    documents = [make_document(2, 8, "a"), make_document(1, 5, "b")]
    batch = pack_documents(documents, VOCABULARY, Static(size=4), PLAN)
    assert batch.layout.num_dead_patches == 0
    assert batch.tokens.tolist() == [t for d in documents for t in d.tokens.tolist()]
    assert batch.layout.cu_tokens.tolist() == [0, 14, 24]
    assert batch.layout.closed_late.nonzero().flatten().tolist() == [13]  # the fifth unit of "b"
    assert batch.record_ids == ("a", "b")


def test_a_batch_moves_as_a_whole():
    here = make_batch(ROWS, VOCABULARY, PLAN, step=3)
    batch = here.to("meta")
    assert isinstance(batch, Batch)
    for part in (batch, batch.layout, batch.encoder_ranges, batch.global_ranges):
        tensors = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        assert tensors
        assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (batch.step, batch.num_targets) == (here.step, here.num_targets)
