"""Words and characters are where the emissions say, in the writing of the text."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.data.records import Record, Span, Word, validate_record
from lst.errors import UserError
from lst.speech.alignment import Alignment, CTCAligner
from lst.speech.audio import Timed

FRAME = 320  # samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_ctc) -> Path:
    return save_ctc(tmp_path_factory.mktemp("ctc"))


@pytest.fixture(scope="module")
def aligner(folder: Path) -> CTCAligner:
    return CTCAligner.load(str(folder))


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=num_samples).astype(np.float32)


def says(monkeypatch: pytest.MonkeyPatch, aligner: CTCAligner, characters: str) -> list[np.ndarray]:
    """Make the emissions near certain: one character a frame, "_" for the blank. Their waveform."""
    emissions = np.full((len(characters), 32), -30.0, np.float32)
    for frame, character in enumerate(characters):
        emissions[frame, aligner._vocabulary.get(character, 4 if character == "|" else 0)] = 0.0
    monkeypatch.setattr(aligner, "emissions", lambda waveforms: [emissions])
    return [np.zeros(FRAME * len(characters), np.float32)]


def in_frames(times: tuple[Timed, ...]) -> list[tuple[str, int, int]]:
    """Of the model: 20 ms each."""
    return [(time.label, round(time.start * 50), round(time.stop * 50)) for time in times]


def test_times_are_those_of_the_emissions(
    monkeypatch: pytest.MonkeyPatch, aligner: CTCAligner
) -> None:
    waveforms = says(monkeypatch, aligner, "__TH_EE__||_CC__AAT___")
    (found,) = aligner.align(waveforms, ["The cat."])
    assert in_frames(found.words) == [("The", 2, 7), ("cat.", 12, 19)]
    assert in_frames(found.chars) == [
        ("T", 2, 3),
        ("h", 3, 5),  # the blank after it is its own
        ("e", 5, 7),
        (" ", 7, 7),
        ("c", 12, 16),
        ("a", 16, 18),
        ("t", 18, 19),
        (".", 19, 19),
    ]
    assert found.score == 0.0


@pytest.mark.parametrize(
    ("text", "emissions", "words"),
    [
        ("see", "S_E_E_", [("see", 0, 5)]),  # equal characters, a blank between
        ("I’m", "II'M__", [("I’m", 0, 4)]),  # the apostrophe of another encoding
        ("café", "CAFE", [("café", 0, 4)]),  # no é in the vocabulary
        ("ﬁn", "_FIN_", [("ﬁn", 1, 4)]),  # one character, two labels
        ("¡no! - so", "_NO_|_SO", [("¡no!", 1, 3), ("-", 3, 3), ("so", 6, 8)]),
        ("16 of 30", "__OF__", [("16", 0, 0), ("of", 2, 4), ("30", 4, 4)]),
        ("  a\n b ", "_A_|B_", [("a", 1, 2), ("b", 4, 5)]),
        ("a|b", "_A__B_", [("a|b", 1, 5)]),  # the delimiter is no character of a text
    ],
)
def test_texts_are_aligned_as_they_are_written(
    monkeypatch: pytest.MonkeyPatch,
    aligner: CTCAligner,
    text: str,
    emissions: str,
    words: list[tuple[str, int, int]],
) -> None:
    (found,) = aligner.align(says(monkeypatch, aligner, emissions), [text])
    assert in_frames(found.words) == words
    assert "".join(char.label for char in found.chars) == text


@pytest.mark.parametrize(
    "characters", ["|abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
)
def test_vocabularies_of_another_case_or_without_delimiter_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, save_ctc, characters: str
) -> None:
    aligner = CTCAligner.load(str(save_ctc(tmp_path, characters=characters)))
    written = "_ON_|_US_" if "|" in characters else "_ON___US_"
    heard = written if characters.isupper() else written.lower()
    (found,) = aligner.align(says(monkeypatch, aligner, heard), ["On us"])
    assert in_frames(found.words) == [("On", 1, 3), ("us", 6, 8)]


texts = st.text(alphabet="abc É’-.\n", min_size=1, max_size=30)


@given(texts, st.integers(1, 40_000), st.integers(0, 50), st.integers(0, 60))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_every_alignment_is_valid_in_a_record(
    aligner: CTCAligner, text: str, num_samples: int, seed: int, num_units: int
) -> None:
    """Random weights, any text and length, and units of another length than the speech."""
    waveform = noise(num_samples, seed)
    if reason := aligner.reason_against(num_samples, text):
        with pytest.raises(UserError, match=re.escape(f"utterance 0: {reason}")):
            aligner.align([waveform], [text])
        return
    (found,) = aligner.align([waveform], [text])
    assert [word.label for word in found.words] == text.split()
    assert [char.label for char in found.chars] == list(text)
    for times in (found.words, found.chars):
        ends = [end for time in times for end in (time.start, time.stop)]
        assert ends == sorted(ends)
        assert 0 <= ends[0] <= ends[-1] <= num_samples / 16_000
    for place, character in enumerate(text):
        assert (found.chars[place].start < found.chars[place].stop) == (character in "abcÉ’")
    words, chars = found.frames(num_units)
    units = np.zeros(num_units, np.int16)
    record = Record(
        id="x", text=text, units=units, words=words, chars=chars, speaker=None, source=""
    )
    validate_record(record, 1, "here")


def test_frames_of_a_record_are_the_nearest() -> None:
    found = Alignment(
        (Timed("ab", 0.059, 0.061),), (Timed("a", 0.059, 0.06), Timed("b", 0.06, 0.2)), 0
    )
    assert found.frames(4) == ((Word("ab", 1, 2),), (Span(1, 2), Span(2, 4)))


def test_emissions_are_those_of_transformers(aligner: CTCAligner, folder: Path) -> None:
    from transformers import Wav2Vec2ForCTC

    waveforms = [noise(30 * FRAME, 1), noise(55 * FRAME, 2), noise(30 * FRAME, 3)]
    for waveform, found in zip(waveforms, aligner.emissions(waveforms), strict=True):
        padded = np.pad(waveform, 40)  # centres each frame on its own 20 ms
        with torch.inference_mode():
            logits = (
                Wav2Vec2ForCTC.from_pretrained(folder).eval()(torch.tensor(padded)[None]).logits
            )
        expected = torch.log_softmax(logits[0], -1).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_utterances_are_aligned_together_as_alone(aligner: CTCAligner) -> None:
    waveforms = [noise(FRAME * length, length) for length in (80, 25, 130)]
    texts = ["one after another", "two", "and three in the end"]
    for together, waveform, text in zip(
        aligner.align(waveforms, texts), waveforms, texts, strict=True
    ):
        (alone,) = aligner.align([waveform], [text])
        assert (together.words, together.chars) == (alone.words, alone.chars)
        assert together.score == pytest.approx(alone.score, abs=1e-4)
    assert aligner.align([], []) == []


def test_folders_of_transformers_processor_are_read(tmp_path: Path, folder: Path) -> None:
    from transformers import (
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    Wav2Vec2ForCTC.from_pretrained(folder).save_pretrained(tmp_path)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(folder)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(tmp_path)
    aligner, plain = CTCAligner.load(str(tmp_path)), CTCAligner.load(str(folder))
    waveform = noise(16_000)
    level = (waveform - waveform.mean()) / waveform.std()
    (found,), (expected,) = (
        aligner.align([waveform + 0.5], ["in all"]),
        plain.align([level], ["in all"]),
    )
    assert found.words == expected.words
    assert found.score == pytest.approx(expected.score, abs=1e-4)


def test_why_an_utterance_cannot_be_aligned_is_told(aligner: CTCAligner) -> None:
    assert aligner.reason_against(5 * FRAME, "abba") is None
    assert aligner.reason_against(4 * FRAME, "abba") == (
        "the text needs 5 frames (0.10 s) at least, the speech has 4 (0.08 s)"
    )
    for text in ("", " \n", "1984 — 85!"):
        reason = aligner.reason_against(16_000, text)
        assert reason == f"no character of {text!r} is in the aligner's vocabulary"
    with pytest.raises(UserError, match="utterance 1: the text needs 2 frames"):
        aligner.align([noise(FRAME), noise(FRAME)], ["a", "no"])
    with pytest.raises(UserError, match="utterance 1: no path of 9 frames speaks its labels"):
        aligner.align([noise(9 * FRAME), np.full(9 * FRAME, np.nan, np.float32)], ["a", "no"])


def test_other_models_are_refused(tmp_path: Path, save_hubert, save_ctc) -> None:
    absent = tmp_path / "absent"
    hubert = save_hubert(tmp_path / "hubert")
    no_tokenizer = save_ctc(tmp_path / "no-tokenizer")
    (no_tokenizer / "vocab.json").unlink()
    other_blank = save_ctc(tmp_path / "other-blank", pad_token_id=3)
    too_many = save_ctc(tmp_path / "too-many")
    vocabulary = json.loads((too_many / "vocab.json").read_text())
    (too_many / "vocab.json").write_text(json.dumps(vocabulary | {"Ä": 99}))
    no_number = save_ctc(tmp_path / "no-number")
    (no_number / "vocab.json").write_text(json.dumps(vocabulary | {"E": "x"}))
    negative = save_ctc(tmp_path / "negative")
    (negative / "vocab.json").write_text(json.dumps(vocabulary | {"E": -1}))
    no_characters = save_ctc(tmp_path / "no-characters", characters="|")
    adapter = save_ctc(tmp_path / "adapter", add_adapter=True)
    cases = [
        (absent, "no wav2vec2 model could be read here"),
        (hubert, "expected a wav2vec2 model, got 'hubert'"),
        (no_tokenizer, "no CTC tokenizer could be read here"),
        (other_blank, "expected the tokenizer's padding to be the blank 3, got 0"),
        (too_many, "expected the ids of characters below the model's 32, got 99"),
        (no_number, "expected the ids of characters below the model's 32, got 'x' of E"),
        (negative, "expected the ids of characters below the model's 32, got -1 of E"),
        (no_characters, "expected a vocabulary of characters, got none"),
        (adapter, "expected a model without an adapter"),
    ]
    for folder, message in cases:
        with pytest.raises(UserError, match=re.escape(f"{folder}: {message}")):
            CTCAligner.load(str(folder))


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=re.escape("pip install 'lst[speech]'")):
        CTCAligner.load("any")
