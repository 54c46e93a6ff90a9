"""The page in a browser, as its reader has it: the command in a process of its own, Chromium
without a window, a prompt typed or a file chosen, and what is then to be seen and heard."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lst.pretrained import save_pretrained

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
soundfile = pytest.importorskip("soundfile", reason="lst[speech] is not installed")
pytest.importorskip("gradio", reason="lst[demo] is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium"),
    pytest.mark.timeout(120),
]
# nothing that a browser does on its own account
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]
MAX_BYTES = 400_000
SECONDS = 30_000  # milliseconds that the page may take for anything


@pytest.fixture(scope="module")
def address(make_trained, tmp_path_factory):
    """A page is served there, of a model of random weights, until the tests are through."""
    folder = tmp_path_factory.mktemp("page")
    save_pretrained(make_trained(context=128), folder / "tiny")
    temporary = folder / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "lst.demo", folder / "tiny", "--port", "0"]
    limits = ["--max-seconds", "4", "--max-megabytes", str(MAX_BYTES / 1e6)]
    with subprocess.Popen(
        [*command, *limits, "--max-tokens", "60"],
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            line = server.stdout.readline()
            assert line.startswith("http://127.0.0.1:"), line + server.stderr.read()
            yield line.split()[0]
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=20)
        finally:
            server.kill()
    assert server.returncode == 0, errors
    assert "Traceback" not in errors
    assert list(temporary.iterdir()) == []  # uploads and sounds are gone with the page


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(address, browser):
    """The page, loaded; whatever it asks of others than its server is an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(error))
    page.goto(address)
    page.locator("#go").wait_for()
    yield page
    context.close()
    elsewhere = [url for url in asked if not url.startswith((address, "blob:", "data:"))]
    assert len(asked) > 3
    assert elsewhere == []
    assert failed == []


def continue_as(page, modality):
    page.locator("#then").get_by_label(modality, exact=True).check()
    page.locator("#go").click()


def choose(page, path):
    page.locator("#speech input[type=file]").set_input_files(path)


def error(page):
    """What the page says is wrong: nothing of files' places or of the program."""
    toast = page.locator(".toast-body").first
    toast.wait_for()
    said = toast.inner_text()
    assert not re.search(r"Traceback|\.py|/tmp|gradio", said)
    return said


def numbers(text):
    """Of log-probabilities, as they are written."""
    return [float(each.replace("−", "-")) for each in text if each]


def test_a_text_is_continued_in_speech_that_can_be_heard_and_seen(page):
    page.locator("#text textarea").fill("the red fox")
    continue_as(page, "speech")
    picture = page.locator("#picture section.lst")
    picture.wait_for()
    said = page.locator("#read textarea").input_value()
    (seconds,) = {sum(map(float, re.findall(r"([\d.]+) s of speech", said)))}
    assert seconds > 0

    # heard: what the player plays is as long as it is said to be
    page.locator("#heard").get_by_label("Play", exact=True).wait_for()
    link = page.locator("#heard a[download]").get_attribute("href")
    response = page.request.get(link)
    assert response.ok
    assert response.body()[:4] == b"RIFF"
    assert (len(response.body()) - 44) / 2 == pytest.approx(16_000 * seconds, abs=100)

    # seen: waveform, bars, and a colour that the radio buttons choose
    wave = picture.locator("svg.wave").first
    assert wave.bounding_box()["width"] > 5
    assert wave.locator("path.chosen").get_attribute("d").startswith("M")
    box = picture.locator(".lanes .patch").first
    colours = [box.evaluate("each => getComputedStyle(each).backgroundColor")]
    picture.get_by_label("mean −log p of its tokens").check()
    colours.append(box.evaluate("each => getComputedStyle(each).backgroundColor"))
    assert colours[0] != colours[1]

    # told: each token's log-probability, and shares that are all of the compute
    picture.locator("summary").click()
    logprobs = numbers(picture.locator("td.bar").all_inner_texts())
    assert len(logprobs) >= 4
    assert all(each <= 0 for each in logprobs)
    shares = picture.locator("tbody tr td:last-child").all_inner_texts()
    assert sum(float(each[:-2]) for each in shares if each.endswith("%")) == pytest.approx(
        100, 0.02
    )


def test_what_the_pointer_rests_on_is_told(page):
    page.locator("#text textarea").fill("the red fox")
    continue_as(page, "text")
    chip = page.locator("#picture .patch").nth(2)
    chip.hover()
    told = chip.evaluate("each => getComputedStyle(each, '::after').content")
    assert "patch 2" in told
    assert "log p" in told


def test_a_recording_is_continued(page, tmp_path):
    path = tmp_path / "said.wav"
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 32_000)
    soundfile.write(path, np.stack([noise, noise], 1), 32_000)  # a second, in stereo
    choose(page, path)
    page.locator("#speech").get_by_label("Play", exact=True).wait_for()
    continue_as(page, "either")
    page.locator("#picture svg.wave path.given").first.wait_for()
    assert "Speech, 1." in page.locator("#picture figcaption").first.inner_text()


def test_a_file_that_is_no_audio_is_said_so_and_another_prompt_works(page, tmp_path):
    path = tmp_path / "broken.wav"
    path.write_bytes(b"RIFF\x24\x00\x00\x00WAVE, it says, but is none")
    choose(page, path)
    continue_as(page, "speech")
    assert "broken.wav: not readable as audio" in error(page)
    page.locator("#speech").get_by_label("Clear").click()
    page.locator("#text textarea").fill("a fox")
    continue_as(page, "text")
    page.locator("#picture section.lst").wait_for()


def test_a_recording_that_is_too_long_is_said_so(page, tmp_path):
    path = tmp_path / "long.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.1, 0.1, 5 * 16_000), 16_000)
    assert path.stat().st_size < MAX_BYTES
    choose(page, path)
    page.locator("#speech").get_by_label("Play", exact=True).wait_for()
    continue_as(page, "speech")
    assert "long.flac: expected at most 4 s of audio" in error(page)


def test_a_file_that_is_too_large_is_not_taken(page, tmp_path):
    path = tmp_path / "large.wav"
    soundfile.write(path, np.zeros(MAX_BYTES), 16_000)  # two bytes each
    choose(page, path)
    assert "large.wav" in error(page)


def test_a_prompt_longer_than_the_context_is_said_so(page):
    page.locator("#text textarea").fill("the red fox " * 60)
    continue_as(page, "text")
    assert "at most 128 patches, the context" in error(page)


def test_nobody_but_this_machine_can_come(address):
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    listening = "0A"  # Linux, proc_pid_net(5); an address is written from its last byte on
    hosts = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            host, at = local.split(":")
            if int(at, 16) == port and state == listening:
                hosts.append(host)
    assert hosts == ["0100007F"]


def test_two_readers_at_once_are_both_answered(page, browser, address):
    other = browser.new_page()
    other.set_default_timeout(SECONDS)
    other.goto(address)
    for each, prompt in ((page, "the red fox"), (other, "far away")):
        each.locator("#text textarea").fill(prompt)
        continue_as(each, "text")
    for each, pieces in ((page, ["red", "fox"]), (other, ["far", "away"])):
        given = each.locator("#picture .patch.given")
        given.first.wait_for()
        said = "".join(given.all_inner_texts())
        assert [piece for piece in pieces if piece not in said] == []
    other.close()
