"""A layout says of every patch and token where it lies, whatever it is made from."""

import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lst_kernels import PatchLayout

QUICK = settings(deadline=None, derandomize=True, max_examples=60)

# A stream is a list of documents, a document a list of patch lengths.
streams = st.lists(st.lists(st.sampled_from([0, 1, 1, 2, 3, 6]), max_size=6), max_size=6)
EDGES = [
    [],
    [[]],
    [[0]],
    [[1]],
    [[], [0, 2, 0], [], [0]],
    [[1] * 20 + [300] + [1] * 20],
    [[1, 2]] * 100,
]


def with_edges(test):
    for edge in EDGES:
        test = example(stream=edge)(test)
    return QUICK(test)


def make(stream, **kwargs):
    lengths = [length for document in stream for length in document]
    return PatchLayout.from_lengths(lengths, [len(document) for document in stream], **kwargs)


def same(a, b):
    fields, others = vars(a), vars(b)
    return all(
        torch.equal(value, others[name])
        if isinstance(value, torch.Tensor)
        else value == others[name]
        for name, value in fields.items()
    )


@with_edges
@given(stream=streams)
def test_offsets_ids_and_positions_are_those_of_a_walk_through_the_stream(stream):
    layout = make(stream)
    cu_patches, cu_documents, cu_tokens = [0], [0], [0]
    patch_ids, token_positions, patch_positions = [], [], []
    for document in stream:
        for position, length in enumerate(document):
            patch_ids += [len(cu_patches) - 1] * length
            patch_positions.append(position)
            cu_patches.append(cu_patches[-1] + length)
        token_positions += range(sum(document))
        cu_documents.append(len(cu_patches) - 1)
        cu_tokens.append(cu_patches[-1])
    for name, expected in {
        "cu_patches": cu_patches,
        "cu_documents": cu_documents,
        "cu_tokens": cu_tokens,
        "patch_ids": patch_ids,
        "token_positions": token_positions,
        "patch_positions": patch_positions,
    }.items():
        assert getattr(layout, name).dtype == torch.int32
        assert getattr(layout, name).tolist() == expected, name
    assert (layout.num_tokens, layout.num_patches) == (len(patch_ids), len(patch_positions))
    assert layout.num_documents == len(stream)
    assert layout.max_patch_length == max((x for d in stream for x in d), default=0)
    assert layout.max_document_tokens == max(map(sum, stream), default=0)
    assert layout.max_document_patches == max(map(len, stream), default=0)


@with_edges
@given(stream=streams)
def test_patch_ids_make_the_layout_they_were_read_from(stream):
    layout = make(stream)
    counts = np.array([len(document) for document in stream], dtype=np.int64)
    assert same(PatchLayout.from_patch_ids(layout.patch_ids, counts), layout)


@with_edges
@given(stream=streams)
def test_boundaries_make_the_layout_without_its_empty_patches_then_padding(stream):
    stream = [[length for length in document if length] for document in stream]
    layout = make(stream)
    starts = torch.zeros(layout.num_tokens, dtype=torch.bool)
    starts[layout.cu_patches[:-1].long()] = True
    starts[layout.cu_tokens[:-1][layout.cu_tokens.diff() > 0].long()] = False  # known without
    padded = PatchLayout.from_boundaries(
        starts, max_patches=layout.num_patches + 2, cu_tokens=layout.cu_tokens
    )
    assert same(padded, make([*stream, [0, 0]]))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_static_patch_cut_short_by_its_document_is_closed_late(size):
    layout = PatchLayout.static([0, 3, 8, 5], size)
    lengths = layout.cu_patches.diff()
    assert layout.cu_tokens.tolist() == [0, 0, 3, 11, 16]
    assert layout.closed_late.tolist() == (lengths < size).tolist()
    for first, stop in zip(layout.cu_documents[:-1], layout.cu_documents[1:], strict=True):
        assert (lengths[first : max(first, stop - 1)] == size).all()


def test_dead_patches_are_in_the_stream_but_in_no_patch_maximum():
    layout = make([[1, 2], [3], [0, 0, 250]], num_dead_patches=3)
    assert (layout.num_tokens, layout.num_patches, layout.num_documents) == (256, 6, 3)
    assert (layout.num_dead_tokens, layout.num_dead_patches) == (250, 3)
    assert layout.max_patch_length == 3
    assert layout.max_document_tokens == 250  # what attention over cu_tokens has to be told


@QUICK
@given(
    stream=streams,
    late=st.lists(st.booleans(), min_size=40, max_size=40),
    keep=st.lists(st.booleans(), min_size=300, max_size=300),
)
def test_a_substream_reads_what_its_tokens_read_in_the_stream(stream, late, keep):
    num_patches = sum(map(len, stream))
    layout = make(stream, closed_late=late[:num_patches])
    sub, index = layout.select_tokens(torch.tensor(keep[: layout.num_tokens], dtype=torch.bool))
    assert index.tolist() == [t for t in range(layout.num_tokens) if keep[t]]
    assert torch.equal(sub.patch_ids, layout.patch_ids[index])
    assert torch.equal(sub.readable_ids, layout.readable_ids[index])
    assert torch.equal(sub.cu_documents, layout.cu_documents)
    for window in (1, 2, None):
        whole = layout.tokens_read_patches(window, slots=2).select_queries(index)
        assert torch.equal(
            sub.tokens_read_patches(window, slots=2).dense_mask(), whole.dense_mask()
        )
    for n in range(layout.num_documents):
        of_document = sub.token_positions[sub.cu_tokens[n] : sub.cu_tokens[n + 1]]
        assert of_document.tolist() == list(range(len(of_document)))


def test_a_substream_of_a_stream_with_a_dead_tail_keeps_it_dead():
    layout = make([[1, 2], [0, 4]], num_dead_patches=2)
    sub, _ = layout.select_tokens(torch.tensor([1, 0, 1, 1, 1, 0, 0], dtype=torch.bool))
    assert (sub.num_dead_patches, sub.num_dead_tokens) == (2, 2)
    assert sub.readable_ids.tolist() == [0, 1, -1, -1]


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "of",
    [
        lambda x: np.repeat(x, 2)[::2],
        lambda x: x[::-1].copy()[::-1],
        lambda x: read_only(x.copy()),
        lambda x: x.astype(x.dtype.newbyteorder()),
        lambda x: torch.from_numpy(x).repeat_interleave(2)[::2],
    ],
    ids=["every second", "backwards", "read-only", "swapped bytes", "strided tensor"],
)
def test_arrays_may_lie_in_memory_in_any_way(of):
    lengths, documents = np.array([1, 2, 0, 3]), np.array([3, 1])
    late = np.array([True, False, False, True])
    expected = PatchLayout.from_lengths(lengths, documents, closed_late=late)
    layout = PatchLayout.from_lengths(of(lengths), of(documents), closed_late=of(late))
    assert same(layout, expected)
    assert same(
        PatchLayout.from_patch_ids(
            of(expected.patch_ids.numpy()), of(documents), closed_late=of(late)
        ),
        expected,
    )


def test_one_flag_may_be_spread_over_all_patches():
    spread = torch.tensor(True).expand(3)
    layout = PatchLayout.from_lengths([1, 2, 1], [3], closed_late=spread)
    assert same(layout, PatchLayout.from_lengths([1, 2, 1], [3], closed_late=[True] * 3))


@pytest.mark.parametrize("integer", [np.int64, torch.tensor], ids=["NumPy", "torch"])
def test_sizes_may_be_integers_of_any_kind(integer):
    layout = make([[1, 2], [3]], num_tokens=integer(6), num_dead_patches=integer(1))
    assert same(layout, make([[1, 2], [3]], num_tokens=6, num_dead_patches=1))
    assert same(PatchLayout.static([7, 4], integer(4)), PatchLayout.static([7, 4], 4))
    starts = torch.tensor([True, False, True])
    padded = PatchLayout.from_boundaries(starts, max_patches=integer(3), closed_late=1)
    assert same(padded, PatchLayout.from_boundaries(starts, max_patches=3, closed_late=True))
    for reads in ("tokens_read_patches", "patches_read_tokens", "sliding_window"):
        ranges = getattr(layout, reads)(integer(2))
        assert same(ranges, getattr(layout, reads)(2)), reads


def test_a_layout_survives_a_worker_process():
    layout = make([[1, 2], [3, 0]], closed_late=[True, False, True, False])
    assert same(pickle.loads(pickle.dumps(layout)), layout)
    assert same(layout.to("cpu"), layout)


def test_layouts_made_on_a_device_ask_it_nothing():
    """The meta device holds no values: whatever asks for one fails there."""
    lengths = torch.ones(5, dtype=torch.int32, device="meta")
    starts = torch.ones(9, dtype=torch.bool, device="meta")
    for layout in (
        PatchLayout.from_lengths(lengths, [2, 3], num_tokens=9),
        PatchLayout.from_boundaries(starts, max_patches=5),
    ):
        assert (layout.num_tokens, layout.num_patches) == (9, 5)
        assert layout.max_patch_length == 9  # a bound
        assert layout.tokens_read_patches(2).max_keys == 2
        assert layout.patches_read_tokens().disjoint
        assert layout.sliding_window(4).transpose().num_queries == 9
        assert layout.block_causal().num_keys == 5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PatchLayout.from_lengths([1.5], [1]), TypeError, "patch_lengths must be integers"),
        (
            lambda: PatchLayout.from_lengths([[1]], [1]),
            ValueError,
            "one dimension; got shape (1, 1)",
        ),
        (lambda: PatchLayout.from_lengths([2, -1], [2]), ValueError, "negative; got -1"),
        (lambda: PatchLayout.from_lengths([2], [2, -1]), ValueError, "negative; got -1"),
        (
            lambda: PatchLayout.from_lengths([2, 1], [1]),
            ValueError,
            "patches_per_document sums to 1, but there are 2 patch_lengths",
        ),
        (
            lambda: PatchLayout.from_lengths([2, 1], [2], num_tokens=4),
            ValueError,
            "num_tokens is 4, but patch_lengths sums to 3",
        ),
        (
            lambda: PatchLayout.from_lengths([2, 1], [2], num_dead_patches=1),
            ValueError,
            "num_dead_patches is 1, but the last document has 2 patches",
        ),
        (
            lambda: PatchLayout.from_lengths([2**30, 2**30], [2]),
            ValueError,
            "fewer than 2**31 tokens; got 2147483648",
        ),
        (
            lambda: PatchLayout.from_lengths([2, 1], [2], closed_late=[True]),
            ValueError,
            "closed_late has shape (1,), but there are 2 patches",
        ),
        (
            lambda: PatchLayout.from_lengths([2, 1], [2], closed_late=[1, 0]),
            TypeError,
            "closed_late must be bool",
        ),
        (
            lambda: PatchLayout.from_patch_ids([0, 1, 0], [2]),
            ValueError,
            "patch_ids must not decrease; at token 2 it falls from 1 to 0",
        ),
        (lambda: PatchLayout.from_patch_ids([0, 2], [2]), ValueError, "lie in [0, 2)"),
        (lambda: PatchLayout.static([4], 0), ValueError, "size must be at least 1; got 0"),
        (lambda: PatchLayout.static([-4], 2), ValueError, "must not be negative; got -4"),
        (
            lambda: PatchLayout.from_boundaries(torch.ones(3, dtype=torch.bool), max_patches=2),
            ValueError,
            "max_patches is 2, but there are 3 patches",
        ),
        (
            lambda: PatchLayout.from_boundaries(torch.ones(3), max_patches=2),
            TypeError,
            "starts must be a (T,) bool tensor",
        ),
        (
            lambda: PatchLayout.from_boundaries([True, False], max_patches=2),
            TypeError,
            "starts must be a (T,) bool tensor; got list",
        ),
        (
            lambda: PatchLayout.from_boundaries(
                torch.ones(3, dtype=torch.bool), max_patches=3, cu_tokens=[0, 2]
            ),
            ValueError,
            "cu_tokens must rise from 0 to the 3 tokens of starts; got [0, 2]",
        ),
        (
            lambda: PatchLayout.from_lengths([2], [1]).select_tokens(torch.ones(3)),
            ValueError,
            "keep must be a bool tensor of shape (2,)",
        ),
        (
            lambda: PatchLayout.from_lengths([2], [1]).tokens_read_patches(0),
            ValueError,
            "window counts the patch itself, so it is at least 1; got 0",
        ),
        (
            lambda: PatchLayout.from_lengths([2], [1]).patches_read_tokens(slots=0),
            ValueError,
            "slots must be at least 1; got 0",
        ),
        (
            lambda: PatchLayout.from_lengths([2], [1]).sliding_window(0),
            ValueError,
            "at least 1; got 0",
        ),
        (
            lambda: PatchLayout.from_lengths(None, [1]),
            TypeError,
            "patch_lengths must be integers; got NoneType",
        ),
        (
            lambda: PatchLayout.from_lengths(torch.tensor([1j]), [1]),
            TypeError,
            "patch_lengths must be integers; got torch.complex64",
        ),
        (  # their sum in int64 is 1
            lambda: PatchLayout.from_lengths([2**62] * 4 + [1], [5]),
            ValueError,
            "patch_lengths must be below 2**31; got 4611686018427387904",
        ),
        (
            lambda: PatchLayout.from_lengths([1] * 5, [2**62] * 4 + [5]),
            ValueError,
            "patches_per_document must be below 2**31; got 4611686018427387904",
        ),
        (
            lambda: PatchLayout.from_lengths([2, 1], [2], num_tokens=3.0),
            TypeError,
            "num_tokens must be an integer; got 3.0",
        ),
        (
            lambda: PatchLayout.from_lengths([2, 1], [1, 1], num_dead_patches=1.0),
            TypeError,
            "num_dead_patches must be an integer; got 1.0",
        ),
        (
            lambda: PatchLayout.from_patch_ids([], [-3]),
            ValueError,
            "patches_per_document must not be negative; got -3",
        ),
        (lambda: PatchLayout.static([4], 1.5), TypeError, "size must be an integer; got 1.5"),
        (
            lambda: PatchLayout.static([2**40], 2**30),
            ValueError,
            "tokens_per_document must be below 2**31; got 1099511627776",
        ),
        (
            lambda: PatchLayout.from_boundaries(torch.ones(3, dtype=torch.bool), max_patches=3.0),
            TypeError,
            "max_patches must be an integer; got 3.0",
        ),
        (
            lambda: PatchLayout.from_lengths([2], [1]).select_tokens([True, False]),
            TypeError,
            "keep must be a bool tensor; got list",
        ),
        (
            lambda: PatchLayout.from_lengths([2], [1]).tokens_read_patches(1.5),
            TypeError,
            "window must be an integer; got 1.5",
        ),
        (
            lambda: PatchLayout.from_lengths([2], [1]).tokens_read_patches(slots=1.5),
            TypeError,
            "slots must be an integer; got 1.5",
        ),
        (
            lambda: PatchLayout.from_lengths([2] * 4, [4]).tokens_read_patches(slots=2**29),
            ValueError,
            "there may be fewer than 2**31 keys; got 2147483648",
        ),
    ],
)
def test_wrong_input_is_told_in_the_callers_words(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
