"""What benchmarks are published as becomes questions; what is wrong with a file is told in a line,
with the file's name and the line's number."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lst.errors import UserError
from lst.evaluate.questions import Question, has_sides, read_questions

HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["is using wrap.", "is ripping tiles off.", "is a cube.", "starts to sing."],
    "label": 3,
}
STORY = {
    "InputStoryid": "138d5bfb",
    "InputSentence1": "Rick grew up in a troubled home.",
    "InputSentence2": "He never found support.",
    "InputSentence3": "He turned to gangs.",
    "InputSentence4": "Rick was shot.",
    "RandomFifthSentenceQuiz1": "He is happy now.",
    "RandomFifthSentenceQuiz2": "He joined a gang.",
    "AnswerRightEnding": "1",
}
WORD = {
    "id": "1", "filename": "aaa", "voice": "A", "frequency": "12", "word": "hello",
    "phones": "HH AH L OW", "length": "4", "correct": "1",
}  # fmt: skip
SENTENCE = {
    "id": "7", "filename": "bbb", "voice": "A", "type": "agreement", "subtype": "plain",
    "transcription": "the dogs bark", "correct": "1",
}  # fmt: skip


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def texts(question: Question) -> list[str | None]:
    passages = (question.prompt, *question.endings)
    return [each and each.record.text for each in passages]


def test_hellaswag_is_label_context_and_four_endings(tmp_path: Path) -> None:
    (question,) = read_questions("hellaswag", write_jsonl(tmp_path / "h.jsonl", HELLASWAG))
    prompt, *endings = texts(question)
    assert prompt == "Roof shingle removal: A man is sitting on a roof. He"
    assert (endings, question.answer) == (HELLASWAG["endings"], 3)


@pytest.mark.parametrize(
    "text",
    [
        "Plain text.",
        "How to sing [header] Breathe [title] Do it. [step] Now.",
        "  two  blanks   and [a] tag ",
        "[title] first. An [unclosed bracket",
        "one [b] [c] two",
    ],
)
def test_hellaswag_is_cleaned_as_the_harness_cleans_it(tmp_path: Path, text: str) -> None:
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    row = HELLASWAG | {"ctx_a": text, "ctx_b": "", "endings": [f"x{text}", "a", "b", "c"]}
    (question,) = read_questions("hellaswag", write_jsonl(tmp_path / "h.jsonl", row))
    prompt, ending, *_ = texts(question)
    assert prompt == utils.preprocess(f"Roof shingle removal: {text} ")
    assert ending == utils.preprocess(f"x{text}")


@pytest.mark.parametrize("task", ["storycloze", "topicstorycloze"])
def test_storycloze_counts_its_answers_from_one(tmp_path: Path, task: str) -> None:
    second = STORY | {"AnswerRightEnding": "2", "InputSentence4": 'He ran, and "fell".\nTwice.'}
    path = write_csv(tmp_path / "s.csv", STORY, second)
    first, other = read_questions(task, path)
    assert texts(first)[0] == " ".join(STORY[f"InputSentence{number}"] for number in (1, 2, 3, 4))
    assert texts(first)[1:] == ["He is happy now.", "He joined a gang."]
    assert (first.answer, other.answer) == (0, 1)
    assert first.scores == (task,)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_text(f"What {name} says." if name.endswith(".txt") else "")
    return folder


def test_spoken_stories_are_pairs_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "10_a.wav", "10_a.txt", "9_b.wav", "9_b.txt", "2_c.wav", "3_d.wav", "notes.md")
    first, second = read_questions("storycloze", tmp_path)
    assert [ending.audio and ending.audio.name for ending in first.endings] == [
        "2_c.wav",
        "3_d.wav",
    ]
    assert [ending.record.text for ending in second.endings] == [
        "What 9_b.txt says.",
        "What 10_a.txt says.",
    ]
    assert first.prompt is None
    assert (first.answer, second.answer) == (0, 0)
    # A story as a whole has no prompt of another modality; one without its text none in text.
    assert [has_sides(first, mode) for mode in ("S→S", "T→T", "S→T")] == [True, False, False]
    assert [has_sides(second, mode) for mode in ("S→S", "T→T", "T→S")] == [True, True, False]


def test_spoken_stories_whose_names_tell_have_a_prompt(tmp_path: Path) -> None:
    names = [f"17_{part}.{kind}" for part in ("mutual", "correct", "incorrect")
             for kind in ("wav", "txt")]  # fmt: skip
    (question,) = read_questions("topicstorycloze", touch(tmp_path, *names))
    assert texts(question) == [f"What 17_{part}.txt says."
                               for part in ("mutual", "correct", "incorrect")]  # fmt: skip
    assert all(has_sides(question, mode) for mode in ("S→S", "T→T", "S→T", "T→S"))


def test_a_word_in_two_voices_is_one_group_and_rare_ones_are_told_apart(tmp_path: Path) -> None:
    rows = []
    for voice in "AB":
        for word, frequency in (("1", "12"), ("2", "0")):
            for correct in ("0", "1"):
                name = f"{voice}{word}{correct}"
                rows.append(WORD | {"id": word, "voice": voice, "filename": name,
                                    "frequency": frequency, "correct": correct})  # fmt: skip
    write_csv(tmp_path / "gold.csv", *rows)
    questions = read_questions("swuggy", tmp_path)
    assert len(questions) == 4
    assert {question.group for question in questions} == {"1", "2"}
    first = questions[0]
    assert [ending.audio for ending in first.endings] == [
        tmp_path / "A11.wav",
        tmp_path / "A10.wav",
    ]
    assert [q.scores for q in questions[:2]] == [("swuggy", "swuggy in-vocabulary"), ("swuggy",)]


def test_sentences_of_two_kinds_may_share_a_number(tmp_path: Path) -> None:
    rows = [
        SENTENCE | {"type": kind, "filename": f"{kind}{correct}", "correct": correct}
        for kind in ("agreement", "binding")
        for correct in ("1", "0")
    ]
    write_csv(tmp_path / "gold.csv", *rows)
    questions = read_questions("sblimp", tmp_path)
    assert [question.group for question in questions] == ["agreement plain 7", "binding plain 7"]
    assert questions[0].scores == ("sblimp",)


# --- what is wrong with a file --------------------------------------------------------------------


def without(row: dict[str, Any], column: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != column}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"h.jsonl, line 2: expected JSON, got"),
        ("[1]", r"line 2: expected an object, got '\[1\]'"),
        (without(HELLASWAG, "ctx_b"), "line 2: expected ctx_b to be a text, got None"),
        (HELLASWAG | {"endings": "a"}, "line 2: expected endings to be a list of texts, got 'a'"),
        (HELLASWAG | {"endings": ["a"]}, "line 2: expected at least 2 endings, got 1"),
        (HELLASWAG | {"endings": ["a", "[b]"], "label": 0}, "line 2: .*got an empty ending-1"),
        (HELLASWAG | {"label": 4}, "line 2: expected an answer from 0 to 3, got 4"),
        (HELLASWAG | {"label": ""}, "line 2: expected label to be a number, got ''"),
        (HELLASWAG | {"label": True}, "line 2: expected label to be a number, got True"),
        (without(HELLASWAG, "label"), "line 2: expected label to be a number, got None"),
    ],
)
def test_a_line_of_hellaswag_that_is_wrong(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "h.jsonl"
    line = row if isinstance(row, str) else json.dumps(row)
    path.write_text(f"{json.dumps(HELLASWAG)}\n{line}\n")
    with pytest.raises(UserError, match=message) as raised:
        read_questions("hellaswag", path)
    assert str(raised.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AnswerRightEnding": "3"}, "line 3: expected an answer from 1 to 2, got 3"),
        ({"AnswerRightEnding": "0"}, "line 3: expected an answer from 1 to 2, got 0"),
        ({"AnswerRightEnding": "a"}, "line 3: expected AnswerRightEnding to be a number, got 'a'"),
        ({"RandomFifthSentenceQuiz2": " "}, "line 3: .*got an empty ending-1"),
    ],
)
def test_a_story_that_is_wrong(tmp_path: Path, change: dict[str, str], message: str) -> None:
    path = write_csv(tmp_path / "s.csv", STORY, STORY | change)
    with pytest.raises(UserError, match=message):
        read_questions("storycloze", path)


def test_a_csv_file_that_is_wrong(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "s.csv", without(STORY, "InputSentence3"))
    with pytest.raises(UserError, match=r"s\.csv: expected a column InputSentence3, got \['Input"):
        read_questions("storycloze", path)
    path = write_csv(tmp_path / "s.csv", STORY)
    path.write_text(path.read_text() + "only,three,fields\n")
    with pytest.raises(UserError, match=r"line 3: expected 8 columns, got another number"):
        read_questions("storycloze", path)
    path.write_text(",".join(STORY) + '\n"a"b' + 7 * ",x" + "\n")
    with pytest.raises(UserError, match=r"s\.csv, line 2: expected CSV, got"):
        read_questions("storycloze", path)
    path.write_text("")
    with pytest.raises(UserError, match="expected a column InputStoryid, got None"):
        read_questions("storycloze", path)
    path.write_bytes(b"a,\xff\n")
    with pytest.raises(UserError, match="expected UTF-8, got byte 2 of another code"):
        read_questions("storycloze", path)
    path.write_text(",".join(STORY) + "\n")
    with pytest.raises(UserError, match="expected questions, got none"):
        read_questions("storycloze", path)
    with pytest.raises(UserError, match=r"none\.csv: expected the data of storycloze, got no such"):
        read_questions("storycloze", tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0_a.wav"], "0_a.wav: expected recordings in pairs, got 1"),
        (["0_a.wav", "0_b.wav"], "0_b.wav: expected one recording of a number, got 0_a.wav as"),
        (["story.wav"], "story.wav: expected a name that opens with a number or ends in _mutual"),
        (["1_correct.wav", "1_mutual.wav"], "expected 1_incorrect beside 1_correct.wav, 1_mutual"),
        (
            ["1_correct.wav", "1_incorrect.wav", "2_x.wav"],
            "expected one kind of names, got 2_x.wav",
        ),
        ([], "expected questions, got none"),
    ],
)
def test_a_folder_of_stories_that_is_wrong(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_questions("storycloze", touch(tmp_path, *names))


def test_an_empty_text_beside_a_recording(tmp_path: Path) -> None:
    touch(tmp_path, "0_a.wav", "1_a.wav")
    (tmp_path / "1_a.txt").write_text("\n")
    with pytest.raises(UserError, match=r"1_a\.txt: expected a text, got an empty file"):
        read_questions("storycloze", tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([WORD | {"correct": "2"}], "line 2: expected correct to be 0 or 1, got '2'"),
        ([WORD], "line 2: expected a line with correct 0 beside it, got none"),
        ([WORD, WORD], "line 3: expected one line of '1 A' with correct 1, got two"),
        ([without(WORD, "voice")], "gold.csv: expected a column voice, got"),
        (
            [WORD | {"frequency": "often"}, WORD | {"correct": "0"}],
            "line 2: expected frequency to be a number, got 'often'",
        ),
    ],
)
def test_a_gold_file_that_is_wrong(
    tmp_path: Path, rows: list[dict[str, str]], message: str
) -> None:
    write_csv(tmp_path / "gold.csv", *rows)
    with pytest.raises(UserError, match=message):
        read_questions("swuggy", tmp_path)


def test_a_folder_without_a_gold_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gold\.csv: cannot be read \(No such file"):
        read_questions("sblimp", tmp_path)
