"""Work comes heaviest first, each block once; shared ranges are found, and only those."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lst_kernels import KeyRanges, PatchLayout
from lst_kernels.schedule import BLOCK_ROWS, heavy_first, queries_per_range

MANY = settings(deadline=None, derandomize=True, max_examples=200)


@MANY
@given(lengths=st.lists(st.integers(0, 400), max_size=12), window=st.sampled_from([3, 200]))
def test_blocks_come_in_decreasing_order_of_the_columns_they_span(lengths, window):
    layout = PatchLayout.from_lengths(lengths, [len(lengths)])
    ranges = layout.sliding_window(window)
    order = heavy_first(ranges.start, ranges.stop).tolist()
    rows = range(0, ranges.num_queries, BLOCK_ROWS)
    assert sorted(order) == list(range(len(rows)))
    last = [min(row + BLOCK_ROWS, ranges.num_queries) - 1 for row in rows]
    work = [int(ranges.stop[b] - ranges.start[a]) for a, b in zip(rows, last, strict=True)]
    assert [work[block] for block in order] == sorted(work, reverse=True)


@MANY
@given(
    runs=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2)), max_size=6),
    slots=st.integers(1, 3),
)
def test_queries_share_a_range_in_groups_or_it_is_said_that_they_do_not(runs, slots):
    """Runs of (queries, keys of their range, keys skipped before it)."""
    start, stop, at = [], [], 0
    for queries, keys, skipped in runs:
        at += skipped
        start += [at] * (queries * slots)
        at += keys
        stop += [at] * (queries * slots)
    found = queries_per_range(torch.tensor(start).int(), torch.tensor(stop).int())
    mask = KeyRanges(torch.tensor(start).long(), torch.tensor(stop).long(), at).dense_mask()
    shared = {queries * slots for queries, keys, _ in runs if keys}
    if found == 0:  # rightly so: the numbers differ, or do not divide the queries between
        assert len(shared) > 1 or any(q * slots % max(shared, default=1) for q, *_ in runs)
        return
    assert len(start) % found == 0
    for i in range(0, len(start), found):
        group, others = mask[i : i + found], torch.cat((mask[:i], mask[i + found :]))
        assert (group == group[0]).all()
        assert not (group[0] & others.any(0)).any()


def test_a_patch_encoder_has_its_slots_and_a_window_has_none():
    layout = PatchLayout.from_lengths([0, 2, 0, 1, 3, 0], [4, 2])
    for slots in (1, 2, 5):
        assert layout.patches_read_tokens(slots=slots).slots == slots
    assert layout.sliding_window(2).slots == 0
    assert layout.patches_read_tokens(2).slots == 0
