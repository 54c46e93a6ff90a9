"""Error rates are those counted by hand, and a model that learnt its clips says and hears them."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.data.loader import DataConfig
from lst.data.patching import PatchingConfig
from lst.data.records import Record, RecordWriter
from lst.errors import UserError
from lst.evaluate.__main__ import main
from lst.evaluate.error_rate import error_rates, format_error_rates, normaliser
from lst.evaluate.speech_to_text import generator_of, same_units, speak, transcribe
from lst.generate import Sampling
from lst.model import ModelConfig, StackConfig
from lst.pretrained import Pretrained
from lst.train.checkpoint import load_trained
from lst.train.config import OptimizerConfig, TrainConfig
from lst.train.loop import train
from lst.vocabulary import train_tokenizer

pytest.importorskip("jiwer", reason="lst[speech] is not installed")
pytest.importorskip("whisper_normalizer", reason="lst[speech] is not installed")

PAGE = Path(__file__).parents[2] / "docs" / "asr-tts.md"
AS_IT_IS = normaliser("none")


# --- error rates ----------------------------------------------------------------------------------


def test_errors_are_those_counted_by_hand() -> None:
    references = ["the cat sat", "on the mat", "so it ends"]
    hypotheses = ["the bat sat", "on mat", "so it it ends"]
    words, characters = error_rates(references, hypotheses, normalise=AS_IT_IS)
    assert (words.substitutions, words.deletions, words.insertions) == (1, 1, 1)
    assert (words.reference_length, words.num_utterances) == (9, 3)
    assert words.rate == pytest.approx(3 / 9)
    # c for b; "the " left out; "it " put in. Blanks between words are characters.
    assert (characters.substitutions, characters.deletions, characters.insertions) == (1, 4, 3)
    assert characters.reference_length == 11 + 10 + 10
    assert characters.rate == pytest.approx(8 / 31)
    assert "| WER | 33.3 |" in format_error_rates([words])


def distance(first: str, second: str) -> int:
    """Levenshtein's, by its definition."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


texts = st.lists(st.sampled_from("abc"), max_size=6).map("".join)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_the_fewest_errors_are_counted(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = (list(side) for side in zip(*pairs, strict=True))
    if not any(references):
        return
    _, characters = error_rates(references, hypotheses, normalise=AS_IT_IS)
    errors = characters.substitutions + characters.deletions + characters.insertions
    assert errors == sum(distance(*pair) for pair in pairs)
    assert characters.rate == pytest.approx(errors / sum(map(len, references)))
    assert characters.low <= characters.high


def test_an_interval_is_around_the_rate_and_narrow_where_utterances_are_alike() -> None:
    alike, _ = error_rates(["a b c d"] * 50, ["a b c x"] * 50, normalise=AS_IT_IS)
    assert (alike.low, alike.rate, alike.high) == (0.25, 0.25, 0.25)
    mixed, _ = error_rates(["a b c d"] * 50, ["a b c d", "x y z w"] * 25, normalise=AS_IT_IS)
    assert mixed.rate == 0.5
    # Half of 50 utterances are all wrong: a binomial share has a deviation of 0.5 / √50 = 0.07.
    assert 0.33 < mixed.low < 0.39
    assert 0.61 < mixed.high < 0.67


def test_what_is_only_written_otherwise_is_no_error() -> None:
    reference, hypothesis = "Mr. Fox didn't go!", "mister fox did not go"
    for name, right in (("english", True), ("basic", False), ("none", False)):
        words, _ = error_rates([reference], [hypothesis], normalise=normaliser(name))  # type: ignore[arg-type]
        assert (words.rate == 0) == right, name
    words, _ = error_rates(["Élan, vital!"], ["élan vital"], normalise=normaliser("basic"))
    assert words.rate == 0
    assert error_rates(["Go!"], ["go"], normalise=AS_IT_IS)[0].rate == 1


def test_silence_that_is_transcribed_as_words_counts_them() -> None:
    words, _ = error_rates(["", "a b"], ["c d e", ""], normalise=AS_IT_IS)
    assert (words.substitutions, words.deletions, words.insertions) == (0, 2, 3)
    assert words.rate == 2.5
    for references in ([""], [" ", "!?"]):
        with pytest.raises(UserError, match=r"expected references with words, got none in \d"):
            error_rates(references, ["a"] * len(references), normalise=normaliser("english"))


# --- models ---------------------------------------------------------------------------------------

NUM_UNITS = 24
LINES = ["red fox", "small red hen", "fox and hen", "hen", "small fox", "red and small"]
SOUNDS = {"red": [1, 1, 2, 3], "fox": [4, 5, 5], "small": [6, 7, 8, 9, 9], "hen": [10, 11],
          "and": [12, 12, 13]}  # fmt: skip


def spoken(text: str) -> np.ndarray:
    """Every word has sounds of its own, with a silence of one frame after it."""
    return np.array([unit for word in text.split() for unit in [*SOUNDS[word], 0]], np.int16)


def write(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    about = {"codebook": "sha256:ours", "num_units": NUM_UNITS} | changes
    with RecordWriter(folder, tokenizer=tokenizer, **about) as writer:
        for number, line in enumerate(LINES):
            writer.write(Record(f"r{number}", line, spoken(line), None, None, None, "test"))
    return folder


@pytest.fixture(scope="module", params=["lst", "token"])
def learnt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that learnt to transcribe six clips and to speak them."""
    folder = tmp_path_factory.mktemp("spoken")
    tokenizer = train_tokenizer([*LINES, *LINES], folder / "tokenizer.model", num_pieces=285)
    for split in ("train", "valid"):
        write(folder / split / "speech", tokenizer.fingerprint)
    config = TrainConfig(
        name="spoken",
        model=ModelConfig(
            architecture=request.param,
            encoder=StackConfig(layers=1, dim=32, heads=2),
            global_transformer=StackConfig(layers=2, dim=64, heads=2),
            decoder=StackConfig(layers=1, dim=32, heads=2),
        ),
        data=DataConfig(
            corpus=str(folder),
            mixture={"speech:asr": 1.0, "speech:tts": 1.0},
            rows=2,
            units_per_sequence=96,
            patching=PatchingConfig(strategy="static" if request.param == "lst" else "none"),
        ),
        optimizer=OptimizerConfig(lr=5e-3, warmup_steps=10),
        steps=100,
        out=folder / "run",
        validate_every=100,
        checkpoint_every=100,
        device="cpu",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lst.train.metrics.plot_losses", lambda *_: None)
        train(config)
    return config


@pytest.fixture(scope="module")
def trained(learnt: TrainConfig) -> Pretrained:
    return load_trained(learnt.out, "cpu")


def test_a_model_that_learnt_its_clips_transcribes_and_speaks_them(trained: Pretrained) -> None:
    generator = generator_of(trained, "cpu")
    heard = transcribe(generator, trained.tokenizer, [spoken(line) for line in LINES])
    assert [answer.text for answer in heard] == LINES
    assert {answer.stopped for answer in heard} == {"eos"}
    said = speak(generator, trained.tokenizer, LINES, sampling=Sampling(temperature=0.0))
    for line, answer in zip(LINES, said, strict=True):
        assert answer.units.tolist() == spoken(line).tolist()
        assert answer.text == ""
    # Units of the global transformer: a patch for four frames, or each of them.
    for line, answer in zip(LINES, heard, strict=True):
        pieces, frames = len(trained.tokenizer.encode(line)), len(spoken(line))
        size = 4 if trained.config.model.architecture == "lst" else 1
        assert answer.num_units == 4 + pieces + -(-frames // size)  # <bos> <s> <t> <eos>


def test_batches_answer_as_single_clips_do(trained: Pretrained) -> None:
    generator = generator_of(trained, "cpu")
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, NUM_UNITS, size).astype(np.int16) for size in (3, 19, 8, 5)]
    together = transcribe(generator, trained.tokenizer, clips)
    alone = transcribe(generator, trained.tokenizer, clips, tokens_per_batch=1)
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def test_an_answer_is_no_longer_than_anybody_speaks(trained: Pretrained) -> None:
    """A model that never ends, as <eos> is never the likeliest, is stopped."""
    generator = generator_of(trained, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        whole = generator.generate
        patch.setattr(generator, "generate", lambda prompts, samplings: limits.extend(samplings)
                      or whole(prompts, samplings))  # fmt: skip
        limits: list[Sampling] = []
        transcribe(generator, trained.tokenizer, [spoken(LINES[0])])
        speak(generator, trained.tokenizer, ["hen"], sampling=Sampling(temperature=1.0, seed=3))
    asr, tts = limits
    assert (asr.modality, asr.temperature, asr.max_tokens) == ("text", 0, 9 // 2 + 16)
    assert (tts.modality, tts.temperature, tts.max_tokens) == ("speech", 1, 12 + 16)


def call(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["lst.evaluate", *map(str, options)])
    main()


@pytest.mark.parametrize("task", ["asr", "tts"])
def test_the_command_writes_scores_and_beside_them_what_they_are_of(
    learnt: TrainConfig,
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--recogniser", learnt.out] if task == "tts" else []
    out = tmp_path / "scores.json"
    call(monkeypatch, learnt.out, "--task", task, *options, "--json", out)
    assert "| WER | 0.0 | 0.0 – 0.0 | 0 | 0 | 0 | 14 | 6 |" in capsys.readouterr().out
    values = json.loads(out.read_text())
    assert [score["measure"] for score in values["scores"]] == ["WER", "CER"]
    assert (values["normaliser"], values["not_ended"]) == ("english", 0)
    assert values["seconds_of_speech"] == sum(len(spoken(line)) for line in LINES) / 25
    lines = [json.loads(line) for line in Path(f"{out}.answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"r{number}" for number in range(6)]
    assert [line["reference"] for line in lines] == LINES
    assert [line["hypothesis"] for line in lines] == LINES
    if task == "tts":
        assert [line["units"] for line in lines] == [spoken(line).tolist() for line in LINES]


def test_the_code_of_the_page_transcribes(
    learnt: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo-asr").symlink_to(learnt.out)
    monkeypatch.chdir(tmp_path)
    exec(code, {"units": spoken("red fox")})
    assert capsys.readouterr().out == "red fox\n"


# --- bad input ------------------------------------------------------------------------------------


def record(**changes: Any) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        whole = Record("odd", "a fox", np.array([1], np.int16), None, None, None, "test")
        with RecordWriter(folder, codebook=None, tokenizer=None, num_units=NUM_UNITS) as writer:
            writer.write(replace(whole, **changes))

    return put


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (record(text=None), r"data, record 'odd': expected text and speech units, got no text"),
        (record(units=None), r"data, record 'odd': expected text and speech units, got no units"),
        (
            record(units=np.zeros(0, np.int16)),
            r"data, record 'odd': expected text and speech units, got no units",
        ),
        (record(text="?!"), r"expected references with words, got none in 1 after normalisation"),
        (
            lambda folder: write(folder, None, codebook="sha256:other"),
            r"data/dataset.json: expected data made with codebook sha256:ours, got sha256:other",
        ),
        (
            lambda folder: write(folder, None, codebook=None, num_units=30),
            r"data: expected units of the model's codebook of 24, got one of 30",
        ),
        (lambda folder: None, r"data: expected a dataset of speech and its text, got no folder"),
    ],
)
def test_data_that_cannot_be_transcribed_is_named(
    learnt: TrainConfig,
    make: Callable[[Path], Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(tmp_path / "data")
    out = tmp_path / "scores.json"
    with pytest.raises(UserError, match=message):
        call(monkeypatch, learnt.out, "--task", "asr", "--data", tmp_path / "data", "--json", out)
    assert not list(tmp_path.glob("scores*"))


def test_nothing_to_say_and_nothing_to_hear_are_refused(trained: Pretrained) -> None:
    generator = generator_of(trained, "cpu")
    with pytest.raises(UserError, match=r"text 1: expected something to say, got ' '"):
        speak(generator, trained.tokenizer, ["hen", " "], sampling=Sampling())
    with pytest.raises(UserError, match=r"clip 0: expected speech units, got none"):
        transcribe(generator, trained.tokenizer, [np.zeros(0, np.int16)])


def test_a_recogniser_of_other_units_is_refused(
    learnt: TrainConfig, trained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_units(trained, replace(trained, codebook=None), "r")  # not known, so taken at its word
    with pytest.raises(UserError, match=r"r: expected a recogniser of the codebook sha256:ours .*"):
        same_units(trained, replace(trained, codebook="sha256:other"), "r")
    other = replace(trained, vocabulary=replace(trained.vocabulary, num_units=30))
    with pytest.raises(UserError, match=r"r: expected a recogniser of the codebook of size 24 .*"):
        same_units(trained, other, "r")
    with pytest.raises(UserError, match=r"--recogniser: expected a model that transcribes units"):
        call(monkeypatch, learnt.out, "--task", "tts")
