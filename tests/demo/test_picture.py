"""The picture shows what was found: a box for each patch, a bar for each token, every number in the
table; and nothing in it can do anything or be fetched from anywhere."""

import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from lst.data.records import Word
from lst.demo.analysis import Analysis, Patch, Run, Token
from lst.demo.picture import draw
from lst.speech.units import FRAME_SAMPLES

VOID = {"wbr", "input", "br"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text up to the next element), and whether tags are paired."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.elements[-1][2] += data

    def of_class(self, name):
        return [each for each in self.elements if name in each[1].get("class", "").split()]

    def tagged(self, tag):
        return [each for each in self.elements if each[0] == tag]


def text(number, position, *labels, logprobs=None):
    """Patches of a piece each, and their tokens, from a number and a position on."""
    logprobs = [-1.0] * len(labels) if logprobs is None else logprobs
    patches = [
        Patch(
            number=number + at,
            kind="special" if label.startswith("<") else "text",
            tokens=(Token(position=position + at, label=label, logprob=logprob),),
            frames=(0, 0),
            share=0.001,
        )
        for at, (label, logprob) in enumerate(zip(labels, logprobs, strict=True))
    ]
    return Run(is_speech=False, patches=tuple(patches), units=np.zeros(0, np.int16))


def speech(number, position, frames, *, size=4, share=0.004):
    """Static patches over so many frames."""
    patches = []
    for start in range(0, frames, size):
        stop = min(start + size, frames)
        tokens = [
            Token(position=position + at, label=str(at % 7), logprob=-(at % 5) - 0.25)
            for at in range(start, stop)
        ]
        patches.append(
            Patch(
                number=number + start // size,
                kind="speech",
                tokens=tuple(tokens),
                frames=(start, stop),
                share=share,
            )
        )
    return Run(is_speech=True, patches=tuple(patches), units=np.zeros(frames, np.int16))


def sine(frames, loud=0.5):
    return (loud * np.sin(np.arange(frames * FRAME_SAMPLES) / 5)).astype(np.float32)


def a_story(prompt=3):
    runs = (
        text(0, 0, "<bos>", "<t>", " Once", "<s>", logprobs=[None, -0.5, -2.0, -1.25]),
        speech(4, 4, 30),
        text(12, 34, "<t>", " upon", "<eos>"),
    )
    return Analysis(runs=runs, prompt=prompt, flops=2.5e8)


def percent(style, name):
    return float(re.search(rf"(?:^|;){name}:([-\d.]+)%", style)[1])


def test_every_patch_is_a_box_that_tells_its_tokens():
    story = a_story()
    boxes = Page(draw(story, [sine(30)])).of_class("patch")
    assert len(boxes) == len(story.patches)
    for (_, attributes, _), patch in zip(boxes, story.patches, strict=True):
        told = attributes["data-tip"].replace("−", "-")
        assert told.startswith(f"patch {patch.number}")
        assert f"{100 * patch.share:.2f} %" in told
        for token in patch.tokens:
            assert token.logprob is None or f"log p {token.logprob:.2f}" in told


def test_colours_are_shares_of_the_scales():
    page = Page(draw(a_story(), [sine(30)]))
    shares = {percent(a["style"], "--share") for _, a, _ in page.of_class("patch")}
    assert shares == {25, 100}  # 0.001 and 0.004
    surprises = [percent(a["style"], "--surprise") for _, a, _ in page.of_class("patch")]
    assert surprises[0] == 0  # nothing is known of the first token
    assert surprises[2] == pytest.approx(100 * 2 / 4.25, abs=0.51)


def test_boxes_of_speech_lie_end_to_end_over_the_row():
    page = Page(draw(a_story(), [sine(30)]))
    places = [a["style"] for _, a, _ in page.of_class("patch") if "left:" in a["style"]]
    ends = [percent(style, "left") + percent(style, "width") for style in places]
    assert percent(places[0], "left") == 0
    assert [percent(style, "left") for style in places[1:]] == pytest.approx(ends[:-1], abs=2e-3)
    assert ends[-1] == pytest.approx(100, abs=2e-3)


@pytest.mark.parametrize("frames", [1, 125, 128, 140, 186, 187, 700])
def test_rows_hold_all_of_the_speech_about_five_seconds_each(frames):
    story = Analysis(runs=(speech(0, 0, frames),), prompt=0, flops=1e6)
    page = Page(draw(story, [sine(frames)]))
    rows = page.of_class("row")
    lengths = [float(a["viewbox"].split()[2]) for _, a, _ in page.of_class("wave")]
    assert sum(lengths) == frames
    assert len(rows) == max(1, round(frames / 125)) or frames == 187
    widths = [percent(attributes["style"], "width") for _, attributes, _ in rows]
    assert all(0 < width <= 100 for width in widths)
    ratios = [width / length for width, length in zip(widths, lengths, strict=True)]
    assert max(ratios) == pytest.approx(min(ratios), abs=1e-3)  # one scale of time


def bars(page, side):
    """(left, height, width) of each bar of prompt or continuation."""
    paths = [
        a["d"]
        for (_, svg, _), (tag, a, _) in pairwise_within(page, "bars")
        if tag == "path" and a["class"] == side
    ]
    found = re.findall(r"M([\d.]+) 1v(-[\d.]+)h([\d.]+)", "".join(paths))
    return [(float(left), -float(height), float(width)) for left, height, width in found]


def pairwise_within(page, name):
    """Each path with the SVG that it is in."""
    svg = None
    for each in page.elements:
        if each[0] == "svg":
            svg = each
        elif each[0] == "path" and svg[1]["class"] == name:
            yield svg, each


def test_a_bar_is_as_high_as_its_token_is_improbable():
    page = Page(draw(a_story(prompt=10), [sine(30)]))
    given, chosen = bars(page, "given"), bars(page, "chosen")
    assert len(given) == 6  # tokens 4 to 9
    assert len(chosen) == 24
    heights = [height for _, height, _ in given + chosen]
    assert heights == pytest.approx([(at % 5 + 0.25) / 4.25 for at in range(30)], abs=1e-3)
    lefts = [left for left, _, _ in given + chosen]
    assert all(b - a == pytest.approx(1, abs=0.02) for a, b in pairwise(lefts))


def test_the_waveform_reaches_as_far_as_it_is_loud():
    """Relative to the loudest of the document."""
    runs = (speech(0, 0, 10), text(3, 10, "<t>"), speech(4, 11, 10))
    page = Page(draw(Analysis(runs=runs, prompt=0, flops=1e6), [sine(10, 0.1), sine(10, 0.4)]))
    reach = [
        max(abs(float(y)) for y in re.findall(r"[\d.]+ (-?[\d.]+)", a["d"]))
        for _, (_, a, _) in pairwise_within(page, "wave")
    ]
    assert reach == pytest.approx([0.26, 1.01], abs=5e-3)


def test_prompt_and_continuation_are_told_apart_and_their_border_is_named_once():
    for prompt, in_text in ((3, 3), (10, 4), (16, 4), (34, 4)):
        page = Page(draw(a_story(prompt), [sine(30)]))
        assert len(page.of_class("flag")) == 1, prompt
        chips = [each for each in page.of_class("patch") if "left:" not in each[1]["style"]]
        assert sum("given" in each[1]["class"].split() for each in chips) == in_text
    assert Page(draw(a_story(prompt=37), [sine(30)])).of_class("flag") == []


def test_words_stand_above_their_frames():
    words = [Word("Once", 0, 6), Word("upon", 9, 15), Word("a", 15, 16)]
    page = Page(draw(a_story(), [sine(30)], [words]))
    start = next(at for at, each in enumerate(page.elements) if each[1].get("class") == "words")
    spans = page.elements[start + 1 : start + 4]
    assert [label for _, _, label in spans] == ["Once", "upon", "a"]
    assert [percent(a["style"], "left") for _, a, _ in spans] == [0, 30, 50]
    # up to where the next but one begins: they take turns in two lines
    assert [percent(a["style"], "width") for _, a, _ in spans] == [50, 70, 50]


def test_the_table_has_every_token_and_its_number():
    story = a_story()
    page = Page(draw(story, [sine(30)]))
    cells = [label for _, _, label in page.of_class("bar")]
    expected = ["" if t.logprob is None else f"−{-t.logprob:.2f}" for t in story.tokens]
    assert cells == expected
    assert len(page.tagged("tr")) == 1 + len(story.tokens)


def test_an_impossible_token_is_drawn_as_high_as_the_highest():
    runs = (text(0, 0, "<bos>", " a", " b", logprobs=[None, -2.0, -np.inf]),)
    html = draw(Analysis(runs=runs, prompt=1, flops=1e6))
    assert [percent(a["style"], "--surprise") for _, a, _ in Page(html).of_class("patch")] == [
        0,
        100,
        100,
    ]


def test_what_is_said_or_written_is_shown_and_not_run():
    evil = '<script>alert("1")</script>'
    runs = (text(0, 0, "<bos>", f" {evil}"), speech(2, 2, 8))
    page = Page(draw(Analysis(runs=runs, prompt=1, flops=1e6), [sine(8)], [[Word(evil, 0, 4)]]))
    assert page.tagged("script") == []
    assert evil in [label for _, _, label in page.elements]


def test_nothing_is_fetched():
    html = draw(a_story(), [sine(30)])
    assert re.search(r"(?:src|href)=|url\(|@import|//", html) is None


def test_speech_is_described_to_those_who_do_not_see_it():
    page = Page(draw(a_story(), [sine(30)]))
    (lanes,) = page.of_class("lanes")
    assert lanes[1]["role"] == "img"
    assert "0.00 s to 1.20 s in 8 patches" in lanes[1]["aria-label"]
