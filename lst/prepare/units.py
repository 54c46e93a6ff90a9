"""``python -m lst.prepare units``: fit a codebook of speech units to a sample of a corpus."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lst.errors import UserError, expect_option, expect_positive
from lst.files import make_folder, replacing
from lst.machine import find_device
from lst.prepare.sources import Sources, Utterance, list_inputs, source_kind
from lst.prepare.speech import open_audio
from lst.speech.audio import SAMPLE_RATE, AudioError, sample_range
from lst.speech.units import LogMelKMeans

__all__ = ["CodebookConfig", "fit_codebook"]

DRAWN = 20_000  # utterances at most, of which as many are read as it takes
AT_MOST = 60 * SAMPLE_RATE  # of one utterance, so that no long recording is most of the sample


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(Sources):
    """What to fit to what. The same sources and settings give the same codebook."""

    out: Path  # the file to write, such as data/corpus/codebook.safetensors
    codes: int = 501
    minutes: float = 30.0  # of speech to fit to, drawn from all over the source
    hubert: str | None = None  # fit to a layer of HuBERT at 25 Hz, a folder or a hub name
    layer: int | None = None  # of HuBERT
    device: str = "cpu"  # where HuBERT runs
    seed: int = 0

    def __post_init__(self) -> None:
        if source_kind(self) in ("text", "authors"):
            raise UserError(f"--{source_kind(self)}: expected a source of audio")
        if (self.hubert is None) != (self.layer is None):
            raise UserError(
                f"expected --hubert and --layer together, got {self.hubert} and {self.layer}"
            )
        expect_positive(self, "codes", "minutes")
        expect_option(0 <= self.seed < 2**32, "seed", "0 or more, below 2^32", self.seed)


def fit_codebook(config: CodebookConfig) -> str:
    """Fit a codebook and write it. Audio that cannot be read is passed over.

    Returns:
        A line on what it was fitted to.

    Raises:
        UserError: the file exists; bad sources; less speech than codes; scikit-learn is missing.
    """
    if config.out.exists():
        raise UserError(f"--out {config.out}: exists, and what is made with it depends on it")
    if config.hubert is not None:
        find_device(config.device)  # before the audio is read
    passed_over: list[str] = []
    waveforms = list(_sample(config, passed_over))
    if not waveforms:
        first = passed_over[0] if passed_over else "none in the source"
        raise UserError(f"expected speech to fit speech units to, got none that is fit: {first}")
    if config.hubert is None:
        codebook = LogMelKMeans.fit(waveforms, num_units=config.codes, seed=config.seed)
        save = codebook.save
    else:
        from lst.speech.hubert import HubertKMeans

        assert config.layer is not None
        save = HubertKMeans.fit(
            config.hubert,
            waveforms,
            layer=config.layer,
            num_units=config.codes,
            seed=config.seed,
            device=config.device,
        ).save
    make_folder(config.out.parent)
    with replacing(config.out) as temporary:
        save(temporary)
    minutes = sum(map(len, waveforms)) / SAMPLE_RATE / 60
    line = f"{config.out}: {config.codes} codes, fitted to {minutes:.1f} minutes of speech"
    return line + (f" ({len(passed_over)} files passed over)" if passed_over else "")


def _sample(config: CodebookConfig, passed_over: list[str]) -> Iterator[np.ndarray]:
    rng = random.Random(f"codebook/{config.seed}")
    drawn: list[Utterance] = []
    for number, each in enumerate(list_inputs(config)):
        assert isinstance(each, Utterance)
        if len(drawn) < DRAWN:
            drawn.append(each)
        elif (place := rng.randrange(number + 1)) < DRAWN:
            drawn[place] = each
    rng.shuffle(drawn)
    missing = max(1, int(min(60 * config.minutes * SAMPLE_RATE, 2**62)))
    with tqdm(total=missing // SAMPLE_RATE, desc="codebook", unit="s", disable=None) as bar:
        for utterance in drawn:
            try:
                audio = open_audio(utterance)
                start, stop = sample_range(audio, utterance.start, utterance.duration)
                waveform = audio.read(start, min(stop, start + AT_MOST, start + missing))
            except AudioError as error:
                reason = str(error).removeprefix(f"{utterance.where}: ")
                passed_over.append(f"{utterance.where}: {reason}")
                continue
            yield waveform
            bar.update(len(waveform) // SAMPLE_RATE)
            missing -= len(waveform)
            if missing <= 0:
                break
