"""A batch holds its rows, and its plan is that of its layout; the dead tail touches nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from lst.data.batch import IGNORE, Batch, PlanConfig, make_batch, pack_documents
from lst.data.interleave import Document
from lst.data.packing import concatenate, patch_document
from lst.data.patching import NoPatching, Static
from lst.speech_bpe import train_speech_bpe
from lst.vocabulary import BOS, EOS, PAD, SPEECH, TEXT, Vocabulary

VOCABULARY = Vocabulary(num_pieces=10, num_units=10)
PLAN = PlanConfig(slots=2, local_window=5, decoder_window=3)
SPLIT = dataclasses.replace(PLAN, text_path="global")


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


@pytest.mark.parametrize(
    "plan", [PLAN, PlanConfig(local=False), SPLIT], ids=["lst", "token", "split"]
)
def test_what_rows_lack_of_their_units_the_dead_tail_has(plan):
    full = sum(len(row.lengths) for row in ROWS) + len(ROWS)
    batch = make_batch(ROWS, VOCABULARY, plan, step=0, units=full + 5)
    same = make_batch(ROWS, VOCABULARY, plan, step=0)
    assert batch.layout.num_patches == full + 5 == same.layout.num_patches + 5
    assert (batch.num_units, batch.num_tokens) == (same.num_units, same.num_tokens)
    assert batch.num_targets == same.num_targets
    assert not batch.global_ranges.dense_mask()[batch.num_units :].any()


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


# --- text_path="global": two streams ----------------------------------------------------------


ONLY_TEXT = [make_document(4, 0, id="text"), make_document(2, 0, id="more")]


def rows_of(*documents):
    return [concatenate([patch_document(d, VOCABULARY, Static(size=4))]) for d in documents]


@pytest.mark.parametrize("rows", [ROWS, rows_of(*ONLY_TEXT)], ids=["mixed", "text alone"])
def test_both_streams_together_are_the_stream(rows):
    batch = make_batch(rows, VOCABULARY, SPLIT, step=0)
    split, live = batch.split, batch.num_tokens
    # the speech vocabulary is the joint one without its pieces
    joint = torch.tensor([*range(5), *range(VOCABULARY.first_unit, VOCABULARY.size)])
    assert VOCABULARY.speech_size == len(joint)
    tokens = torch.cat((joint[split.speech_tokens], split.text_tokens))
    assert torch.equal(tokens[split.token_rows], batch.tokens)
    none = split.speech_targets < 0
    ours = torch.where(none, IGNORE, joint[split.speech_targets.clamp(min=0)])
    targets = torch.cat((ours, split.text_targets))
    assert torch.equal(targets[split.token_rows], batch.targets)
    assert VOCABULARY.is_unit(tokens[split.token_rows][:live]).sum() == batch.num_speech_tokens
    assert (batch.tokens[live:] == PAD).all()
    assert not VOCABULARY.is_unit(split.text_tokens).any()
    assert PAD not in split.text_tokens.tolist()
    # each patch comes from one of the two
    text = split.patch_rows >= batch.local_layout.num_patches
    assert torch.equal(text.nonzero().flatten(), split.text_patches)
    assert split.patch_rows.sort().values.tolist() == list(range(batch.layout.num_patches))


@pytest.mark.parametrize("rows", [ROWS, rows_of(*ONLY_TEXT)], ids=["mixed", "text alone"])
def test_the_dead_tail_is_in_the_stream_of_speech_and_rounds_it_up(rows):
    batch = make_batch(rows, VOCABULARY, SPLIT, step=0)
    assert batch.local_layout.num_tokens == 256
    assert batch.local_layout.num_dead_tokens == batch.layout.num_dead_tokens
    assert batch.local_layout.num_dead_patches == batch.layout.num_dead_patches == len(rows)
    dead = batch.local_layout.num_dead_tokens
    for ranges in (batch.local_ranges, batch.decoder_ranges):
        assert not ranges.dense_mask()[256 - dead :].any()
    slots = PLAN.slots * len(rows)
    assert not batch.encoder_ranges.dense_mask()[-slots:].any()
    assert not batch.decoder_ranges.dense_mask()[:, -slots:].any()


@pytest.mark.parametrize("window", [1, 3, None])
def test_speech_reads_the_patches_that_it_reads_beside_text(window):
    plan = dataclasses.replace(SPLIT, decoder_window=window)
    batch = make_batch(ROWS, VOCABULARY, plan, step=0)
    whole = make_batch(ROWS, VOCABULARY, dataclasses.replace(plan, text_path="local"), step=0)
    speech = VOCABULARY.is_unit(batch.tokens)
    expected = whole.decoder_ranges.dense_mask()[: batch.layout.num_tokens][
        VOCABULARY.is_unit(whole.tokens)
    ]
    read = batch.decoder_ranges.dense_mask()[: int(speech.sum())]
    slots = (batch.split.read_patches[:, None] * 2 + torch.arange(2)).flatten()
    assert torch.equal(expected[:, slots], read)
    unread = torch.ones(expected.shape[1], dtype=torch.bool)
    unread[slots] = False
    assert not expected[:, unread].any()
    live = len(batch.split.read_patches) - len(ROWS)
    assert read[:, : 2 * live].any(0).all()


def test_text_documents_are_read_by_no_speech():
    documents = [*ONLY_TEXT, make_document(1, 6, id="speech")]
    batch = pack_documents(documents, VOCABULARY, Static(size=4), SPLIT)
    first = int(batch.layout.cu_documents[2])
    # Of <bos> <t> piece <s> and four units, all but <bos>: the window is of three patches. The
    # last patch, of two units, is readable only after them.
    assert batch.split.read_patches.tolist() == list(range(first + 1, first + 5))
    assert batch.local_layout.cu_tokens.tolist() == [0, 0, 0, 6]
    assert batch.local_layout.token_positions.tolist() == list(range(6))


def test_a_piece_after_a_unit_has_no_owner():
    document = make_document(2, 3)
    tokens = document.tokens.copy()
    tokens[-1] = VOCABULARY.first_piece
    wrong = document._replace(tokens=tokens)
    with pytest.raises(ValueError, match="speech unit is followed by a text piece"):
        pack_documents([wrong], VOCABULARY, Static(size=4), SPLIT)


# --- the rest ---------------------------------------------------------------------------------


def test_a_batch_of_the_baseline_has_a_token_for_every_unit():
    """Whatever their number: of rows of 11 units too, where 33 and 36 are no multiples of 256."""
    document = patch_document(make_document(2, 5), VOCABULARY, NoPatching())
    assert len(document.lengths) == 11
    batch = make_batch([document] * 3, VOCABULARY, PlanConfig(local=False), step=0)
    assert batch.layout.num_tokens == batch.layout.num_patches == len(batch.tokens) == 36
    assert (batch.num_tokens, batch.num_units) == (33, 33)


def test_counts_are_those_of_the_tokens():
    batch = make_batch(ROWS, VOCABULARY, PLAN, step=0)
    assert batch.num_targets == int((batch.targets != IGNORE).sum())
    # Every token but <bos> is predicted, and units are told from the rest.
    assert batch.num_targets == batch.num_tokens - 5
    assert batch.num_speech_tokens == 8 + 5 + 7 + 1 + 9 == batch.num_speech_targets
    units = VOCABULARY.is_unit(batch.targets)
    assert torch.equal(batch.speech_targets, units)
    assert batch.num_units_to_predict == batch.num_speech_targets


def test_speech_pieces_count_as_the_units_that_they_stand_for():
    units = np.tile([1, 1, 1, 2, 2], 20)
    bpe = train_speech_bpe([units], num_units=10, num_pieces=16)
    vocabulary = Vocabulary(num_pieces=10, num_units=10, speech_bpe=bpe)
    ids = vocabulary.encode_units(units)
    tokens = np.concatenate(([BOS, SPEECH], ids, [EOS])).astype(np.int32)
    document = Document(tokens, np.zeros((0, 2), np.int32), (), 0, True, "r")
    batch = pack_documents([document], vocabulary, NoPatching(), PlanConfig(local=False))
    assert batch.num_speech_targets == len(ids) < 50
    assert (batch.num_speech_tokens, batch.num_units_to_predict) == (100, 100)
    assert batch.num_units == batch.num_tokens == len(ids) + 3


def test_documents_for_evaluation_have_no_dead_tail():
    documents = [make_document(2, 8, "a"), make_document(1, 5, "b")]
    batch = pack_documents(documents, VOCABULARY, Static(size=4), PLAN)
    assert batch.layout.num_dead_patches == 0
    assert batch.tokens.tolist() == [t for d in documents for t in d.tokens.tolist()]
    assert batch.layout.cu_tokens.tolist() == [0, 14, 24]
    assert batch.layout.closed_late.nonzero().flatten().tolist() == [13]  # the fifth unit of "b"
    assert batch.record_ids == ("a", "b")


@pytest.mark.parametrize("plan", [PLAN, SPLIT])
def test_a_batch_moves_as_a_whole(plan):
    here = make_batch(ROWS, VOCABULARY, plan, step=3)
    batch = here.to("meta")
    assert isinstance(batch, Batch)
    assert (batch.local_layout is batch.layout) == (plan is PLAN)
    parts = [batch, batch.layout, batch.local_layout, batch.encoder_ranges, batch.global_ranges]
    for part in [*parts, batch.split] if plan is SPLIT else parts:
        tensors = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        assert tensors
        assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (batch.step, batch.num_targets) == (here.step, here.num_targets)
