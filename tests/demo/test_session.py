"""From a prompt to what the page shows, without the page."""

import re
from dataclasses import replace

import numpy as np
import pytest

from lst.data.patching import PatchingConfig
from lst.data.records import Record, StoryItem, Word, write_items
from lst.demo.examples import corpus_examples
from lst.demo.session import Limits, Request, Session
from lst.errors import UserError
from lst.generate import Sampling
from lst.speech.units import FRAME_SAMPLES

soundfile = pytest.importorskip("soundfile", reason="lst[speech] is not installed")
pytest.importorskip("scipy", reason="lst[speech] is not installed")
RATE = 16_000


def session_of(trained, codebook, **settings):
    settings = {"encoder": codebook, "voice": codebook, "limits": Limits(), **settings}
    return Session(trained, **settings)


def noise(seconds, rate=RATE):
    return np.random.default_rng(0).uniform(-0.3, 0.3, int(seconds * rate))


@pytest.fixture
def said(tmp_path):
    """1.5 s of it, in stereo and at another rate."""
    path = tmp_path / "said.flac"
    soundfile.write(path, np.stack([noise(1.5, 24_000)] * 2, 1), 24_000)
    return path


@pytest.mark.parametrize("kind", ["local", "global", "token", "bpe"])
def test_every_model_continues_text_and_speech(kind, make_trained, codebook, said):
    session = session_of(make_trained(kind), codebook)
    request = Request(
        text="the red fox", audio=said, sampling=Sampling(max_tokens=9, modality="speech")
    )
    result = session.continue_(request)
    spoken = re.findall(r"\[([\d.]+) s of speech\]", result.text)
    assert round(sum(map(float, spoken)) * RATE) == len(result.sound) > 0
    assert result.ended.startswith(("As long as asked for: 9", "The model ended the document"))
    assert 'class="patch text given' in result.picture
    assert 'class="wave"' in result.picture


def test_the_seed_and_the_prompt_decide(make_trained, codebook):
    session = session_of(make_trained(), codebook)

    def text(seed, prompt="the red fox"):
        sampling = Sampling(max_tokens=12, modality="text", seed=seed)
        return session.continue_(Request(text=prompt, sampling=sampling)).text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_the_order_of_text_and_audio_is_as_asked_for(make_trained, codebook, said):
    session = session_of(make_trained(), codebook)
    sampling = Sampling(max_tokens=1)
    places = []
    for order in ("text first", "audio first"):
        request = Request(text="the red fox", audio=said, order=order, sampling=sampling)
        picture = session.continue_(request).picture
        places.append(picture.index("patch text given") < picture.index("<figure>"))
    assert places == [True, False]


def test_the_recording_itself_is_drawn_and_its_continuation_is_heard(make_trained, codebook, said):
    """Speech goes on in the same run: heard is only what is new."""
    session = session_of(make_trained("token"), codebook)
    request = Request(audio=said, sampling=Sampling(max_tokens=5, modality="speech", seed=2))
    result = session.continue_(request)
    new = len(result.sound) // FRAME_SAMPLES
    assert 0 < new <= 5
    frames = 38 + new  # ⌈1.5 s · 25⌉
    assert f"Speech, {frames / 25:.2f} s: {frames} patches, 25 a second" in result.picture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "fox " * 1001}, "text: expected at most 4,000 characters, got 4,003"),
        ({"sampling": Sampling(max_tokens=501)}, "length: expected at most 500 tokens, got 501"),
    ],
)
def test_what_is_too_much_is_said(changes, message, make_trained, codebook):
    request = replace(Request(sampling=Sampling()), **changes)
    with pytest.raises(UserError, match=message):
        session_of(make_trained(), codebook).continue_(request)


def test_audio_that_is_too_long_is_said_before_it_is_read(make_trained, codebook, said):
    session = session_of(make_trained(), codebook, limits=Limits(seconds=1.4))
    with pytest.raises(UserError, match=r"said\.flac: expected at most 1\.4 s of audio.*1\.5 s"):
        session.continue_(Request(audio=said, sampling=Sampling()))


def test_a_prompt_longer_than_the_context_is_said(make_trained, codebook):
    session = session_of(make_trained(context=16), codebook)
    with pytest.raises(UserError, match="at most 16 patches, the context"):
        session.continue_(Request(text="the red fox " * 9, sampling=Sampling()))


def test_a_file_that_is_no_audio_is_said(make_trained, codebook, tmp_path):
    path = tmp_path / "broken.wav"
    path.write_bytes(b"RIFF\x24\x00\x00\x00WAVE, it says, but is none")
    with pytest.raises(UserError, match=r"broken\.wav: not readable as audio"):
        session_of(make_trained(), codebook).continue_(Request(audio=path, sampling=Sampling()))


def test_out_of_time_a_continuation_ends_where_it_is(make_trained, codebook):
    session = session_of(make_trained(), codebook, limits=Limits(time=0.0))
    seen = []
    request = Request(text="a fox", sampling=Sampling(max_tokens=50, modality="text"))
    result = session.continue_(request, seen.append)
    assert result.ended.startswith("Stopped after 0 s: 1 tokens")
    assert seen == [1]
    assert 'class="chosen"' in result.picture or "text chosen" in result.picture


def test_without_a_voice_there_is_silence_and_without_an_encoder_no_audio(
    make_trained, codebook, said
):
    session = session_of(make_trained(), codebook, voice=None, encoder=None)
    request = Request(text="a fox", sampling=Sampling(max_tokens=6, modality="speech"))
    sound = session.continue_(request).sound
    assert len(sound)
    assert not sound.any()
    with pytest.raises(UserError, match="expected text alone"):
        session.continue_(replace(request, audio=said))


def test_a_model_of_aligned_patches_is_refused(make_trained, codebook):
    trained = make_trained()
    data = replace(trained.config.data, patching=PatchingConfig(strategy="aligned"))
    trained = replace(trained, config=replace(trained.config, data=data))
    with pytest.raises(UserError, match="aligned"):
        session_of(trained, codebook)


def test_facts_are_the_models(make_trained, codebook):
    facts = session_of(make_trained("global"), codebook).facts()
    assert facts[0] == "tiny, step 3"
    assert "static patches of 4 units, 6.25 a second of speech" in facts
    assert "context of 512 patches" in facts
    assert "text passes the global transformer alone" in facts


# --- examples -------------------------------------------------------------------------------------


def record(name, rng):
    words = (Word("The", 0, 5), Word("fox", 8, 14), Word("ran", 140, 160))
    units = rng.integers(0, 20, 170).astype(np.int16)
    return Record(
        id=name,
        text=f"The fox ran ({name}).",
        units=units,
        words=words,
        chars=None,
        speaker=None,
        source="made",
    )


@pytest.fixture
def corpus(tmp_path, tokenizer, codebook):
    """Eight stories, and what the corpus is made with."""
    folder, rng = tmp_path / "corpus", np.random.default_rng(0)
    items = [
        StoryItem(
            id=f"story {number}",
            task="storycloze",
            prompt=record(f"prompt {number}", rng),
            endings=(record("true", rng), record("false", rng)),
            answer=0,
        )
        for number in range(8)
    ]
    made_with = {"codebook": codebook.fingerprint, "tokenizer": tokenizer.fingerprint}
    write_items(folder / "items", items, num_units=20, **made_with)
    codebook.save(folder / "codebook.safetensors")
    return folder


def test_examples_are_beginnings_of_the_stories_of_the_corpus(
    corpus, make_trained, codebook, tmp_path
):
    session = session_of(make_trained(corpus=str(corpus)), codebook)
    examples = corpus_examples(session, tmp_path)
    assert [bool(example.text) for example in examples] == [True, True, False, False]
    assert [example.label for example in examples[2:]] == ["spoken: The fox"] * 2
    assert examples[0].text == "The fox ran (prompt 0)."
    result = session.continue_(Request(audio=examples[2].audio, sampling=Sampling(max_tokens=1)))
    assert ">fox</span>" in result.picture  # its words are known
    assert ">ran</span>" not in result.picture  # and it ends with the last before six seconds


def test_an_examples_units_are_those_of_the_corpus(corpus, make_trained, codebook, tmp_path):
    """Not those that the codebook would make of its own sound."""

    class Deaf:
        def encode(self, waveform):
            raise AssertionError("this audio's units are known")

    session = session_of(make_trained(corpus=str(corpus)), codebook, encoder=Deaf())
    spoken = corpus_examples(session, tmp_path)[2]
    session.continue_(Request(audio=spoken.audio, sampling=Sampling(max_tokens=1)))


def test_without_the_corpus_there_are_no_examples(make_trained, codebook, tmp_path):
    session = session_of(make_trained(corpus=str(tmp_path / "gone")), codebook)
    assert corpus_examples(session, tmp_path) == []
