"""Recordings and their units, to learn from: where each is, what it says, and stretches of them.

    manifest or folder → units of each recording → clips.jsonl, clips.safetensors of the run
    (seed, step) → stretches of num_units units and their samples, read from the audio files

The units are made once, of whole recordings, as a corpus's are; samples are read where they are
wanted, so that any number of hours can be learnt from.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from lst.errors import UserError
from lst.files import replacing, write_atomically
from lst.prepare.sources import Sources, Utterance, from_json, list_inputs, to_json
from lst.prepare.speech import encode_audio, open_audio
from lst.speech.audio import AudioError, sample_range
from lst.speech.units import FRAME_SAMPLES, UnitEncoder
from lst.strict_json import read_json_lines

__all__ = ["Clip", "Stretches", "draw", "make_clips", "read_clips", "samples_of", "write_clips"]

LIST, UNITS = "clips.jsonl", "clips.safetensors"


@dataclass(frozen=True)
class Clip:
    """A recording: its units (F,) int16, and where its samples are."""

    utterance: Utterance
    units: np.ndarray


@dataclass(frozen=True)
class Stretches:
    """Units and samples of one length.

    Attributes:
        units: (B, S) int64.
        samples: (B, 640 S) float32; zeros after a recording's end.
        speakers: (B,) int64, indices into the names of speakers; zeros where they do not count.
    """

    units: np.ndarray
    samples: np.ndarray
    speakers: np.ndarray


def make_clips(sources: Sources, encoder: UnitEncoder) -> tuple[list[Clip], list[str]]:
    """Encode every recording.

    Returns:
        The clips, and of each recording that is not fit to be one, why.
    """
    clips, passed_over = [], []
    for each in tqdm(list(list_inputs(sources)), desc="units", unit="clip", disable=None):
        assert isinstance(each, Utterance)
        try:
            audio = open_audio(each)
            units = encode_audio(encoder, audio, *sample_range(audio, each.start, each.duration))
        except AudioError as error:
            passed_over.append(str(error))
            continue
        clips.append(Clip(each, units))
    return clips, passed_over


def write_clips(folder: Path, clips: Sequence[Clip]) -> None:
    """The list is written last: where it is, the units are."""
    offsets = np.cumsum([0, *(len(clip.units) for clip in clips)])
    with replacing(folder / UNITS) as temporary:
        units = np.concatenate([clip.units for clip in clips])
        save_file({"units": units, "cu_clips": offsets, "crc32": _checksum(units)}, temporary)
    lines = "".join(f"{to_json(clip.utterance)}\n" for clip in clips)
    write_atomically(folder / LIST, lines)


def _checksum(units: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(units.tobytes())], np.int64)


def read_clips(folder: Path) -> list[Clip] | None:
    """What :func:`write_clips` wrote; None where nothing is. Raises UserError for damage."""
    if not (folder / LIST).is_file():
        return None
    lines = read_json_lines(folder / LIST)
    utterances = [from_json("folder", values, where) for _, where, values in lines]
    path = folder / UNITS
    try:
        tensors = load_file(path)
        units, offsets, checksum = (tensors[name] for name in ("units", "cu_clips", "crc32"))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: expected the units of {LIST}, got {error!r}") from None
    whole = units.dtype == np.int16 and offsets.shape == (len(utterances) + 1,)
    if not np.array_equal(checksum, _checksum(units)):
        raise UserError(f"{path}: damaged: expected the units of their checksum, got others")
    if not whole or offsets[-1] != len(units) or offsets[0] != 0 or np.any(np.diff(offsets) < 1):
        raise UserError(f"{path}: expected the units of the {len(utterances)} clips of {LIST}")
    return [
        Clip(utterance, each)
        for utterance, each in zip(utterances, np.split(units, offsets[1:-1]), strict=True)
        if isinstance(utterance, Utterance)
    ]


def draw(
    clips: Sequence[Clip],
    speakers: Sequence[str],
    *,
    batch: int,
    num_units: int,
    seed: int,
    step: int,
) -> Stretches:
    """The stretches of a training step: every frame of every clip is as likely to be a start.

    Args:
        clips: each of at least ``num_units`` units.
        speakers: names, where they count.
    """
    rng = np.random.default_rng([seed, step])
    starts = np.cumsum([len(clip.units) - num_units + 1 for clip in clips])
    places = rng.integers(starts[-1], size=batch)
    chosen = np.searchsorted(starts, places, side="right")
    units, samples, who = [], [], []
    for place, index in zip(places, chosen, strict=True):
        clip = clips[index]
        start = int(place - (starts[index] - (len(clip.units) - num_units + 1)))
        units.append(clip.units[start : start + num_units])
        samples.append(samples_of(clip, start, start + num_units))
        who.append(speakers.index(clip.utterance.speaker or "") if speakers else 0)
    return Stretches(np.stack(units).astype(np.int64), np.stack(samples), np.array(who))


def samples_of(clip: Clip, start: int, stop: int) -> np.ndarray:
    """Frames [start, stop) → (640 (stop − start),) float32, zeros after the recording's end.

    Raises:
        UserError: the audio is no longer what it was.
    """
    try:
        audio = open_audio(clip.utterance)
        begin, end = sample_range(audio, clip.utterance.start, clip.utterance.duration)
        first = begin + start * FRAME_SAMPLES
        samples = audio.read(first, min(end, begin + stop * FRAME_SAMPLES))
    except (AudioError, ValueError) as error:
        raise UserError(str(error)) from None
    return np.pad(samples, (0, (stop - start) * FRAME_SAMPLES - len(samples)))
