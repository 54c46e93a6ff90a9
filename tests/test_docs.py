"""What the documents say is true: their code runs, their links lead somewhere, their pictures are
what the objects look like."""

import doctest
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

import lst_kernels
from lst_kernels.backends import BACKENDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GALLERY = DOCS / "kernels.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# Whose blocks go on from one another, or need a model: see test_tutorials.py,
# evaluate/test_asr.py, evaluate/test_harness.py and vocoder/test_vocoder_page.py
TUTORIALS = DOCS / "tutorials"
FOLLOWED = [DOCS / f"{name}.md" for name in ("asr-tts", "evaluation", "generation", "vocoder")]
# What the code of a page or module needs beside lst itself.
NEEDS = {
    DOCS / "blt.md": "transformers.models.blt",
    ROOT / "lst_kernels/integrations/__init__.py": "transformers.models.blt",
}
SOURCES = sorted((ROOT / "lst_kernels").rglob("*.py"))
WITH_EXAMPLES = [path for path in SOURCES if ">>> " in path.read_text()]


def code_blocks():
    blocks = []
    for page in PAGES:
        if page.parent == TUTORIALS or page in FOLLOWED:
            continue
        for block in re.finditer(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S):
            line = block.string.count("\n", 0, block.start(1))
            name = f"{page.relative_to(ROOT)}:{line + 1}"
            blocks.append(pytest.param(page, line, block[1], id=name))
    return blocks


def without_code(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def drawings():
    spec = importlib.util.spec_from_file_location("draw_pictures", DOCS / "draw_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PICTURES


@pytest.mark.parametrize(("page", "line", "code"), code_blocks())
def test_code_of_a_page_runs_on_its_own(page, line, code):
    pytest.importorskip(NEEDS.get(page, "lst"))
    # the empty lines make a traceback show the line of the page
    exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "__main__"})


def test_the_pages_have_code():
    assert len(code_blocks()) >= 15


# --- figures --------------------------------------------------------------------------------------


def rows_of(page):
    return [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if "|" in line]


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def test_the_table_of_the_readme_is_of_its_result_file():
    demo = result("demo-intel-xeon-processor-2026-11-22.json")
    scores = {
        (run["preset"], score["task"], score["mode"]): (
            f"{100 * score['accuracy']:.1f} ({100 * score['low']:.1f}–{100 * score['high']:.1f})"
        )
        for run in demo["runs"]
        for score in run["story_completion"]
        if score["measure"] == "sum"
    }
    names = {
        "StoryCloze (50)": "storycloze",
        "TopicStoryCloze (50)": "topicstorycloze",
        "HellaSwag-like, four ways (25)": "hellaswag",
    }
    found = [row for row in rows_of(ROOT / "README.md") if row[0] in names]
    assert len(found) == len(names)
    for name, *shown in found:
        assert shown == [
            scores[preset, names[name], mode]
            for preset in ("demo", "demo-baseline")
            for mode in ("T→T", "S→S")
        ]


def test_the_conditions_of_the_readme_are_those_of_its_result_file():
    demo = result("demo-intel-xeon-processor-2026-11-22.json")
    corpus, machine = demo["corpus"], demo["machine"]
    run = next(run for run in demo["runs"] if run["preset"] == "demo")
    minutes, seconds = divmod(round(run["seconds"]), 60)
    items = {score["num_items"] for each in demo["runs"] for score in each["story_completion"]}
    words = " ".join((ROOT / "README.md").read_text().split())
    for told in (
        f"torch {machine['torch'].partition('+')[0]}, commit {machine['commit']})",
        f"{corpus['seconds']:.0f} s for the corpus ({corpus['settings']['hours']:.0f} hours of "
        "speech, "
        f"{corpus['settings']['text_tokens'] // 10**6} million text tokens), "
        f"{minutes} min {seconds} s for {run['steps']:,} steps",
        f"{items.pop()} held-out stories a task",
    ):
        assert told in words
    assert not items
    assert machine["load"] < machine["threads"]  # no other work


def test_what_the_page_on_transcribing_says_is_in_its_result_file():
    runs = result("asr-intel-xeon-processor-2026-11-21.json")["runs"]
    points = {
        (run["preset"], point["set"], point["step"]): point
        for run in runs
        for point in run["points"]
    }
    words = " ".join((DOCS / "asr-tts.md").read_text().split())
    steps = {step for _, _, step in points}
    for said in ("valid/speech", "valid/voice"):
        lst, base = (points[name, said, max(steps)] for name in ("demo", "demo-baseline"))
        half = points["demo", said, max(steps) // 2]
        share = lst["units_per_second_of_speech"] / base["units_per_second_of_speech"]
        assert f"needs {share:.1f} of the units" in words
        assert round(lst["hours_heard"] / base["hours_heard"]) == 3, "three times as much speech"
        assert round(lst["training_flops"] / base["training_flops"]) == 2, "twice the FLOPs"
        for rate, bound in zip(half["scores"], base["scores"], strict=True):
            assert abs(rate["rate"] - bound["rate"]) < 0.02, "is about that of the token-level"


def test_speeds_are_told_by_the_performance_page_alone():
    """It is made from result files; a rate or a ratio of times in prose would be from none."""
    speed = r"\d ?(?:[kMGT]i?B/s|[GT]FLOP/s|(?:tokens|units|steps|hours)(?:/s| a second)|"
    speed += r"(?:×|times|%|per cent) (?:faster|slower))"
    found = {
        page.name: re.findall(rf".*{speed}.*", page.read_text())
        for page in PAGES
        if page.name != "performance.md"
    }
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert re.search(speed, (DOCS / "performance.md").read_text())


def test_the_table_of_the_data_page_is_of_its_result_file():
    measured = result("alignment-intel-xeon-processor-2026-11-21.json")
    page = DOCS / "data.md"
    errors = measured["unknown_voice"]["in_seconds"]
    rows = {row[0]: row[1:] for row in rows_of(page)}
    for name, key in (("starts", "starts"), ("stops", "stops"), ("both", "all")):
        median, *shares = rows[name]
        assert abs(float(median.removesuffix(" ms late")) - errors[key]["median_late_ms"]) <= 0.5
        kinds = ("share_within_ms", "share_within_ms_of_the_median")
        within = [errors[key][kind][ms] for kind in kinds for ms in ("20", "40", "80")]
        assert shares == [f"{100 * share:.0f} %" for share in within]
    words = " ".join(page.read_text().split())
    assert f"Of {measured['unknown_voice']['words']} words by a voice" in words
    kept = measured["windows"]["share_of_equal_units_of_100"]
    assert f"windows of 60 s keep {100 * kept:.1f} %" in words


# --- examples -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_docstrings_give_what_they_show(path):
    pytest.importorskip(NEEDS.get(path, "lst"))
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_of_a_page_exist(page):
    text = without_code(page)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            missing += [target] if target[1:] not in anchors else []
        elif not re.match(r"\w+:", target) and not (page.parent / target.split("#")[0]).exists():
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("name", drawings())
def test_a_picture_is_what_the_script_draws(name):
    committed = (DOCS / "pictures" / f"{name}.svg").read_text()
    assert committed == drawings()[name](), "run python docs/draw_pictures.py and look at it"


def test_every_picture_is_drawn_and_shown():
    files = {path.name for path in (DOCS / "pictures").glob("*.svg")}
    assert files == {f"{name}.svg" for name in drawings()}
    assert files == set(re.findall(r"\]\(pictures/([^)]+)\)", GALLERY.read_text()))


def test_the_gallery_names_every_public_name_and_describes_every_backend():
    text = GALLERY.read_text()
    assert [name for name in lst_kernels.__all__ if not re.search(rf"`.*\b{name}\b.*`", text)] == []
    assert [b.name for b in BACKENDS if f"\n| `{b.name}` |" not in text] == []
