"""``python -m lst.evaluate --task …``: scores are those of each document alone, a stopped command
goes on where it was, and what cannot be asked is told in a line."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lst.data.batch import pack_documents
from lst.data.interleave import Mode, item_document
from lst.data.patching import final_strategy
from lst.data.records import Record, StoryItem, write_items
from lst.errors import UserError
from lst.evaluate import __main__ as command
from lst.evaluate.choice import MEASURES, Likelihood, choice_scores, likelihoods
from lst.evaluate.questions import Passage, Question, of_items, read_questions
from lst.evaluate.speech import Speaker, find_voice
from lst.pretrained import Pretrained, save_pretrained
from lst.speech.units import LogMelKMeans

WORDS = ["the", "small", "red", "fox", "went", "over", "hills", "and", "told", "a", "story"]
MODES: tuple[Mode, ...] = ("T→T", "S→S", "S→T", "T→S")

Make = Callable[..., Pretrained]
Run = Callable[..., dict[str, Any]]


def passage(rng: np.random.Generator, name: str, words: int) -> Record:
    units = rng.integers(0, 20, 6 * words).astype(np.int16)
    return Record(name, " ".join(rng.choice(WORDS, words)), units, None, None, None, "test")


def items(number: int, endings: int = 2) -> list[StoryItem]:
    rng = np.random.default_rng(0)

    def told(name: str, least: int, most: int) -> Record:
        return passage(rng, name, int(rng.integers(least, most)))

    return [
        StoryItem(
            id=f"item-{index}",
            task="storycloze",
            prompt=told(f"p{index}", 3, 9),
            endings=tuple(told(f"e{index}-{k}", 2, 6) for k in range(endings)),
            answer=int(rng.integers(endings)),
        )
        for index in range(number)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(make_trained: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    out = tmp_path_factory.mktemp("evaluated") / "model"
    save_pretrained(make_trained(), out)
    return out


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("--task", …, checkpoint=folder) → what the command writes."""

    def run(*options: object, checkpoint: Path = folder, out: str = "out.json") -> dict[str, Any]:
        words = [str(checkpoint), *map(str, options), "--json", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", ["evaluate", *words])
        command.main()
        result: dict[str, Any] = json.loads((tmp_path / out).read_text())
        return result

    return run


def rows(result: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(s["task"], s["mode"], s["measure"]): s for s in result["scores"]}


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [{}, {"text_path": "global"}], ids=["local", "global"])
def test_likelihoods_are_those_of_each_document_alone(
    make_trained: Make, mode: Mode, model: dict[str, Any]
) -> None:
    """The oracle: a softmax over the logits of one document, token by token."""
    trained = make_trained(model=model)
    patching, plan = trained.config.data.patching, trained.config.model.plan()
    questions = of_items(items(5, endings=3))
    found = likelihoods(
        trained.model.eval(),
        questions,
        mode,
        trained.vocabulary,
        trained.tokenizer,
        plan,
        patching=patching,
        tokens_per_batch=300,
    )
    for question, of_question in zip(questions, found, strict=True):
        assert question.prompt is not None
        for ending, got in zip(question.endings, of_question, strict=True):
            document = item_document(
                question.prompt.record, ending.record, mode, trained.vocabulary, trained.tokenizer
            )
            batch = pack_documents([document], trained.vocabulary, final_strategy(patching), plan)
            with torch.no_grad():
                nats = trained.model.logits(batch).log_softmax(-1).double()
            start = document.score_from
            prompt = [nats[i - 1, t].item() for i, t in enumerate(document.tokens) if 0 < i < start
                      and t > 4]  # fmt: skip
            rest = [nats[i - 1, t].item() for i, t in enumerate(document.tokens) if i >= start
                    and t > 4]  # fmt: skip
            assert got.ending == pytest.approx(sum(rest), abs=1e-3)
            assert got.prompt == pytest.approx(sum(prompt), abs=2e-3)
            assert (got.tokens, got.prompt_tokens) == (len(rest), len(prompt))
            assert got.characters == len(ending.record.text or "")


def test_measures_are_what_they_are_called() -> None:
    of = Likelihood(ending=-12.0, tokens=3, characters=8, prompt=-30.0, prompt_tokens=11)
    found = {name: measure(of) for name, measure in MEASURES.items()}
    assert found == {"sum": -12, "per token": -4, "per character": -1.5, "whole mean": -3}


def question(name: str, group: str, text: str | None = "a") -> Question:
    endings = tuple(Passage(Record(f"{name}{i}", text, None, None, None, None, "")) for i in "01")
    return Question(id=name, scores=("task",), prompt=None, endings=endings, answer=0, group=group)


def test_questions_of_a_group_count_as_one() -> None:
    """Four voices of one word are no four words: the interval is of groups."""
    right = [Likelihood(-1.0, 1, 1), Likelihood(-2.0, 1, 1)]
    asked = [question("a", "x"), question("b", "x"), question("c", "x"), question("d", "y")]
    answers = [right, right, right[::-1], right[::-1]]
    score, *_ = choice_scores(asked, answers, "S→S")
    assert score.num_items == 2
    assert score.accuracy == pytest.approx((2 / 3 + 0) / 2)


def test_speech_without_text_has_no_score_per_character() -> None:
    answers = [[Likelihood(-1.0, 1, None), Likelihood(-2.0, 1, None)]]
    found = choice_scores([question("a", "x", None)], answers, "S→S")
    assert [score.measure for score in found] == ["sum", "per token", "whole mean"]


def test_a_written_ending_is_cut_as_it_is_after_the_prompt(make_trained: Make) -> None:
    """As a tokenizer of bytes does, which has a blank open a word, but no text."""

    class Bytes:
        def encode(self, text: str) -> list[int]:
            return [ord(letter) - 32 for letter in text]

    trained = make_trained()
    ending = Record("e", "fox", None, None, None, None, "")
    prompt = replace(ending, id="p", text="red", units=np.array([1, 2], np.int16))
    for mode, before in (("T→T", 3), ("S→T", 4)):
        document = item_document(prompt, ending, mode, trained.vocabulary, Bytes())  # type: ignore
        assert document.score_from == 1 + before
        pieces = trained.vocabulary.id_to_piece(document.tokens[document.score_from : -1])
        assert "".join(chr(piece + 32) for piece in pieces) == " fox"


def test_a_document_without_a_prompt_scores_everything(make_trained: Make) -> None:
    trained = make_trained()
    record = passage(np.random.default_rng(0), "e", 3)
    for mode, opening in (("T→T", 1), ("S→S", 2)):
        document = item_document(None, record, mode, trained.vocabulary, trained.tokenizer)  # type: ignore[arg-type]
        assert document.score_from == opening
    with pytest.raises(UserError, match="record 'e': expected a prompt for mode S→T, got none"):
        item_document(None, record, "S→T", trained.vocabulary, trained.tokenizer)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def story_folder(tmp_path: Path) -> Path:
    write_items(tmp_path / "items", items(12), codebook=None, tokenizer=None, num_units=20)
    return tmp_path / "items"


def test_stories_in_every_mode(run: Run, story_folder: Path, capsys: Any) -> None:
    result = run("--data", story_folder, "--modes", "T2T", "S2S", "S2T", "T2S")
    assert {(mode, measure) for _, mode, measure in rows(result)} == set(
        itertools.product(MODES, MEASURES)
    )
    assert all(score["num_items"] == 12 for score in result["scores"])
    assert result["asked"]["task"] == "stories"
    assert result["of"]["model"].startswith("sha256:")
    assert result["machine"]["commit"]
    assert "| storycloze | S→T | whole mean | 12 |" in capsys.readouterr().out


def test_text_is_spoken_by_a_voice(run: Run, tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="lst[speech] is not installed")
    row = {"activity_label": "Fox", "ctx_a": "The red fox - went", "ctx_b": "", "label": 1,
           "endings": ["over the hills.", "and told a story."]}  # fmt: skip
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(row) + "\n")
    result = run("--task", "hellaswag", "--data", path, "--espeak", "us-f4")
    assert {mode for _, mode, _ in rows(result)} == {"S→S", "T→T"}
    assert result["of"]["voice"]["espeak"] == "en-us+f4"
    # Words that espeak spoke are aligned, and a dash is no word.
    encoder = LogMelKMeans.load(folder / "codebook.safetensors")
    (asked,) = read_questions("hellaswag", path)
    assert asked.prompt is not None
    record = Speaker(encoder, find_voice("en-us+f4")).record(asked.prompt, True)
    assert record.words is not None
    assert record.units is not None
    assert [word.word for word in record.words] == ["Fox:", "The", "red", "fox", "went"]
    assert record.words[-1].stop <= len(record.units)
    with pytest.raises(UserError, match=r"hellaswag-1-prompt: .*nobody"):
        run("--task", "hellaswag", "--data", path, "--espeak", "nobody", out="other.json")


def sound(path: Path, seconds: float = 0.3, seed: int = 0, rate: int = 16_000) -> Path:
    soundfile = pytest.importorskip("soundfile", reason="lst[speech] is not installed")
    noise = np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate))
    soundfile.write(path, noise, rate)
    return path


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Two spoken stories with their prompts and texts."""
    out = tmp_path / "stories"
    out.mkdir()
    for number, part in itertools.product((1, 2), ("mutual", "correct", "incorrect")):
        sound(out / f"{number}_{part}.wav", 0.2 + 0.1 * number, seed=number)
        (out / f"{number}_{part}.txt").write_text(f"a {part} story of {number}")
    return out


def test_recordings_in_every_mode(run: Run, recordings: Path) -> None:
    result = run(
        "--task", "storycloze", "--data", recordings, "--modes", "T2T", "S2S", "S2T", "T2S"
    )
    assert {mode for _, mode, _ in rows(result)} == set(MODES)
    # Both endings are the same sound: a tie.
    assert rows(result)["storycloze", "S→S", "sum"]["accuracy"] == 0.5
    assert result["of"]["codebook"].startswith("sha256:")


def test_words_and_sentences(run: Run, tmp_path: Path) -> None:
    lines = ["id,filename,voice,frequency,word,correct"]
    for voice, correct in itertools.product("AB", "10"):
        name = f"{voice}{correct}"
        sound(tmp_path / f"{name}.wav", seed=len(lines))
        lines.append(f"1,{name},{voice},3,{'fox' if correct == '1' else 'fxo'},{correct}")
    (tmp_path / "gold.csv").write_text("\n".join(lines) + "\n")
    found = rows(run("--task", "swuggy", "--data", tmp_path))
    tasks = ("swuggy", "swuggy in-vocabulary")
    assert set(found) == set(itertools.product(tasks, ("S→S", "T→T"), MEASURES))
    assert {score["num_items"] for score in found.values()} == {1}
    for mode in ("S→S", "T→T"):  # nothing comes before: the whole is the ending
        whole, own = (found["swuggy", mode, name] for name in ("whole mean", "per token"))
        assert whole["accuracy"] == own["accuracy"]


# --- going on -------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How many questions the model has answered; ``stop_after`` of them it is killed."""

    class Counted:
        number, stop_after = 0, 10**9

    def counting(model: Any, questions: Any, *args: Any, **options: Any) -> Iterator[Any]:
        for answer in likelihoods(model, questions, *args, **options):
            if Counted.number == Counted.stop_after:
                raise Killed
            Counted.number += 1
            yield answer

    monkeypatch.setattr("lst.evaluate.tasks.likelihoods", counting)
    return Counted


def test_a_stopped_evaluation_goes_on_where_it_was(
    run: Run, story_folder: Path, tmp_path: Path, counted: Any
) -> None:
    whole = run("--data", story_folder, out="whole.json")
    counted.number, counted.stop_after = 0, 17
    options = ("--data", story_folder, "--tokens-per-batch", 200)
    with pytest.raises(Killed):
        run(*options)
    assert not (tmp_path / "out.json").exists()
    answers = tmp_path / "out.json.answers.jsonl"
    lines = answers.read_text().splitlines()
    assert len(lines) == 1 + 17
    # As a kill in the middle of a line leaves it.
    answers.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    counted.stop_after = 10**9
    again = run(*options)
    assert counted.number == 17 + 24 - 16
    for one, other in zip(again["scores"], whole["scores"], strict=True):
        assert one == other
    # An answer that is no longer the one that was given is not taken.
    kept = answers.read_text()
    line = kept.splitlines()[3]
    answers.write_text(kept.replace(line, line.replace('"ending": -', '"ending": -9', 1)))
    with pytest.raises(UserError, match=r"out\.json\.answers\.jsonl, line 4: damaged"):
        run(*options)
    answers.write_text(kept)
    # Done: nothing is asked again, and another mode asks only for itself.
    counted.number = 0
    assert run(*options)["scores"] == again["scores"]
    assert counted.number == 0
    run(*options, "--modes", "T2T", "S2T")
    assert counted.number == 12


def test_answers_of_something_else_are_not_taken(
    run: Run, story_folder: Path, tmp_path: Path, make_trained: Make
) -> None:
    run("--data", story_folder)
    other = tmp_path / "other-items"
    write_items(other, items(3), codebook=None, tokenizer=None, num_units=20)
    with pytest.raises(UserError, match=r"out\.json\.answers\.jsonl: holds answers for another da"):
        run("--data", other)
    trained = make_trained()
    with torch.no_grad():
        trained.model.head.weight[0, 0] += 1
    save_pretrained(trained, tmp_path / "changed")
    with pytest.raises(UserError, match=r"holds answers for another model, 'sha256:.*; remove it"):
        run("--data", story_folder, checkpoint=tmp_path / "changed")


def test_a_file_of_something_else_is_left_alone(
    run: Run, story_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "out.json.answers.jsonl"
    path.write_text("not ours\n")
    with pytest.raises(UserError, match=r"answers\.jsonl, line 1: expected JSON, got"):
        run("--data", story_folder)
    assert path.read_text() == "not ours\n"


def test_two_commands_do_not_write_the_same_answers(
    run: Run, story_folder: Path, tmp_path: Path
) -> None:
    import fcntl

    with (tmp_path / "out.json.answers.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another command writes here"):
            run("--data", story_folder)


# --- what cannot be asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "riddles"], "--task: expected one of stories, hellaswag, .*, got 'riddles'"),
        (
            ["--task", "hellaswag"],
            "--task hellaswag: expected its file or folder, got none; --data",
        ),
        (["--data", "none"], "none: expected a folder of stories to complete, got none; --data"),
        (["--tokens-per-batch", "0"], "--tokens-per-batch: expected 1 or more, got 0"),
        (["--modes"], "--modes: expected one or more, got none"),
        (["--device", "tpu"], "device tpu: expected one that is here"),
        (["--boundary-noise-ms", "9"], "expected a model of aligned patches, got one of strategy"),
    ],
)
def test_options_that_are_wrong(run: Run, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*options)


def test_what_is_no_place_for_the_result_is_refused_before_anything_is_scored(
    run: Run, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for out in (".", "none/result.json", "pipe"):
        with pytest.raises(UserError, match=r"--json .*: expected a file to write, in a folder th"):
            run(out=out)


def test_a_mode_that_the_data_does_not_have(run: Run, tmp_path: Path) -> None:
    row = {"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c", "d"], "label": 0}
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        UserError, match=r"--modes T2S: .* which no question of --task hellaswag has"
    ):
        run("--task", "hellaswag", "--data", path, "--modes", "T2S")
    found = rows(run("--task", "hellaswag", "--data", path))
    assert {mode for _, mode, _ in found} == {"T→T"}


def test_recordings_that_cannot_be_used(run: Run, recordings: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = recordings / "2_correct.wav"

    def fails(message: str) -> None:
        with pytest.raises(UserError, match=message) as raised:
            run("--task", "storycloze", "--data", recordings)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)
        (recordings.parent / "out.json.answers.jsonl").unlink(missing_ok=True)

    soundfile.write(path, np.zeros(8000), 16_000)
    fails("expected speech, got silence")
    soundfile.write(path, np.zeros(0), 16_000)
    fails("expected audio, got 0 samples")
    path.write_text("no sound")
    fails("not readable as audio")


def test_a_recording_that_gold_names_is_missing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "gold.csv").write_text(
        "id,filename,voice,frequency,word,correct\n1,a,A,3,fox,1\n1,b,A,3,fxo,0\n"
    )
    with pytest.raises(
        UserError, match=r"a\.wav: expected a recording, got no file \(and 1 others"
    ):
        run("--task", "swuggy", "--data", tmp_path)
    # Its words need no recording.
    found = rows(run("--task", "swuggy", "--data", tmp_path, "--modes", "T2T"))
    assert {mode for _, mode, _ in found} == {"T→T"}


def test_a_codebook_that_is_not_the_model_s(
    run: Run, recordings: Path, make_trained: Make, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)

    def codebook(units: int) -> Path:
        path = tmp_path / f"{units}.safetensors"
        LogMelKMeans(
            rng.integers(-200, 200, (units, 26)).astype(np.int16),
            np.zeros((units, 2, 40), np.float32),
        ).save(path)
        return path

    ask = ("--task", "storycloze", "--data", recordings)
    with pytest.raises(
        UserError, match=r"expected the codebook of the model's speech units \(sha256:"
    ):
        run(*ask, "--codebook", codebook(20))
    with pytest.raises(UserError, match="expected the codebook of the model's speech units"):
        run(*ask, "--codebook", codebook(21))
    bare = replace(make_trained(), codebook="name:hubert", codebook_file=None)
    save_pretrained(bare, tmp_path / "bare")
    with pytest.raises(
        UserError, match=r"expected the codebook of the model's .*, got none; --codebook"
    ):
        run(*ask, checkpoint=tmp_path / "bare")


def test_an_ending_of_no_token(make_trained: Make) -> None:
    trained = make_trained()
    (item,) = items(1)
    empty = replace(item.endings[0], units=np.zeros(0, np.int16))
    item = replace(item, endings=(empty, item.endings[1]))
    with pytest.raises(
        UserError, match="question 'item-0': expected endings of at least one token"
    ):
        list(
            likelihoods(
                trained.model,
                of_items([item]),
                "S→S",
                trained.vocabulary,
                trained.tokenizer,
                trained.config.model.plan(),
                patching=trained.config.data.patching,
            )
        )
