"""The plan that the native library makes in one pass is the vectorised code's, field by field;
offsets that it would misread are refused."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lst_kernels import KeyRanges, PatchLayout, layout, native, ranges

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
)
MANY = settings(deadline=None, derandomize=True, max_examples=150)

patches = st.tuples(st.sampled_from([0, 1, 1, 2, 3, 150]), st.booleans())
documents = st.lists(st.lists(patches, max_size=8), max_size=6)
ends = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40)
groups = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2)), max_size=8)


def int32(*lists):
    return [torch.tensor(each, dtype=torch.int32) for each in lists]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype
            assert torch.equal(value, other[name]), name
        else:
            assert (type(value), value) == (type(other[name]), other[name]), name


def assert_planned_alike(start, stop, num_keys):
    start, stop = int32(start, stop)
    assert_same(native.plan_ranges(start, stop, num_keys), ranges._plan(start, stop, num_keys))


@MANY
@given(steps=ends, spare=st.integers(0, 300))
@example(steps=[], spare=0)
@example(steps=[(0, 0)] * 300, spare=2)
@example(steps=[(1, 1)] * 300, spare=0)
@example(steps=[(0, 3)] * 300, spare=129)
def test_ranges_of_any_kind(steps, spare):
    start, stop = [], []
    for skipped, keys in steps:
        start.append((start[-1] if start else 0) + skipped)
        stop.append(max(stop[-1] if stop else 0, start[-1] + keys))
    assert_planned_alike(start, stop, (stop[-1] if stop else 0) + spare)


@MANY
@given(runs=groups, slots=st.integers(1, 3))
def test_ranges_that_share_no_key(runs, slots):
    """Runs of (queries, keys of their range, keys skipped before it)."""
    start, stop, at = [], [], 0
    for queries, keys, skipped in runs:
        at += skipped
        start += [at] * (queries * slots)
        at += keys
        stop += [at] * (queries * slots)
    assert_planned_alike(start, stop, at)


@MANY
@given(stream=documents, num_dead=st.integers(0, 3), keep=st.integers(1, 5))
def test_layouts(stream, num_dead, keep):
    stream = [*stream, [(0, False)] * (num_dead - 1) + [(5, False)]] if num_dead else stream
    lengths = torch.tensor([length for each in stream for length, _ in each], dtype=torch.int64)
    per_document = torch.tensor([len(each) for each in stream], dtype=torch.int64)
    late = torch.tensor([late for each in stream for _, late in each], dtype=torch.bool)
    whole = (
        layout._offsets(lengths),
        layout._offsets(per_document),
        late,
        int(lengths.sum()),
        num_dead,
    )
    assert_same(native.plan_layout(*whole, None), layout._plan(*whole, None))

    kept = torch.arange(int(lengths.sum())) % keep == 0
    before = layout._offsets(kept.int())
    readable_from = before[native.plan_layout(*whole, None)["readable_from"]]
    some = (before[whole[0]], whole[1], late, int(kept.sum()), num_dead)
    assert_same(native.plan_layout(*some, readable_from), layout._plan(*some, readable_from))


@pytest.mark.parametrize(
    ("start", "stop", "num_keys"),
    [
        ([1, 0], [1, 1], 2),
        ([0, 0], [2, 1], 2),
        ([2], [1], 2),
        ([-1], [1], 2),
        ([0, 0], [1, 3], 2),
    ],
)
def test_what_are_no_ranges_is_refused(start, stop, num_keys):
    with pytest.raises(ValueError, match="must never fall"):
        native.plan_ranges(*int32(start, stop), num_keys)


@pytest.mark.parametrize(
    ("cu_patches", "cu_documents", "num_tokens"),
    [([0, 2, 1], [0, 2], 1), ([0, 1, 2], [0, 3, 2], 2), ([1, 1, 2], [0, 2], 2),
     ([0, 1, 2], [0, 1], 2), ([0, 1, 2], [0, 2], 3)],
)  # fmt: skip
def test_offsets_that_fall_or_end_elsewhere_are_refused(cu_patches, cu_documents, num_tokens):
    late = torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="must rise from 0"):
        native.plan_layout(*int32(cu_patches, cu_documents), late, num_tokens, 0, None)


def outcome(make):
    """The fields of what is made, or the error."""
    try:
        return vars(make())
    except (TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def assert_made_alike(make):
    """With the library and without it: the same fields, or the same error."""
    with pytest.MonkeyPatch.context() as patched:
        first = outcome(make)
        patched.setattr(native, "LIBRARY", native.LIBRARY.with_name("absent"))
        assert_same(first, outcome(make))


edges = st.sampled_from([-(2**63), -(2**31), -1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1])
integers = st.one_of(st.integers(-1, 4), st.integers(0, 3), st.integers(0, 3), edges)


@MANY
@given(start=st.lists(integers, max_size=4), stop=st.lists(integers, max_size=4), num_keys=integers)
@example(start=[2**32], stop=[2**32 + 1], num_keys=3)
def test_any_integers_are_the_same_ranges_or_the_same_error_without_the_library(
    start, stop, num_keys
):
    start, stop = (torch.tensor(ends, dtype=torch.int64) for ends in (start, stop))
    if 2**16 < num_keys < 2**31:  # a transpose of that many keys is only large
        num_keys = 2**16
    assert_made_alike(lambda: KeyRanges(start, stop, num_keys))


@MANY
@given(
    lengths=st.lists(integers, max_size=4),
    documents=st.lists(integers, max_size=3),
    num_dead=st.integers(-1, 2),
    late=st.sampled_from([None, [True], [True, False]]),
)
@example(lengths=[2**62] * 4 + [1], documents=[5], num_dead=0, late=None)
def test_any_integers_are_the_same_layout_or_the_same_error_without_the_library(
    lengths, documents, num_dead, late
):
    if 2**16 < sum(lengths) < 2**31:  # a stream of that many tokens is only large
        lengths = [min(length, 2**16) for length in lengths]
    assert_made_alike(
        lambda: PatchLayout.from_lengths(
            lengths, documents, num_dead_patches=num_dead, closed_late=late
        )
    )


def test_buffers_of_another_length_are_refused():
    start, stop, late = *int32([0, 0], [1]), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="stop has 1 queries, but start has 2"):
        native.plan_ranges(start, stop, 4)
    with pytest.raises(ValueError, match="readable_from has 1 of 2 patches"):
        native.plan_layout(*int32([0, 1, 2], [0, 2]), late, 2, 0, stop)


def test_without_the_library_a_batch_has_the_same_plan(monkeypatch):
    def plans():
        made = PatchLayout.from_lengths([1, 3, 2, 0, 1], [2, 3], closed_late=[True] * 5)
        reads = made.tokens_read_patches(2, slots=2)
        return vars(made), vars(reads), vars(KeyRanges(reads.start, reads.stop, reads.num_keys))

    first = plans()
    monkeypatch.setattr(native, "LIBRARY", native.LIBRARY.with_name("absent"))
    assert native.unavailable_reason() is not None
    for one, other in zip(first, plans(), strict=True):
        assert_same(one, other)
