"""Prompts are what documents begin with, and documents are read back as what they say."""

import sys
import wave
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lst.data.interleave import item_document, record_document, stable_rng
from lst.data.records import Record, Word
from lst.errors import UserError
from lst.generate.prompt import audio_units, open_units, prompt_tokens, spans_of
from lst.pretrained import Pretrained
from lst.speech.audio import write_wav
from lst.speech.units import LogMelKMeans
from lst.vocabulary import BOS, EOS, SPEECH, TEXT, SentencePieceTokenizer, Vocabulary

Make = Callable[..., Pretrained]
UNITS = np.array([3, 3, 7, 1, 19], np.int16)
STORY = "the small red fox"


@pytest.fixture(scope="module")
def trained(make_trained: Make) -> Pretrained:
    return make_trained()


def record(text: str | None = STORY, units: np.ndarray | None = UNITS, words: Any = None) -> Record:
    return Record(
        id="r", text=text, units=units, words=words, chars=None, speaker=None, source="test"
    )


def ids(trained: Pretrained, spans: list[Any], then: Any) -> list[int]:
    return prompt_tokens(spans, trained.vocabulary, trained.tokenizer, then=then).tolist()


def pieces(trained: Pretrained, text: str) -> list[int]:
    return [trained.vocabulary.piece_to_id(p) for p in trained.tokenizer.encode(text)]


def codes(trained: Pretrained, units: Any) -> list[int]:
    return trained.vocabulary.unit_to_id(np.asarray(units, np.int32)).tolist()


# The rules of documents ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "spans", "then"),
    [
        ("text", [STORY], "text"),
        ("speech", [UNITS], "speech"),
        ("speech", [UNITS], "any"),
    ],
)
def test_a_prompt_is_the_document_of_that_kind_without_its_end(
    trained: Pretrained, kind: Any, spans: list[Any], then: str
) -> None:
    document = record_document(
        record(), trained.vocabulary, trained.tokenizer, stable_rng(0), kind
    ).tokens
    assert ids(trained, spans, then) == document[:-1].tolist()
    assert document[-1] == EOS


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [("text-to-speech", STORY, "speech"), ("speech-to-text", UNITS, "text")],
)
def test_a_prompt_of_one_modality_ends_with_the_marker_of_the_other(
    trained: Pretrained, kind: Any, first: Any, then: str
) -> None:
    tokens = ids(trained, [first], then)
    document = record_document(
        record(), trained.vocabulary, trained.tokenizer, stable_rng(0), kind
    ).tokens.tolist()
    assert document[: len(tokens)] == tokens
    assert tokens[-1] == (SPEECH if then == "speech" else TEXT)


@pytest.mark.parametrize("mode", ["T→T", "S→S", "T→S", "S→T"])
def test_a_prompt_is_what_the_ending_of_a_story_is_scored_after(
    trained: Pretrained, mode: Any
) -> None:
    document = item_document(record(), record(), mode, trained.vocabulary, trained.tokenizer)
    prompt = ids(
        trained,
        [STORY if mode[0] == "T" else UNITS],
        "text" if mode[2] == "T" else "speech",
    )
    assert document.tokens[: document.score_from].tolist() == prompt


def test_interleaved_prompts_are_the_beginnings_of_interleaved_documents(
    trained: Pretrained,
) -> None:
    """Whatever spans were drawn: cut a document where a span ends, and ask for it as a prompt."""
    words = STORY.split() * 10
    spoken = tuple(Word(word, 3 * i, 3 * i + 3) for i, word in enumerate(words))
    units = (np.arange(3 * len(words)) % 20).astype(np.int16)
    seen = 0
    for seed in range(12):
        tokens = record_document(
            record(" ".join(words), units, spoken),
            trained.vocabulary,
            trained.tokenizer,
            stable_rng(seed),
            "interleaved",
        ).tokens
        spans = spans_of(tokens, trained.vocabulary, trained.tokenizer)
        markers = np.flatnonzero((tokens == TEXT) | (tokens == SPEECH))
        for number, marker in enumerate(markers[1:], 1):
            then = "text" if tokens[marker] == TEXT else "speech"
            assert ids(trained, spans[:number], then) == tokens[: marker + 1].tolist()
            seen += 1
    assert seen > 20


def test_what_may_follow_decides_the_markers(trained: Pretrained) -> None:
    text, units = pieces(trained, STORY), codes(trained, UNITS)
    assert ids(trained, [STORY], "any") == [BOS, TEXT, *text]
    assert ids(trained, [STORY], "text") == [BOS, *text]
    assert ids(trained, [STORY], "speech") == [BOS, TEXT, *text, SPEECH]
    assert ids(trained, [STORY, UNITS], "speech") == [BOS, TEXT, *text, SPEECH, *units]
    assert ids(trained, [STORY, UNITS], "text") == [BOS, TEXT, *text, SPEECH, *units, TEXT]
    assert ids(trained, [UNITS, STORY], "text") == [BOS, SPEECH, *units, TEXT, *text]


def test_no_prompt_is_the_start_of_a_document(trained: Pretrained) -> None:
    for spans in ([], [""], [UNITS[:0], ""]):
        assert ids(trained, spans, "any") == [BOS]
        assert ids(trained, spans, "text") == [BOS]
        assert ids(trained, spans, "speech") == [BOS, SPEECH]


def test_neighbours_of_one_modality_are_one_span(trained: Pretrained) -> None:
    assert ids(trained, ["the small", "", "red fox"], "any") == ids(trained, [STORY], "any")
    assert ids(trained, [UNITS[:2], UNITS[2:]], "any") == ids(trained, [UNITS], "any")


def test_text_after_speech_has_the_pieces_that_go_on_with_the_text_before(
    make_trained: Make,
) -> None:
    """Of a tokenizer that puts the blank before a word into its piece, and none before a text."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from lst.vocabulary import JsonTokenizer

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(
        ["the small red fox"] * 9,
        trainers.BpeTrainer(
            vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[]
        ),
    )
    tokenizer = JsonTokenizer(library.to_str().encode())
    vocabulary = Vocabulary(tokenizer.num_pieces, 20)
    tokens = prompt_tokens(["the small", UNITS, "red fox"], vocabulary, tokenizer, then="any")
    last = vocabulary.id_to_piece(tokens[np.flatnonzero(tokens == TEXT)[-1] + 1 :]).tolist()
    assert last == tokenizer.encode(" red fox") != tokenizer.encode("red fox")
    alone = prompt_tokens([UNITS, "red fox"], vocabulary, tokenizer, then="any")
    assert vocabulary.id_to_piece(alone[-len(tokenizer.encode("red fox")) :]).tolist() == (
        tokenizer.encode("red fox")
    )


# There and back -----------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(STORY.split()), min_size=1, max_size=6).map(" ".join)
SPEECH_SPANS = st.lists(st.integers(0, 19), min_size=1, max_size=9).map(
    lambda units: np.array(units, np.int16)
)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    spans=st.lists(WORDS | SPEECH_SPANS, max_size=6),
    then=st.sampled_from(["any", "text", "speech"]),
    bpe=st.booleans(),
)
def test_prompts_are_read_back(make_trained: Make, spans: list[Any], then: Any, bpe: bool) -> None:
    trained = make_trained(speech_bpe=bpe)
    tokens = prompt_tokens(spans, trained.vocabulary, trained.tokenizer, then=then)
    read = spans_of(tokens, trained.vocabulary, trained.tokenizer)
    assert " ".join(s for s in read if isinstance(s, str)) == " ".join(
        s for s in spans if isinstance(s, str)
    )
    heard = [s for s in read if not isinstance(s, str)]
    said = [s for s in spans if not isinstance(s, str)]
    np.testing.assert_array_equal(np.concatenate([[], *heard]), np.concatenate([[], *said]))
    kinds = [isinstance(s, str) for s in read]
    assert all(a != b for a, b in pairwise(kinds))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_no_character_is_lost_that_the_tokenizer_has_never_seen(
    make_trained: Make, text: str
) -> None:
    """A tokenizer of ours spells it in bytes; only SentencePiece's sign for a blank becomes one."""
    trained = make_trained()
    tokens = prompt_tokens([text], trained.vocabulary, trained.tokenizer, then="text")
    read = "".join(spans_of(tokens, trained.vocabulary, trained.tokenizer))
    assert read == text.replace("\u2581", " ")


def test_a_tokenizer_without_bytes_reads_an_unknown_character_as_unknown(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["the small red fox"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=24,
        model_type="bpe",
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer((tmp_path / "tokenizer.model").read_bytes())
    vocabulary = Vocabulary(tokenizer.num_pieces, 20)
    tokens = prompt_tokens(["fox 狐"], vocabulary, tokenizer, then="text")
    assert spans_of(tokens, vocabulary, tokenizer) == ["fox  \u2047 "]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(text=WORDS, cut=st.integers(0, 30))
def test_text_that_goes_on_begins_where_the_text_before_it_ends(
    make_trained: Make, text: str, cut: int
) -> None:
    trained = make_trained()
    whole = prompt_tokens([text], trained.vocabulary, trained.tokenizer, then="text")
    before, rest = np.split(whole, [min(1 + cut, len(whole))])
    read = [spans_of(before, trained.vocabulary, trained.tokenizer)]
    read.append(spans_of(rest, trained.vocabulary, trained.tokenizer, after=before))
    assert "".join("".join(spans) for spans in read) == text


def test_a_character_in_several_tokens_is_read_with_the_last_of_them(trained: Pretrained) -> None:
    whole = prompt_tokens(["a狐"], trained.vocabulary, trained.tokenizer, then="text")
    before, rest = whole[:-1], whole[-1:]
    assert spans_of(rest, trained.vocabulary, trained.tokenizer, after=before) == ["狐"]


def test_text_after_a_switch_does_not_go_on_with_text_before_it(trained: Pretrained) -> None:
    before = prompt_tokens(["fox"], trained.vocabulary, trained.tokenizer, then="any")
    tokens = np.array([SPEECH, *codes(trained, UNITS), TEXT, *pieces(trained, "went"), EOS])
    speech, text = spans_of(tokens, trained.vocabulary, trained.tokenizer, after=before)
    assert (speech.tolist(), text) == (UNITS.tolist(), "went")


@pytest.mark.parametrize(
    ("span", "message"),
    [
        (np.array([20]), r"expected units in \[0, 20\), got 20 to 20"),
        (np.array([-1, 3]), r"expected units in \[0, 20\), got -1 to 3"),
        (np.array([0.5]), r"expected units \(F,\) as integers, got float64"),
        (np.zeros((2, 2), int), r"expected units \(F,\) as integers, got int64 of shape \(2, 2\)"),
        ("half a \ud83d", r"expected text, got 'half a \\ud83d' with a character that is none at"),
    ],
)
def test_what_is_no_text_and_no_units_is_refused(
    trained: Pretrained, span: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ids(trained, [span], "any")


# Audio --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(trained: Pretrained) -> Any:
    return open_units(trained)


def tone(seconds: float, rate: int = 16_000) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 220 * time) * (1 + np.sin(9 * time))).astype(np.float32)


def write_pcm(path: Path, samples: np.ndarray, rate: int, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat((samples * 32767).astype("<i2"), channels).tobytes())
    return path


def test_audio_becomes_the_units_of_the_codebook(
    trained: Pretrained, encoder: Any, tmp_path: Path
) -> None:
    pytest.importorskip("soundfile")
    write_wav(tmp_path / "a.wav", tone(1.0))
    units = audio_units(tmp_path / "a.wav", encoder, max_seconds=2)
    codebook = LogMelKMeans.load(trained.codebook_file)
    rounded = np.rint(tone(1.0) * 32768) / 32768  # 16 bits
    np.testing.assert_array_equal(units, codebook.encode(rounded.astype(np.float32)))
    assert (len(units), units.dtype) == (25, np.int16)


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (11_025, 3), (44_100, 2), (47_999, 6)])
def test_any_rate_and_number_of_channels_is_heard(
    encoder: Any, tmp_path: Path, rate: int, channels: int
) -> None:
    pytest.importorskip("soundfile")
    path = write_pcm(tmp_path / "a.wav", tone(1.0, rate), rate, channels)
    units = audio_units(path, encoder)
    assert len(units) == 25
    reference = audio_units(write_pcm(tmp_path / "b.wav", tone(1.0), 16_000), encoder)
    assert (units == reference).mean() > 0.8


def test_long_audio_is_refused_without_being_read(
    encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("soundfile")
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes(b"")
    size = 3 * 3600 * 8_000 * 2
    with path.open("r+b") as file:  # three hours of zeros that take no room on the disk
        header = bytearray(file.read(44))
        header[4:8] = (36 + size).to_bytes(4, "little")
        header[40:44] = size.to_bytes(4, "little")
        file.seek(0)
        file.write(header)
        file.truncate(44 + size)
    monkeypatch.setattr("lst.speech.audio.AudioReader.read", lambda *_: pytest.fail("was read"))
    message = r"long.wav: expected at most 60 s of audio as a prompt, got 10800.0 s"
    with pytest.raises(UserError, match=message):
        audio_units(path, encoder, max_seconds=60)


def nan(path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    samples = tone(0.5)
    samples[100] = np.nan
    soundfile.write(path, samples, 16_000, subtype="FLOAT")


def truncated(path: Path) -> None:
    write_wav(path, tone(0.5))
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "a.wav: expected an audio file, got none"),
        (lambda path: path.write_bytes(b""), "a.wav: not readable as audio"),
        (lambda path: path.write_text("Once upon a time"), "a.wav: not readable as audio"),
        (lambda path: write_wav(path, np.zeros(0)), "a.wav: expected audio, got 0 samples"),
        (lambda path: write_wav(path, np.zeros(8000)), r"expected speech, got silence \(all sa"),
        (lambda path: write_wav(path, tone(0.5) / 9000), r"got silence \(-84 dBFS\)"),
        (nan, r"a.wav: nan for a sample at 0.006 s"),
        (truncated, r"a.wav: cut short \(16000 bytes by its header, 11000 in the file\)"),
    ],
)
def test_audio_that_cannot_be_used_is_one_clear_line(
    encoder: Any, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    pytest.importorskip("soundfile")
    make(tmp_path / "a.wav")
    with pytest.raises(UserError, match=message) as error:
        audio_units(tmp_path / "a.wav", encoder)
    assert "\n" not in str(error.value)


def test_audio_without_its_library_names_the_extra(
    encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match=r"pip install 'lst\[speech\]'"):
        audio_units(tmp_path / "a.wav", encoder)


# Codebooks ----------------------------------------------------------------------------------------


def test_only_the_codebook_of_the_model_makes_its_units(
    trained: Pretrained, tmp_path: Path
) -> None:
    own, other = LogMelKMeans.load(trained.codebook_file), tmp_path / "other.safetensors"
    LogMelKMeans(own.centroids + 1, own.log_mels).save(other)
    with pytest.raises(UserError, match=r"other.safetensors: expected the codebook of the model's"):
        open_units(trained, codebook=other)
    LogMelKMeans(own.centroids[:9], own.log_mels[:9]).save(other)
    with pytest.raises(UserError, match=r"expected a codebook of 20 units, .* got one of 9"):
        open_units(replace(trained, codebook=None), codebook=other)
    with pytest.raises(UserError, match=r"units \(sha256:\w+\), got none; --codebook names it"):
        open_units(replace(trained, codebook_file=None))
    with pytest.raises(UserError, match="expected --hubert and --layer together"):
        open_units(trained, hubert="somewhere")
