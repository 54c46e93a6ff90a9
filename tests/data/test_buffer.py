"""What crosses to another process or device crosses whole, and as one buffer."""

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lst.data.buffer import ALIGNMENT, flatten, unflatten


@dataclass(frozen=True, eq=False)
class Inner:
    ids: Tensor
    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    flags: Tensor
    first: Inner
    second: Inner | None
    number: int
    again: Any = None


def make(**changes):
    first = Inner(torch.arange(5), "a")
    fields = {
        "flags": torch.tensor([True, False, True]),
        "first": first,
        "second": Inner(torch.rand(3, 4, dtype=torch.float64).T, "b"),
        "number": 7,
        "again": first,
    }
    return Value(**(fields | changes))


def tensors_of(value):
    return [value.flags, value.first.ids, *([value.second.ids] if value.second else [])]


def assert_same(got, expected):
    for one, other in zip(tensors_of(got), tensors_of(expected), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert (got.number, got.first.name) == (expected.number, expected.first.name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"second": None},
        {"flags": torch.zeros(0, dtype=torch.bool)},
        {"flags": torch.tensor(True)},  # of no dimension
    ],
    ids=["all", "none for a part", "an empty tensor", "a scalar"],
)
def test_a_value_is_the_same_after_the_way_there_and_back(changes):
    value = make(**changes)
    buffer, skeleton = flatten(value)
    assert (buffer.dtype, buffer.dim()) == (torch.uint8, 1)
    back = unflatten(buffer, skeleton)
    assert_same(back, value)
    for tensor in tensors_of(back):
        assert tensor.untyped_storage().data_ptr() == buffer.data_ptr()
        assert tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0


def test_what_was_one_object_stays_one():
    back = unflatten(*flatten(make()))
    assert back.again is back.first
    shared = torch.arange(1000)
    buffer, skeleton = flatten(make(first=Inner(shared, "a"), second=Inner(shared, "b")))
    assert buffer.nbytes < 2 * shared.nbytes
    back = unflatten(buffer, skeleton)
    assert back.first.ids is back.second.ids


def test_a_flat_value_is_not_copied_again():
    flat = unflatten(*flatten(make()))
    buffer, skeleton = flatten(flat)
    assert buffer.data_ptr() == flat.flags.untyped_storage().data_ptr()
    assert_same(unflatten(buffer, skeleton), flat)


def test_a_part_of_a_flat_value_that_was_exchanged_is_not_forgotten():
    flat = unflatten(*flatten(make()))
    other = make(flags=torch.tensor([False]), first=flat.first, second=flat.second, again=None)
    assert_same(unflatten(*flatten(other)), other)


def test_the_value_given_stays_as_it_was():
    value = make()
    back = unflatten(*flatten(value))
    back.flags.fill_(False)
    assert value.flags.tolist() == [True, False, True]
    assert value.flags.untyped_storage().nbytes() == 3


def test_the_skeleton_crosses_to_another_process():
    value = make()
    buffer, skeleton = flatten(value)
    back = unflatten(buffer, pickle.loads(pickle.dumps(skeleton)))
    assert_same(back, value)
    assert back.again is back.first


def test_a_value_without_tensors_is_an_empty_buffer():
    buffer, skeleton = flatten(7)
    assert buffer.nbytes == 0
    assert unflatten(buffer, skeleton) == 7


@pytest.mark.gpu
def test_a_batch_goes_to_the_gpu_from_pinned_memory_as_one_copy():
    value = make()
    buffer, skeleton = flatten(value)
    pinned = unflatten(buffer.pin_memory(), skeleton)
    assert pinned.first.ids.is_pinned()
    again, skeleton = flatten(pinned)
    assert again.is_pinned()
    with torch.profiler.profile() as profile:
        moved = unflatten(again.to("cuda", non_blocking=True), skeleton)
        torch.cuda.synchronize()
    copies = [event for event in profile.events() if "Memcpy HtoD" in event.name]
    assert len(copies) == 1
    assert_same(Value(moved.flags.cpu(), Inner(moved.first.ids.cpu(), "a"),
                      Inner(moved.second.ids.cpu(), "b"), 7), value)  # fmt: skip
