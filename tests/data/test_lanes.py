"""A lane's rows are full, hold its records once an epoch, and follow from its state."""

import itertools
import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map_only

from lst.data.batch import PlanConfig, make_batch
from lst.data.encoded import EncodedDataset
from lst.data.interleave import record_document, stable_rng
from lst.data.lanes import Lane, LaneState, Source
from lst.data.packing import IGNORE, MIN_ROOM, patch_document
from lst.data.patching import PatchingConfig, Static
from lst.data.records import Dataset
from lst.errors import UserError
from lst.vocabulary import BOS, SPEECH, TEXT
from lst_kernels import native

STATIC = PatchingConfig(strategy="static")
UNUSED = stable_rng("unused")


@pytest.fixture
def make_lane(corpus):
    def make(number=0, weights=None, **options):
        weights = weights or {"text": 2.0, "speech": 1.0}
        defaults = {
            "num_lanes": 4,
            "datasets": {
                name: EncodedDataset(Dataset.open(corpus.folder / "train" / name), corpus.tokenizer)
                for name in {key.split(":")[0] for key in weights}
            },
            "vocabulary": corpus.vocabulary,
            "row_units": 63,
            "patching": PatchingConfig(),
            "total_steps": 60,
            "seed": 5,
        }
        return Lane(number=number, weights=weights, **(defaults | options))

    return make


def rows_of(lane, count, state=None):
    return list(islice(lane.rows(state or lane.first_state()), count))


def documents_of(rows):
    """[(record id, tokens)] of the documents in a lane's rows, the split ones put together."""
    documents, is_open = [], False
    for row, state in rows:
        tokens = np.split(row.tokens, np.cumsum(tokens_per_document(row))[:-1])
        for place, (part, id) in enumerate(zip(tokens, row.record_ids, strict=True)):
            part = part.tolist()
            if place == 0 and is_open:
                assert id == documents[-1][0]
                whole = documents[-1][1]
                markers = [t for t in whole if t in (TEXT, SPEECH)]
                # Spans alternate: the marker of the last span can only be a reopening's.
                opening = 2 if markers and part[1] == markers[-1] else 1
                whole += part[opening:]
            else:
                documents.append((id, part))
        is_open = state.carry is not None
    return documents


def tokens_per_document(row):
    stops = np.concatenate(([0], np.cumsum(row.lengths)))
    return np.diff(stops[np.concatenate(([0], np.cumsum(row.patches_per_document)))])


def same_rows(first, second):
    assert len(first) == len(second)
    for (row, state), (other, other_state) in zip(first, second, strict=True):
        for name in ("tokens", "targets", "lengths", "closed_late", "patches_per_document"):
            np.testing.assert_array_equal(getattr(row, name), getattr(other, name))
        assert row.record_ids == other.record_ids
        assert state == other_state


@pytest.mark.parametrize("row_units", [MIN_ROOM, 8, 63])
def test_rows_are_full(make_lane, row_units):
    for row, _ in rows_of(make_lane(row_units=row_units), 50):
        assert len(row.lengths) == len(row.closed_late) == row_units
        assert row.patches_per_document.sum() == row_units
        assert row.lengths.sum() == len(row.tokens) == len(row.targets)
        assert row.targets[-1] == IGNORE


@pytest.mark.parametrize("row_units", [MIN_ROOM, 17, 63])
def test_rows_put_together_are_the_documents(corpus, make_lane, row_units):
    lane = make_lane(2, row_units=row_units)  # it owns the record that is longer than rows
    epochs = Counter()
    documents = documents_of(rows_of(lane, 4000 // row_units))[:-1]
    records = corpus.records["text"] | corpus.records["speech"]
    for id, tokens in documents:
        rng = stable_rng(lane.seed, epochs[id], id)
        whole = record_document(records[id], corpus.vocabulary, corpus.tokenizer, rng).tokens
        # An <eos> that would have opened a row alone is left out.
        assert tokens in (whole.tolist(), whole[:-1].tolist())
        epochs[id] += 1
    assert max(epochs.values()) > 1
    assert sum(len(tokens) > 2 * row_units for _, tokens in documents) > 0


def test_an_epoch_holds_every_record_once(corpus, make_lane):
    seen = Counter()
    for number in range(4):
        lane = make_lane(number, weights={"text": 1.0})
        size = len(range(number, 41, 4))
        ids = [id for id, _ in documents_of(rows_of(lane, 40))]
        first, second = ids[:size], ids[size : 2 * size]
        assert sorted(first) == sorted(second) == sorted(f"t{i}" for i in range(number, 41, 4))
        assert first != second  # an order of its own
        seen.update(first)
    assert seen == Counter(list(corpus.records["text"]))


def test_interleaving_changes_with_the_epoch(make_lane):
    documents = documents_of(rows_of(make_lane(weights={"speech": 1.0}), 200))
    variants = {}
    for id, tokens in documents[:-1]:
        variants.setdefault(id, set()).add(tuple(tokens))
    assert sum(len(each) > 1 for each in variants.values()) > len(variants) / 2


def test_sources_deliver_content_by_weight(corpus, make_lane):
    for weights in ({"text": 2.0, "speech": 1.0}, {"text": 1.0, "speech": 3.0}):
        rows = rows_of(make_lane(weights=weights), 400)
        content = Counter()
        for id, tokens in documents_of(rows):
            count = sum(not corpus.vocabulary.is_special(token) for token in tokens)
            content["text" if id.startswith("t") else "speech"] += count
        ratio = content["text"] / content["speech"]
        assert ratio == pytest.approx(weights["text"] / weights["speech"], rel=0.1)
        delivered = {name: each.delivered for name, each in rows[-1][1].sources.items()}
        assert delivered["text"] == pytest.approx(content["text"], abs=100)


@pytest.mark.parametrize("weights_in", ["tokens", "units"])
def test_the_shares_of_a_long_run_are_exact_but_for_a_document(corpus, make_lane, weights_in):
    """The paper's 2 to 1, and three sources by modality, in either measure."""
    for weights in (
        {"text": 2.0, "speech": 1.0},
        {"text": 0.5, "speech:speech": 0.2, "speech:interleaved": 0.3},
    ):
        lane = make_lane(weights=weights, weights_in=weights_in, patching=STATIC)
        rows = rows_of(lane, 300)
        delivered = {name: each.delivered for name, each in rows[-1][1].sources.items()}
        longest = 39 * 10 + 4  # frames of the longest record of lane 0: 39 words of at most 10
        levels = [delivered[name] / weights[name] for name in weights]
        assert max(levels) - min(levels) <= longest / min(weights.values())
        # Against the rows themselves: what was delivered is what they hold.
        specials = sum(int(corpus.vocabulary.is_special(row.tokens).sum()) for row, _ in rows)
        held = sum(len(row.tokens if weights_in == "tokens" else row.lengths) for row, _ in rows)
        assert sum(delivered.values()) == pytest.approx(held - specials, abs=longest)


def test_a_source_makes_the_kind_of_documents_that_it_names(corpus, make_lane):
    starts = {"speech:text": None, "speech:speech": SPEECH, "speech:speech-to-text": SPEECH,
              "speech:text-to-speech": TEXT}  # fmt: skip
    for key, marker in starts.items():
        for _, tokens in documents_of(rows_of(make_lane(weights={key: 1.0}), 20)):
            expected = tokens[1] if marker is None else marker
            assert tokens[1] == expected
            assert (marker is None) == corpus.vocabulary.is_piece(tokens[1])


def test_documents_of_a_task_stay_whole_and_rows_end_where_the_next_does_not_fit(corpus, make_lane):
    lane = make_lane(2, weights={"speech:asr": 1.0}, row_units=150, patching=STATIC)
    rows = rows_of(lane, 40)
    counts = Counter()
    for (row, state), (after, _) in itertools.pairwise(rows):
        assert 0 < len(row.lengths) <= 150
        assert len(row.lengths) + after.patches_per_document[0] > 150  # it would not have fitted
        tokens = np.split(row.tokens, np.cumsum(tokens_per_document(row))[:-1])
        for id, document in zip(row.record_ids, tokens, strict=True):
            whole = record_document(
                corpus.records["speech"][id], corpus.vocabulary, corpus.tokenizer, UNUSED, "asr"
            )
            assert document.tolist() == whole.tokens.tolist()
            counts[id] += 1
        assert (state.carry is None) == (len(row.lengths) == 150)
        assert state.carry is None or state.carry.consumed == 0
    lengths = {
        id: sum(patch_document(
            record_document(record, corpus.vocabulary, corpus.tokenizer, UNUSED, "asr"),
            corpus.vocabulary, Static(size=4),
        ).patches_per_document)
        for id, record in corpus.records["speech"].items()
    }  # fmt: skip
    ours = list(lengths)[2::4]
    too_long = [id for id in ours if lengths[id] > 150]
    assert too_long  # "long" is one of them
    assert set(counts) == set(ours) - set(too_long)
    source = rows[-1][1].sources["speech:asr"]
    assert source.left_out == pytest.approx(len(too_long) * source.epoch, abs=len(too_long))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_lane_of_whole_documents_goes_on_from_any_of_its_states(make_lane):
    options = {"weights": {"speech:tts": 1.0, "text": 1.0}, "row_units": 150}
    rows = rows_of(make_lane(**options), 60)
    for row in range(0, 55, 4):
        state = LaneState.from_json(json.loads(json.dumps(rows[row][1].to_json())))
        same_rows(rows_of(make_lane(**options), 3, state), rows[row + 1 : row + 4])


def test_a_lane_whose_rows_hold_no_document_of_a_task_is_an_error(make_lane):
    lane = make_lane(weights={"speech:asr": 1.0}, row_units=12)
    expected = r"'speech:asr' .*: expected documents of at most 12 units, .* got none \('s\d+' has"
    with pytest.raises(UserError, match=expected):
        rows_of(lane, 1)


@pytest.mark.parametrize("key", ["speech:", ":speech", "speech:song", "speech:auto:text", ""])
def test_a_source_that_is_none_is_refused(key):
    with pytest.raises(UserError, match=r"expected a mixture of DATASET or DATASET:KIND, KIND one"):
        Source.parse(key)


def test_the_order_of_the_mixture_does_not_matter(make_lane):
    one = make_lane(weights={"text": 1.0, "speech": 1.0})
    other = make_lane(weights={"speech": 1.0, "text": 1.0})
    same_rows(rows_of(one, 10), rows_of(other, 10))


def test_a_lane_goes_on_from_any_of_its_states(make_lane):
    """Over epoch boundaries, in the middle of documents, through the curriculum."""
    lane = make_lane(weights={"text": 1.0, "speech": 1.0}, row_units=23)
    rows = rows_of(lane, 120)
    carried = 0
    for row in range(0, 110, 3):
        state = LaneState.from_json(json.loads(json.dumps(rows[row][1].to_json())))
        assert state == rows[row][1]
        carried += state.carry is not None
        same_rows(rows_of(make_lane(weights=lane.weights, row_units=23), 3, state),
                  rows[row + 1 : row + 4])  # fmt: skip
    assert carried > 20
    assert rows[-1][1].sources["text"].epoch > 1


def test_patches_follow_the_curriculum_of_the_row_that_drew_the_document(make_lane):
    patching = PatchingConfig(curriculum=(0.5, 0.5), size=4)
    lane = make_lane(weights={"speech": 1.0}, patching=patching, total_steps=100, row_units=40)
    rows = rows_of(lane, 100)
    static = [row.lengths.max() <= 4 for row, _ in rows]
    assert sum(static[:45]) < 20  # those of text alone, and of short words
    first_drawn = next(i for i in range(50, 100) if rows[i - 1][1].carry is None
                       or rows[i - 1][1].carry.row >= 50)  # fmt: skip
    assert all(static[first_drawn:])


def test_speech_without_alignment_is_patched_statically(make_lane):
    lane = make_lane(weights={"bare": 1.0}, patching=PatchingConfig(strategy="aligned", size=4))
    for row, _ in rows_of(lane, 5):
        assert row.lengths.max() == 4


def test_a_source_with_fewer_records_than_lanes_is_shared(make_lane):
    options = {"weights": {"bare": 1.0}, "num_lanes": 5}
    orders = []
    for number in range(5):
        lane = make_lane(number, **options)
        ids = [id for id, _ in documents_of(rows_of(lane, 30))]
        for start in range(0, 27, 3):
            assert sorted(ids[start : start + 3]) == ["b0", "b1", "b2"]
        orders.append(tuple(ids[:27]))
    assert len(set(orders)) == 5


def test_lanes_that_share_interleave_each_in_its_own_way(make_lane):
    options = {"weights": {"speech": 1.0}, "num_lanes": 30}
    texts = []
    for number in (0, 1):
        documents = documents_of(rows_of(make_lane(number, **options), 80))
        texts.append(next(tokens for id, tokens in documents if id == "long"))
    assert texts[0] != texts[1]


def test_everything_reads_bos_first(make_lane):
    for row, _ in rows_of(make_lane(), 20):
        firsts = np.concatenate(([0], np.cumsum(tokens_per_document(row))[:-1]))
        assert (row.tokens[firsts] == BOS).all()


def test_a_state_of_other_data_is_refused(make_lane):
    state = make_lane().first_state()
    with pytest.raises(
        UserError, match=r"lane 1 of 4: expected a state of sources \['text'\], got"
    ):
        next(make_lane(1, weights={"text": 1.0}).rows(state))
    far = state.sources["text"]._replace(position=11)  # lane 0 has 11 of 41 records
    with pytest.raises(UserError, match="lane 0 of 4: its state is not one of source 'text'"):
        next(make_lane().rows(replace(state, sources={**state.sources, "text": far})))
    with pytest.raises(UserError, match="expected the state of a lane, got"):
        LaneState.from_json({"row": 3})


@pytest.mark.parametrize("text_path", ["local", "global"])
@pytest.mark.parametrize("row_units", [MIN_ROOM, 17, 200])
def test_batches_of_any_mixture_are_planned_alike_without_the_native_library(
    corpus, make_lane, monkeypatch, row_units, text_path
):
    """Documents cut at every place, of one unit and of more than a row, and what is no speech."""
    weights = {"text": 1.0, "speech": 1.0, "bare": 0.2, "speech:text-to-speech": 0.5}
    plan = PlanConfig(slots=3, local_window=9, decoder_window=4, text_path=text_path)

    def batches():
        lanes = [
            make_lane(number, weights, row_units=row_units, weights_in="units",
                      patching=PatchingConfig(strategy="mixed", size=3, silence="merged"))
            for number in range(4)
        ]  # fmt: skip
        streams = [lane.rows(lane.first_state()) for lane in lanes]
        return [
            make_batch([next(stream)[0] for stream in streams], corpus.vocabulary, plan, step=step)
            for step in range(12)
        ]

    planned = batches()
    monkeypatch.setattr(native, "LIBRARY", native.LIBRARY.with_name("absent"))
    assert native.unavailable_reason() is not None
    for one, other in zip(planned, batches(), strict=True):
        assert plain(one) == plain(other)


def plain(batch):
    return tree_map_only(torch.Tensor, lambda x: (x.dtype, x.tolist()), asdict(batch))
