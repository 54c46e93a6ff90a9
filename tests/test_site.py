"""The documentation as a site, and the commands that its pages and the README show."""

import functools
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest

import lst_kernels

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS_OF_COMMANDS = ("lst.prepare", "lst.evaluate.harness", "lst.vocoder")
MODULE = re.compile(r"(?:python|torchrun).* -m (lst[\w.]*)(.*)")


# --- commands -------------------------------------------------------------------------------------


def commands_shown():
    """(page, module, what follows it) of every line that runs a module of ours."""
    for page in PAGES:
        for block in re.findall(
            r"^```(?:console|bash)?\n(.*?)^```$", page.read_text(), re.M | re.S
        ):
            for line in block.replace("\\\n", " ").splitlines():
                if found := MODULE.search(line.split("&&")[-1]):
                    words = shlex.split(found[2].replace('" &', ""), comments=True)
                    yield pytest.param(found[1], words, id=f"{page.name}: {line.strip()[:60]}")


@functools.cache
def help_of(module, *subcommand):
    """What ``--help`` says, in one line: long options are broken in its boxes."""
    argv, sys.argv = sys.argv, [module, *subcommand, "--help"]
    try:
        with redirect_stdout(StringIO()) as out, pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = argv
    assert not ended.value.code
    return re.sub(r"[\s│]+", " ", out.getvalue())


@pytest.mark.parametrize(("module", "words"), list(commands_shown()))
def test_a_command_of_a_page_has_the_options_that_it_shows(module, words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    if module == "lst.evaluate.harness":
        pytest.importorskip("lm_eval", reason="lst[eval] is not installed")
    subcommand = words[:1] if module in COMMANDS_OF_COMMANDS else ()
    known = help_of(module, *subcommand)
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    assert [each for each in options if not re.search(rf"{each}(?![\w-])", known)] == []


def test_the_pages_show_commands():
    assert len(list(commands_shown())) >= 30


COMMANDS = [
    ("lst.train",), ("lst.generate",), ("lst.evaluate",), ("lst.evaluate.word_embeddings",),
    ("lst.compare",), ("lst.demo",), ("lst.export",), ("lst.flops",),
    *(("lst.prepare", each) for each in ("demo", "corpus", "units", "stats", "tokenizer")),
    *(("lst.vocoder", each) for each in ("train", "synthesise", "recordings")),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_help_of_a_command_is_prose_for_its_user(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    said = help_of(*command)
    assert said.startswith(f"usage: python -m {' '.join(command)} ")
    assert "``" not in said
    assert ":mod:" not in said


def test_the_comment_of_an_option_does_not_go_on_below_it():
    """--help shows what is behind a field, and of what is below it nothing."""
    behind, below = re.compile(r"    \w+: .*\S  # "), re.compile(r"    # [a-z`(]")
    broken = []
    for path in sorted((ROOT / "lst").rglob("*.py")):
        lines = path.read_text().splitlines()
        broken += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, (line, following) in enumerate(pairwise(lines), start=1)
            if behind.match(line) and below.match(following)
        ]
    assert broken == []


# --- the site -------------------------------------------------------------------------------------


class References(HTMLParser):
    """What a page of HTML has, and what it fetches or leads to."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.targets, self.fetched = set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        has = dict(attributes)
        self.ids.add(has.get("id"))
        if tag in ("img", "script"):
            self.fetched.append(has.get("src"))
        elif tag == "link" and has.get("rel") in ("stylesheet", "preconnect", "icon"):
            self.fetched.append(has["href"])
        elif tag == "a" and "href" in has:
            self.targets.append(has["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the site, built as ``make docs`` does."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out)))
    return {path: References(path) for path in out.rglob("*.html") if path.name != "404.html"}


def test_the_site_is_read_without_a_network(site):
    fetched = {each for page in site.values() for each in page.fetched if each}
    assert fetched
    assert [each for each in fetched if re.match(r"(\w+:)?//", each)] == []


def test_every_link_of_the_site_leads_somewhere(site):
    dead = []
    for path, page in site.items():
        for target in filter(None, page.targets):
            file, _, anchor = target.partition("#")
            if re.match(r"\w+:", file):
                continue
            there = (path.parent / file).resolve() if file else path
            if not there.exists() or (anchor and there in site and anchor not in site[there].ids):
                dead.append(f"{path.name}: {target}")
    assert dead == []


def test_the_reference_has_the_comments_of_fields(site):
    pages = {path.name: path.read_text() for path in site if path.parent.name == "api"}
    for comment in ("int32, token offset of each patch; last = T", "scores needed: the sum of"):
        assert comment in pages["kernels.html"]
    assert "for the initial weights, the order of the data and" in pages["lst.html"]
    assert not re.search("::</p>", "".join(pages.values()))


def test_the_reference_has_every_public_name(site):
    (page,) = (page for path, page in site.items() if path.match("api/kernels.html"))
    assert {f"lst_kernels.{name}" for name in lst_kernels.__all__} <= page.ids
