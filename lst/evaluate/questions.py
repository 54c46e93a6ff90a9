"""Questions with several endings, read from the files that benchmarks are published as.

    hellaswag                     JSONL: activity_label, ctx_a, ctx_b, endings, label
    storycloze, topicstorycloze   CSV: InputStoryid, InputSentence1 … 4,
                                  RandomFifthSentenceQuiz1 and 2, AnswerRightEnding
                                  or a folder of pairs of recordings (below)
    swuggy, sblimp                a folder of recordings with gold.csv (ZeroSpeech 2021)

Spoken stories are a folder with two recordings for each story, and their texts beside them where
there are any. Either the whole story is in both, and the number that opens a name gives the order:
the true one, then the other; or names tell what is what, and the prompt has a file of its own::

    0_….wav  0_….txt              17_mutual.wav     17_mutual.txt
    1_….wav  1_….txt              17_correct.wav    17_correct.txt
    2_….wav  2_….txt              17_incorrect.wav  17_incorrect.txt

Every error names the file, and the line where there is one.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lst.data.interleave import Mode
from lst.data.records import Record, StoryItem
from lst.errors import UserError
from lst.files import reason
from lst.speech.audio import AUDIO_SUFFIXES
from lst.strict_json import expect_unicode, parse_json

__all__ = ["READERS", "Passage", "Question", "has_sides", "of_items", "read_questions", "sides"]


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt or an ending: written, spoken or both."""

    record: Record  # without units where they are still to be made
    audio: Path | None = None  # the recording to make them of

    @property
    def written(self) -> bool:
        return self.record.text is not None

    @property
    def spoken(self) -> bool:
        return self.record.units is not None or self.audio is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which ending follows?

    Attributes:
        id: for people; that of a story, a line, a pair.
        scores: names of the scores that it counts in, at least one.
        prompt: None where the endings are whole: words, sentences, stories.
        answer: the true ending's place.
        group: questions of one group weigh as much as one: the same words in several voices.
    """

    id: str
    scores: tuple[str, ...]
    prompt: Passage | None
    endings: tuple[Passage, ...]
    answer: int
    group: str


def of_items(items: Iterable[StoryItem]) -> list[Question]:
    """The items of a corpus of our own."""
    return [
        Question(
            id=item.id,
            scores=(item.task,),
            prompt=Passage(item.prompt),
            endings=tuple(map(Passage, item.endings)),
            answer=item.answer,
            group=f"{place} {item.id}",
        )
        for place, item in enumerate(items)
    ]


def sides(question: Question, mode: Mode) -> list[tuple[str, Passage]]:
    """("S" or "T", passage) of every passage in a mode."""
    endings = [(mode[2], ending) for ending in question.endings]
    return endings if question.prompt is None else [(mode[0], question.prompt), *endings]


def has_sides(question: Question, mode: Mode, *, speakable: bool = False) -> bool:
    """Whether a question can be asked in a mode.

    Args:
        speakable: whatever is written can be spoken as well.
    """
    if question.prompt is None and mode[0] != mode[2]:
        return False
    return all(
        passage.written if side == "T" or speakable else passage.spoken
        for side, passage in sides(question, mode)
    )


def read_questions(task: str, path: Path) -> list[Question]:
    """Read a benchmark.

    Args:
        task: one of READERS.
        path: its file or its folder.

    Raises:
        UserError: nothing there; a column that is missing, a line that is malformed, an answer out
            of range, a text that is empty, a recording without its partner.
    """
    if not path.exists():
        raise UserError(f"{path}: expected the data of {task}, got no such file or folder")
    questions = READERS[task](task, path)
    if not questions:
        raise UserError(f"{path}: expected questions, got none")
    return questions


# Text ---------------------------------------------------------------------------------------------


def _hellaswag(task: str, path: Path) -> list[Question]:
    questions = []
    for line, text in enumerate(_read_text(path).split("\n"), 1):
        where = f"{path}, line {line}"
        if not text.strip():
            continue
        fields = parse_json(text, where)
        if not isinstance(fields, dict):
            raise UserError(f"{where}: expected an object, got {text[:40]!r}")
        columns = ("activity_label", "ctx_a", "ctx_b")
        label, ctx_a, ctx_b = (_string(fields, column, where) for column in columns)
        endings = fields.get("endings")
        if not isinstance(endings, list) or not all(isinstance(each, str) for each in endings):
            raise UserError(f"{where}: expected endings to be a list of texts, got {endings!r}")
        prompt = _clean(f"{label}: {ctx_a} {ctx_b.capitalize()}")
        answer = _whole_number(fields.get("label"), f"{where}: expected label")
        questions.append(
            _question(task, line, where, prompt, [_clean(each) for each in endings], answer)
        )
    return questions


def _clean(text: str) -> str:
    """HellaSwag's text as it is usually scored: what its WikiHow half has in brackets is markup, of
    which a title ends a sentence."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


_STORY = [f"InputSentence{number}" for number in (1, 2, 3, 4)]
_ENDINGS = ["RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"]


def _stories(task: str, path: Path) -> list[Question]:
    if path.is_dir():
        return _recordings(task, path)
    questions = []
    columns = ["InputStoryid", *_STORY, *_ENDINGS, "AnswerRightEnding"]
    for number, (where, row) in enumerate(_read_csv(path, columns), 1):
        answer = _whole_number(row["AnswerRightEnding"], f"{where}: expected AnswerRightEnding")
        prompt = " ".join(row[column].strip() for column in _STORY)
        endings = [row[column].strip() for column in _ENDINGS]
        questions.append(_question(task, number, where, prompt, endings, answer - 1, first=1))
    return questions


def _question(
    task: str,
    number: int,
    where: str,
    prompt: str,
    endings: Sequence[str],
    answer: int,
    *,
    first: int = 0,
) -> Question:
    """A written question; ``first`` is the number that the file gives to the first ending."""
    if len(endings) < 2:
        raise UserError(f"{where}: expected at least 2 endings, got {len(endings)}")
    if not 0 <= answer < len(endings):
        raise UserError(
            f"{where}: expected an answer from {first} to {len(endings) - 1 + first}, "
            f"got {answer + first}"
        )
    passages = []
    for name, text in [("prompt", prompt), *((f"ending-{i}", t) for i, t in enumerate(endings))]:
        if not text.strip():
            raise UserError(f"{where}: expected text for every part, got an empty {name}")
        expect_unicode(text, where)
        passages.append(Passage(_record(f"{task}-{number}-{name}", text, task)))
    return Question(
        id=f"{task}-{number}",
        scores=(task,),
        prompt=passages[0],
        endings=tuple(passages[1:]),
        answer=answer,
        group=f"{task}-{number}",
    )


# Recordings ---------------------------------------------------------------------------------------

_TOLD = re.compile(r"(.+)_(mutual|correct|incorrect)")
_NUMBERED = re.compile(r"(\d+)(_.*)?")


def _recordings(task: str, folder: Path) -> list[Question]:
    """Pairs of spoken stories, see above."""
    files = sorted(each for each in folder.iterdir() if each.suffix.lower() in AUDIO_SUFFIXES)
    told: dict[str, dict[str, Path]] = defaultdict(dict)
    numbered: dict[int, Path] = {}
    for file in files:
        if found := _TOLD.fullmatch(file.stem):
            told[found[1]][found[2]] = file
        elif found := _NUMBERED.fullmatch(file.stem):
            if int(found[1]) in numbered:
                other = numbered[int(found[1])].name
                raise UserError(f"{file}: expected one recording of a number, got {other} as well")
            numbered[int(found[1])] = file
        else:
            raise UserError(
                f"{file}: expected a name that opens with a number or ends in _mutual, _correct or "
                "_incorrect"
            )
    if told and numbered:
        raise UserError(
            f"{folder}: expected one kind of names, got {next(iter(numbered.values())).name} and "
            f"{next(iter(next(iter(told.values())).values())).name}"
        )
    pairs = list(told.items())
    ordered = [numbered[number] for number in sorted(numbered)]
    if len(ordered) % 2:
        raise UserError(f"{ordered[-1]}: expected recordings in pairs, got {len(ordered)}")
    for true, false in zip(ordered[::2], ordered[1::2], strict=True):
        pairs.append((true.stem, {"correct": true, "incorrect": false}))
    return [_pair(task, folder, name, parts) for name, parts in pairs]


def _pair(task: str, folder: Path, name: str, parts: dict[str, Path]) -> Question:
    for part in ("correct", "incorrect"):
        if part not in parts:
            raise UserError(f"{folder}: expected {name}_{part} beside {_names(parts)}, got no file")
    passages = {part: _recording(file, task) for part, file in parts.items()}
    return Question(
        id=f"{task}-{name}",
        scores=(task,),
        prompt=passages.get("mutual"),
        endings=(passages["correct"], passages["incorrect"]),
        answer=0,
        group=name,
    )


def _names(parts: dict[str, Path]) -> str:
    return ", ".join(sorted(file.name for file in parts.values()))


def _recording(file: Path, task: str) -> Passage:
    """A recording and the text beside it, if there is one."""
    beside = file.with_suffix(".txt")
    text = _read_text(beside).strip() if beside.exists() else None
    if text == "":
        raise UserError(f"{beside}: expected a text, got an empty file")
    return Passage(_record(file.stem, text, task), file)


_GOLD = {"swuggy": "word", "sblimp": "transcription"}  # the column of the text


def _gold(task: str, folder: Path) -> list[Question]:
    """Pairs of which one is a word, or grammatical; each in several voices."""
    gold, text = folder / "gold.csv", _GOLD[task]
    of = ["id"] if task == "swuggy" else ["type", "subtype", "id"]
    more = ["frequency"] if task == "swuggy" else []
    pairs: dict[tuple[str, ...], dict[str, tuple[str, dict[str, str]]]] = defaultdict(dict)
    for where, row in _read_csv(gold, [*of, "filename", "voice", text, "correct", *more]):
        key, correct = (*(row[column] for column in of), row["voice"]), row["correct"]
        if correct not in ("0", "1"):
            raise UserError(f"{where}: expected correct to be 0 or 1, got {correct!r}")
        if correct in pairs[key]:
            raise UserError(
                f"{where}: expected one line of {' '.join(key)!r} with correct {correct}, got two"
            )
        pairs[key][correct] = (where, row)
    questions = []
    for key, pair in pairs.items():
        if len(pair) < 2:
            ((where, row),) = pair.values()
            missing = "0" if row["correct"] == "1" else "1"
            raise UserError(f"{where}: expected a line with correct {missing} beside it, got none")
        endings = []
        for _, row in (pair["1"], pair["0"]):
            name = row["filename"].removesuffix(".wav")
            endings.append(Passage(_record(name, row[text] or None, task), folder / f"{name}.wav"))
        scores: tuple[str, ...] = (task,)
        if task == "swuggy":
            where, row = pair["1"]
            known = _whole_number(row["frequency"] or 0, f"{where}: expected frequency") > 0
            scores = (task, f"{task} in-vocabulary") if known else (task,)
        group = " ".join(key[:-1])
        questions.append(
            Question(
                id=" ".join(key),
                scores=scores,
                prompt=None,
                endings=tuple(endings),
                answer=0,
                group=group,
            )
        )
    return questions


READERS: dict[str, Callable[[str, Path], list[Question]]] = {
    "hellaswag": _hellaswag,
    "storycloze": _stories,
    "topicstorycloze": _stories,
    "swuggy": _gold,
    "sblimp": _gold,
}


# Files --------------------------------------------------------------------------------------------


def _record(id: str, text: str | None, source: str) -> Record:
    return Record(id=id, text=text, units=None, words=None, chars=None, speaker=None, source=source)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8, got byte {error.start} of another code") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)})") from None


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line, row) of every row."""
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path}: expected a column {missing[0]}, got {reader.fieldnames}")
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                raise UserError(f"{where}: expected {expected} columns, got another number")
            yield where, row
    except csv.Error as error:
        line = reader.reader.line_num  # the one under way
        raise UserError(f"{path}, line {line}: expected CSV, got {error}") from None


def _string(fields: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(fields.get(key), str):
        raise UserError(f"{where}: expected {key} to be a text, got {fields.get(key)!r}")
    return str(fields[key])


def _whole_number(value: object, expected: str) -> int:
    """An int, also where it is written as a text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    raise UserError(f"{expected} to be a number, got {value!r}")
