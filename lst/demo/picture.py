"""A document's patches as HTML with inline SVG: it needs no script and fetches nothing.

Text is a line of tokens that wraps; speech is rows of up to five seconds::

    words     once  upon   a   time
    waveform  ~~~~|~~~~|~~~~|~~~~|~~   behind it the patches, coloured
    bars      ▂▅▁▁|▃▂▁▁|▂▁▁▂|▁▁▁▁|▂▁   −log p of each token
    axis      0 s            1 s

A patch is coloured by its share of compute or by its mean −log p; two radio buttons choose, by
style alone. Its tokens are told where the pointer rests, and all of them in a table.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from lst.data.records import FRAMES_PER_SECOND, Word
from lst.demo.analysis import Analysis, Patch, Run, Token
from lst.speech.units import FRAME_SAMPLES

__all__ = ["draw"]

ROW_FRAMES = 5 * FRAMES_PER_SECOND  # about as long is a row
POINT_SAMPLES = 160  # of the waveform that a point of its outline stands for: 10 ms
STYLE = Path(__file__).with_name("picture.css")


def draw(
    analysis: Analysis,
    waveforms: Sequence[np.ndarray] = (),
    words: Sequence[Sequence[Word]] = (),
) -> str:
    """The picture of a document.

    Args:
        waveforms: (640 F,) float in [−1, 1] of each run of speech, in order.
        words: of each run of speech, those that are known; none of the runs past the last.
    """
    scale = _Scale(analysis)
    loudest = max([0.01, *(float(np.abs(each).max(initial=0)) for each in waveforms)])
    parts, speech = [], 0
    for run in analysis.runs:
        if run.is_speech:
            known = words[speech] if speech < len(words) else ()
            parts.append(_speech(run, waveforms[speech] / loudest, known, scale))
            speech += 1
        else:
            parts.append(_text(run, scale))
    return (
        f'<section class="lst" aria-label="The document in patches"><style>{STYLE.read_text()}'
        f"</style>{_summary(analysis)}{_legend(scale)}{''.join(parts)}{_table(analysis)}</section>"
    )


class _Scale:
    """What is full height or full colour in a document."""

    def __init__(self, analysis: Analysis) -> None:
        self.prompt = analysis.prompt
        self.share = max(patch.share for patch in analysis.patches)
        surprises = [_surprise(token) for token in analysis.tokens]
        self.surprise = max([1.0, *(each for each in surprises if math.isfinite(each))])
        self.row = _row_frames([run for run in analysis.runs if run.is_speech])

    def colours(self, patch: Patch) -> str:
        """As percentages of the two scales."""
        surprise = 0.0 if patch.logprob is None else min(-patch.logprob, self.surprise)
        return (
            f"--share:{100 * patch.share / self.share:.0f}%;"
            f"--surprise:{100 * max(surprise, 0) / self.surprise:.0f}%"
        )

    def side(self, token: Token) -> str:
        return "given" if token.position < self.prompt else "chosen"


def _row_frames(runs: Sequence[Run]) -> int:
    """Frames of a full row: such that the longest run leaves no little rest for its last one."""
    longest = max((len(run.units) for run in runs), default=0)
    patch = max((last - first for run in runs for first, last in _frames(run)), default=0)
    return max(ROW_FRAMES, longest // max(1, round(longest / ROW_FRAMES)) + patch)


def _frames(run: Run) -> Iterator[tuple[int, int]]:
    return (patch.frames for patch in run.patches)


def _surprise(token: Token) -> float:
    return 0.0 if token.logprob is None else max(-token.logprob, 0.0)


# --- what surrounds the document ------------------------------------------------------------------


def _summary(analysis: Analysis) -> str:
    tokens, patches = analysis.tokens, analysis.patches
    frames = sum(len(run.units) for run in analysis.runs)
    spoken = sum(patch.kind == "speech" for patch in patches)
    chosen = [-_surprise(token) for token in tokens[analysis.prompt :]]
    figures = [("tokens", f"{len(tokens):,}"), ("patches", f"{len(patches):,}")]
    if frames:
        figures.append(("of speech", f"{_seconds(frames)}"))
        rate = f"{spoken * FRAMES_PER_SECOND / frames:.3g}"
        figures.append(("speech patches a second, of 25 units", rate))
    if chosen:
        figures.append(("mean log p of a continued token, nats", _log(float(np.mean(chosen)))))
    figures.append(("a forward pass over all", f"{_flops(analysis.flops)}"))
    items = (f"<div><dd>{value}</dd><dt>{name}</dt></div>" for name, value in figures)
    return f'<dl class="figures">{"".join(items)}</dl>'


def _legend(scale: _Scale) -> str:
    """Which colour is what, and what chooses it."""

    def choice(name: str, label: str, low: str, high: str, checked: str = "") -> str:
        return (
            f'<label><input type="radio" name="lst-colour" class="by-{name}"{checked}> {label}'
            f'<span class="scale {name}"><i>{low}</i><b></b><i>{high}</i></span></label>'
        )

    return (
        '<fieldset class="legend"><legend>Patches coloured by</legend>'
        + choice("share", "share of compute", "0", _percent(scale.share), " checked")
        + choice("surprise", "mean −log p of its tokens", "0", f"{scale.surprise:.1f} nats")
        + '<span class="key"><b class="given"></b> prompt <b class="chosen"></b> continuation'
        "</span></fieldset>"
    )


def _table(analysis: Analysis) -> str:
    """Every token in words and numbers: what the pictures show, for those who do not see them."""
    most = max([1.0, *(_surprise(token) for token in analysis.tokens)])
    rows = []
    for run in analysis.runs:
        for patch in run.patches:
            span = f' rowspan="{len(patch.tokens)}"'
            time = _times(patch) if patch.kind == "speech" else ""
            for index, token in enumerate(patch.tokens):
                of_patch = f"<td{span}>{patch.number}</td><td{span}>{time}</td>"
                share = f"<td{span}>{_percent(patch.share)}</td>"
                kind = "unit " if patch.kind == "speech" else ""
                side = "prompt" if token.position < analysis.prompt else "continuation"
                width = 60 * min(_surprise(token), most) / most  # the number is beside it
                rows.append(
                    f"<tr>{of_patch if index == 0 else ''}<td>{token.position}</td><td>{side}</td>"
                    f"<td class='label'>{kind}{_visible(token.label)}</td>"
                    f'<td class="bar" style="--width:{width:.1f}%">{_log(token.logprob)}</td>'
                    f"{share if index == 0 else ''}</tr>"
                )
    heads = ("patch", "time", "token", "of", "stands for", "log p, nats", "share of compute")
    return (
        "<details><summary>All tokens and their log-probabilities</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Tokens"><table><thead><tr>'
        + "".join(f'<th scope="col">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


# --- text -----------------------------------------------------------------------------------------


def _text(run: Run, scale: _Scale) -> str:
    """Tokens of a word touch, and a line breaks between words."""
    words: list[list[str]] = []
    for patch in run.patches:
        (token,) = patch.tokens
        label = token.label.strip(" ") or token.label  # a blank is a gap
        if not words or label != token.label or patch.kind == "special":
            words.append([])
        if token.position == scale.prompt:
            words[-1].append('<span class="flag">continuation</span>')
        words[-1].append(
            f'<span class="patch {patch.kind} {scale.side(token)}" '
            f'style="{scale.colours(patch)}" data-tip="{_tip(patch)}">{_visible(label)}</span>'
        )
    spans = (f'<span class="word">{"".join(word)}</span>' for word in words)
    return f'<p class="text">{" ".join(spans)}</p>'


# --- speech ---------------------------------------------------------------------------------------


def _speech(run: Run, waveform: np.ndarray, words: Sequence[Word], scale: _Scale) -> str:
    num_frames = len(run.units)
    caption = (
        f"Speech, {_seconds(num_frames)}: {_patches(len(run.patches))}, "
        f"{len(run.patches) * FRAMES_PER_SECOND / num_frames:.3g} a second. Bars: −log p of each "
        f"token, up to {scale.surprise:.1f} nats"
    )
    rows = (_draw_row(row, waveform, words, scale) for row in _rows(run.patches, scale.row))
    return f"<figure><figcaption>{caption}</figcaption>{''.join(rows)}</figure>"


def _rows(patches: Sequence[Patch], longest: int) -> Iterator["_Row"]:
    """Whole patches, as many as fit."""
    row: list[Patch] = []
    for patch in patches:
        if row and patch.frames[1] - row[0].frames[0] > longest:
            yield _Row(row)
            row = []
        row.append(patch)
    yield _Row(row)


@dataclass(frozen=True)
class _Row:
    """Some patches of a run, from one frame of it to another."""

    patches: Sequence[Patch]

    @property
    def start(self) -> int:
        return self.patches[0].frames[0]

    @property
    def stop(self) -> int:
        return self.patches[-1].frames[1]

    @property
    def length(self) -> int:
        return self.stop - self.start

    def percent(self, frames: float) -> str:
        return f"{100 * frames / self.length:.3f}%"

    def left(self, frame: float) -> str:
        return f"left:{self.percent(frame - self.start)}"

    def place(self, first: float, last: float) -> str:
        return f"{self.left(first)};width:{self.percent(last - first)}"

    def tokens(self) -> Iterator[tuple[Token, float, float]]:
        """Each with its frames: those of its patch in equal parts."""
        for patch in self.patches:
            first, last = patch.frames
            width = (last - first) / len(patch.tokens)
            for index, token in enumerate(patch.tokens):
                yield token, first + index * width, width


def _draw_row(row: _Row, waveform: np.ndarray, words: Sequence[Word], scale: _Scale) -> str:
    boxes = "".join(
        f'<div class="patch" style="{row.place(*patch.frames)};{scale.colours(patch)}" '
        f'data-tip="{_tip(patch)}"></div>'
        for patch in row.patches
    )
    seconds = range(-(-row.start // FRAMES_PER_SECOND), -(-row.stop // FRAMES_PER_SECOND))
    axis = "".join(
        f'<span style="{row.left(second * FRAMES_PER_SECOND)}">{second} s</span>'
        for second in seconds
    )
    label = (
        f"Waveform from {_seconds(row.start)} to {_seconds(row.stop)} in "
        f"{_patches(len(row.patches))}, with the −log p of each token"
    )
    flag = "".join(
        f'<span class="flag{" before" if frame - row.start > 0.85 * scale.row else ""}" '
        f'style="{row.left(frame)}"><b>continuation</b></span>'
        for token, frame, _ in row.tokens()
        if token.position == scale.prompt
    )
    return (
        f'<div class="row" style="width:{100 * row.length / scale.row:.3f}%">{_words(row, words)}'
        f'<div class="lanes" role="img" aria-label="{label}">{boxes}'
        f'<svg class="wave" viewBox="0 -1 {row.length} 2" preserveAspectRatio="none">'
        f"{_outline(row, waveform, scale)}</svg>"
        f'<svg class="bars" viewBox="0 0 {row.length} 1" preserveAspectRatio="none">'
        f"{_bars(row, scale)}</svg>{flag}</div>"
        f'<div class="axis" aria-hidden="true">{axis}</div></div>'
    )


def _words(row: _Row, words: Sequence[Word]) -> str:
    """Each above its frames. They take turns in two lines, so each is as wide as the next but one
    allows."""
    here = [word for word in words if row.start <= word.start < row.stop]
    if not here:
        return ""
    starts = [*(word.start for word in here), row.stop, row.stop]
    spans = (
        f'<span style="{row.place(word.start, starts[at + 2])}" title="{escape(word.word)}">'
        f"{escape(word.word)}</span>"
        for at, word in enumerate(here)
    )
    return f'<div class="words">{"".join(spans)}</div>'


def _outline(row: _Row, waveform: np.ndarray, scale: _Scale) -> str:
    """The extremes of the waveform, 100 times a second: of the prompt, then of the continuation."""
    given = [start + width for token, start, width in row.tokens() if token.position < scale.prompt]
    split = round(max(given, default=row.start))
    paths = []
    for side, first, last in (("given", row.start, split), ("chosen", split, row.stop)):
        if first == last:
            continue
        samples = waveform[first * FRAME_SAMPLES : last * FRAME_SAMPLES]
        points = samples.reshape(-1, POINT_SAMPLES)
        at = first - row.start + (np.arange(len(points)) + 0.5) * POINT_SAMPLES / FRAME_SAMPLES
        upper = [f"{x:.2f} {y:.3f}" for x, y in zip(at, -points.max(1) - 0.01, strict=True)]
        lower = [f"{x:.2f} {y:.3f}" for x, y in zip(at, -points.min(1) + 0.01, strict=True)]
        paths.append(f'<path class="{side}" d="M{"L".join(upper + lower[::-1])}Z"/>')
    return "".join(paths)


def _bars(row: _Row, scale: _Scale) -> str:
    """A bar for each token, as wide as it lasts."""
    shapes = {"given": "", "chosen": ""}
    for token, start, width in row.tokens():
        left = start - row.start + 0.15 * width
        height = min(_surprise(token) / scale.surprise, 1.0)
        shapes[scale.side(token)] += f"M{left:.2f} 1v{-height:.3f}h{0.7 * width:.2f}v{height:.3f}z"
    return "".join(f'<path class="{side}" d="{path}"/>' for side, path in shapes.items() if path)


# --- words and numbers ----------------------------------------------------------------------------


def _tip(patch: Patch) -> str:
    """What is told of a patch, as the value of an attribute."""
    time = f", {_times(patch)}" if patch.kind == "speech" else ""
    lines = [f"patch {patch.number}{time}", f"{_percent(patch.share)} of the compute"]
    kind = "unit " if patch.kind == "speech" else ""
    lines += [
        f"{kind}{_visible(token.label)}   log p {_log(token.logprob)}" for token in patch.tokens
    ]
    return "&#10;".join(lines)


def _visible(label: str) -> str:
    """A label in HTML, with blanks that can be seen."""
    return escape(label.replace(" ", "\N{OPEN BOX}").replace("\n", "↵") or "·")


def _times(patch: Patch) -> str:
    start, stop = (frame / FRAMES_PER_SECOND for frame in patch.frames)
    return f"{start:.2f}–{stop:.2f} s"


def _patches(number: int) -> str:
    return "1 patch" if number == 1 else f"{number:,} patches"


def _seconds(frames: int) -> str:
    return f"{frames / FRAMES_PER_SECOND:.2f} s"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _log(logprob: float | None) -> str:
    return "" if logprob is None else f"{logprob:.2f}".replace("-", "−")


def _flops(flops: float) -> str:
    power = min(max(int(math.log10(max(flops, 1)) // 3), 2), 4)
    return f"{flops / 1000**power:,.3g} {'MGT'[power - 2]}FLOPs"
