"""Every pattern reads what its definition, walked through token by token, says it reads."""

import pickle
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lst_kernels import KeyRanges, PatchLayout, range_attention
from lst_kernels.ranges import part_ranges

QUICK = settings(deadline=None, derandomize=True, max_examples=60)

# A document is a list of (tokens of a patch, closed late).
patches = st.tuples(st.sampled_from([0, 1, 1, 2, 3, 6]), st.booleans())
streams = st.lists(st.lists(patches, max_size=6), max_size=5)
windows = st.sampled_from([1, 2, 3, None])
EDGES = [
    [],
    [[]],
    [[(0, False)]],
    [[(0, True), (2, False), (0, False), (1, True)], [], [(0, False)], [(1, False)]],
    [[(1, False)] * 9 + [(300, True)] + [(1, False)] * 9],
    [[(1, False), (2, True)]] * 100,
]


def with_edges(*others):
    def decorate(test):
        for edge in EDGES:
            test = example(edge, *others)(test)
        return QUICK(test)

    return decorate


def make(stream, *, dead=False):
    """The layout, and the walk through it: (patch, document, tokens, late) of each patch."""
    num_live = sum(map(len, stream))
    if dead:
        stream = [*stream, [(0, False), (5, False)]]
    walk, token = [], 0
    for n, document in enumerate(stream):
        for length, late in document:
            walk.append((len(walk), n, range(token, token + length), late))
            token += length
    layout = PatchLayout.from_lengths(
        [len(tokens) for _, _, tokens, _ in walk],
        [len(document) for document in stream],
        closed_late=[late for *_, late in walk],
        num_dead_patches=2 if dead else 0,
    )
    return layout, walk[:num_live]


def readable(walk, token, document):
    """The patches readable at a token, by the rule."""
    found = []
    for p, n, tokens, late in walk:
        if n != document:
            continue
        if len(tokens):
            ends = tokens[-1] + (1 if late else 0)
            if token >= ends:
                found.append(p)
        elif not any(m == n for _, m, *_ in walk[:p]) or p - 1 in found:
            found.append(p)
    return found


def expect(ranges, reads, num_queries, num_keys):
    """``reads``: (query, key) pairs. The mask, its transpose and every host value follow."""
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for query, key in reads:
        mask[query, key] = True
    assert torch.equal(ranges.dense_mask(), mask)
    check_plan(ranges)


def check_plan(ranges):
    mask = ranges.dense_mask()
    transpose = ranges.transpose()
    transpose.validate()
    assert torch.equal(transpose.dense_mask(), mask.T)
    assert torch.equal(transpose.transpose().dense_mask(), mask)
    counts, overlap = mask.int(), mask.int() @ mask.int().T
    longest = torch.maximum(counts.sum(1)[:, None], counts.sum(1))
    for plan in (ranges, transpose):
        assert plan.num_pairs == counts.sum()
        if plan.num_pairs:  # else it is what the pattern is where something is read
            assert plan.disjoint == bool(((overlap == 0) | (overlap == longest)).all())
    keys = max(counts.sum(1).tolist(), default=0)
    queries = max(counts.sum(0).tolist(), default=0)
    assert (ranges.max_keys, ranges.max_queries) == (keys, queries)
    assert (transpose.max_keys, transpose.max_queries) == (queries, keys)


@pytest.mark.parametrize("slots", [1, 2])
def test_ranges_that_nobody_reads_are_of_the_kind_of_those_that_are_read(slots):
    """Or code compiled for a stream with speech would be compiled again for one without."""
    kinds = []
    for dead in (2, 6):  # of six patches, of which some or none are alive
        layout = PatchLayout.from_lengths([3] * 6, [6 - dead, dead] if dead < 6 else [6],
                                          num_dead_patches=dead)  # fmt: skip
        decoder = layout.tokens_read_patches(4, slots)
        every = (
            layout.patches_read_tokens(1, slots),
            decoder,
            layout.sliding_window(4),
            layout.block_causal(),
            decoder.select_queries(torch.arange(layout.num_tokens)),
        )
        kinds.append([(each.disjoint, each.slots) for each in every])
        assert all(bool(each.num_pairs) == (dead < 6) for each in every)
    assert kinds[0] == kinds[1]


@with_edges(1, 1, True)
@given(streams, windows, st.sampled_from([1, 2]), st.booleans())
def test_patches_read_the_tokens_of_the_last_patches(stream, window, slots, dead):
    layout, walk = make(stream, dead=dead)
    reads = [
        (p * slots + s, t)
        for p, n, *_ in walk
        for other, m, tokens, _ in walk
        if m == n and other <= p and (window is None or other > p - window)
        for t in tokens
        for s in range(slots)
    ]
    ranges = layout.patches_read_tokens(window, slots)
    expect(ranges, reads, layout.num_patches * slots, layout.num_tokens)


@with_edges(1, 2, True)
@given(streams, windows, st.sampled_from([1, 2]), st.booleans())
def test_tokens_read_the_last_patches_that_are_readable(stream, window, slots, dead):
    layout, walk = make(stream, dead=dead)
    reads = [
        (t, p * slots + s)
        for _, n, tokens, _ in walk
        for t in tokens
        for p in readable(walk, t, n)[-(window or 0) :]
        for s in range(slots)
    ]
    ranges = layout.tokens_read_patches(window, slots)
    expect(ranges, reads, layout.num_tokens, layout.num_patches * slots)


@with_edges(False)
@given(streams, st.booleans())
def test_the_last_readable_patch_of_each_token_and_the_tokens_of_each_patch_agree(stream, dead):
    layout, walk = make(stream, dead=dead)
    last = [-1] * layout.num_tokens
    for _, n, tokens, _ in walk:
        for t in tokens:
            last[t] = max(readable(walk, t, n), default=-1)
    assert layout.readable_ids.tolist() == last
    for p in range(layout.num_patches):
        of_patch = list(range(layout.readable_from[p], layout.replaced_at[p]))
        assert of_patch == [t for t, patch in enumerate(last) if patch == p]


@with_edges(3, True)
@given(streams, st.sampled_from([1, 2, 5, 400]), st.booleans())
def test_a_sliding_window_counts_the_token_itself(stream, window, dead):
    layout, walk = make(stream, dead=dead)
    document = [n for _, n, tokens, _ in walk for _ in tokens]
    reads = [
        (t, u)
        for t in range(len(document))
        for u in range(max(0, t - window + 1), t + 1)
        if document[u] == document[t]
    ]
    expect(layout.sliding_window(window), reads, layout.num_tokens, layout.num_tokens)


@with_edges(True)
@given(streams, st.booleans())
def test_block_causal_units_read_their_document_up_to_themselves(stream, dead):
    layout, walk = make(stream, dead=dead)
    reads = [(p, o) for p, n, *_ in walk for o, m, *_ in walk if m == n and o <= p]
    expect(layout.block_causal(), reads, layout.num_patches, layout.num_patches)


@QUICK
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12), st.data())
def test_any_staircase_has_its_transpose_and_its_selections(pairs, data):
    start = torch.tensor(sorted(min(pair) for pair in pairs), dtype=torch.int32)
    stop = torch.tensor(sorted(max(pair) for pair in pairs), dtype=torch.int32)
    ranges = KeyRanges(start, stop, 7)
    check_plan(ranges)
    index = [i for i in range(len(pairs)) if data.draw(st.booleans())]
    selected = ranges.select_queries(torch.tensor(index, dtype=torch.int64))
    assert torch.equal(selected.dense_mask(), ranges.dense_mask()[index])
    check_plan(selected)


def cut(kinds):
    """Patch a string of kinds as a model must: runs of a kind, cut after three. A patch of three is
    known to end; a shorter one shows its end only in the next token."""
    lengths = []
    for i, kind in enumerate(kinds):
        if i and kind == kinds[i - 1] and lengths[-1] < 3:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return PatchLayout.from_lengths(
        lengths, [len(lengths)], closed_late=[length < 3 for length in lengths]
    )


@QUICK
@given(st.text("ab", min_size=2, max_size=14), st.data())
def test_what_a_token_reads_does_not_depend_on_what_follows(kinds, data):
    at = data.draw(st.integers(1, len(kinds) - 1))
    changed = kinds[:at] + ("b" if kinds[at] == "a" else "a") + kinds[at + 1 :]
    seen = []
    for stream in (kinds, changed):
        layout = cut(stream)
        mask = layout.tokens_read_patches().dense_mask()
        tokens = [
            set(range(a, b))
            for a, b in zip(layout.cu_patches[:-1], layout.cu_patches[1:], strict=True)
        ]
        seen.append([[tokens[p] for p in row.nonzero().flatten()] for row in mask[:at]])
    assert seen[0] == seen[1]


def test_ranges_survive_a_worker_process():
    ranges = PatchLayout.from_lengths([1, 3, 2], [3]).tokens_read_patches()
    for copy in (pickle.loads(pickle.dumps(ranges)), ranges.to("cpu")):
        assert torch.equal(copy.dense_mask(), ranges.dense_mask())
        assert (copy.num_pairs, copy.max_keys) == (ranges.num_pairs, ranges.max_keys)
        check_plan(copy)


def test_ranges_assembled_on_a_device_have_bounds_unless_a_check_is_asked_for(monkeypatch):
    ends = torch.zeros(4, dtype=torch.int32, device="meta")
    ranges = KeyRanges(ends, ends, 3)
    assert (ranges.max_keys, ranges.max_queries, ranges.num_pairs) == (3, 4, 12)
    monkeypatch.setenv("LST_KERNELS_CHECK", "1")
    with pytest.raises((RuntimeError, NotImplementedError)):  # the meta device has no values
        KeyRanges(ends, ends, 3)


@pytest.mark.parametrize("parts", [[0, 1, 2], [0, 0, 1, 3], [2]])
def test_the_ranges_of_parts_read_their_first_keys(parts):
    """Made without the transpose, they are in every other way those that are made with it."""
    lengths = torch.arange(1, len(parts) + 1)
    ranges = part_ranges(torch.tensor(parts), lengths, num_parts=4, part_size=5)
    start = torch.tensor(parts) * 5
    expected = KeyRanges(start, start + lengths, 20)
    torch.testing.assert_close(ranges.dense_mask(), expected.dense_mask())
    for name in ("num_keys", "num_pairs", "max_keys", "disjoint"):
        assert getattr(ranges, name) == getattr(expected, name), name
    assert ranges.slots == (0 if parts == [0, 0, 1, 3] else 1)
    q, k, v = (torch.randn(n, 2, 8) for n in (len(parts), 20, 20))
    torch.testing.assert_close(range_attention(q, k, v, ranges), range_attention(q, k, v, expected))
    with pytest.raises(RuntimeError, match="for a forward pass alone"):
        range_attention(q.requires_grad_(), k, v, ranges).sum().backward()


@pytest.mark.parametrize("window", [100, 2**31 - 1, 2**31, 2**32, 2**40, sys.maxsize])
def test_a_window_past_every_document_is_no_window(window):
    layout = make([[(1, False), (3, True)], [(2, False), (0, False), (1, True)]])[0]
    for ranges, all_of_them in (
        (layout.tokens_read_patches(window), layout.tokens_read_patches(None)),
        (layout.patches_read_tokens(window), layout.patches_read_tokens(None)),
        (layout.sliding_window(window), layout.sliding_window(7)),
    ):
        assert torch.equal(ranges.dense_mask(), all_of_them.dense_mask())


@pytest.mark.parametrize("integer", [np.int64, torch.tensor], ids=["NumPy", "torch"])
def test_the_number_of_keys_may_be_an_integer_of_any_kind(integer):
    ranges = ranges_of([0, 1], [2, 5], integer(5))
    assert type(ranges.num_keys) is int
    assert torch.equal(ranges.dense_mask(), ranges_of([0, 1], [2, 5], 5).dense_mask())


def ranges_of(start, stop, num_keys=4):
    return KeyRanges(torch.tensor(start), torch.tensor(stop), num_keys)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ranges_of([0], [1, 2]), ValueError, "stop has 2 queries, but start has 1"),
        (lambda: ranges_of([0.0], [1.0]), TypeError, "start must be a tensor of integers"),
        (lambda: ranges_of([[0]], [[1]]), ValueError, "start must have one dimension"),
        (lambda: ranges_of([0, 3], [1, 2]), ValueError, "query 1 starts at 3, past its stop 2"),
        (
            lambda: ranges_of([1, 0], [2, 2]),
            ValueError,
            "start must not decrease; at query 1 it falls from 1 to 0",
        ),
        (
            lambda: ranges_of([0, 0, 0], [2, 3, 2]),
            ValueError,
            "stop must not decrease; at query 2 it falls from 3 to 2",
        ),
        (lambda: ranges_of([-1], [2]), ValueError, "start must not be negative; got -1"),
        (
            lambda: ranges_of([0, 0, 1], [4, 5, 6]),
            ValueError,
            "stop reaches 5 at query 1, but there are 4 keys",
        ),
        (lambda: ranges_of([0], [0], -1), ValueError, "num_keys must not be negative; got -1"),
        (
            lambda: ranges_of([0], [1]).select_queries(torch.tensor([1])),
            ValueError,
            "index must lie in [0, 1)",
        ),
        (
            lambda: ranges_of([0, 0], [1, 1]).select_queries(torch.tensor([1, 0])),
            ValueError,
            "index must not decrease; at 1 it falls from 1 to 0",
        ),
        (
            lambda: ranges_of([0, 0], [1, 1]).select_queries(torch.tensor([True, False])),
            TypeError,
            "index must be a tensor of integers; got torch.bool",
        ),
        (
            lambda: ranges_of([0, 0], [1, 1]).select_queries([0]),
            TypeError,
            "index must be a tensor of integers; got list",
        ),
        (  # in int32 they are 0 and 1
            lambda: ranges_of([2**32], [2**32 + 1]),
            ValueError,
            "start must lie within the keys, fewer than 2**31; got 4294967296",
        ),
        (lambda: ranges_of([0], [1], 1.0), TypeError, "num_keys must be an integer; got 1.0"),
        (lambda: ranges_of([0], [1], 2**31), ValueError, "fewer than 2**31 keys; got 2147483648"),
    ],
)
def test_wrong_input_is_told_in_the_callers_words(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
