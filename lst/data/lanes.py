"""Lanes: the endless rows of the global batch, each with its own order and its own state.

    records -> interleave -> patching -> packing -> batch
    [           a lane runs these four          ]

A batch of R rows has R lanes. Lane l owns records l, l + R, l + 2R … of every source, in an order
shuffled anew each epoch, and yields (row, state after it); its row number is the training step. No
lane knows of another, of processes or of workers, so what a lane yields depends on none of them.

A source is a dataset and the kind of documents that its records become. The next document comes
from the source that has delivered the least content for its weight: tokens (text pieces and 25 Hz
speech units) or units (their patches). So each source's share of a lane is its weight's but for one
document. A source with fewer records than lanes is shared: every lane goes through all of it, in
orders of its own.

A row is filled to its last unit, documents being split where it ends. A document of a task (``asr``
or ``tts``) is never split: where it does not fit, the row ends early and the document opens the
next; one that fits no row is left out, and the state counts it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from lst.data.encoded import EncodedDataset
from lst.data.interleave import (
    DOCUMENT_KINDS,
    TASKS,
    DocumentKind,
    encoded_document,
    stable_rng,
)
from lst.data.packing import Packed, concatenate, patch_document, take
from lst.data.patching import NoPatching, PatchingConfig, Strategy, strategy_at
from lst.errors import UserError
from lst.vocabulary import Vocabulary

__all__ = ["Carry", "Lane", "LaneState", "Source", "SourceState"]


_UNUSED = stable_rng("unused")  # for text, of which nothing is drawn: making one takes its time


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset, and what its records become."""

    dataset: str
    kind: DocumentKind

    @classmethod
    def parse(cls, key: str) -> Self:
        """Read ``DATASET`` or ``DATASET:KIND``. Raises UserError where it is neither."""
        dataset, colon, name = key.partition(":")
        kinds = [kind for kind in DOCUMENT_KINDS if kind == (name if colon else "auto")]
        if not dataset or not kinds:
            raise UserError(
                "data: expected a mixture of DATASET or DATASET:KIND, KIND one of "
                f"{', '.join(DOCUMENT_KINDS)}; got {key!r}"
            )
        return cls(dataset, kinds[0])


class SourceState(NamedTuple):
    """Where a lane stands in one source."""

    epoch: int = 0
    position: int = 0  # of the next record in the order of this epoch
    delivered: int = 0  # content so far
    left_out: int = 0  # documents so far that no row could hold


class Carry(NamedTuple):
    """A document under way: which record it was, and what made it the document that it is."""

    source: str
    epoch: int
    position: int
    row: int  # at which it was drawn; the curriculum reads it
    consumed: int  # patches in earlier rows


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneState:
    """The smallest facts that reproduce a lane's next row."""

    row: int
    sources: Mapping[str, SourceState]
    carry: Carry | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "row": self.row,
            "sources": {name: source._asdict() for name, source in self.sources.items()},
            "carry": None if self.carry is None else self.carry._asdict(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises UserError where ``values`` is not what :meth:`to_json` gave."""
        try:
            return cls(
                row=values["row"],
                sources={name: SourceState(**each) for name, each in values["sources"].items()},
                carry=None if values["carry"] is None else Carry(**values["carry"]),
            )
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"expected the state of a lane, got {values!r}") from None


@dataclass(kw_only=True)
class Lane:
    """One lane of ``num_lanes``.

    Args:
        weights: by source, as ``Source.parse`` reads it; more than 0 each.
        weights_in: what they are shares of.
        datasets: by the name that the sources give it.
        row_units: units of a row, at least MIN_ROOM.
        patching, total_steps: what ``strategy_at`` reads.
    """

    number: int
    num_lanes: int
    weights: Mapping[str, float]
    weights_in: Literal["tokens", "units"] = "tokens"
    datasets: Mapping[str, EncodedDataset]
    vocabulary: Vocabulary
    row_units: int
    patching: PatchingConfig
    total_steps: int
    seed: int

    def __post_init__(self) -> None:
        self._names = sorted(
            self.weights
        )  # a tie goes to the first, in whatever order the mixture is
        self._sources = {name: Source.parse(name) for name in self._names}
        sizes = {name: len(self._dataset(name)) for name in self._names}
        self._is_shared = {name: size < self.num_lanes for name, size in sizes.items()}
        self._num_records = {
            name: size if self._is_shared[name] else len(range(self.number, size, self.num_lanes))
            for name, size in sizes.items()
        }
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    def first_state(self) -> LaneState:
        return LaneState(row=0, sources={name: SourceState() for name in self._names})

    def rows(self, state: LaneState) -> Iterator[tuple[Packed, LaneState]]:
        """Endless rows of ``row_units`` units, each with the state after it. A row has fewer where
        a document that must stay whole comes next.

        Raises:
            UserError: the state belongs to other sources, a record cannot be read, or no row can
                hold any document of a source.
        """
        self._check(state)
        sources, carry = dict(state.sources), state.carry
        document = None if carry is None else self._document(carry)[0]
        row = state.row
        left_out = 0  # documents since the last that was not
        while True:
            parts: list[Packed] = []
            room = self.row_units
            while room:
                if carry is None or document is None:
                    carry = self._draw(sources, row)
                    document, content = self._document(carry)
                    fits = not self._is_whole(carry) or len(document.lengths) <= self.row_units
                    before = sources[carry.source]
                    sources[carry.source] = self._advance(carry, before, content if fits else None)
                    left_out = 0 if fits else left_out + 1
                    if not fits:
                        self._expect_some_fit(carry, document, left_out)
                        carry = None
                        continue
                if self._is_whole(carry) and len(document.lengths) > room:
                    break
                part, consumed = take(document, carry.consumed, room)
                parts.append(part)
                room -= len(part.lengths)
                done = consumed == len(document.lengths)
                carry = None if done else carry._replace(consumed=consumed)
            row += 1
            yield concatenate(parts), LaneState(row=row, sources=dict(sources), carry=carry)

    def _draw(self, sources: Mapping[str, SourceState], row: int) -> Carry:
        name = min(self._names, key=lambda name: sources[name].delivered / self.weights[name])
        source = sources[name]
        return Carry(source=name, epoch=source.epoch, position=source.position, row=row, consumed=0)

    def _advance(self, drawn: Carry, source: SourceState, content: int | None) -> SourceState:
        """The state after a document of so much content, or after one that was left out."""
        epoch, position = drawn.epoch, drawn.position + 1
        if position == self._num_records[drawn.source]:
            epoch, position = epoch + 1, 0
        return SourceState(
            epoch=epoch,
            position=position,
            delivered=source.delivered + (content or 0),
            left_out=source.left_out + (content is None),
        )

    def _is_whole(self, drawn: Carry) -> bool:
        return self._sources[drawn.source].kind in TASKS

    def _expect_some_fit(self, drawn: Carry, document: Packed, left_out: int) -> None:
        """Raise UserError where the last ``left_out`` documents are all that a source has."""
        if left_out >= self._num_records[drawn.source]:
            raise UserError(
                f"data: {drawn.source!r} of the mixture: expected documents of at most "
                f"{self.row_units} units, as they are not split, got none "
                f"({document.record_ids[0]!r} has {len(document.lengths)}); a larger "
                "--data.units-per-sequence takes them"
            )

    def _document(self, drawn: Carry) -> tuple[Packed, int]:
        """The whole patched document, and how much content it has: a pure function of what was
        drawn."""
        epoch = drawn.epoch
        if self._is_shared[drawn.source]:
            epoch = epoch * self.num_lanes + self.number  # no two lanes interleave a record alike
        dataset, kind = self._dataset(drawn.source), self._sources[drawn.source].kind
        index = self._record_index(drawn)
        record = dataset[index]
        draws = record.units is not None and kind != "text"
        rng = stable_rng(self.seed, epoch, record.id) if draws else _UNUSED
        try:
            document = encoded_document(
                record, self.vocabulary, rng, kind, noise_ms=self.patching.boundary_noise_ms
            )
        except UserError as error:
            raise UserError(f"{dataset.where(index)}, {error}") from None
        strategy: Strategy = NoPatching()  # of text each token is a patch, whatever the strategy
        if draws:
            strategy = strategy_at(self.patching, drawn.row, self.total_steps, rng)
        packed = patch_document(document, self.vocabulary, strategy)
        return packed, self._content(packed)

    def _content(self, packed: Packed) -> int:
        """Specials are none of it. Speech counts by its units also where it is in BPE pieces, so
        that runs of both read the same documents."""
        tokens, vocabulary = packed.tokens, self.vocabulary
        specials = int(np.count_nonzero(vocabulary.is_special(tokens)))  # a patch each
        if self.weights_in == "units":
            return len(packed.lengths) - specials
        content = len(tokens) - specials
        if vocabulary.speech_bpe is not None:
            content += int((vocabulary.num_frames(tokens) - vocabulary.is_unit(tokens)).sum())
        return content

    def _record_index(self, drawn: Carry) -> int:
        key = (drawn.source, drawn.epoch)
        if key not in self._orders:
            rng = stable_rng("order", self.seed, drawn.source, self.number, drawn.epoch)
            for old in [old for old in self._orders if old[0] == drawn.source]:
                del self._orders[old]
            self._orders[key] = rng.permutation(self._num_records[drawn.source])
        place = int(self._orders[key][drawn.position])
        return place if self._is_shared[drawn.source] else self.number + self.num_lanes * place

    def _dataset(self, source: str) -> EncodedDataset:
        return self.datasets[self._sources[source].dataset]

    def _check(self, state: LaneState) -> None:
        where = f"lane {self.number} of {self.num_lanes}"
        if sorted(state.sources) != self._names:
            raise UserError(
                f"{where}: expected a state of sources {self._names}, got {sorted(state.sources)}"
            )
        for name, position in [
            *((name, source.position) for name, source in state.sources.items()),
            *((carry.source, carry.position) for carry in [state.carry] if carry is not None),
        ]:
            if name not in self._sources or not 0 <= position < self._num_records[name]:
                raise UserError(f"{where}: its state is not one of source {name!r} as it is now")
