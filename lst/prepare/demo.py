"""The demo corpus: stories told in text and in speech, made in minutes with no download.

    stories 0, 2, 4 …  → synthesised by eight voices → units and word times → train/speech
    stories 1, 3, 5 …  → train/text
    held-out stories   → valid/{text,speech,voice}, and items: questions about their endings

A step leaves a file or folder that gets its name when it is whole, and is not done again: a run
that was stopped goes on from there. Speech is made in portions, each of them a dataset in
``work/``, by any number of processes; what comes out does not depend on how many. ``corpus.json``
is written last, and where it is, the corpus is.
"""

import os
import random
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import count, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lst.data.records import (
    FRAMES_PER_SECOND,
    Dataset,
    Record,
    RecordWriter,
    StoryItem,
    read_items,
    write_items,
)
from lst.errors import UserError, expect_option, expect_positive
from lst.files import replacing, write_json
from lst.prepare.stats import word_lengths
from lst.prepare.stories import BLOCK_SIZE, Story, generate_stories, story_questions
from lst.speech.audio import SAMPLE_RATE
from lst.speech.synthesis import HELD_OUT_VOICE, TRAINING_VOICES, Voice, synthesize
from lst.speech.units import LogMelKMeans, word_frames
from lst.strict_json import read_json
from lst.vocabulary import Tokenizer, train_tokenizer

__all__ = ["DemoConfig", "describe", "prepare_demo"]

PORTION = 16  # utterances: what is lost, at most, of each process's work when a run is stopped
CODEBOOK_SECONDS = 1800.0  # of speech that the codes are fitted to
TOKENIZER_STORIES = 10_000  # at most
SOURCE = "demo stories"
TASKS_PER_STORY = 3
# No two stories are the same, and what was told is kept in mind: a demo is no larger.
MOST = {"hours": 1000, "text_tokens": 10**9, "questions": 100_000, "validation": 100_000}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What to make. The same settings make the same corpus, bit for bit, on one machine."""

    out: Path = Path("data/demo")  # the corpus folder
    hours: float = 4.0  # of training speech
    text_tokens: int = 2_000_000  # pieces of training text
    questions: int = 240  # held-out stories that are asked about, each in three tasks
    validation: int = 64  # held-out stories for the validation losses
    pieces: int = 2000  # of the tokenizer that is trained
    tokenizer: Path | None = None  # one that there is, instead: a file, or a checkpoint's folder
    codes: int = 501  # of the speech codebook
    seed: int = 0
    workers: int = 2  # processes that make speech; no more than there are processors

    def __post_init__(self) -> None:
        for name in ("questions", "validation"):
            value = getattr(self, name)
            if value < BLOCK_SIZE or value % BLOCK_SIZE:
                raise UserError(f"--{name}: expected a multiple of {BLOCK_SIZE}, got {value}")
        expect_positive(self, "hours", "text_tokens", "pieces", "codes", "workers")
        for name, most in MOST.items():
            value = getattr(self, name)
            expect_option(value <= most, name, f"at most {most:,}", value)
        expect_option(0 <= self.seed < 2**32, "seed", "0 or more, below 2^32", self.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """What the content of the corpus depends on."""
        settings = asdict(self)
        del settings["out"], settings["workers"]
        if self.tokenizer is not None:
            settings["tokenizer"] = Tokenizer.load(self.tokenizer).fingerprint
        return settings


def prepare_demo(config: DemoConfig) -> Path:
    """Make the corpus, or what is missing of it, and return its folder.

    A corpus of the same settings that is there already is left as it is. With more than one
    worker a script must call this under ``if __name__ == "__main__"``, as processes are spawned.

    Raises:
        UserError: the folder holds something else, or a corpus of other settings, or cannot be
            written; espeak-ng or scikit-learn is missing.
    """
    out, work = config.out, config.out / "work"
    if not _claim(config):
        began = time.monotonic()
        tokenizer = _make_tokenizer(config)
        codebook = _make_codebook(config)
        _make_text(config, tokenizer)
        with _workers(min(config.workers, os.cpu_count() or 1)) as pool:
            studio = _Studio(work, out / "codebook.safetensors", pool)
            _make_speech(config, codebook, studio)
            _make_validation(config, codebook, tokenizer, studio)
            _make_items(config, codebook, tokenizer, studio)
        facts = {"settings": config.settings, **_facts(out, tokenizer)}
        write_json(out / "corpus.json", {**facts, "seconds": round(time.monotonic() - began, 1)})
    shutil.rmtree(work, ignore_errors=True)
    return out


def describe(folder: Path) -> str:
    """A table of what the corpus in ``folder`` holds, from its ``corpus.json``."""
    path = folder / "corpus.json"
    facts = read_json(path)
    try:
        return _table(facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected what a corpus holds, got {error!r}") from None


def _table(facts: dict[str, Any]) -> str:
    lines = [f"{'':14}{'records':>10}{'hours':>8}{'text tokens':>14}"]
    for name, part in facts["parts"].items():
        lines.append(f"{name:14}{part['records']:10,}{part['hours']:8.2f}{part['text_tokens']:14,}")
    rate = sum(part["units"] for part in facts["parts"].values()) / max(facts["seconds"], 0.1)
    lines.append(
        f"{facts['frames_per_word']:.1f} frames a word, {facts['frames_per_silence']:.1f} a silence"
        f" (of 40 ms); made in {facts['seconds']:.0f} s, {rate:,.0f} speech units/s"
    )
    return "\n".join(lines)


# The folder ---------------------------------------------------------------------------------------


def _claim(config: DemoConfig) -> bool:
    """Check that the folder is for these settings; True where the corpus is there already."""
    out = config.out
    done, begun = out / "corpus.json", out / "work" / "settings.json"
    for path in (done, begun):
        if path.is_file():
            _check_settings(path, config)
    if done.is_file():
        return True
    try:
        if not begun.is_file():
            if out.is_dir() and any(path.name != "work" for path in out.iterdir()):
                raise UserError(f"--out {out}: expected an empty or absent folder, got other files")
            settings = config.settings  # before the folder is made: the tokenizer may be none
            begun.parent.mkdir(parents=True, exist_ok=True)
            write_json(begun, {"settings": settings})
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    return False


def _check_settings(path: Path, config: DemoConfig) -> None:
    try:
        before = dict(read_json(path)["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected the settings of a corpus, got {error!r}") from None
    now = config.settings
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        differences = ", ".join(f"{name} {before.get(name)}, not {now[name]}" for name in changed)
        raise UserError(
            f"--out {config.out}: holds a corpus of {differences}; "
            "choose another --out or remove the folder"
        )


def _is_dataset(folder: Path) -> bool:
    return (folder / "dataset.json").is_file()


# The steps ----------------------------------------------------------------------------------------


def _training_stories(config: DemoConfig, remainder: int) -> Iterator[Story]:
    """Without end: every other story, so that none is both told in text and spoken."""
    return islice(generate_stories(config.seed, 1_000_000_000), remainder, None, 2)


def _spoken_stories(config: DemoConfig) -> Iterator["Utterance"]:
    """Without end: the training stories that are spoken, and who speaks them."""
    rng = random.Random(f"voices/{config.seed}")
    for story in _training_stories(config, 0):
        yield Utterance(story.id, story.text, rng.choice(TRAINING_VOICES))


def _make_tokenizer(config: DemoConfig) -> Tokenizer:
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
        with replacing(config.out / tokenizer.file_name) as temporary:
            tokenizer.save(temporary)
        return tokenizer
    path = config.out / "tokenizer.model"
    if not path.is_file():
        # A story is some 70 pieces; a small corpus needs no better tokenizer than its text.
        num_stories = min(TOKENIZER_STORIES, 100 + config.text_tokens // 50)
        stories = islice(_training_stories(config, 1), num_stories)
        with replacing(path) as temporary:
            train_tokenizer((story.text for story in stories), temporary, num_pieces=config.pieces)
    return Tokenizer.load(path)


def _make_codebook(config: DemoConfig) -> LogMelKMeans:
    path = config.out / "codebook.safetensors"
    if not path.is_file():
        seconds = min(CODEBOOK_SECONDS, 3600 * config.hours)
        waveforms = []
        with tqdm(total=round(seconds), desc="codebook", unit="s", disable=None) as bar:
            for utterance in _spoken_stories(config):
                waveforms.append(synthesize(utterance.text, utterance.voice).waveform)
                bar.update(len(waveforms[-1]) // SAMPLE_RATE)
                seconds -= len(waveforms[-1]) / SAMPLE_RATE
                if seconds <= 0:
                    break
        codebook = LogMelKMeans.fit(waveforms, num_units=config.codes, seed=config.seed)
        with replacing(path) as temporary:
            codebook.save(temporary)
    return LogMelKMeans.load(path)


def _make_text(config: DemoConfig, tokenizer: Tokenizer) -> None:
    folder = config.out / "train" / "text"
    if _is_dataset(folder):
        return
    missing = config.text_tokens
    with (
        tqdm(total=missing, desc="train/text", unit="tok", disable=None) as bar,
        RecordWriter(
            folder, codebook=None, tokenizer=tokenizer.fingerprint, num_units=config.codes
        ) as writer,
    ):
        for story in _training_stories(config, 1):
            writer.write(_written(story))
            num_pieces = len(tokenizer.encode(story.text))
            bar.update(num_pieces)
            missing -= num_pieces
            if missing <= 0:
                break


def _make_speech(config: DemoConfig, codebook: LogMelKMeans, studio: "_Studio") -> None:
    folder = config.out / "train" / "speech"
    if _is_dataset(folder):
        return
    missing = 3600 * config.hours
    with (
        tqdm(total=round(missing), desc="train/speech", unit="s", disable=None) as bar,
        RecordWriter(
            folder, codebook=codebook.fingerprint, tokenizer=None, num_units=config.codes
        ) as writer,
    ):
        for record in studio.records("train", _spoken_stories(config)):
            writer.write(record)
            bar.update(_seconds(record))
            missing -= _seconds(record)
            if missing <= 0:
                break


def _held_out_stories(config: DemoConfig) -> tuple[list[Story], list[Story]]:
    """Those to validate on and those to ask about."""
    num_stories = config.validation + config.questions
    stories = list(generate_stories(config.seed, num_stories, held_out=True))
    return stories[: config.validation], stories[config.validation :]


def _make_validation(
    config: DemoConfig, codebook: LogMelKMeans, tokenizer: Tokenizer, studio: "_Studio"
) -> None:
    stories, _ = _held_out_stories(config)
    rng = random.Random(f"voices/validation/{config.seed}")
    known = [Utterance(story.id, story.text, rng.choice(TRAINING_VOICES)) for story in stories]
    other = [replace(utterance, voice=HELD_OUT_VOICE) for utterance in known]
    parts: dict[str, Iterable[Record]] = {
        "text": map(_written, stories),
        "speech": studio.records("valid-speech", known),
        "voice": studio.records("valid-voice", other),
    }
    for name, records in parts.items():
        folder = config.out / "valid" / name
        if _is_dataset(folder):
            continue
        with RecordWriter(
            folder,
            codebook=None if name == "text" else codebook.fingerprint,
            tokenizer=tokenizer.fingerprint if name == "text" else None,
            num_units=config.codes,
        ) as writer:
            title = f"valid/{name}"
            for record in tqdm(records, desc=title, total=len(stories), disable=None):
                writer.write(record)


def _make_items(
    config: DemoConfig, codebook: LogMelKMeans, tokenizer: Tokenizer, studio: "_Studio"
) -> None:
    """Prompt and endings are spoken apart, all of an item by one voice, and joined in scoring."""
    folder = config.out / "items"
    if _is_dataset(folder):
        return
    questions = story_questions(_held_out_stories(config)[1], config.seed)
    # One voice a block of stories: their questions share prompts and endings, which are then
    # spoken once.
    rng = random.Random(f"voices/items/{config.seed}")
    block = BLOCK_SIZE * TASKS_PER_STORY
    voices = [rng.choice(TRAINING_VOICES) for _ in range(0, len(questions), block)]
    utterances: dict[tuple[str, Voice], Utterance] = {}
    for index, question in enumerate(questions):
        voice = voices[index // block]
        for text in (question.prompt, *question.endings):
            utterances.setdefault((text, voice), Utterance(f"{len(utterances)}", text, voice))
    spoken = studio.records("items", utterances.values())
    spoken = tqdm(spoken, desc="items", total=len(utterances), disable=None)
    records = dict(zip(utterances, spoken, strict=True))
    items = []
    for index, question in enumerate(questions):
        voice = voices[index // block]
        endings = [records[text, voice] for text in question.endings]
        items.append(
            StoryItem(
                id=question.id,
                task=question.task,
                prompt=replace(records[question.prompt, voice], id=f"{question.id}/prompt"),
                endings=tuple(
                    replace(ending, id=f"{question.id}/{place}")
                    for place, ending in enumerate(endings)
                ),
                answer=question.answer,
            )
        )
    write_items(
        folder,
        items,
        codebook=codebook.fingerprint,
        tokenizer=tokenizer.fingerprint,
        num_units=config.codes,
    )


def _written(story: Story) -> Record:
    return Record(
        id=story.id,
        text=story.text,
        units=None,
        words=None,
        chars=None,
        speaker=None,
        source=SOURCE,
    )


def _seconds(record: Record) -> float:
    assert record.units is not None
    return len(record.units) / FRAMES_PER_SECOND


# Speaking -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Utterance:
    """What is to be spoken, and by whom."""

    id: str
    text: str
    voice: Voice


@dataclass(frozen=True)
class _Studio:
    """Where portions of speech are made: ``work``, by ``pool`` or, without one, right here."""

    work: Path
    codebook: Path
    pool: ProcessPoolExecutor | None

    def records(self, name: str, utterances: Iterable[Utterance]) -> Iterator[Record]:
        """Speak utterances, of which there may be no end, in order, a few portions ahead."""
        ahead: deque[tuple[Path, Future[None] | None]] = deque()
        most_ahead = 0 if self.pool is None else 4
        source = iter(utterances)
        for number in count():
            portion = list(islice(source, PORTION))
            if not portion:
                break
            folder = self.work / f"{name}-{number:05d}"
            ahead.append((folder, self._start(folder, portion)))
            if len(ahead) > most_ahead:
                yield from self._finish(*ahead.popleft())
        for folder, future in ahead:
            yield from self._finish(folder, future)

    def _start(self, folder: Path, portion: list[Utterance]) -> "Future[None] | None":
        if _is_dataset(folder):
            return None
        if self.pool is not None:
            return self.pool.submit(_speak, folder, portion, self.codebook)
        _speak(folder, portion, self.codebook)
        return None

    def _finish(self, folder: Path, future: "Future[None] | None") -> Iterator[Record]:
        if future is not None:
            future.result()
        portion = Dataset.open(folder, codebook=_codebook(self.codebook).fingerprint)
        yield from (portion[row] for row in range(len(portion)))


def _speak(folder: Path, utterances: list[Utterance], codebook_path: Path) -> None:
    """Write a dataset of the utterances."""
    codebook = _codebook(codebook_path)
    with RecordWriter(
        folder, codebook=codebook.fingerprint, tokenizer=None, num_units=codebook.num_units
    ) as writer:
        for utterance in utterances:
            speech = synthesize(utterance.text, utterance.voice)
            units = codebook.encode(speech.waveform)
            record = Record(
                id=utterance.id,
                text=utterance.text,
                units=units,
                words=word_frames(speech.words, len(units)),
                chars=None,
                speaker=utterance.voice.name,
                source=SOURCE,
            )
            writer.write(record)


@cache
def _codebook(path: Path) -> LogMelKMeans:
    return LogMelKMeans.load(path)


@contextmanager
def _workers(number: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that end with this one: after what they have begun where it is interrupted, at
    once where it is killed."""
    if number == 1:
        yield None
        return
    # Not forked: this process has threads, of which a fork would keep the locks and not the owners.
    pool = ProcessPoolExecutor(number, get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and says what to do
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threadpool_limits(1)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# Facts --------------------------------------------------------------------------------------------


def _facts(out: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Counts of each part, and how long words and silences of the training speech are."""

    def counts(num_rows: int, records: Iterable[Record]) -> dict[str, Any]:
        num_units = num_pieces = 0
        for record in records:
            num_units += 0 if record.units is None else len(record.units)
            num_pieces += len(tokenizer.encode(record.text or ""))
        hours = round(num_units / FRAMES_PER_SECOND / 3600, 4)
        return {"records": num_rows, "hours": hours, "units": num_units, "text_tokens": num_pieces}

    parts = {}
    for name in ("train/text", "train/speech", "valid/text", "valid/speech", "valid/voice"):
        dataset = Dataset.open(out / name)
        parts[name] = counts(len(dataset), (dataset[row] for row in range(len(dataset))))
    items = read_items(out / "items")
    # Items share prompts and endings, which were spoken once.
    spoken = {
        (record.text, record.speaker): record
        for item in items
        for record in (item.prompt, *item.endings)
    }
    parts["items"] = counts(len(items), spoken.values())
    return {"parts": parts, **_word_and_silence_lengths(Dataset.open(out / "train/speech"))}


def _word_and_silence_lengths(dataset: Dataset) -> dict[str, float]:
    means = word_lengths(dataset[row] for row in range(len(dataset))).means
    return {
        "frames_per_word": round(means["word"], 2),
        "frames_per_silence": round(means["silence"], 2),
    }
