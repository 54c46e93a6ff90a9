"""Speech is a function of text and voice, and every written word has its time in it."""

import re
import sys
from itertools import pairwise

import numpy as np
import pytest

from lst.errors import UserError
from lst.prepare.stories import generate_stories
from lst.speech.audio import SAMPLE_RATE
from lst.speech.synthesis import HELD_OUT_VOICE, TRAINING_VOICES, Speech, Voice, synthesize

pytest.importorskip("espeakng_loader")

VOICES = (*TRAINING_VOICES, HELD_OUT_VOICE)

# Pairs that espeak's dictionary would read as one word, figures that it reads as several.
HARD_TEXT = (
    "Out of the blue, at the end of the day, it had been 25 miles; "
    "she said: \"I don't know!\" to Mr. Smith's well-known dog... and to the old cat."
)
PAUSES = ["blue,", "day,", "miles;", "said:", 'know!"', "dog...", "cat."]


def loudness(speech: Speech, start: float, stop: float) -> float:
    samples = speech.waveform[round(start * SAMPLE_RATE) : round(stop * SAMPLE_RATE)]
    return float(np.sqrt(np.square(samples).mean()))


def test_there_are_eight_training_voices_and_another_held_out() -> None:
    assert len(TRAINING_VOICES) >= 8
    assert len({voice.name for voice in VOICES}) == len(VOICES)
    assert len({voice.espeak for voice in VOICES}) == len(VOICES)


@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice.name)
def test_words_are_the_text_in_order_and_disjoint(voice: Voice) -> None:
    texts = [story.text for story in generate_stories(3, 12)]
    for text in (HARD_TEXT, *texts):
        speech = synthesize(text, voice)
        assert " ".join(word.label for word in speech.words) == text
        assert all(word.start < word.stop for word in speech.words)
        assert all(one.stop <= other.start for one, other in pairwise(speech.words))
        assert speech.words[0].start >= 0
        assert speech.words[-1].stop <= len(speech.waveform) / SAMPLE_RATE


def test_voices_sound_different() -> None:
    waveforms = [synthesize("The boat was late.", voice).waveform for voice in VOICES]
    shortest = min(map(len, waveforms))
    for index, one in enumerate(waveforms):
        for other in waveforms[:index]:
            assert np.abs(one[:shortest] - other[:shortest]).mean() > 0.01


@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice.name)
def test_speech_does_not_depend_on_what_was_spoken_before(voice: Voice) -> None:
    alone = synthesize(HARD_TEXT, voice)
    synthesize("Something else, and at length. " * 5, TRAINING_VOICES[3])
    again = synthesize(HARD_TEXT, voice)
    np.testing.assert_array_equal(alone.waveform, again.waveform)
    assert (alone.words, alone.phones) == (again.words, again.phones)


def test_waveform_is_16_khz_speech() -> None:
    speech = synthesize(HARD_TEXT, TRAINING_VOICES[0])
    assert speech.waveform.dtype == np.float32
    assert 0.3 < np.abs(speech.waveform).max() <= 1
    # Samples of 22,050 Hz counted as 16,000 would last 1.38 times as long as the words.
    assert len(speech.waveform) / SAMPLE_RATE - speech.words[-1].stop < 0.5


@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice.name)
def test_words_are_loud_and_the_gaps_between_them_silent(voice: Voice) -> None:
    speech = synthesize(HARD_TEXT, voice)
    words = [loudness(speech, word.start, word.stop) for word in speech.words]
    following = [*(word.start for word in speech.words[1:]), len(speech.waveform) / SAMPLE_RATE]
    pauses = {
        word.label: loudness(speech, word.stop + 0.04, stop - 0.04)  # 40 ms: what may be off
        for word, stop in zip(speech.words, following, strict=True)
        if stop - word.stop > 0.09
    }
    assert list(pauses) == PAUSES
    assert max(pauses.values()) < 0.1 * np.median(words)


def test_phones_lie_inside_words() -> None:
    speech = synthesize(HARD_TEXT, TRAINING_VOICES[0])
    for phone in speech.phones:
        # A word starts with the closure of its first consonant, whose phone with its burst.
        assert any(
            word.start - 0.06 <= phone.start and phone.stop <= word.stop + 0.06
            for word in speech.words
        ), phone
    dog = speech.words[HARD_TEXT.split().index("dog...")]
    phones = [phone.label.strip("'") for phone in speech.phones if dog.start <= phone.start]
    assert phones[:3] == ["d", "0", "g"]


@pytest.mark.parametrize(
    ("text", "voice", "message"),
    [
        ("one - two", TRAINING_VOICES[0], "does not pronounce '-'"),
        ("  ", TRAINING_VOICES[0], "expected a text with words to speak, got '  '"),
        ("one", Voice(name="nobody", espeak="xx-yy"), "espeak-ng knows no voice 'xx-yy'"),
        ("one", Voice(name="nobody", espeak="\udcff"), r"espeak-ng knows no voice '\udcff'"),
    ],
)
def test_what_cannot_be_spoken_is_named(text: str, voice: Voice, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        synthesize(text, voice)


def test_missing_espeak_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=re.escape("pip install 'lst[speech]'")):
        synthesize("one", TRAINING_VOICES[0])
