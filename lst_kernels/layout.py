"""How a packed stream is cut into patches and documents.

Documents lie end to end with no padding between them; a document is a run of patches, a patch a
run of tokens. Two documents, of patches of 1, 3 and of 2, 0, 1 tokens:

    >>> layout = PatchLayout.from_lengths([1, 3, 2, 0, 1], [2, 3])
    >>> layout.cu_patches.tolist()      # token offset of each patch
    [0, 1, 4, 6, 6, 7]
    >>> layout.cu_documents.tolist()    # patch offset of each document
    [0, 2, 5]
    >>> layout.patch_ids.tolist()
    [0, 1, 1, 1, 2, 2, 4]
    >>> layout.token_positions.tolist()
    [0, 1, 2, 3, 0, 1, 2]
    >>> layout.tokens_read_patches().dense_mask().int()
    tensor([[1, 0, 0, 0, 0],
            [1, 0, 0, 0, 0],
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 0, 1, 1, 0],
            [0, 0, 1, 1, 1]], dtype=torch.int32)

**When a patch is readable.** At its own last token if its end is known there. A patch whose end
shows only in the token after it (``closed_late``) is readable from that token on, and never where
that token belongs to the next document: reading it sooner would tell the model what comes next. An
empty patch is readable as soon as the patch before it is, at the head of a document from the
document's first token.

**Dead patches.** A stream may end with a document of dead patches, whose tokens only fill the
stream up to a round size. They read nothing, are read by nothing and count in no patch's length.

Shape letters: T tokens, P patches, N documents, S slots.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lst_kernels import native
from lst_kernels.checks import MAX_ROWS, check_size, is_checked
from lst_kernels.ranges import KeyRanges, at_or_below, causal_ranges, tighten

__all__ = ["PatchLayout"]

Integers: TypeAlias = Tensor | np.ndarray | Sequence[int]


@dataclass(frozen=True, eq=False, kw_only=True)
class PatchLayout:
    """A packed stream's patches and documents. Make one with a ``from_…`` constructor or `static`.

    Made on the CPU, a layout is validated and its maxima are exact. Made on a device without
    synchronisation (`from_boundaries`, or `from_lengths` with ``num_tokens``), it is not validated
    and its maxima are upper bounds; ``LST_KERNELS_CHECK=1`` validates everywhere.
    """

    #: (P+1,) int32, token offset of each patch; last = T
    cu_patches: Tensor
    #: (N+1,) int32, patch offset of each document; last = P
    cu_documents: Tensor
    #: (N+1,) int32, token offset of each document; last = T
    cu_tokens: Tensor
    #: (P,) bool, True where a patch's end is known only at the token after it
    closed_late: Tensor
    #: (T,) int32, the patch of each token
    patch_ids: Tensor
    #: (T,) int32, position within the document, in tokens
    token_positions: Tensor
    #: (P,) int32, position within the document, in patches
    patch_positions: Tensor
    #: (T,) int32, the last patch readable at each token; -1 for none
    readable_ids: Tensor
    #: (P,) int32 each: tokens readable_from[p] … replaced_at[p] - 1 have p as their last readable
    #: patch. Neither ever decreases
    readable_from: Tensor
    replaced_at: Tensor
    #: T, P and N, dead ones included
    num_tokens: int
    num_patches: int
    num_documents: int
    #: patches and tokens of the last document, where it is dead; else 0
    num_dead_patches: int
    num_dead_tokens: int
    #: tokens of the longest patch that is not dead
    max_patch_length: int
    #: the longest document in tokens and in patches, a dead one counted: these are the
    #: ``max_length`` of attention over ``cu_tokens`` and ``cu_documents``, and FlashAttention
    #: leaves rows past ``max_length`` unwritten
    max_document_tokens: int
    max_document_patches: int

    @staticmethod
    def from_lengths(
        patch_lengths: Integers,
        patches_per_document: Integers,
        *,
        closed_late: Tensor | np.ndarray | Sequence[bool] | None = None,
        num_tokens: int | None = None,
        num_dead_patches: int = 0,
    ) -> "PatchLayout":
        """A layout from the tokens of each patch and the patches of each document.

        Args:
            patch_lengths: (P,) integers, zeros allowed. Decides the device of the layout.
            patches_per_document: (N,) integers that sum to P, zeros allowed.
            closed_late: (P,) bool; None for no such patch. Without meaning for an empty patch.
            num_tokens: the sum of ``patch_lengths``. On a device it saves a synchronisation, and
                the maxima are then upper bounds.
            num_dead_patches: the last document is dead and consists of that many patches.

        Raises:
            ValueError: a shape, a sum or a sign is wrong.
            TypeError: lengths are not integers, or ``closed_late`` is not bool.
        """
        lengths = _integers(patch_lengths, "patch_lengths")
        per_document = _integers(patches_per_document, "patches_per_document")
        num_dead_patches = check_size("num_dead_patches", num_dead_patches)
        if num_tokens is not None:
            num_tokens = check_size("num_tokens", num_tokens)
        device = lengths.device
        late = _flags(closed_late, len(lengths), device)
        if device.type != "cpu" and num_tokens is None:  # one synchronisation, then all is exact
            lengths, per_document, late = lengths.cpu(), per_document.cpu(), late.cpu()
        if is_checked(lengths):
            _check_lengths(lengths, per_document, num_tokens, num_dead_patches)
        elif num_dead_patches:
            raise ValueError("num_dead_patches needs patch_lengths on the CPU, or no num_tokens")
        layout = _assemble(
            cu_patches=_offsets(lengths),
            cu_documents=_offsets(per_document).to(lengths.device),
            closed_late=late,
            num_tokens=int(lengths.sum()) if num_tokens is None else num_tokens,
            num_dead_patches=num_dead_patches,
        )
        return layout if layout.device == device else layout.to(device)

    @staticmethod
    def from_patch_ids(
        patch_ids: Integers,
        patches_per_document: Integers,
        *,
        closed_late: Tensor | np.ndarray | Sequence[bool] | None = None,
    ) -> "PatchLayout":
        """A layout from the patch of each token; a patch that no token names is empty.

        Args:
            patch_ids: (T,) integers in [0, P) that never decrease.
            patches_per_document: (N,) integers; their sum is P.
            closed_late: as in `from_lengths`.

        Raises:
            ValueError: an id decreases or is not in [0, P).
        """
        ids = _integers(patch_ids, "patch_ids")
        per_document = _integers(patches_per_document, "patches_per_document")
        _check_counts(per_document, "patches_per_document")
        num_patches = int(per_document.sum())
        if len(ids) and (ids.min() < 0 or ids.max() >= num_patches):
            raise ValueError(
                f"patch_ids must lie in [0, {num_patches}), for patches_per_document "
                f"sums to {num_patches}; got {int(ids.min())} … {int(ids.max())}"
            )
        if (ids[1:] < ids[:-1]).any():
            at = int((ids[1:] < ids[:-1]).nonzero()[0]) + 1
            raise ValueError(
                f"patch_ids must not decrease; at token {at} it falls from "
                f"{int(ids[at - 1])} to {int(ids[at])}"
            )
        lengths = torch.bincount(ids, minlength=num_patches)
        return PatchLayout.from_lengths(lengths, per_document, closed_late=closed_late)

    @staticmethod
    def static(tokens_per_document: Integers, size: int) -> "PatchLayout":
        """Every document cut into patches of ``size`` tokens; the last may be shorter.

        A shorter one ends where its document does, which nothing tells beforehand: it is closed
        late. ``tokens_per_document``: (N,) integers.
        """
        tokens = _integers(tokens_per_document, "tokens_per_document")
        size = min(check_size("size", size), MAX_ROWS)
        if size < 1:
            raise ValueError(f"size must be at least 1; got {size}")
        _check_counts(tokens, "tokens_per_document")
        per_document = (tokens + size - 1) // size
        lengths = torch.full((int(per_document.sum()),), size, device=tokens.device)
        ends_document = per_document.cumsum(0)[tokens > 0] - 1
        lengths[ends_document] = (tokens[tokens > 0] - 1) % size + 1
        return PatchLayout.from_lengths(lengths, per_document, closed_late=lengths < size)

    @staticmethod
    def from_boundaries(
        starts: Tensor,
        *,
        max_patches: int,
        cu_tokens: Integers | None = None,
        closed_late: bool = False,
    ) -> "PatchLayout":
        """A layout from a mark at the first token of each patch, made on any device without
        synchronisation: boundaries that the GPU decides stay there.

        Empty patches pad the layout to ``max_patches``. They form one more document, without
        tokens, after the given ones, so nothing but they themselves can read them.

        Args:
            starts: (T,) bool. The first token of every document starts a patch, marked or not.
            max_patches: P of the layout. Too few is a ValueError on the CPU; on a device the last
                patch swallows the rest of the stream.
            cu_tokens: (N+1,) integers, token offset of each document; None for a single document.
            closed_late: whether the end of every patch shows only at the token after it, as when
                the boundary before a token is decided from that token.
        """
        if not isinstance(starts, Tensor):
            raise TypeError(f"starts must be a (T,) bool tensor; got {type(starts).__name__}")
        if starts.dtype != torch.bool or starts.ndim != 1:
            raise TypeError(
                f"starts must be a (T,) bool tensor; got {starts.dtype} of shape "
                f"{tuple(starts.shape)}"
            )
        num_tokens, device = starts.shape[0], starts.device
        max_patches = check_size("max_patches", max_patches)
        if cu_tokens is None:
            cu = num_tokens * torch.arange(2, device=device)  # a list from the host would wait
        else:
            cu = _integers(cu_tokens, "cu_tokens")
            if is_checked(starts):
                _check_offsets(cu, num_tokens)
        marks = torch.cat((starts, starts.new_zeros(1)))  # (T+1,), for documents that start at T
        marks[cu[:-1]] = True
        patches_before = torch.cumsum(marks, 0) - marks.long()  # (T+1,)
        if is_checked(starts) and patches_before[-1] > max_patches:
            raise ValueError(
                f"max_patches is {max_patches}, but there are {int(patches_before[-1])} patches"
            )
        ids = (patches_before[:-1] + marks[:-1].long() - 1).clamp(max=max_patches - 1)
        cu_patches = torch.searchsorted(ids, torch.arange(max_patches + 1, device=device))
        cu_documents = patches_before[cu].clamp(max=max_patches)
        return _assemble(
            cu_patches=cu_patches.int(),
            cu_documents=torch.cat((cu_documents, cu_documents.new_full((1,), max_patches))).int(),
            closed_late=torch.full((max_patches,), closed_late, dtype=torch.bool, device=device),
            num_tokens=num_tokens,
            num_dead_patches=0,
        )

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.cu_patches.device

    def patches_read_tokens(self, window: int | None = 1, slots: int = 1) -> KeyRanges:
        """The patch encoder: every slot of patch p reads the tokens of patches p-window+1 … p of
        the same document (None: of all patches up to p). P·S queries, T keys."""
        window, slots = _check_window(window, slots)
        first = self._first_patches()
        if window is not None:
            patch = torch.arange(self.num_patches, dtype=torch.int32, device=self.device)
            first = torch.maximum(first, patch - (window - 1))
        num_live = self.num_tokens - self.num_dead_tokens
        start = self.cu_patches[first].clamp(max=num_live).repeat_interleave(slots)
        stop = self.cu_patches[1:].clamp(max=num_live).repeat_interleave(slots)
        bound = self.num_tokens if window is None else window * self.max_patch_length
        return tighten(
            KeyRanges(start, stop, self.num_tokens),
            max_keys=min(bound, self.num_tokens),
            disjoint=window == 1,
            slots=slots if window == 1 else 0,
        )

    def tokens_read_patches(self, window: int | None = None, slots: int = 1) -> KeyRanges:
        """The patch decoder: token t reads every slot of the last ``window`` patches (None: of all
        patches) of its document that are readable at t. T queries, P·S keys."""
        window, slots = _check_window(window, slots)
        stop = at_or_below(self.readable_from, self.num_tokens)
        start = self._first_patches()[self.patch_ids]
        if window is not None:
            start = torch.maximum(start, stop - window)
        bound = self.max_document_patches if window is None else window
        return tighten(
            KeyRanges(start * slots, stop * slots, self.num_patches * slots),
            max_keys=slots * min(bound, self.max_document_patches),
        )

    def sliding_window(self, window: int) -> KeyRanges:
        """Token t reads the last ``window`` tokens of its document, t included. T × T."""
        return causal_ranges(
            self.cu_tokens,
            num_rows=self.num_tokens,
            window=window,
            max_length=self.max_document_tokens,
            num_live=self.num_tokens - self.num_dead_tokens,
        )

    def block_causal(self) -> KeyRanges:
        """Patch p reads the patches of its document up to p. P × P."""
        return causal_ranges(
            self.cu_documents,
            num_rows=self.num_patches,
            max_length=self.max_document_patches,
            num_live=self.num_patches - self.num_dead_patches,
        )

    def select_tokens(self, keep: Tensor) -> tuple["PatchLayout", Tensor]:
        """The sub-stream of some of the tokens, in the same P patches and N documents.

        A patch that keeps no token becomes empty. What is readable at a token stays what it was,
        so the sub-stream's ``tokens_read_patches()`` is the stream's, with ``select_queries``.
        Positions count the kept tokens alone.

        Args:
            keep: (T,) bool, on the layout's device. Asks the device for the number of kept tokens.

        Returns:
            The layout of the sub-stream, and the (T',) int64 index of its tokens in this one.
        """
        if not isinstance(keep, Tensor):
            raise TypeError(f"keep must be a bool tensor; got {type(keep).__name__}")
        if keep.dtype != torch.bool or keep.shape != (self.num_tokens,):
            raise ValueError(
                f"keep must be a bool tensor of shape ({self.num_tokens},); got "
                f"{keep.dtype} of shape {tuple(keep.shape)}"
            )
        (index,) = keep.nonzero(as_tuple=True)
        kept_before = _offsets(keep.int())  # (T+1,)
        layout = _assemble(
            cu_patches=kept_before[self.cu_patches],
            cu_documents=self.cu_documents,
            closed_late=self.closed_late,
            num_tokens=index.shape[0],
            num_dead_patches=self.num_dead_patches,
            readable_from=kept_before[self.readable_from],
        )
        return layout, index

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PatchLayout":
        """The same layout on another device, with every host value as it was."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)

    def _first_patches(self) -> Tensor:
        """(P,) int32, the first patch of each patch's document."""
        patch = torch.arange(self.num_patches, dtype=torch.int32, device=self.device)
        return patch - self.patch_positions


def _assemble(
    *,
    cu_patches: Tensor,
    cu_documents: Tensor,
    closed_late: Tensor,
    num_tokens: int,
    num_dead_patches: int,
    readable_from: Tensor | None = None,
) -> PatchLayout:
    """Everything that follows from the offsets; asks the device nothing."""
    num_live = len(cu_patches) - 1 - num_dead_patches
    is_native = cu_patches.device.type == "cpu" and native.unavailable_reason() is None
    plan = native.plan_layout if is_native else _plan
    return PatchLayout(
        cu_patches=cu_patches,
        cu_documents=cu_documents,
        closed_late=closed_late,
        num_tokens=num_tokens,
        num_patches=len(cu_patches) - 1,
        num_documents=len(cu_documents) - 1,
        num_dead_patches=num_dead_patches,
        num_dead_tokens=num_tokens - int(cu_patches[num_live]) if num_dead_patches else 0,
        **plan(cu_patches, cu_documents, closed_late, num_tokens, num_dead_patches, readable_from),
    )


def _plan(
    cu_patches: Tensor,
    cu_documents: Tensor,
    closed_late: Tensor,
    num_tokens: int,
    num_dead_patches: int,
    readable_from: Tensor | None,
) -> dict[str, Any]:
    device = cu_patches.device
    num_patches = len(cu_patches) - 1
    num_live = num_patches - num_dead_patches
    patch = torch.arange(num_patches, dtype=torch.int32, device=device)
    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    cu_tokens = cu_patches[cu_documents]
    patch_ids = at_or_below(cu_patches, num_tokens) - 1
    document = at_or_below(cu_documents, num_patches) - 1  # (P,)
    first_patch, first_token = cu_documents[document], cu_tokens[document]  # (P,) each

    if readable_from is None:
        start, stop = cu_patches[:-1], cu_patches[1:]
        # an empty patch takes the value of the patch before it through the running maximum
        closed = torch.where(stop > start, stop - 1 + closed_late.int(), first_token)
        readable_from = torch.cummax(closed, 0).values
        readable_from[num_live:] = num_tokens
    next_readable = torch.cat((readable_from[1:], readable_from.new_full((1,), num_tokens)))
    replaced_at = torch.minimum(next_readable[:num_patches], cu_tokens[document + 1])
    replaced_at[num_live:] = num_tokens
    last = at_or_below(readable_from, num_tokens) - 1

    exact = device.type == "cpu"
    return {
        "cu_tokens": cu_tokens,
        "patch_ids": patch_ids,
        "token_positions": token - first_token[patch_ids],
        "patch_positions": patch - first_patch,
        "readable_ids": torch.where(last >= first_patch[patch_ids], last, -1),
        "readable_from": readable_from,
        "replaced_at": replaced_at,
        "max_patch_length": _longest(cu_patches[: num_live + 1]) if exact else num_tokens,
        "max_document_tokens": _longest(cu_tokens) if exact else num_tokens,
        "max_document_patches": _longest(cu_documents) if exact else num_patches,
    }


def _offsets(lengths: Tensor) -> Tensor:
    zero = torch.zeros(1, dtype=torch.int64, device=lengths.device)
    return torch.cat((zero, torch.cumsum(lengths, 0))).int()


def _longest(cu: Tensor) -> int:
    return int(torch.diff(cu).max()) if len(cu) > 1 else 0


def _integers(values: Integers, name: str) -> Tensor:
    tensor = _as_tensor(values, f"{name} must be integers")
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        tensor = tensor.long()  # an empty list has no type
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {tensor.dtype}")
    if tensor.ndim != 1:
        raise ValueError(f"{name} must have one dimension; got shape {tuple(tensor.shape)}")
    return tensor.long()


def _flags(
    closed_late: Tensor | np.ndarray | Sequence[bool] | None,
    num_patches: int,
    device: torch.device,
) -> Tensor:
    if closed_late is None:
        return torch.zeros(num_patches, dtype=torch.bool, device=device)
    flags = _as_tensor(closed_late, "closed_late must be bool")
    if flags.dtype != torch.bool and flags.numel():
        raise TypeError(f"closed_late must be bool; got {flags.dtype}")
    if flags.shape != (num_patches,):
        raise ValueError(
            f"closed_late has shape {tuple(flags.shape)}, but there are {num_patches} patches"
        )
    return flags.bool().to(device).contiguous()


def _as_tensor(values: Any, expected: str) -> Tensor:
    if isinstance(values, np.ndarray):  # torch takes none that is read-only, reversed or swapped
        values = np.require(values, values.dtype.newbyteorder("="), ["C", "W"])
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{expected}; got {type(values).__name__} ({error})") from None


def _check_lengths(
    lengths: Tensor, per_document: Tensor, num_tokens: int | None, num_dead_patches: int
) -> None:
    _check_counts(lengths, "patch_lengths")
    _check_counts(per_document, "patches_per_document")
    if int(per_document.sum()) != len(lengths):
        raise ValueError(
            f"patches_per_document sums to {int(per_document.sum())}, but there are "
            f"{len(lengths)} patch_lengths"
        )
    if num_tokens is not None and int(lengths.sum()) != num_tokens:
        raise ValueError(
            f"num_tokens is {num_tokens}, but patch_lengths sums to {int(lengths.sum())}"
        )
    if int(lengths.sum()) > MAX_ROWS:
        raise ValueError(f"a stream holds fewer than 2**31 tokens; got {int(lengths.sum())}")
    last = int(per_document[-1]) if len(per_document) else 0
    if num_dead_patches and num_dead_patches != last:
        raise ValueError(
            f"num_dead_patches is {num_dead_patches}, but the last document has {last} patches"
        )


def _check_counts(values: Tensor, name: str) -> None:
    if len(values) == 0:
        return
    least, most = map(int, values.aminmax())
    if least < 0:
        raise ValueError(f"{name} must not be negative; got {least}")
    if most > MAX_ROWS:  # so that their sum stays within int64
        raise ValueError(f"{name} must be below 2**31; got {most}")


def _check_offsets(cu_tokens: Tensor, num_tokens: int) -> None:
    offsets = cu_tokens.tolist()
    if not offsets or offsets[0] != 0 or offsets[-1] != num_tokens or offsets != sorted(offsets):
        raise ValueError(
            f"cu_tokens must rise from 0 to the {num_tokens} tokens of starts; got "
            f"{offsets if len(offsets) < 10 else [*offsets[:9], '…']}"
        )


def _check_window(window: int | None, slots: int) -> tuple[int | None, int]:
    window = None if window is None else min(check_size("window", window), MAX_ROWS)
    if window is not None and window < 1:
        raise ValueError(f"window counts the patch itself, so it is at least 1; got {window}")
    slots = check_size("slots", slots)
    if slots < 1:
        raise ValueError(f"slots must be at least 1; got {slots}")
    return window, slots
