"""Training a unit HiFi-GAN on recordings.

    recordings → units (by the codebook) ┐
               → stretches of samples    ┴→ discriminators' step → generator's step → …

The folder of a run, which is the vocoder's folder too, from its first checkpoint on::

    config.json  generator.safetensors      the vocoder, as it was last saved (vocoder.py)
    training.json                           what is run
    clips.jsonl  clips.safetensors          what it learns from (clips.py)
    metrics.jsonl                           losses
    checkpoints/step-00001000/              the last two, to go on from
    samples/original.wav  00001000.wav      a held-out recording, as it is and from its units

A step depends on the weights, the settings and its own number alone, so that a run that was stopped
and goes on ends with the same bits as one that was not.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lst.data.records import FRAMES_PER_SECOND
from lst.errors import UserError, brief, expect_not_negative, expect_positive, expect_text
from lst.files import fsync, make_folder, write_json, writing
from lst.machine import find_device
from lst.prepare.sources import Sources, list_inputs, source_kind
from lst.speech.audio import write_wav
from lst.speech.units import UnitEncoder, UnitsConfig, load_units
from lst.strict_json import read_json, read_strictly
from lst.train.distributed import World
from lst.train.interrupt import catch_signals
from lst.train.manifest import faults, file_names, hash_files, write_manifest
from lst.train.metrics import drop_lines_after
from lst.train.run_folder import RunLock
from lst.vocoder.clips import (
    LIST,
    UNITS,
    Clip,
    Stretches,
    draw,
    make_clips,
    read_clips,
    samples_of,
    write_clips,
)
from lst.vocoder.config import SIZES
from lst.vocoder.discriminators import Discriminators
from lst.vocoder.generator import Generator, add_weight_norm
from lst.vocoder.losses import (
    FEATURE_WEIGHT,
    MEL_WEIGHT,
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    log_mel_spectrogram,
)
from lst.vocoder.vocoder import load_vocoder, save_vocoder

__all__ = ["TrainVocoderConfig", "train_vocoder"]

SETTINGS, METRICS, CHECKPOINTS, SAMPLES = "training.json", "metrics.jsonl", "checkpoints", "samples"
BETAS = (0.8, 0.99)  # of AdamW, as published
KEPT = 2  # checkpoints
HELD_OUT_UNITS = 250  # of each held-out recording, 10 s: what is heard and measured
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class TrainVocoderConfig(Sources):
    """What to train on what. The same command goes on with a run that was stopped."""

    out: Path  # the folder of the run and the vocoder
    codebook: Path  # of the units, as for python -m lst.prepare corpus
    hubert: str | None = None  # HuBERT that the codebook is of: a folder or a hub name
    layer: int | None = None  # of HuBERT
    allow_pickle: bool = False  # read a codebook of joblib, which runs the code in it
    device: str = "cpu"  # where it trains, and HuBERT runs
    size: str = "hifigan"  # or tiny, which learns on a CPU
    by_speaker: bool = False  # learn each speaker's voice; the recordings must name theirs
    predict_durations: bool = False  # learn how long units last, too
    steps: int = 400_000
    batch: int = 16  # stretches
    stretch_units: int = 14  # each: 0.56 s
    learning_rate: float = 2e-4
    half_life: int = 500_000  # steps in which the learning rate halves
    alone_steps: int = 0  # first steps that the generator takes without discriminators: cheaper
    held_out: int = 8  # recordings that are not learnt from, to hear and to measure
    report_every: int = 100  # steps
    save_every: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        if source_kind(self) in ("text", "authors"):
            raise UserError(f"--{source_kind(self)}: expected a source of audio")
        if self.size not in SIZES:
            raise UserError(f"--size: expected one of {', '.join(SIZES)}, got {self.size!r}")
        positive = (
            "steps", "batch", "stretch_units", "learning_rate", "half_life", "held_out",
            "report_every", "save_every",
        )  # fmt: skip
        expect_positive(self, *positive)
        expect_not_negative(self, "alone_steps", "seed")
        expect_text(self, "out")
        _ = self.units  # checks that its options go together

    @property
    def units(self) -> UnitsConfig:
        return UnitsConfig(
            codebook=self.codebook,
            hubert=self.hubert,
            layer=self.layer,
            allow_pickle=self.allow_pickle,
            device=self.device,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the weights after a step depend on, or what would be another corpus."""
        settings = {
            name: [str(each) for each in value] if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        for name in ("out", "device", "allow_pickle", "steps", "report_every", "save_every"):
            del settings[name]
        return json.loads(json.dumps(settings, default=str))


def train_vocoder(config: TrainVocoderConfig) -> str:
    """Train until ``config.steps``, or until Ctrl-C or SIGTERM; what is learnt is saved first.

    Returns:
        A line on how it ended.

    Raises:
        UserError: bad options or sources, or no such device; a folder that holds something else;
            damaged files.
    """
    find_device(config.device)
    encoder = load_units(config.units)
    lock = RunLock()
    _claim(config)
    lock.take(config.out)
    try:
        run = _Run.of(config, encoder)
        with catch_signals() as interrupt, ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(run.draw, run.step + 1)
            while run.step < config.steps and not interrupt:
                stretches = upcoming.result()
                upcoming = reader.submit(run.draw, run.step + 2)
                run.advance(stretches)
                if run.step % config.report_every == 0:
                    run.report()
                if run.step % config.save_every == 0:
                    run.save()
            upcoming.cancel()
            run.report()
            run.save()
    finally:
        lock.release()
    if run.step < config.steps:
        return f"{interrupt.signal}: stopped after step {run.step}; the same command goes on"
    return f"{config.out}: a vocoder of {config.size} size, trained for {run.step} steps"


def _claim(config: TrainVocoderConfig) -> None:
    """Check that the folder is for these settings; one without clips is not yet for any."""
    path = config.out / SETTINGS
    settings = config.settings
    if not (path.is_file() and (config.out / LIST).is_file()):
        with writing(config.out):
            begun = {".lock", SETTINGS, UNITS}
            if config.out.is_dir() and any(each.name not in begun for each in config.out.iterdir()):
                raise UserError(
                    f"--out {config.out}: expected an empty or absent folder, got files"
                )
        next(iter(list_inputs(config)), None)  # told before the folder is made that it is none
        make_folder(config.out)
        write_json(path, settings)
        return
    before = read_json(path)
    if not isinstance(before, dict) or before.keys() != settings.keys():
        raise UserError(f"{path}: expected the settings of a run, {', '.join(settings)}")
    changed = [name for name in settings if before[name] != settings[name]]
    if changed:
        differences = ", ".join(f"{name} {before[name]}, not {settings[name]}" for name in changed)
        raise UserError(f"--out {config.out}: holds a run of {differences}; choose another --out")


@dataclass(frozen=True)
class _State:
    """What ``state.json`` says."""

    step: int
    seconds: float


class _Run:
    """A run at a step."""

    def __init__(
        self,
        config: TrainVocoderConfig,
        *,
        clips: Sequence[Clip],
        held_out: Sequence[Clip],
        speakers: Sequence[str],
        encoder: UnitEncoder,
    ) -> None:
        self.config, self.step, self.seconds = config, 0, 0.0
        self._clips, self._held_out = clips, held_out
        self._speakers, self._codebook = speakers, encoder.fingerprint
        size = SIZES[config.size]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            generator = Generator(
                size.generator(
                    num_units=encoder.num_units,
                    num_speakers=len(speakers),
                    predict_durations=config.predict_durations,
                )
            )
            embed_by_sound(generator, encoder)
            self.generator = add_weight_norm(generator).to(config.device)
            self.discriminators = Discriminators(size.discriminator).to(config.device)
        self.modules = {"generator": self.generator, "discriminators": self.discriminators}
        self._optimizers = {
            name: torch.optim.AdamW(module.parameters(), config.learning_rate, betas=BETAS)
            for name, module in self.modules.items()
        }
        self._recent: list[dict[str, float]] = []
        self._began = time.monotonic()

    @classmethod
    def of(cls, config: TrainVocoderConfig, encoder: UnitEncoder) -> "_Run":
        """From the last checkpoint, or from the start."""
        known = read_clips(config.out)
        clips = _make_clips(config, encoder) if known is None else known
        speakers = _speakers(config, clips)
        if known is None:
            write_clips(config.out, clips)
        held_out, learnt = _share(config, clips)
        run = cls(config, clips=learnt, held_out=held_out, speakers=speakers, encoder=encoder)
        if folder := _last_checkpoint(config.out):
            run.load(folder)
        (config.out / METRICS).touch()
        drop_lines_after(config.out / METRICS, run.step)
        minutes = sum(len(clip.units) for clip in learnt) / FRAMES_PER_SECOND / 60
        print(f"{len(learnt)} recordings, {minutes:.1f} minutes; from step {run.step}", flush=True)
        return run

    def draw(self, step: int) -> Stretches:
        return draw(
            self._clips,
            self._speakers,
            batch=self.config.batch,
            num_units=self.config.stretch_units,
            seed=self.config.seed,
            step=step,
        )

    # A step ----------------------------------------------------------------------------------

    def advance(self, stretches: Stretches) -> None:
        """One step of the discriminators, if they take part yet, and one of the generator."""
        self.step += 1
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate * 0.5 ** (self.step / self.config.half_life)
        units = torch.from_numpy(stretches.units).to(self.config.device)
        real = torch.from_numpy(stretches.samples).to(self.config.device)
        speakers = torch.from_numpy(stretches.speakers).to(self.config.device)
        with _seeded(self.config.seed, self.step, self.config.device):  # of dropout
            made = self.generator(units, speakers)
            losses = {}
            judged = self.step > self.config.alone_steps
            if judged:
                loss = discriminator_loss(
                    self.discriminators(real), self.discriminators(made.detach())
                )
                self._update("discriminators", loss)
                losses["discriminators"] = loss
            mel = F.l1_loss(log_mel_spectrogram(made), log_mel_spectrogram(real))
            losses["mel"] = mel
            total = MEL_WEIGHT * mel
            if judged:
                with torch.no_grad():
                    on_real = self.discriminators(real)
                self.discriminators.requires_grad_(False)
                on_made = self.discriminators(made)
                self.discriminators.requires_grad_(True)
                losses["adversarial"] = adversarial_loss(on_made)
                losses["features"] = feature_loss(on_real, on_made)
                total = total + losses["adversarial"] + FEATURE_WEIGHT * losses["features"]
            if self.config.predict_durations:
                losses["durations"] = duration_loss(self.generator, units)
                total = total + losses["durations"]
            self._update("generator", total)
        values = {name: float(loss.detach()) for name, loss in losses.items()}
        if not np.isfinite(list(values.values())).all():
            raise UserError(
                f"{self.config.out}: losses {values} at step {self.step}; go on from the last "
                "checkpoint in another folder with a lower --learning-rate"
            )
        self._recent.append(values)

    def _update(self, name: str, loss: Tensor) -> None:
        self._optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        self._optimizers[name].step()

    # Telling ---------------------------------------------------------------------------------

    def report(self) -> None:
        """Means since the last report, if there are any, to the terminal and to metrics.jsonl."""
        if not self._recent:
            return
        means = {
            name: float(np.mean([each[name] for each in self._recent if name in each]))
            for name in self._recent[-1]
        }
        self._write({"split": "train", **means})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"step {self.step:7,}  {shown}  {self._elapsed():,.0f} s", flush=True)
        self._recent.clear()

    def _write(self, values: Mapping[str, Any]) -> None:
        with writing(self.config.out / METRICS), (self.config.out / METRICS).open("a") as file:
            file.write(json.dumps({"step": self.step, **values, "seconds": self._elapsed()}) + "\n")

    def _elapsed(self) -> float:
        return round(self.seconds + time.monotonic() - self._began, 2)

    def _validate(self) -> None:
        """The mel loss of the held-out recordings, and the first of them to listen to."""
        vocoder = load_vocoder(self.config.out, device=self.config.device)
        samples = self.config.out / SAMPLES
        with writing(samples):
            samples.mkdir(exist_ok=True)
        losses = []
        for clip in self._held_out:
            units = clip.units[:HELD_OUT_UNITS]
            speaker = clip.utterance.speaker if self._speakers else None
            made = vocoder.speak(units, speaker=speaker)
            real = samples_of(clip, 0, len(units))
            both = log_mel_spectrogram(torch.from_numpy(np.stack([made, real])))
            losses.append(float(F.l1_loss(both[0], both[1])))
            if clip is self._held_out[0]:
                write_wav(samples / f"{self.step:08d}.wav", made)
                write_wav(samples / "original.wav", real)
        self._write({"split": "held out", "mel": float(np.mean(losses))})
        print(f"step {self.step:7,}  held out: mel {np.mean(losses):.3f}", flush=True)

    # Checkpoints -----------------------------------------------------------------------------

    def save(self) -> None:
        """The vocoder and a checkpoint, each whole or not at all, unless this step has one."""
        folder = self.config.out / CHECKPOINTS / f"step-{self.step:08d}"
        if folder.is_dir():
            return
        save_vocoder(
            self.config.out,
            self.generator.config,
            self.generator.state_dict(),
            codebook=self._codebook,
            speakers=self._speakers,
        )
        self._validate()
        temporary = folder.with_name(f".{folder.name}.tmp")
        with writing(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        try:
            for name, tensors in self._tensors().items():
                save_file(tensors, temporary / f"{name}.safetensors")
        except SafetensorError as error:
            raise UserError(f"{temporary}: cannot be written ({error})") from None
        write_json(temporary / "state.json", asdict(_State(self.step, self._elapsed())))
        write_manifest(temporary, hash_files(temporary, file_names(temporary), ALONE))
        with writing(folder):
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
            temporary.rename(folder)
            fsync(folder.parent)
            for old in _checkpoints(self.config.out)[:-KEPT]:
                shutil.rmtree(old)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file: weights and buffers of each module, and AdamW's state by parameter."""
        files = {}
        for name, module in self.modules.items():
            files[name] = {key: value.contiguous() for key, value in module.state_dict().items()}
            files[f"{name}-optimizer"] = {
                f"{index}.{key}": value
                for index, state in self._optimizers[name].state_dict()["state"].items()
                for key, value in state.items()
            }
        return files

    def load(self, folder: Path) -> None:
        """Raises UserError where it is damaged or of other sizes."""
        if damage := faults(folder, ALONE):
            raise UserError(f"{folder}: damaged ({damage[0]}); remove it to go on from another")
        path = folder / "state.json"
        state = read_strictly(_State, read_json(path), str(path))
        self.step, self.seconds = state.step, state.seconds
        self._began = time.monotonic()
        for name, module in self.modules.items():
            try:
                module.load_state_dict(load_file(folder / f"{name}.safetensors"))
                self._load_optimizer(name, load_file(folder / f"{name}-optimizer.safetensors"))
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"{folder}: {name}: does not fit the run's settings and clips ({brief(error)})"
                ) from None

    def _load_optimizer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        values = self._optimizers[name].state_dict()
        for key, value in tensors.items():
            index, what = key.split(".")
            values["state"].setdefault(int(index), {})[what] = value
        self._optimizers[name].load_state_dict(values)


def embed_by_sound(generator: Generator, encoder: UnitEncoder) -> None:
    """Start from embeddings that are alike where units sound alike: a random projection of the
    codebook's centroids. What is learnt of one unit is then learnt of its neighbours."""
    centroids = torch.as_tensor(encoder.centroids).cpu().float()
    spread = (centroids - centroids.mean(0)) / centroids.std(0, correction=0).clamp(min=1e-6)
    width = generator.config.embedding_dim
    with torch.no_grad():
        generator.dict.weight.copy_(spread @ torch.randn(spread.shape[1], width))
        generator.dict.weight.div_(generator.dict.weight.std(correction=0).clamp(min=1e-6))


def duration_loss(generator: Generator, units: Tensor) -> Tensor:
    """Mean square error of log(1 + frames) over units whose begin and end are both in (B, S)."""
    errors = []
    for row in units:
        runs, lengths = torch.unique_consecutive(row, return_counts=True)
        found = generator.log_durations(runs[None])[0]
        errors.append((found - lengths.log1p())[1:-1].square())
    every = torch.cat(errors)
    return every.sum() / max(1, len(every))


@contextmanager
def _seeded(seed: int, step: int, device: str) -> Iterator[None]:
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.default_rng([seed, step, 1]).integers(2**63)))
        yield


def _make_clips(config: TrainVocoderConfig, encoder: UnitEncoder) -> list[Clip]:
    """Encode every recording. Raises UserError where none is left to learn from."""
    clips, passed_over = make_clips(config, encoder)
    if passed_over:
        print(f"{len(passed_over)} recordings passed over; the first: {passed_over[0]}", flush=True)
    long_enough = [clip for clip in clips if len(clip.units) >= config.stretch_units]
    if len(long_enough) <= config.held_out:
        raise UserError(
            f"expected more than the {config.held_out} recordings that are held out, of at least "
            f"{config.stretch_units} units each, got {len(long_enough)}"
        )
    return clips


def _share(
    config: TrainVocoderConfig, clips: Sequence[Clip]
) -> tuple[Sequence[Clip], Sequence[Clip]]:
    """(held out, learnt from), among those that are long enough for a stretch."""
    long_enough = [clip for clip in clips if len(clip.units) >= config.stretch_units]
    order = np.random.default_rng(config.seed).permutation(len(long_enough))
    shuffled = [long_enough[index] for index in order]
    return shuffled[: config.held_out], shuffled[config.held_out :]


def _speakers(config: TrainVocoderConfig, clips: Sequence[Clip]) -> list[str]:
    if not config.by_speaker:
        return []
    for clip in clips:
        if clip.utterance.speaker is None:
            raise UserError(f"--by-speaker: {clip.utterance.where}: expected a speaker, got none")
    return sorted({clip.utterance.speaker or "" for clip in clips})


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / CHECKPOINTS).glob("step-*"))


def _last_checkpoint(out: Path) -> Path | None:
    found = _checkpoints(out)
    return found[-1] if found else None
