"""Units of HuBERT: the nearest k-means centroid of a layer's output, 25 times a second.

    waveform (n,) → HuBERT's layer L (F, D) → nearest of (num_units, D) centroids → units (F,)

The paper's units are 501 codes at 25 Hz. Models of another rate are refused rather than resampled:
a unit that skips every second frame of a 50 Hz model is not a unit of what was published for it.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lst.data.records import FRAMES_PER_SECOND
from lst.data.shards import MAX_UNITS
from lst.errors import UserError, brief
from lst.machine import find_device
from lst.speech.audio import SAMPLE_RATE
from lst.speech.units import CONTEXT, STRETCH, in_stretches
from lst.speech.wav2vec2 import FrameModel, load_pretrained

__all__ = ["HubertKMeans", "read_centroids"]

ONE_PASS_SECONDS = (STRETCH + 2 * CONTEXT) // SAMPLE_RATE


class HubertKMeans:
    """A :class:`lst.speech.units.UnitEncoder` of a HuBERT model and a k-means file.

    Up to ten minutes a waveform is one pass of the model; a longer one is cut into passes of that
    length, which overlap, as :func:`lst.speech.units.in_stretches` says.

    Attributes:
        centroids: (num_units, D) float32.
    """

    frame_rate = FRAMES_PER_SECOND

    def __init__(self, model: FrameModel, centroids: Tensor, layer: int) -> None:
        self.centroids = centroids
        self._model = model
        content = hashlib.sha256(f"hubert k-means 1, layer {layer} {model.digest()} ".encode())
        content.update(centroids.cpu().contiguous().numpy().tobytes())
        self.fingerprint = f"sha256:{content.hexdigest()}"

    @classmethod
    def load(
        cls,
        name: str,
        codebook: Path | str,
        *,
        layer: int,
        allow_pickle: bool = False,
        device: str = "cpu",
    ) -> Self:
        """Open a model and its centroids.

        Args:
            name: a local folder or a name on the hub.
            codebook: see :func:`read_centroids`, which also explains ``allow_pickle``.
            layer: whose output the centroids are of: 0 for the transformer's input, 1 for its
                first layer, and so on. It is taken before the norm that follows the last layer
                of the larger models.

        Raises:
            UserError: a model that is not HuBERT, or not at 25 Hz, or has no such layer; centroids
                of another size; files that cannot be read; no such device; transformers is not
                installed.
        """
        place = find_device(device)
        model = _open(name, layer).to(place)
        centroids = read_centroids(codebook, allow_pickle=allow_pickle)
        if centroids.shape[1] != model.width:
            raise UserError(
                f"{codebook}: expected centroids of {model.width} numbers, as the layers of {name} "
                f"have, got {centroids.shape[1]}"
            )
        return cls(model, torch.from_numpy(centroids).to(place), layer)

    @classmethod
    def fit(
        cls,
        name: str,
        waveforms: Iterable[np.ndarray],
        *,
        layer: int,
        num_units: int = 501,
        seed: int = 0,
        device: str = "cpu",
    ) -> Self:
        """Fit centroids to a layer's output, which is kept in memory: 280 MB an hour for base.

        Args:
            name: a local folder or a name on the hub.
            waveforms: (n,) each, 16 kHz, of several voices.
            layer: as for :meth:`load`.
            num_units: number of centroids.
            seed: of the first centroids and the batches.

        Raises:
            UserError: as for :meth:`load`; fewer frames than centroids; no scikit-learn here.
        """
        try:
            from sklearn.cluster import MiniBatchKMeans
        except ImportError:
            raise UserError(
                "fitting speech units needs scikit-learn, which is not installed: "
                "pip install 'lst[speech]'"
            ) from None
        place = find_device(device)
        model = _open(name, layer).to(place)
        states = [model.states([waveform])[0].cpu().numpy() for waveform in waveforms]
        frames = np.concatenate(states) if states else np.zeros((0, model.width), np.float32)
        if len(frames) < num_units:
            raise UserError(
                f"expected at least {num_units} frames to fit {num_units} speech units, "
                f"got {len(frames)}"
            )
        kmeans = MiniBatchKMeans(num_units, random_state=seed, n_init=1, batch_size=4096)
        centroids = kmeans.fit(frames).cluster_centers_.astype(np.float32)
        return cls(model, torch.from_numpy(centroids).to(place), layer)

    def save(self, path: Path | str) -> None:
        """Write the centroids as a ``.safetensors`` file; the model is not in it."""
        from safetensors.numpy import save

        Path(path).write_bytes(save({"centroids": self.centroids.cpu().numpy()}))

    @property
    def num_units(self) -> int:
        return len(self.centroids)

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        """(n,) float at 16 kHz → (F,) int16 in [0, num_units), F = ⌈n / 640⌉."""
        return in_stretches(
            lambda part: _nearest(self._model.states([part])[0], self.centroids),
            lambda start, stop: waveform[start:stop],
            len(waveform),
        )


def _open(name: str, layer: int) -> FrameModel:
    base, normalize = load_pretrained(name, "hubert", "HubertModel")
    if not 0 <= layer <= base.config.num_hidden_layers:
        raise UserError(
            f"{name}: expected a layer of 0 to {base.config.num_hidden_layers}, got {layer}"
        )
    model = FrameModel(base, layer=layer, normalize=normalize, window_seconds=ONE_PASS_SECONDS)
    if model.stride * FRAMES_PER_SECOND != SAMPLE_RATE:
        raise UserError(
            f"{name}: expected {FRAMES_PER_SECOND} frames a second, "
            f"got {SAMPLE_RATE / max(1, model.stride):g} (a stride of {model.stride} samples)"
        )
    return model


def _nearest(states: Tensor, centroids: Tensor) -> np.ndarray:
    """(F, D) → (F,) int16; of equally near centroids the first."""
    # argmin |x − c|² = argmin |c|² − 2 x·c, in float64: the squares cancel almost wholly.
    columns = centroids.double().T
    distances = columns.square().sum(0) - 2 * states.double() @ columns
    return distances.argmin(1).to(torch.int16).cpu().numpy()


def read_centroids(path: Path | str, *, allow_pickle: bool = False) -> np.ndarray:
    """Read the centroids of a k-means.

    A ``.safetensors`` or ``.npz`` file holds them as ``centroids``, or as the only array in it.
    Any other file is taken for what joblib wrote of scikit-learn's k-means. Reading that
    runs whatever code is in it, so it is read only with ``allow_pickle``, for files that you trust.

    Returns:
        (num_units, D) float32.

    Raises:
        UserError: a file that cannot be read, is not of that kind, or needs ``allow_pickle``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: expected a k-means file, got none")
    if path.suffix == ".safetensors":
        arrays = _read_safetensors(path)
    elif path.suffix == ".npz":
        arrays = _read_npz(path)
    elif allow_pickle:
        arrays = {"centroids": _unpickle(path)}
    else:
        raise UserError(
            f"{path}: expected a .safetensors or .npz file; reading any other runs the code in it, "
            "and needs --allow-pickle"
        )
    if "centroids" not in arrays and len(arrays) != 1:
        raise UserError(f"{path}: expected an array 'centroids', got {sorted(arrays)}")
    centroids = arrays["centroids"] if "centroids" in arrays else next(iter(arrays.values()))
    if centroids.ndim != 2 or not 0 < len(centroids) <= MAX_UNITS:
        raise UserError(
            f"{path}: expected centroids of shape (1 to {MAX_UNITS}, D), got {centroids.shape}"
        )
    if not np.issubdtype(centroids.dtype, np.floating) or not np.isfinite(centroids).all():
        raise UserError(f"{path}: expected finite floating-point centroids, got {centroids.dtype}")
    return centroids.astype(np.float32)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no safetensors file could be read here ({error})") from None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # NumPy's own, and those of zip files and what packs them
        raise UserError(f"{path}: no npz file could be read here ({brief(error)})") from None


def _unpickle(path: Path) -> np.ndarray:
    try:
        import joblib  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(
            f"{path} needs joblib, which is not installed: pip install 'lst[speech]'"
        ) from None
    try:
        kmeans = joblib.load(path)
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"{path}: no joblib file could be read here ({error!r})") from None
    if not hasattr(kmeans, "cluster_centers_"):
        raise UserError(f"{path}: expected a fitted k-means, got {type(kmeans).__name__}")
    return np.asarray(kmeans.cluster_centers_)
