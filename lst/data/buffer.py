"""All tensors of a value in one buffer: one transfer to a process, to pinned memory, to a GPU.

(layout: cu_patches (5,) int32, closed_late (4,) bool …)
    flatten →  buffer  |cu_patches ....|closed_late .....|…|      and a skeleton that says
    unflatten ←                                                   where each tensor lies
"""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["flatten", "unflatten"]

ALIGNMENT = 128  # bytes: as large as any vector load of a kernel


@dataclass(frozen=True, slots=True)
class _Place:
    """A contiguous tensor in the buffer."""

    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class _Object:
    """A dataclass, with a place for each tensor in it. Not one itself, which might know of a way of
    its own to be pickled."""

    kind: type
    fields: dict[str, Any]


def flatten(value: Any) -> tuple[Tensor, Any]:
    """Lay the tensors of a value end to end, or find that they lie so already.

    Args:
        value: dataclasses, nested at will, of tensors of one device and of anything else.

    Returns:
        The buffer, (B,) uint8 on that device: that of an earlier :func:`unflatten` where all
        tensors come from there, else a copy. And the skeleton: what else there is, with each
        tensor's place in it.
    """
    tensors = _tensors(value, {})
    buffer = _buffer_of(tensors)
    if buffer is not None:
        offsets = [int(each.storage_offset()) * each.itemsize for each in tensors]
    else:
        offsets, end = [], 0
        for each in tensors:
            offsets.append(end)
            end += -(-each.nbytes // ALIGNMENT) * ALIGNMENT
        buffer = torch.empty(end, dtype=torch.uint8, device=tensors[0].device if tensors else None)
    places = {}
    for each, offset in zip(tensors, offsets, strict=True):
        place = _Place(offset, tuple(each.shape), each.dtype)
        places[id(each)] = place
        there = _view(buffer, place)
        if there.data_ptr() != each.data_ptr():
            there.copy_(each)
    return buffer, _skeleton(value, dict(places))


def unflatten(buffer: Tensor, skeleton: Any) -> Any:
    """The value again, its tensors views of ``buffer``."""
    return _value(skeleton, buffer, {})


def _tensors(value: Any, seen: dict[int, Any]) -> list[Tensor]:
    """Every tensor once, in order."""
    if id(value) in seen:
        return []
    seen[id(value)] = value
    if isinstance(value, Tensor):
        return [value]
    if not is_dataclass(value) or isinstance(value, type):
        return []
    inner = (getattr(value, field.name) for field in fields(value))
    return [tensor for each in inner for tensor in _tensors(each, seen)]


def _buffer_of(tensors: list[Tensor]) -> Tensor | None:
    """The buffer that all tensors are views of, where there is one."""
    pointers = {each.untyped_storage().data_ptr() for each in tensors}
    if len(tensors) < 2 or len(pointers) > 1 or not all(map(Tensor.is_contiguous, tensors)):
        return None
    if 0 in pointers:  # no memory at all: on the meta device, say
        return None
    whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    return whole.set_(tensors[0].untyped_storage())


def _skeleton(value: Any, known: dict[int, Any]) -> Any:
    """``known``, here and below: by identity, what is made already. One object stays one."""
    if id(value) not in known:
        if not is_dataclass(value) or isinstance(value, type):
            return value
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        known[id(value)] = _Object(
            type(value), {name: _skeleton(part, known) for name, part in parts.items()}
        )
    return known[id(value)]


def _value(skeleton: Any, buffer: Tensor, known: dict[int, Any]) -> Any:
    if not isinstance(skeleton, _Place | _Object):
        return skeleton
    if id(skeleton) not in known:
        if isinstance(skeleton, _Place):
            made = _view(buffer, skeleton)
        else:
            made = object.__new__(skeleton.kind)
            for name, part in skeleton.fields.items():
                object.__setattr__(made, name, _value(part, buffer, known))  # it may be frozen
        known[id(skeleton)] = made
    return known[id(skeleton)]


def _view(buffer: Tensor, place: _Place) -> Tensor:
    size = math.prod(place.shape) * place.dtype.itemsize
    return buffer[place.offset : place.offset + size].view(place.dtype).view(place.shape)
