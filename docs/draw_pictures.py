"""Draws docs/pictures/*.svg from the objects that they explain, so that no picture can be wrong.

Every grid is the `dense_mask` of a `KeyRanges`, every number the value of an op. A token has the
colour of its patch: the first document is blue, the second orange, and two shades take turns from
patch to patch. `python docs/draw_pictures.py` writes the files; a test compares them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from lst_kernels import KeyRanges, PatchLayout, patch_expand, patch_pool, segment_scan

FOLDER = Path(__file__).with_name("pictures")
FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"
SHADES = (("#8fb8ea", "#c3daf6"), ("#f2b066", "#fbd9b5"))
EMPTY, EDGE, INK, SOFT, ALARM = "#f3f3f3", "#333333", "#222222", "#777777", "#c62828"
CELL, MARGIN = 22, 12

# Two documents, of patches of 1, 4, 2 and of 1, 3 tokens: the stream of most pictures.
STREAM = PatchLayout.from_lengths([1, 4, 2, 1, 3], [3, 2])


class Canvas:
    """SVG elements and the space that they take."""

    def __init__(self, title: str) -> None:
        self.title, self.elements = title, list[str]()
        self.right = self.bottom = 0

    def rect(
        self, x: int, y: int, w: int, h: int, fill: str, stroke: str = "#ffffff", width: float = 1
    ) -> None:
        self.elements.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="{width}"/>'
        )
        self._reach(x + w, y + h)

    def line(
        self, x1: int, y1: int, x2: int, y2: int, stroke: str = EDGE, width: float = 1.5
    ) -> None:
        self.elements.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{stroke}" '
            f'stroke-width="{width}"/>'
        )
        self._reach(max(x1, x2), max(y1, y2))

    def text(
        self, x: int, y: int, text: str, *, size: int = 11, anchor: str = "middle", ink: str = INK
    ) -> None:
        """Text around (x, y), which is the middle of its height."""
        self.elements.append(
            f'<text x="{x}" y="{y + (size * 3 + 4) // 8}" font-size="{size}" fill="{ink}" '
            f'text-anchor="{anchor}">{escape(text)}</text>'
        )
        width = len(text) * size * 5 // 8  # about, and rather too much
        self._reach(x + {"start": width, "middle": width // 2, "end": 0}[anchor], y + size)

    def svg(self) -> str:
        w, h = self.right + MARGIN, self.bottom + MARGIN
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" '
                f'height="{h}" font-family="{FONT}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f'<rect width="{w}" height="{h}" fill="white"/>',
                *self.elements,
                "</svg>\n",
            )
        )

    def _reach(self, right: int, bottom: int) -> None:
        self.right, self.bottom = max(self.right, right), max(self.bottom, bottom)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One side of a grid: a labelled, coloured cell per row or column, in groups."""

    name: str
    labels: list[str]
    fills: list[str]
    groups: list[tuple[str, int, int]]  # label, first cell, one past the last

    def __len__(self) -> int:
        return len(self.labels)


def fills(layout: PatchLayout) -> list[str]:
    """The colour of each patch."""
    per_document = torch.diff(layout.cu_documents)
    document = torch.repeat_interleave(torch.arange(layout.num_documents), per_document)
    return [
        SHADES[d % 2][p % 2]
        for d, p in zip(document.tolist(), layout.patch_positions.tolist(), strict=True)
    ]


def tokens_of(layout: PatchLayout, name: str = "tokens") -> Axis:
    colours, cu = fills(layout), layout.cu_patches.tolist()
    return Axis(
        name=name,
        labels=[str(t) for t in range(layout.num_tokens)],
        fills=[colours[p] for p in layout.patch_ids.tolist()],
        groups=[(f"p{p}", cu[p], cu[p + 1]) for p in range(layout.num_patches)],
    )


def slots_of(layout: PatchLayout, slots: int = 1, name: str = "patches") -> Axis:
    colours, patches = fills(layout), range(layout.num_patches)
    return Axis(
        name=name,
        labels=[chr(ord("a") + s) if slots > 1 else f"p{p}" for p in patches for s in range(slots)],
        fills=[colours[p] for p in patches for _ in range(slots)],
        groups=[(f"p{p}", p * slots, (p + 1) * slots) for p in patches] if slots > 1 else [],
    )


def draw_grid(
    canvas: Canvas,
    x: int,
    y: int,
    ranges: KeyRanges,
    queries: Axis,
    keys: Axis,
    title: str,
    *,
    ends: bool = False,
    differs_from: KeyRanges | None = None,
) -> tuple[int, int]:
    """The dense mask of ``ranges`` under a row of keys and right of a column of queries.

    ``ends`` writes start and stop beside each query; cells in which the ranges differ from
    ``differs_from`` get a red edge. Returns where the grid ends, right and below.
    """
    mask = ranges.dense_mask()
    assert mask.shape == (len(queries), len(keys))
    canvas.text(x, y + 8, title, size=13, anchor="start")
    left = x + 22 + CELL + 4 + (20 if queries.groups else 0)
    top = y + 48 + CELL + 4 + (16 if keys.groups else 0)
    right, bottom = left + len(keys) * CELL, top + len(queries) * CELL
    canvas.text((left + right) // 2, y + 34, f"keys: {keys.name}", ink=SOFT)
    _text_upwards(canvas, x + 8, (top + bottom) // 2, f"queries: {queries.name}")
    for j, (label, fill) in enumerate(zip(keys.labels, keys.fills, strict=True)):
        canvas.rect(left + j * CELL, top - CELL - 4, CELL, CELL, fill)
        canvas.text(left + j * CELL + CELL // 2, top - CELL // 2 - 4, label, size=10)
    for i, (label, fill) in enumerate(zip(queries.labels, queries.fills, strict=True)):
        canvas.rect(left - CELL - 4, top + i * CELL, CELL, CELL, fill)
        canvas.text(left - CELL // 2 - 4, top + i * CELL + CELL // 2, label, size=10)
    draw_mask(canvas, left, top, CELL, mask, keys.fills)
    for label, first, last in keys.groups:
        canvas.text(left + (first + last) * CELL // 2, top - CELL - 14, label, size=10, ink=SOFT)
    for label, first, last in queries.groups:
        canvas.text(left - CELL - 16, top + (first + last) * CELL // 2, label, size=10, ink=SOFT)
    if differs_from is not None:
        for i, j in (mask != differs_from.dense_mask()).nonzero().tolist():
            x0, y0 = left + j * CELL + 1, top + i * CELL + 1
            canvas.rect(x0, y0, CELL - 2, CELL - 2, "none", ALARM, 2)
    if ends:
        for c, (name, values) in enumerate((("start", ranges.start), ("stop", ranges.stop))):
            middle = right + 22 + 38 * c
            canvas.text(middle, top - CELL // 2 - 4, name, ink=SOFT)
            for i, value in enumerate(values.tolist()):
                canvas.text(middle, top + i * CELL + CELL // 2, str(value))
        right += 80
    return right, bottom


def draw_mask(
    canvas: Canvas, left: int, top: int, cell: int, mask: Tensor, colours: Sequence[str]
) -> None:
    """A cell for every pair, in its key's colour where the query reads the key."""
    rows, columns = mask.shape
    right, bottom = left + columns * cell, top + rows * cell
    canvas.rect(left, top, columns * cell, rows * cell, EMPTY)
    for i, j in mask.nonzero().tolist():
        canvas.rect(left + j * cell, top + i * cell, cell, cell, colours[j])
    for i in range(1, rows):
        canvas.line(left, top + i * cell, right, top + i * cell, "#ffffff", 1)
    for j in range(1, columns):
        canvas.line(left + j * cell, top, left + j * cell, bottom, "#ffffff", 1)


def _text_upwards(canvas: Canvas, x: int, y: int, text: str) -> None:
    canvas.elements.append(
        f'<text x="{x}" y="{y}" font-size="11" fill="{SOFT}" text-anchor="middle" '
        f'transform="rotate(-90 {x} {y})" dominant-baseline="middle">{escape(text)}</text>'
    )


def draw_strip(
    canvas: Canvas,
    x: int,
    y: int,
    name: str,
    labels: Sequence[object],
    colours: Sequence[str],
    cu: Sequence[int] | None = None,
    *,
    cell: int = 36,
    note: str = "",
) -> None:
    """A row of boxes under each other's names; box i spans cells cu[i] … cu[i+1] - 1."""
    cu = range(len(labels) + 1) if cu is None else cu
    canvas.text(x - 12, y + 11, name, size=12, anchor="end")
    for i, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        if cu[i] == cu[i + 1]:
            continue
        canvas.rect(x + cu[i] * cell, y, (cu[i + 1] - cu[i]) * cell, 22, colour, width=2)
        canvas.text(x + (cu[i] + cu[i + 1]) * cell // 2, y + 11, str(label))
    if note:
        canvas.text(x + cu[-1] * cell + 12, y + 11, note, size=12, anchor="start", ink=SOFT)


def draw_offsets(
    canvas: Canvas, x: int, y: int, name: str, at: Tensor, values: Tensor, cell: int = 36
) -> None:
    """Numbers at the borders between cells."""
    canvas.text(x - 12, y + 15, name, size=12, anchor="end")
    for position, value in zip(at.tolist(), values.tolist(), strict=True):
        canvas.line(x + position * cell, y, x + position * cell, y + 6)
        canvas.text(x + position * cell, y + 15, str(value))


# --- the pictures ---


def draw_patterns() -> str:
    """The five patterns on one stream, small."""
    layout = PatchLayout.from_lengths([1, 4, 2, 5, 3, 1, 4, 3], [5, 3])
    canvas = Canvas("Five attention patterns of a patch model, each a staircase")
    tokens, patches = tokens_of(layout), slots_of(layout)
    x, cell = MARGIN, 8
    for name, ranges, queries, keys in (
        ("patch encoder", layout.patches_read_tokens(), patches, tokens),
        ("patch decoder", layout.tokens_read_patches(), tokens, patches),
        ("sliding window", layout.sliding_window(6), tokens, tokens),
        ("block-causal", layout.block_causal(), patches, patches),
        ("patch-bidirectional", patch_bidirectional(layout), tokens, tokens),
    ):
        width = len(keys) * cell
        middle = x + max(width, 136) // 2
        canvas.text(middle, 18, name, size=13)
        canvas.text(middle, 36, f"{queries.name} read {keys.name}", ink=SOFT)
        draw_mask(canvas, middle - width // 2, 52, cell, ranges.dense_mask(), keys.fills)
        x += max(width, 136) + 24
    return canvas.svg()


def draw_layout() -> str:
    canvas = Canvas("A packed stream of two documents, five patches and eleven tokens")
    x, colours, tokens = 150, fills(STREAM), tokens_of(STREAM)
    cu_patches, cu_tokens = STREAM.cu_patches, STREAM.cu_tokens
    documents = [shades[0] for shades in SHADES]
    draw_strip(canvas, x, 10, "documents", ["0", "1"], documents, cu_tokens.tolist())
    patches = range(STREAM.num_patches)
    draw_strip(canvas, x, 36, "patches", patches, colours, cu_patches.tolist())
    draw_strip(canvas, x, 62, "tokens", tokens.labels, tokens.fills)
    draw_offsets(canvas, x, 92, "cu_patches", cu_patches, cu_patches)
    draw_offsets(canvas, x, 122, "cu_documents", cu_tokens, STREAM.cu_documents)
    draw_offsets(canvas, x, 152, "cu_tokens", cu_tokens, cu_tokens)
    draw_strip(canvas, x, 186, "patch_ids", STREAM.patch_ids.tolist(), tokens.fills)
    draw_strip(canvas, x, 212, "token_positions", STREAM.token_positions.tolist(), tokens.fills)
    positions = STREAM.patch_positions.tolist()
    draw_strip(canvas, x, 238, "patch_positions", positions, colours, cu_patches.tolist())
    return canvas.svg()


def draw_ranges() -> str:
    canvas = Canvas("A KeyRanges, its ends, and its transpose")
    ranges = STREAM.tokens_read_patches(2)
    tokens, patches = tokens_of(STREAM), slots_of(STREAM)
    place = (canvas, MARGIN, 10, ranges, tokens, patches, "tokens_read_patches(2)")
    right, _ = draw_grid(*place, ends=True)
    place = (canvas, right + 40, 10, ranges.transpose(), patches, tokens, "its transpose")
    draw_grid(*place, ends=True)
    return canvas.svg()


def draw_encoder() -> str:
    canvas = Canvas("Patch encoder: slots of patches read tokens")
    tokens = tokens_of(STREAM)
    queries, ranges = slots_of(STREAM, 2, "slots of patches"), STREAM.patches_read_tokens(slots=2)
    title = "window=1, slots=2"
    right, _ = draw_grid(canvas, MARGIN, 10, ranges, queries, tokens, title)
    ranges, title = STREAM.patches_read_tokens(window=2), "window=2, slots=1"
    draw_grid(canvas, right + 40, 10, ranges, slots_of(STREAM), tokens, title)
    return canvas.svg()


def draw_decoder() -> str:
    canvas = Canvas("Patch decoder: tokens read slots of patches")
    tokens, right = tokens_of(STREAM), MARGIN - 40
    for window, slots in ((None, 1), (2, 1), (1, 2)):
        ranges = STREAM.tokens_read_patches(window, slots)
        keys = slots_of(STREAM, slots, "slots of patches" if slots > 1 else "patches")
        title = f"window={window}, slots={slots}"
        right, _ = draw_grid(canvas, right + 40, 10, ranges, tokens, keys, title)
    return canvas.svg()


def patch_bidirectional(layout: PatchLayout) -> KeyRanges:
    """Every token reads its document up to the end of its own patch."""
    token = torch.arange(layout.num_tokens)
    start = token - layout.token_positions
    return KeyRanges(start, layout.cu_patches[1:][layout.patch_ids], layout.num_tokens)


def draw_bidirectional() -> str:
    canvas = Canvas("Patch-bidirectional: tokens read to the end of their patch")
    tokens = tokens_of(STREAM)
    ranges = patch_bidirectional(STREAM)
    draw_grid(canvas, MARGIN, 10, ranges, tokens, tokens, "patch-bidirectional")
    return canvas.svg()


def draw_causal() -> str:
    canvas = Canvas("Sliding window over tokens, and block-causal over patches")
    tokens, patches = tokens_of(STREAM), slots_of(STREAM)
    ranges, title = STREAM.sliding_window(3), "sliding_window(3)"
    right, _ = draw_grid(canvas, MARGIN, 10, ranges, tokens, tokens, title)
    ranges = STREAM.block_causal()
    draw_grid(canvas, right + 40, 10, ranges, patches, patches, "block_causal()")
    return canvas.svg()


def draw_readable() -> str:
    canvas = Canvas("A patch that is closed late is readable one token later")
    lengths = [1, 4, 2, 3]
    on_time = PatchLayout.from_lengths(lengths, [4])
    late = PatchLayout.from_lengths(lengths, [4], closed_late=[False, False, True, False])
    tokens, patches = tokens_of(on_time), slots_of(on_time)
    ranges, other = on_time.tokens_read_patches(1), late.tokens_read_patches(1)
    title = "every patch closed on time"
    right, _ = draw_grid(canvas, MARGIN, 10, ranges, tokens, patches, title)
    place = (canvas, right + 60, 10, other, tokens, patches, "p2 closed late")
    draw_grid(*place, differs_from=ranges)
    return canvas.svg()


def draw_pool() -> str:
    canvas = Canvas("patch_pool with each reduction")
    x, cu = 80, STREAM.cu_patches.tolist()
    values = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3, 7])
    draw_strip(canvas, x, 10, "x", [f"{v:g}" for v in values.tolist()], tokens_of(STREAM).fills)
    for row, reduce in enumerate(("mean", "sum", "max", "min", "first", "last")):
        labels = [f"{v:.3g}" for v in patch_pool(values, STREAM, reduce).tolist()]
        draw_strip(canvas, x, 48 + 26 * row, reduce, labels, fills(STREAM), cu)
    return canvas.svg()


def draw_expand() -> str:
    canvas = Canvas("patch_expand with shift 0 and 1")
    lengths, documents = [2, 3, 2, 1, 3], [3, 2]
    on_time = PatchLayout.from_lengths(lengths, documents)
    late = PatchLayout.from_lengths(lengths, documents, closed_late=[p == 1 for p in range(5)])
    x, colours, patches = 80, fills(on_time), torch.arange(1.0, on_time.num_patches + 1)
    cu = on_time.cu_patches.tolist()
    draw_strip(canvas, x, 10, "z", [f"z{p}" for p in range(5)], colours, cu)
    for row, (layout, shift, note) in enumerate(
        ((on_time, 0, ""), (on_time, 1, ""), (late, 1, "p1 closed late"))
    ):
        got = [int(v) - 1 for v in patch_expand(patches, layout, shift=shift).tolist()]
        labels = [f"z{p}" if p >= 0 else "0" for p in got]
        shades = [colours[p] if p >= 0 else EMPTY for p in got]
        draw_strip(canvas, x, 48 + 26 * row, f"shift={shift}", labels, shades, note=note)
    return canvas.svg()


def draw_scan() -> str:
    canvas = Canvas("segment_scan over the patches of two documents")
    x, colours, cell = 80, fills(STREAM), 44
    values = torch.tensor([8.0, 0, 4, 6, 2])
    draw_strip(canvas, x, 10, "x", [f"{v:g}" for v in values.tolist()], colours, cell=cell)
    for row, decay in enumerate(([0.5] * 5, [1.0] * 5, [0.0] * 5, [0.5, 0.5, 0.0, 0.5, 0.5])):
        y = segment_scan(values, torch.tensor(decay), STREAM.cu_documents)
        labels, top = [f"{v:.3g}" for v in y.tolist()], 48 + 60 * row
        shown = ["" if p == 0 else f"{d:g}" for d, p in
                 zip(decay, STREAM.patch_positions.tolist(), strict=True)]  # fmt: skip
        draw_strip(canvas, x, top, "decay", shown, [EMPTY] * 5, cell=cell)
        draw_strip(canvas, x, top + 26, "y", labels, colours, cell=cell)
    return canvas.svg()


def draw_select() -> str:
    canvas = Canvas("select_tokens: a sub-stream with the same patches and documents")
    keep = torch.diff(STREAM.cu_patches)[STREAM.patch_ids] > 1
    selected, index = STREAM.select_tokens(keep)
    x, colours, tokens = 150, fills(STREAM), tokens_of(STREAM)
    cu = STREAM.cu_patches.tolist()
    draw_strip(canvas, x, 10, "patches", range(STREAM.num_patches), colours, cu)
    draw_strip(canvas, x, 36, "tokens", tokens.labels, tokens.fills)
    chosen = [tokens.fills[t] if keep[t] else EMPTY for t in range(STREAM.num_tokens)]
    draw_strip(canvas, x, 62, "keep", ["yes" if k else "no" for k in keep.tolist()], chosen)
    kept = tokens_of(selected)
    for new, old in enumerate(index.tolist()):
        canvas.line(x + old * 36 + 18, 86, x + new * 36 + 18, 108, SOFT)
    draw_strip(canvas, x, 110, "index", index.tolist(), kept.fills)
    positions = selected.token_positions.tolist()
    draw_strip(canvas, x, 136, "token_positions", positions, kept.fills)
    cu = selected.cu_patches.tolist()
    draw_strip(canvas, x, 162, "patches", range(selected.num_patches), fills(selected), cu)
    draw_strip(canvas, x, 196, "patch lengths", torch.diff(selected.cu_patches).tolist(), colours)
    return canvas.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "patterns": draw_patterns,
    "layout": draw_layout,
    "readable": draw_readable,
    "ranges": draw_ranges,
    "patch-encoder": draw_encoder,
    "patch-decoder": draw_decoder,
    "patch-bidirectional": draw_bidirectional,
    "causal": draw_causal,
    "pool": draw_pool,
    "expand": draw_expand,
    "scan": draw_scan,
    "select-tokens": draw_select,
}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())
