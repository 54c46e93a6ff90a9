"""Where growing documents stand: what is kept of them, and the plan of the pass over new tokens.

What a later token may read is kept of B requests, each as far back as any token reads::

    encoder      (layers, 2, B, local_window, H, D)        keys and values of the last tokens
    open patch   (B, size, d_local)                        states of its tokens, until it closes
    global       (layers, 2, B, patches, Hkv, D)           keys and values of all patches
    cross        (layers, 2, B, decoder_window · S, H, D)  those of the last patches' slots
    decoder      (layers, 2, B, local_window, H, D)        keys and values of the last tokens

Attention does not care in which order its keys lie: their positions are turned into them. So a
window is a ring, a row's place is its number modulo the window's size, and a token reads one
stretch of its request's part of the rows.

A pass is over new tokens: all of the prompts', which read each other, or one of every request,
which reads what is kept, itself included. A patch passes the global transformer once, when it
closes. The tokens of patches that were open before are looked at again then::

    open before   7 7 7 _      a unit fills it   7 7 7 7      a marker cuts it short   7 7 7 | <t>

T tokens, P patches that close, S slots.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lst.data.batch import rows_of
from lst.data.buffer import flatten, unflatten
from lst.model import ModelConfig
from lst.model.layers import Attention
from lst.vocabulary import Vocabulary
from lst_kernels import KeyRanges, PatchLayout, range_attention
from lst_kernels.ranges import causal_ranges, part_ranges

FIRST_ROOM = 64  # rows of a request that there is room for before more is made


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Which rows of a pass are kept, and where."""

    rows: Tensor | None  # (n,) int64, those that a later pass may read; None: all of them
    places: Tensor  # (n,) int64, among the B·room rows of a layer

    def put(self, values: Tensor, into: Tensor, dim: int = 0) -> None:
        """Keep of ``values``, the rows of a pass along ``dim``."""
        if self.rows is not None:
            values = values.index_select(dim, self.rows)
        into.index_copy_(dim, self.places, values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reads:
    """What the rows of a stack read of their own kind, and what is kept of them."""

    positions: Tensor  # (n,) int64, in their documents
    ranges: KeyRanges  # n × n, or n × B·room
    fresh: bool  # they read each other; else what is kept
    kept: Kept


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalPass:
    """New tokens that pass encoder and decoder."""

    tokens: Tensor  # (T,) int64 joint ids
    reads: Reads
    patches: KeyRanges  # T × P·S, or T × B·room: the slots that the decoder reads
    open: Kept  # those whose patch goes on


@dataclass(frozen=True, kw_only=True, eq=False)
class Closing:
    """Patches that the encoder makes."""

    rows: Tensor  # (n,) int64, their tokens in [what is kept of open patches; new tokens]
    layout: PatchLayout
    ranges: KeyRanges


@dataclass(frozen=True, kw_only=True, eq=False)
class PatchPass:
    """Patches that pass the global transformer."""

    rows: Tensor  # (P,) int64, where they are in [patches of the encoder; tokens that are patches]
    reads: Reads
    cross: Kept  # of their P·S slots


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """The plan of a pass."""

    local: LocalPass | None  # None where no token passes the encoder
    closing: Closing | None  # None where it makes no patch
    direct: Tensor  # (n,) int64 joint ids of tokens that are patches without it
    patches: PatchPass | None  # None where no patch closes
    #: The last of every request: tokens that pass the decoder, patches that are tokens, and where
    #: the B requests are in both, one after the other.
    last_tokens: Tensor
    last_patches: Tensor
    order: Tensor

    def to(self, device: torch.device) -> "Pass":
        """The same plan on another device, moved as one buffer."""
        if device.type == "cpu":
            return self
        buffer, skeleton = flatten(self)
        moved: Pass = unflatten(buffer.to(device), skeleton)
        return moved


class Cache:
    """Keys and values of every layer of a stack, a part for each of B requests."""

    def __init__(self, layers: int, heads: int, head_dim: int, like: Tensor) -> None:
        """``like``: of the dtype and on the device of what is to be kept."""
        self.rows = like.new_zeros(layers, 2, 0, 0, heads, head_dim)

    def make_room(self, requests: int, room: int) -> None:
        """Parts of ``room`` rows, at least as many as there are, which stay where they are."""
        layers, two, before, old, *head = self.rows.shape
        if (before, old) != (requests, room):
            rows = self.rows.new_zeros(layers, two, requests, room, *head)
            rows[:, :, :before, :old] = self.rows
            self.rows = rows

    def keep(self, requests: Tensor) -> None:
        self.rows = self.rows.index_select(2, requests)

    def put(self, keys_values: Tensor, kept: Kept) -> None:
        """Keep of (n, layers, 2, H, D), of all layers at once."""
        kept.put(keys_values.permute(1, 2, 0, 3, 4), self.rows.flatten(2, 3), dim=2)

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """The keys and the values of a layer, (B·room, H, D) each."""
        k, v = self.rows[number].flatten(1, 2).unbind(0)
        return k, v

    def attention(self, number: int, reads: Reads) -> Attention:
        """Self-attention of a layer that keeps the keys and values it is given."""
        keys, values = self.layer(number)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            reads.kept.put(k, keys)
            reads.kept.put(v, values)
            if not reads.fresh:
                k, v = keys, values
            return range_attention(q, k, v, reads.ranges)

        return attend


class Documents:
    """How far B documents have come. On the CPU; the plans of all passes come from here.

    Attributes:
        token_room, patch_room, cross_room: rows of a request's part of what is kept.
    """

    def __init__(
        self, config: ModelConfig, vocabulary: Vocabulary, patch_size: int, requests: int
    ) -> None:
        self._config, self._vocabulary, self._size = config, vocabulary, patch_size
        none = np.zeros(requests, np.int64)
        self._tokens = none  # (B,) that passed the encoder
        self._patches = none  # (B,) that are closed
        self._open = none  # (B,) tokens of a patch that may go on
        self.token_room = self.patch_room = self.cross_room = 0

    def __len__(self) -> int:
        return len(self._open)

    def keep(self, requests: np.ndarray) -> None:
        """Go on with some of the requests, in their order."""
        self._tokens, self._patches = self._tokens[requests], self._patches[requests]
        self._open = self._open[requests]

    def begin(
        self, prompts: Sequence[np.ndarray], patches: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> Pass:
        """The pass over whole prompts, with what ``patch_lengths`` says of each."""
        lengths = np.concatenate([lengths for lengths, _ in patches])
        closed_late = np.concatenate([late for _, late in patches])
        counts = np.array([len(lengths) for lengths, _ in patches])
        goes_on = np.zeros(len(lengths), bool)
        last = counts.cumsum() - 1
        goes_on[last] = closed_late[last]  # nothing came that would have cut it short
        tokens = np.concatenate(prompts)
        return self._plan(tokens, lengths, counts, closed_late, goes_on, fresh=True)

    def advance(self, tokens: Sequence[int]) -> Pass:
        """The pass over one more token of every request."""
        ids = np.array(tokens)
        is_unit = self._vocabulary.is_unit(ids)
        cuts_short = ~is_unit & (self._open > 0)
        counts = 1 + cuts_short
        last = counts.cumsum() - 1
        lengths = np.empty(counts.sum(), np.int64)
        lengths[last] = np.where(is_unit, self._open + 1, 1)
        lengths[last[cuts_short] - 1] = self._open[cuts_short]
        goes_on = np.zeros(len(lengths), bool)
        goes_on[last] = is_unit & (lengths[last] < self._size)
        closed_late = goes_on.copy()
        closed_late[last[cuts_short] - 1] = True
        return self._plan(ids, lengths, counts, closed_late, goes_on, fresh=False)

    def _plan(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        counts: np.ndarray,
        closed_late: np.ndarray,
        goes_on: np.ndarray,
        *,
        fresh: bool,
    ) -> Pass:
        """The plan of a pass; the documents are then as they are after it.

        Args:
            ids: of the new tokens.
            lengths, closed_late, goes_on: of the patches that they are in.
            counts: (B,) how many of these patches are each request's.
        """
        view = _view(lengths, counts, self._open, self._is_local(ids), self._size)
        closes = ~goes_on
        by_encoder = view.is_local[view.start][closes]
        closing_request = np.arange(len(counts)).repeat(counts)[closes]
        closed = np.bincount(closing_request, minlength=len(counts))
        number = closes.cumsum() - closes  # of each patch, among those that close
        first = closed.cumsum() - closed  # of each request
        # A patch is readable at its last token if that tells, else from the next token on.
        told = (view.offset + 1 == lengths[view.patch]) & ~closed_late[view.patch]
        readable = self._patches[view.request] + (number[view.patch] - first[view.request]) + told

        local_request = view.request[view.new_local]
        token_positions = self._tokens[local_request] + _ranks(local_request)
        patch_positions = self._patches[closing_request] + _ranks(closing_request)
        self._tokens = self._tokens + np.bincount(local_request, minlength=len(counts))
        self._patches = self._patches + closed
        last = counts.cumsum() - 1
        self._open = np.where(goes_on[last], lengths[last], 0)
        self._make_rooms()

        local = closing = patches = None
        if len(local_request):
            stays_open = view.new_local & goes_on[view.patch]
            local = LocalPass(
                tokens=torch.from_numpy(ids[view.is_local[view.is_new]]).long(),
                reads=_reads(
                    local_request,
                    token_positions,
                    self._tokens,
                    room=self.token_room,
                    window=self._config.local_window,
                    fresh=fresh,
                ),
                patches=self._slots_read(
                    local_request, readable[view.new_local], first if fresh else None, closes.sum()
                ),
                open=Kept(
                    rows=torch.from_numpy(view.row[stays_open] - view.num_places),
                    places=torch.from_numpy(view.place[stays_open]),
                ),
            )
        if by_encoder.any():
            rows = torch.from_numpy(view.row[view.is_local & closes[view.patch]])
            shape = tuple(lengths[closes][by_encoder].tolist())
            layout, ranges = _closing_plan(shape, self._config.slots)
            closing = Closing(rows=rows, layout=layout, ranges=ranges)
        if len(closing_request):
            patches = PatchPass(
                rows=rows_of(torch.from_numpy(by_encoder)),
                reads=_reads(
                    closing_request,
                    patch_positions,
                    self._patches,
                    room=self.patch_room,
                    window=None,
                    fresh=fresh,
                ),
                cross=self._kept_slots(closing_request, patch_positions),
            )
        final = np.append(np.flatnonzero(np.diff(view.request)), len(view.request) - 1)
        is_local = view.is_local[final]
        return Pass(
            local=local,
            closing=closing,
            direct=torch.from_numpy(ids[~view.is_local[view.is_new]]).long(),
            patches=patches,
            last_tokens=torch.from_numpy(view.row[final[is_local]] - view.num_places),
            last_patches=torch.from_numpy(number[view.patch[final[~is_local]]]),
            order=rows_of(torch.from_numpy(is_local)),
        )

    def _is_local(self, ids: np.ndarray) -> np.ndarray:
        """Which tokens pass encoder and decoder; the others are patches without them."""
        if self._config.architecture == "token":
            return np.zeros(len(ids), bool)
        if self._config.text_path == "local":
            return np.ones(len(ids), bool)
        is_unit: np.ndarray = self._vocabulary.is_unit(ids)
        return is_unit

    def _make_rooms(self) -> None:
        tokens, patches = int(self._tokens.max()), int(self._patches.max())
        self.token_room = max(self.token_room, _room(tokens, self._config.local_window))
        self.patch_room = max(self.patch_room, _room(patches, None))
        self.cross_room = max(self.cross_room, _room(patches, self._config.decoder_window))

    def _slots_read(
        self, request: np.ndarray, readable: np.ndarray, first: np.ndarray | None, num_patches: int
    ) -> KeyRanges:
        """Slots of the last patches of those that are ``readable`` at each token: among the new
        ones, whose ``first`` of each request is given, or among what is kept."""
        slots = self._config.slots
        if first is None:
            return part_ranges(
                torch.from_numpy(request),
                torch.from_numpy(slots * np.minimum(readable, self.cross_room)),
                num_parts=len(self),
                part_size=slots * self.cross_room,
            )
        window = self._config.decoder_window
        start = np.zeros_like(readable) if window is None else np.maximum(readable - window, 0)
        return KeyRanges(
            torch.from_numpy(slots * (first[request] + start)),
            torch.from_numpy(slots * (first[request] + readable)),
            slots * int(num_patches),
        )

    def _kept_slots(self, request: np.ndarray, positions: np.ndarray) -> Kept:
        kept = _kept(request, positions, self._patches, self.cross_room)
        slots = torch.arange(self._config.slots)
        each = None if kept.rows is None else _times(kept.rows, slots)
        return Kept(rows=each, places=_times(kept.places, slots))


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """The tokens of the patches that new tokens are in, those that were there before too."""

    start: np.ndarray  # of each patch, its first token here
    patch: np.ndarray  # of each token, as all that follows
    request: np.ndarray
    offset: np.ndarray  # in its patch
    is_new: np.ndarray
    is_local: np.ndarray  # whether it passes the encoder
    place: np.ndarray  # in what is kept of open patches
    row: np.ndarray  # in [what is kept of open patches; new tokens that pass the encoder]
    num_places: int

    @property
    def new_local(self) -> np.ndarray:
        return self.is_new & self.is_local


def _view(
    lengths: np.ndarray, counts: np.ndarray, open_: np.ndarray, is_local_new: np.ndarray, size: int
) -> _View:
    """Of patches (P,), ``counts`` (B,) of each request, the first of which had ``open_`` tokens."""
    patch = np.arange(len(lengths)).repeat(lengths)
    patch_request = np.arange(len(counts)).repeat(counts)
    request = patch_request[patch]
    start = lengths.cumsum() - lengths
    offset = np.arange(len(patch)) - start[patch]
    is_new = (offset >= open_[request]) | (_ranks(patch_request)[patch] > 0)
    is_local = np.ones(len(patch), bool)
    is_local[is_new] = is_local_new
    place = request * size + offset
    num_places = len(counts) * size
    row = place.copy()
    row[is_new & is_local] = num_places + np.arange(is_local_new.sum())
    return _View(start, patch, request, offset, is_new, is_local, place, row, num_places)


def _reads(
    request: np.ndarray,
    positions: np.ndarray,
    ends: np.ndarray,
    *,
    room: int,
    window: int | None,
    fresh: bool,
) -> Reads:
    """Of rows (n,) of requests, at positions in documents of which ``ends`` (B,) rows are there."""
    if fresh:
        cu = np.append(0, np.bincount(request, minlength=len(ends)).cumsum())
        num_rows, longest = len(request), int(np.diff(cu).max())
        ranges = causal_ranges(
            torch.from_numpy(cu).int(),
            num_rows=num_rows,
            window=window,
            max_length=longest,
            num_live=num_rows,
        )
    else:
        ranges = part_ranges(
            torch.from_numpy(request),
            torch.from_numpy(np.minimum(positions + 1, room)),
            num_parts=len(ends),
            part_size=room,
        )
    return Reads(
        positions=torch.from_numpy(positions),
        ranges=ranges,
        fresh=fresh,
        kept=_kept(request, positions, ends, room),
    )


def _kept(request: np.ndarray, positions: np.ndarray, ends: np.ndarray, room: int) -> Kept:
    """The last ``room`` rows of each request."""
    places = request * room + positions % room
    is_kept = positions >= ends[request] - room
    if is_kept.all():
        return Kept(rows=None, places=torch.from_numpy(places))
    return Kept(
        rows=torch.from_numpy(np.flatnonzero(is_kept)), places=torch.from_numpy(places[is_kept])
    )


def _times(rows: Tensor, slots: Tensor) -> Tensor:
    return (rows[:, None] * len(slots) + slots).flatten()


def _ranks(groups: np.ndarray) -> np.ndarray:
    """(n,) the number of each row within its group; equal ones lie together."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def _room(rows: int, most: int | None) -> int:
    """Twice what there was whenever it runs out, and never more than a window."""
    room = max(FIRST_ROOM, 1 << (rows - 1).bit_length())
    return room if most is None else min(room, most)


@functools.lru_cache(maxsize=256)
def _closing_plan(lengths: tuple[int, ...], slots: int) -> tuple[PatchLayout, KeyRanges]:
    layout = PatchLayout.from_lengths(lengths, [len(lengths)])
    return layout, layout.patches_read_tokens(window=1, slots=slots)
