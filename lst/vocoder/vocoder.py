"""A vocoder as a folder: what speaks units.

::

    config.json               sizes, by CodeHiFiGAN's names; our codebook and speakers beside them
    generator.safetensors     the generator's weights, by CodeHiFiGAN's names

A folder of a public checkpoint of CodeHiFiGAN is of this form once its weights, which come as a
pickle, are written as safetensors (:func:`load_vocoder` says how). Kernels may be plain, or lengths
and directions of weight norm, in either spelling of torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lst.errors import UserError
from lst.files import replacing, write_json
from lst.speech.audio import SAMPLE_RATE
from lst.strict_json import read_json, read_strictly
from lst.vocoder.config import DurationConfig, GeneratorConfig
from lst.vocoder.generator import Generator, fold_weight_norm

__all__ = ["CONFIG", "WEIGHTS", "Vocoder", "load_vocoder", "save_vocoder"]

CONFIG, WEIGHTS = "config.json", "generator.safetensors"
CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file({n: t.contiguous() for n, t in '
    "torch.load('%s', map_location='cpu', weights_only=True)['generator'].items()}, '%s')\""
)
#: What other vocoders are told beside units, which this one has no input for.
MORE_INPUTS = ("f0", "embedder_params", "multistyle", "multilingual")


class Vocoder:
    """Speaks units.

    Attributes:
        config: its sizes.
        codebook: the fingerprint of the codebook whose units it speaks; None where it is not known.
        speakers: their names, in the order of the embedding; none where it has one voice.
    """

    def __init__(
        self, generator: Generator, *, codebook: str | None, speakers: Sequence[str]
    ) -> None:
        self.config = generator.config
        self.codebook = codebook
        self.speakers = tuple(speakers)
        self._generator = generator.eval().requires_grad_(False)

    @property
    def num_units(self) -> int:
        return self.config.num_embeddings

    @property
    def samples_per_unit(self) -> int:
        return self.config.samples_per_unit

    def to(self, device: torch.device | str) -> "Vocoder":
        self._generator.to(device)
        return self

    @torch.inference_mode()
    def speak(
        self, units: np.ndarray, *, speaker: str | None = None, predict_durations: bool = False
    ) -> np.ndarray:
        """Units to a waveform, the same one each time.

        Args:
            units: (F,) integers in [0, num_units).
            speaker: one of ``speakers``; None for the first.
            predict_durations: take no heed of how often a unit is repeated; say each as long as
                the duration predictor finds.

        Returns:
            (n,) float32 in [−1, 1] at 16 kHz; n = samples_per_unit · F, but for predicted
            durations.

        Raises:
            UserError: units or a speaker that it does not have; no duration predictor.
        """
        units = np.asarray(units)
        if len(units) and not 0 <= units.min() <= units.max() < self.num_units:
            raise UserError(
                f"expected units in [0, {self.num_units}), got {units.min()} to {units.max()}"
            )
        index = self._speaker(speaker)
        if predict_durations and self.config.dur_predictor_params is None:
            raise UserError("expected a vocoder that predicts durations, got one without")
        if not len(units):
            return np.zeros(0, np.float32)
        device = self._generator.conv_pre.weight.device
        codes = torch.from_numpy(units.astype(np.int64)).to(device)
        if predict_durations:
            codes = torch.unique_consecutive(codes)
            codes = codes.repeat_interleave(self._generator.durations(codes[None])[0])
        speakers = None if index is None else torch.tensor([index], device=device)
        return self._generator(codes[None], speakers)[0].cpu().numpy()

    def _speaker(self, name: str | None) -> int | None:
        if not self.speakers:
            if name is not None:
                raise UserError(f"expected no speaker for a vocoder of one voice, got {name!r}")
            return None
        if name is not None and name not in self.speakers:
            raise UserError(f"expected a speaker of {', '.join(self.speakers)}, got {name!r}")
        return 0 if name is None else self.speakers.index(name)


def save_vocoder(
    folder: Path,
    config: GeneratorConfig,
    weights: Mapping[str, Tensor],
    *,
    codebook: str | None,
    speakers: Sequence[str],
) -> None:
    """Write a folder, or new weights into it; with weight norm or without, they are saved plain."""
    plain = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in fold_weight_norm(dict(weights)).items()
    }
    with replacing(folder / WEIGHTS) as temporary:
        try:
            save_file(plain, temporary)
        except SafetensorError as error:
            raise UserError(f"{folder / WEIGHTS}: cannot be written ({error})") from None
    write_json(
        folder / CONFIG,
        {
            **asdict(config),
            "model_in_dim": config.embedding_dim * (2 if speakers else 1),
            "multispkr": bool(speakers),
            "sampling_rate": SAMPLE_RATE,
            "code_hop_size": config.samples_per_unit,
            "codebook": codebook,
            "speakers": list(speakers),
        },
    )


@dataclass(frozen=True)
class _Names:
    """What ``config.json`` has of ours; None in CodeHiFiGAN's."""

    codebook: str | None
    speakers: list[str] | None


_NAMES = [field.name for field in fields(_Names)]


def load_vocoder(folder: Path | str, *, device: torch.device | str = "cpu") -> Vocoder:
    """Open a folder of ours, or of a checkpoint of CodeHiFiGAN: its config and, as
    ``*.safetensors``, its generator. Speakers without names are called "0", "1", ….

    Raises:
        UserError: something is missing, damaged, not finite, or of another kind of vocoder.
    """
    folder = Path(folder)
    about = _read_config(folder / CONFIG)
    path = _weights_file(folder)
    try:
        tensors = fold_weight_norm(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no vocoder could be read here ({error})") from None
    config = _generator_config(about, tensors, folder / CONFIG)
    names = read_strictly(_Names, {name: about.get(name) for name in _NAMES}, f"{folder / CONFIG}")
    with torch.device("meta"):  # sizes are compared before any memory is asked for
        _expect_tensors(tensors, Generator(config).state_dict(), path)
    generator = Generator(config)
    generator.load_state_dict(tensors)
    speakers = names.speakers or [str(index) for index in range(config.num_speakers)]
    if len(speakers) != config.num_speakers:
        raise UserError(
            f"{folder / CONFIG}: expected the names of {config.num_speakers} speakers, "
            f"got {len(speakers)}"
        )
    vocoder = Vocoder(generator, codebook=names.codebook, speakers=speakers)
    return vocoder.to(device)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: expected the configuration of a vocoder, got none")
    about = read_json(path)
    if not isinstance(about, dict):
        raise UserError(f"{path}: expected an object, got {type(about).__name__}")
    more = [name for name in MORE_INPUTS if about.get(name)]
    if more:
        raise UserError(f"{path}: expected a vocoder of units and speakers, got one of {more[0]}")
    rate = about.get("sampling_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise UserError(f"{path}: expected a vocoder of {SAMPLE_RATE} Hz, got one of {rate}")
    return about


def _weights_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if (folder / WEIGHTS) in found:
        return folder / WEIGHTS
    if not found:
        for path in sorted(folder.iterdir()):
            if path.is_file() and _is_pickle(path):
                command = CONVERT % (path, folder / WEIGHTS)
                raise UserError(
                    f"{path}: a pickle, which is not opened here; convert it: {command}"
                )
    raise UserError(f"{folder}: expected {WEIGHTS}, got {len(found)} files *.safetensors")


def _is_pickle(path: Path) -> bool:
    """Of torch: a zip archive, or the bare pickle of old."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")


def _generator_config(
    about: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> GeneratorConfig:
    names = {field.name for field in fields(GeneratorConfig)}
    given = {name: _tuples(value) for name, value in about.items() if name in names}
    # Public ones have a table of speakers that their config may not give the size of.
    given["num_speakers"] = len(tensors["spkr.weight"]) if "spkr.weight" in tensors else 0
    durations = given.get("dur_predictor_params")
    try:
        if durations:
            given["dur_predictor_params"] = DurationConfig(**durations)
        else:
            given["dur_predictor_params"] = None
        config = GeneratorConfig(**given)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: expected the configuration of a vocoder ({error})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return read_strictly(GeneratorConfig, json.loads(json.dumps(asdict(config))), str(path))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _expect_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> None:
    for name in sorted({*tensors, *expected}):
        if name not in tensors:
            raise UserError(f"{path}: expected {name}, got none")
        if name not in expected:
            raise UserError(f"{path}: expected no {name}, which its configuration has no place for")
        if tensors[name].shape != expected[name].shape:
            raise UserError(
                f"{path}: expected {name} of shape {tuple(expected[name].shape)}, "
                f"got {tuple(tensors[name].shape)}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: expected numbers in {name}, got NaN or infinity")
