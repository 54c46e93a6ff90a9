"""Speech with exact word times from espeak-ng, for corpora that need no download.

    >>> speech = synthesize("The boat was late.", TRAINING_VOICES[0])       # doctest: +SKIP
    >>> [(word.label, word.start, word.stop) for word in speech.words]      # doctest: +SKIP
    [('The', 0.0, 0.09), ('boat', 0.09, 0.34), ('was', 0.34, 0.51), ('late.', 0.51, 0.89)]

What is written decides what is aligned: every string between blanks is one word, from espeak's
first event inside it. It stops where the next word starts, or where espeak's pause after it starts
(a phoneme event of the class ``_``), so that the gaps between words are silence.

espeak keeps oscillator phases in static variables that no call resets, and starts the random
numbers of breathy voices from the clock, so that the same text sounds different the second time.
Here each utterance comes from a library loaded anew, which takes 0.6 ms, and seeded: the samples
depend on the text, the voice and the version of espeak alone.
"""

import ctypes
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from lst.errors import UserError
from lst.speech.audio import Timed

__all__ = ["HELD_OUT_VOICE", "TRAINING_VOICES", "Speech", "Voice", "synthesize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """A voice of espeak-ng.

    Attributes:
        name: ours, the ``speaker`` of a record.
        espeak: espeak's voice and variant, as in ``en-us+f3``.
        speed: words per minute; espeak's own default is 175.
        pitch: 0 to 99; espeak's own default is 50.
    """

    name: str
    espeak: str
    speed: int = 175
    pitch: int = 50


@dataclass(frozen=True, slots=True)
class Speech:
    """An utterance.

    Attributes:
        waveform: (n,) float32 in [−1, 1], 16 kHz.
        words: one for each written word, in order; " ".join of the labels is the text.
        phones: espeak's phoneme names, pauses left out.
    """

    waveform: np.ndarray
    words: tuple[Timed, ...]
    phones: tuple[Timed, ...]


TRAINING_VOICES = (
    Voice(name="us-m1", espeak="en-us+m1", speed=180, pitch=46),
    Voice(name="us-m3", espeak="en-us+m3", speed=195, pitch=58),
    Voice(name="us-m7", espeak="en-us+m7", speed=185, pitch=40),
    Voice(name="us-f1", espeak="en-us+f1", speed=190, pitch=52),
    Voice(name="us-f2", espeak="en-us+f2", speed=180, pitch=44),
    Voice(name="us-f5", espeak="en-us+f5", speed=200, pitch=50),
    Voice(name="rp-m4", espeak="en-gb-x-rp+m4", speed=200, pitch=50),
    Voice(name="rp-f3", espeak="en-gb-x-rp+f3", speed=185, pitch=56),
)
HELD_OUT_VOICE = Voice(name="us-f4", espeak="en-us+f4", speed=190, pitch=48)


def synthesize(text: str, voice: Voice) -> Speech:
    """Speak a text.

    Args:
        text: words between blanks; each must have something to pronounce.
        voice: who speaks.

    Returns:
        The same samples and times for the same arguments, whatever was spoken before.

    Raises:
        UserError: a word that espeak does not pronounce (a dash between blanks), no word at all,
            an unknown voice, or no espeak-ng here.
    """
    words = text.split()
    if not words:
        raise UserError(f"expected a text with words to speak, got {text!r}")
    # The bar is espeak's mark of a word boundary. It is silent, and keeps espeak from reading two
    # words as one ("of the", "had been"), which would leave the second without a time.
    offsets = [0, *accumulate(len(word) + len(_BOUNDARY) for word in words)][:-1]
    samples, events = _speak(_BOUNDARY.join(words), voice)
    end = len(samples) / _ESPEAK_RATE
    starts: list[float | None] = [None] * len(words)
    for event in events:
        index = bisect_right(offsets, event.character) - 1
        if event.kind == _WORD and starts[index] is None:
            starts[index] = event.sample / _ESPEAK_RATE
    for word, start in zip(words, starts, strict=True):
        if start is None:
            raise UserError(f"voice {voice.name} does not pronounce {word!r} in {text!r}")
    phones = tuple(_phones([event for event in events if event.kind == _PHONEME], end))
    return Speech(_resample(samples), _words(words, starts, phones, end), phones)  # type: ignore[arg-type]


def _phones(events: Sequence["_Event"], end: float) -> Iterator[Timed]:
    times = [*(event.sample / _ESPEAK_RATE for event in events), end]
    for event, (start, stop) in zip(events, pairwise(times), strict=True):
        if event.phoneme and not event.phoneme.startswith("_"):
            yield Timed(event.phoneme, start, stop)


def _words(
    words: Sequence[str], starts: Sequence[float], phones: Sequence[Timed], end: float
) -> tuple[Timed, ...]:
    """A word ends with its last phone: phones follow one another but for the pauses."""
    stops_of_phones = [0.0, *(phone.stop for phone in phones)]
    starts_of_phones = [phone.start for phone in phones]
    timed = []
    for word, (start, limit) in zip(words, pairwise([*starts, end]), strict=True):
        # Phones that start before the limit; a word's event may come a few ms before its phone.
        last = bisect_right(starts_of_phones, np.nextafter(limit, 0))
        timed.append(Timed(word, start, min(limit, max(start, stops_of_phones[last]))))
    return tuple(timed)


def _resample(samples: np.ndarray) -> np.ndarray:
    """(n,) int16 at 22,050 Hz → float32 at 16 kHz, by scipy's polyphase filter."""
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise UserError(_INSTALL.format("scipy")) from None
    # 16000 / 22050 = 320 / 441
    waveform = resample_poly(samples / 32768.0, 320, 441)
    return np.clip(waveform, -1.0, 1.0).astype(np.float32)


# espeak-ng's C interface (speak_lib.h) ------------------------------------------------------------

_INSTALL = "speech needs {}, which is not installed: pip install 'lst[speech]'"
_BOUNDARY = " | "
_ESPEAK_RATE = 22_050
_LIST_TERMINATED, _WORD, _PHONEME = 0, 1, 7  # espeak_EVENT_TYPE
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PHONEME_EVENTS, _DONT_EXIT = 0x0001, 0x8000  # options of espeak_Initialize
_CHARS_UTF8, _ENDPAUSE = 0x0001, 0x1000  # flags of espeak_Synth
_POS_CHARACTER = 1
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_ONE_AT_A_TIME = threading.Lock()  # espeak is one set of static variables per process


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _EspeakEvent(ctypes.Structure):
    """espeak_EVENT: 40 bytes where pointers are 8."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_EspeakEvent)
)


@dataclass(frozen=True, slots=True)
class _Event:
    kind: int
    character: int  # in the text, from 0
    sample: int  # at 22,050 Hz, from the utterance's start
    phoneme: str


def _speak(text: str, voice: Voice) -> tuple[np.ndarray, list[_Event]]:
    """Samples (n,) int16 at 22,050 Hz, and the word and phoneme events."""
    pieces: list[np.ndarray] = []
    events: list[_Event] = []

    def receive(wave: Any, num_samples: int, event: Any) -> int:
        if wave and num_samples:
            pieces.append(np.ctypeslib.as_array(wave, (num_samples,)).copy())
        index = 0
        while (kind := event[index].type) != _LIST_TERMINATED:
            if kind in (_WORD, _PHONEME):
                phoneme = event[index].id.string.decode() if kind == _PHONEME else ""
                character = event[index].text_position - 1
                events.append(_Event(kind, character, event[index].sample, phoneme))
            index += 1
        return 0

    with _ONE_AT_A_TIME, _library() as library:
        callback = _Callback(receive)
        library.espeak_SetSynthCallback(callback)
        if library.espeak_SetVoiceByName(voice.espeak.encode(errors="replace")) != 0:
            raise UserError(f"voice {voice.name}: espeak-ng knows no voice {voice.espeak!r}")
        library.espeak_SetParameter(_RATE, voice.speed, 0)
        library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        content = text.encode() + b"\0"
        flags = _CHARS_UTF8 | _ENDPAUSE
        status = library.espeak_Synth(
            content, len(content), 0, _POS_CHARACTER, 0, flags, None, None
        )
        if status != 0:
            raise RuntimeError(f"espeak_Synth failed with status {status} on {text!r}")
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int16), events


@contextmanager
def _library() -> Iterator[ctypes.CDLL]:
    """espeak-ng with its static variables as on its first day; unloaded afterwards."""
    try:
        import espeakng_loader
    except ImportError:
        raise UserError(_INSTALL.format("espeakng-loader")) from None
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_Initialize.argtypes = (
        ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int
    )  # fmt: skip
    library.espeak_SetSynthCallback.argtypes = (_Callback,)
    library.espeak_Synth.argtypes = (
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int,
        ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p,
    )  # fmt: skip
    data = espeakng_loader.get_data_path().encode()
    options = _PHONEME_EVENTS | _DONT_EXIT
    try:
        rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, options)
        if rate != _ESPEAK_RATE:
            raise RuntimeError(f"espeak-ng did not start with its data: status or rate {rate}")
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # its start takes the time for a seed
        yield library
        library.espeak_Terminate()
    finally:
        unload = ctypes.CDLL(None).dlclose
        unload.argtypes = (ctypes.c_void_p,)
        unload(library._handle)
