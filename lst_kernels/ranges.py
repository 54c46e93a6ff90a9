"""Which keys each query reads: one contiguous range per query.

Both ends of the range never decrease from one query to the next. So the dense mask is a staircase,
the queries that read a key are contiguous too, and the transpose is again a :class:`KeyRanges`:

    >>> import torch
    >>> ranges = KeyRanges(torch.tensor([0, 0, 1, 3]), torch.tensor([1, 2, 3, 3]), num_keys=3)
    >>> ranges.dense_mask().int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 1, 1],
            [0, 0, 0]], dtype=torch.int32)
    >>> ranges.transpose().dense_mask().int()
    tensor([[1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 0]], dtype=torch.int32)

Shapes: Q queries, K keys.
"""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lst_kernels import native
from lst_kernels.checks import MAX_ROWS, check_size, is_checked
from lst_kernels.schedule import BLOCK_ROWS, heavy_first, queries_per_range

__all__ = ["KeyRanges", "causal_ranges", "part_ranges"]


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """Query ``i`` reads keys ``start[i] … stop[i] - 1``; none where ``start[i] == stop[i]``.

    Both ends must not decrease, empty ranges included. The other fields are filled from these: at
    once, so that every layer and both passes share them. For ranges made on the CPU they are exact
    and the ranges are validated. For ranges made on another device they are upper bounds and
    nothing is validated, for either would wait for the device (``LST_KERNELS_CHECK=1`` validates
    everywhere, at that price).

    Args:
        start: (Q,) integers, first key that each query reads. Kept as int32.
        stop: (Q,) integers, one past the last key that each query reads. Kept as int32.
        num_keys: K.

    Raises:
        ValueError: a shape, an order or a bound is wrong.
        TypeError: ``start`` or ``stop`` is not an integer tensor.
    """

    start: Tensor
    stop: Tensor
    num_keys: int
    #: (K,) int32 each, the transpose: key ``j`` is read by queries query_start[j] … query_stop[j]-1
    query_start: Tensor = field(init=False)
    query_stop: Tensor = field(init=False)
    #: int32 each, the blocks of queries and of keys with most work first (`lst_kernels.schedule`)
    query_order: Tensor = field(init=False)
    key_order: Tensor = field(init=False)
    #: scores needed: the sum of ``stop - start``
    num_pairs: int = field(init=False)
    #: the most keys that one query reads, and the most queries that read one key
    max_keys: int = field(init=False)
    max_queries: int = field(init=False)
    #: True where any two ranges are equal or share no key (False on a device: "not known to be")
    disjoint: bool = field(init=False)
    #: queries ``i·slots … (i+1)·slots - 1`` have one range for every i, and share no key with the
    #: other queries; 0 where no number is known to be such. ``key_slots`` is the same of the keys
    slots: int = field(init=False)
    key_slots: int = field(init=False)

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            object.__setattr__(self, name, _as_int32(getattr(self, name), name))
        if self.start.shape != self.stop.shape:
            raise ValueError(f"stop has {len(self.stop)} queries, but start has {len(self.start)}")
        if self.start.device != self.stop.device:
            raise ValueError(f"stop is on {self.stop.device}, but start is on {self.start.device}")
        object.__setattr__(self, "num_keys", check_size("num_keys", self.num_keys))
        if self.num_keys < 0:
            raise ValueError(f"num_keys must not be negative; got {self.num_keys}")
        if self.num_keys > MAX_ROWS:
            raise ValueError(f"there may be fewer than 2**31 keys; got {self.num_keys}")
        for name, value in self._planned().items():
            object.__setattr__(self, name, value)

    def _planned(self) -> dict[str, Tensor | int | bool]:
        if _is_host(self.start) and native.unavailable_reason() is None:
            try:
                return native.plan_ranges(self.start, self.stop, self.num_keys)
            except ValueError:
                self.validate()  # says where
                raise
        if is_checked(self.start):
            self.validate()
        return _plan(self.start, self.stop, self.num_keys)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.start.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.start.device

    def validate(self) -> None:
        """Raise ValueError unless these are ranges of ``num_keys`` keys whose ends never decrease.

        Waits for the device where the ranges are on one.
        """
        if self.num_queries == 0:
            return
        backward = self.stop < self.start
        if backward.any():
            i = int(backward.nonzero()[0])
            raise ValueError(
                f"query {i} starts at {int(self.start[i])}, past its stop {int(self.stop[i])}"
            )
        for name, ends in (("start", self.start), ("stop", self.stop)):
            drops = ends[1:] < ends[:-1]
            if drops.any():
                i = int(drops.nonzero()[0]) + 1
                raise ValueError(
                    f"{name} must not decrease; at query {i} it falls from "
                    f"{int(ends[i - 1])} to {int(ends[i])}"
                )
        if self.start[0] < 0:
            raise ValueError(f"start must not be negative; got {int(self.start[0])} at query 0")
        if self.stop[-1] > self.num_keys:
            i = int((self.stop > self.num_keys).nonzero()[0])
            raise ValueError(
                f"stop reaches {int(self.stop[i])} at query {i}, but there are {self.num_keys} keys"
            )

    def transpose(self) -> "KeyRanges":
        """For every key, the range of queries that read it. Costs nothing."""
        return assemble(
            start=self.query_start,
            stop=self.query_stop,
            num_keys=self.num_queries,
            query_start=self.start,
            query_stop=self.stop,
            query_order=self.key_order,
            key_order=self.query_order,
            num_pairs=self.num_pairs,
            max_keys=self.max_queries,
            max_queries=self.max_keys,
            disjoint=self.disjoint,
            slots=self.key_slots,
            key_slots=self.slots,
        )

    def select_queries(self, index: Tensor) -> "KeyRanges":
        """The ranges of some of the queries, over the same keys.

        Args:
            index: (Q',) integers, the queries to keep, in increasing order.

        Raises:
            ValueError: ``index`` decreases or leaves [0, Q) (told for an ``index`` on the CPU).
            TypeError: ``index`` is not an integer tensor.
        """
        _check_integers(index, "index")
        if _is_host(index) and index.numel():
            if index.min() < 0 or index.max() >= self.num_queries:
                raise ValueError(
                    f"index must lie in [0, {self.num_queries}); got "
                    f"{int(index.min())} … {int(index.max())}"
                )
            drops = index[1:] < index[:-1]
            if drops.any():
                i = int(drops.nonzero()[0]) + 1
                raise ValueError(
                    f"index must not decrease; at {i} it falls from "
                    f"{int(index[i - 1])} to {int(index[i])}"
                )
        selected = KeyRanges(self.start[index], self.stop[index], self.num_keys)
        return tighten(selected, max_keys=self.max_keys, disjoint=self.disjoint)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "KeyRanges":
        """The same ranges on another device, with every host value as it was."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return assemble(**vars(self) | moved)

    def dense_mask(self) -> Tensor:
        """(Q, K) bool, True where query ``i`` reads key ``j``. Q·K bytes: for small inputs."""
        keys = torch.arange(self.num_keys, dtype=torch.int32, device=self.device)
        return (keys >= self.start[:, None]) & (keys < self.stop[:, None])


def causal_ranges(
    cu: Tensor, *, num_rows: int, window: int | None = None, max_length: int, num_live: int
) -> KeyRanges:
    """Every row reads the last ``window`` rows of its own sequence, itself included.

    Args:
        cu: (N+1,) int32, offset of each sequence; last = ``num_rows``.
        num_rows: rows of the stream: both Q and K.
        window: how many rows, the row's own counted; None for all of them.
        max_length: the longest sequence, or more.
        num_live: rows from this one on read nothing and are read by nothing.
    """
    window = None if window is None else min(check_size("window", window), MAX_ROWS)
    if window is not None and window < 1:
        raise ValueError(f"window counts the row itself, so it is at least 1; got {window}")
    row = torch.arange(num_rows, dtype=torch.int32, device=cu.device)
    start = cu[at_or_below(cu, num_rows) - 1]
    if window is not None:
        start = torch.maximum(start, row - (window - 1))
    ranges = KeyRanges(start.clamp(max=num_live), (row + 1).clamp(max=num_live), num_rows)
    return tighten(ranges, max_keys=max_length if window is None else min(window, max_length))


def part_ranges(parts: Tensor, lengths: Tensor, *, num_parts: int, part_size: int) -> KeyRanges:
    """Every query reads the first keys of one part: decoding, where a request's cache is a part.

    For a forward pass alone: there is no transpose (its tensors are empty), so nothing can be
    differentiated. That makes it cheap, whatever the number of keys.

    Args:
        parts: (Q,) int64 on the CPU, the part that each query reads; never decreases.
        lengths: (Q,) int64 on the CPU, how many keys; never decreases where the part is the same.
        num_parts, part_size: K is their product.
    """
    start = (parts * part_size).int()
    none = start[:0]
    alone = bool((parts[1:] > parts[:-1]).all())
    return assemble(
        start=start,
        stop=start + lengths.int(),
        num_keys=num_parts * part_size,
        query_start=none,
        query_stop=none,
        query_order=torch.arange(-(-len(parts) // BLOCK_ROWS), dtype=torch.int32),
        key_order=none,
        num_pairs=int(lengths.sum()),
        max_keys=int(lengths.max()),
        max_queries=len(parts),
        disjoint=alone,
        slots=int(alone),
        key_slots=0,
    )


def tighten(
    ranges: KeyRanges, *, max_keys: int, disjoint: bool = False, slots: int = 0
) -> KeyRanges:
    """Give ranges made on a device the bounds their maker knows; exact ones stay as they are.

    Exact ones that read nothing at all are of any kind: they get their maker's, so that a stream
    without readers is no other kind to compiled code.
    """
    if _is_host(ranges.start):
        if ranges.num_pairs:
            return ranges
        return assemble(**vars(ranges) | {"disjoint": disjoint, "slots": slots})
    bounds = {
        "num_pairs": ranges.num_queries * max_keys,
        "max_keys": max_keys,
        "disjoint": disjoint,
        "slots": slots,
    }
    return assemble(**vars(ranges) | bounds)


def _plan(start: Tensor, stop: Tensor, num_keys: int) -> dict[str, Tensor | int | bool]:
    """The transpose and the host values. Key j is read by the queries with start <= j < stop:
    those before the first start > j, and from the first stop > j on."""
    query_start, query_stop = at_or_below(stop, num_keys), at_or_below(start, num_keys)
    plan: dict[str, Tensor | int | bool] = {
        "query_start": query_start,
        "query_stop": query_stop,
        "query_order": heavy_first(start, stop),
        "key_order": heavy_first(query_start, query_stop),
    }
    if not _is_host(start):
        return plan | {
            "num_pairs": len(start) * num_keys,
            "max_keys": num_keys,
            "max_queries": len(start),
            "disjoint": False,
            "slots": 0,
            "key_slots": 0,
        }
    lengths = stop - start
    same = (start[1:] == start[:-1]) & (stop[1:] == stop[:-1])
    return plan | {
        "num_pairs": int(lengths.sum(dtype=torch.int64)),
        "max_keys": int(lengths.max()) if len(lengths) else 0,
        "max_queries": int((query_stop - query_start).max()) if num_keys else 0,
        "disjoint": bool((same | (start[1:] >= stop[:-1])).all()),
        "slots": queries_per_range(start, stop),
        "key_slots": queries_per_range(query_start, query_stop),
    }


def at_or_below(values: Tensor, count: int) -> Tensor:
    """How many of ``values``, which never decrease and are not negative, are at most 0, 1, 2 …

    Args:
        values: (M,) int32.
        count: how many answers; one for each of 0 … count - 1.

    Returns:
        (count,) int32.
    """
    if _is_host(values):  # one pass over either; on a device, bincount would wait for it
        return torch.bincount(values, minlength=count)[:count].cumsum(0, dtype=torch.int32)
    asked = torch.arange(count, dtype=torch.int32, device=values.device)
    return torch.searchsorted(values, asked, right=True, out_int32=True)


def assemble(**fields: object) -> KeyRanges:
    """A KeyRanges from all of its fields, nothing computed and nothing checked anew."""
    ranges = object.__new__(KeyRanges)
    assert fields.keys() == {f.name for f in dataclasses.fields(KeyRanges)}
    ranges.__dict__.update(fields)
    return ranges


def _as_int32(x: Tensor, name: str) -> Tensor:
    _check_integers(x, name)
    if x.dtype != torch.int32 and len(x) and is_checked(x):
        for value in map(int, x.long().aminmax()):
            if abs(value) > MAX_ROWS:
                raise ValueError(f"{name} must lie within the keys, fewer than 2**31; got {value}")
    return x.to(torch.int32).contiguous()


def _check_integers(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of integers; got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers; got {x.dtype}")
    if x.ndim != 1:
        raise ValueError(f"{name} must have one dimension; got shape {tuple(x.shape)}")


def _is_host(x: Tensor) -> bool:
    return x.device.type == "cpu"
