"""Splitting a document loses nothing, counts nothing twice and always goes on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.data.interleave import Document
from lst.data.packing import IGNORE, MIN_ROOM, concatenate, patch_document, take
from lst.data.patching import Aligned, NoPatching, Static
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, Vocabulary

VOCABULARY = Vocabulary(num_pieces=100, num_units=100)


def make_document(spans, **options):
    """spans: lengths of text (even places) and speech (odd places); one span alone is pure text.
    The ids of the content count up, so that each token tells where it comes from."""
    tokens, aligned, counter = [BOS], [], 0
    for place, length in enumerate(spans):
        if len(spans) > 1:
            tokens.append(SPEECH if place % 2 else TEXT)
        first = VOCABULARY.first_unit if place % 2 else VOCABULARY.first_piece
        if place % 2 and length > 3:
            aligned.append((len(tokens) + 1, len(tokens) + 3))
        tokens += [first + (counter + i) % 100 for i in range(length)]
        counter += length
    defaults = {"breaks": (), "score_from": 0, "score_eos": True, "record_id": "r"}
    return Document(
        tokens=np.array([*tokens, EOS], np.int32),
        aligned=np.array(aligned, np.int32).reshape(-1, 2),
        **(defaults | options),
    )


def parts_of(document, rooms):
    """The parts that rows with these rooms take, the last room for all that follow."""
    parts, consumed, rooms = [], 0, list(rooms)
    while consumed < len(document.lengths):
        room = rooms.pop(0) if len(rooms) > 1 else rooms[0]
        part, after = take(document, consumed, room)
        assert after > consumed
        assert part.lengths.sum() == len(part.tokens) == len(part.targets)
        assert len(part.lengths) == part.patches_per_document[0] == len(part.closed_late)
        assert len(part.lengths) <= room
        if after < len(document.lengths):
            assert len(part.lengths) == room
        parts.append((part, consumed))
        consumed = after
    return parts


documents = st.builds(
    lambda spans, strategy: patch_document(make_document(spans), VOCABULARY, strategy),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.sampled_from([NoPatching(), Static(size=3), Aligned(), Aligned(silence="merged")]),
)
rooms = st.tuples(st.integers(1, 20), st.integers(MIN_ROOM, 12), st.integers(MIN_ROOM, 12))


@given(documents, rooms)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_parts_put_together_are_the_document(document, rooms):
    parts = parts_of(document, rooms)
    tokens, targets, lengths, late = [], [], [], []
    for part, consumed in parts:
        if consumed:
            opening = 1 if has_no_marker(part, document, len(tokens)) else 2
            assert part.tokens[0] == BOS
            assert (part.lengths[:opening] == 1).all()
            assert (part.targets[: opening - 1] == IGNORE).all()
            # The target that the part before had to leave out is that of the opening's last token.
            assert targets[-1] == IGNORE
            targets[-1] = part.targets[opening - 1]
        else:
            opening = 0
        tokens += part.tokens[opening:].tolist()
        targets += part.targets[opening:].tolist()
        lengths += part.lengths[opening:].tolist()
        late += part.closed_late[opening:].tolist()
    whole = document.tokens.tolist()
    if tokens != whole:  # an <eos> that would have opened a row alone
        assert [*tokens, EOS] == whole
        assert targets[-1] == IGNORE
        assert (targets[:-1], lengths, late) == (
            document.targets[:-2].tolist(),
            document.lengths[:-1].tolist(),
            document.closed_late[:-1].tolist(),
        )
    else:
        assert targets == document.targets.tolist()
        assert lengths == document.lengths.tolist()
        assert late == document.closed_late.tolist()


def has_no_marker(part, document, start):
    """Whether the part that goes on at token ``start`` opens with <bos> alone."""
    before = document.tokens[:start]
    pure_text = not np.isin(document.tokens, (TEXT, SPEECH)).any()
    marker_next = document.tokens[start] in (TEXT, SPEECH)
    if not pure_text and not marker_next and len(before) > 1:
        markers = before[np.isin(before, (TEXT, SPEECH))]
        assert part.tokens[1] == markers[-1]
    return pure_text or marker_next or not np.isin(before, (TEXT, SPEECH)).any()


@given(documents, rooms)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_every_target_is_the_next_token_of_its_part(document, rooms):
    for part, _ in parts_of(document, rooms):
        scored = np.flatnonzero(part.targets != IGNORE)
        np.testing.assert_array_equal(part.targets[scored], part.tokens[scored + 1])
        assert part.targets[-1] == IGNORE


def test_a_speech_span_split_in_two():
    document = patch_document(make_document([2, 10]), VOCABULARY, Static(size=4))
    unit = VOCABULARY.first_unit
    first, consumed = take(document, 0, 6)  # <bos> <t> a b <s> 2345
    assert (consumed, first.lengths.tolist()) == (6, [1, 1, 1, 1, 1, 4])
    assert first.tokens.tolist() == [BOS, TEXT, 5, 6, SPEECH, *range(unit + 2, unit + 6)]
    assert first.targets.tolist()[-2:] == [unit + 5, IGNORE]
    rest, consumed = take(document, consumed, 6)  # <bos> <s> 6789 10,11 <eos>
    assert (consumed, rest.lengths.tolist()) == (9, [1, 1, 4, 2, 1])
    assert rest.tokens.tolist() == [BOS, SPEECH, *range(unit + 6, unit + 12), EOS]
    assert rest.targets.tolist() == [IGNORE, *rest.tokens.tolist()[2:], IGNORE]
    assert rest.closed_late.tolist() == [False, False, False, True, False]


def test_pure_text_reopens_without_a_marker():
    document = patch_document(make_document([6]), VOCABULARY, Static(size=4))
    _, consumed = take(document, 0, 4)
    rest, _ = take(document, consumed, 4)
    assert rest.tokens.tolist() == [BOS, 8, 9, 10]
    assert rest.targets.tolist() == [8, 9, 10, IGNORE]


def test_a_row_never_opens_with_eos_alone():
    document = patch_document(make_document([6]), VOCABULARY, Static(size=4))
    part, consumed = take(document, 0, 7)
    assert part.tokens.tolist() == [BOS, *range(5, 11)]
    assert consumed == len(document.lengths)
    assert part.targets[-1] == IGNORE


@pytest.mark.parametrize(
    ("options", "scored"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"score_from": 1}, [1, 2, 3, 4, 5]),
        ({"score_from": 3}, [3, 4, 5]),
        ({"score_from": 3, "score_eos": False}, [3, 4]),
    ],
)
def test_targets_follow_the_document(options, scored):
    packed = patch_document(make_document([4], **options), VOCABULARY, NoPatching())
    places = np.flatnonzero(packed.targets != IGNORE) + 1
    assert places.tolist() == scored
    np.testing.assert_array_equal(packed.targets[places - 1], packed.tokens[places])


def test_concatenation_keeps_documents_apart():
    one = patch_document(make_document([2, 5]), VOCABULARY, Static(size=4))
    two = patch_document(make_document([3], record_id="q"), VOCABULARY, Static(size=4))
    both = concatenate([one, two])
    assert both.patches_per_document.tolist() == [len(one.lengths), len(two.lengths)]
    assert both.record_ids == ("r", "q")
    assert both.tokens.tolist() == one.tokens.tolist() + two.tokens.tolist()
    assert both.targets[len(one.tokens) - 1] == IGNORE  # nothing predicts across documents
