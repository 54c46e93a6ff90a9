"""The network of wav2vec 2.0 and HuBERT, from ``transformers``, over waveforms of any length.

    waveform (n,) at 16 kHz → strided convolutions → (F, C), a frame per stride, F = ⌈n / stride⌉
                            → transformer, in windows that overlap → (F, D)

Zeros are put around the waveform so that every begun frame has an output, whose receptive field is
centred on the frame: frame f tells of samples [stride·f, stride·(f+1)).

What is the same as one pass over the whole waveform, but for rounding:

- the convolutions, at any length. The group norm of the models that have one averages over the
  whole utterance; its mean and variance are found beforehand, piece by piece.
- the transformer, up to one window: 60 s, where nothing else is asked for (HuBERT's units ask for
  620). A longer waveform is cut into windows, of which all but 10 s at either end are kept, so that
  every frame sees 10 s on either side (or the waveform's end). Attention reaches further than that,
  so no window can be exact; where the layers reach less far, as in layer 0, it is. Windows depend
  on the waveform alone: the same one gives the same frames.

Memory is linear in the window. The time of attention is quadratic in it.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lst.errors import UserError, brief
from lst.speech.audio import SAMPLE_RATE

__all__ = ["FrameModel", "load_pretrained"]

PIECE_SECONDS = 10  # that the convolutions see at once: 64 MB for each output of the first
WINDOW_SECONDS = 60
CONTEXT_SECONDS = 10
BATCH_SECONDS = 120  # that the transformer sees at once


def load_pretrained(name: str, kind: str, class_name: str) -> tuple[Any, bool]:
    """A model of ``transformers``, all of whose weights were found, and whether it normalises.

    Args:
        name: a local folder or a name on the hub.
        kind: the ``model_type`` that its config must have.
        class_name: of ``transformers``.

    Returns:
        The model in float32, in evaluation; and ``do_normalize`` of its
        ``preprocessor_config.json`` or ``processor_config.json``, False where it has neither.

    Raises:
        UserError: transformers is not installed; no model there, or another one.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{kind} models need transformers, which is not installed: pip install 'lst[speech]'"
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type != kind:
            raise UserError(f"{name}: expected a {kind} model, got {config.model_type!r}")
        model, report = getattr(transformers, class_name).from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # of transformers, and of whatever it reads a file by
        raise UserError(f"{name}: no {kind} model could be read here ({brief(error)})") from None
    # The mask that pretraining puts over frames is no part of what is computed here.
    absent = sorted(key for key in report["missing_keys"] if not key.endswith("masked_spec_embed"))
    if absent:
        raise UserError(
            f"{name}: expected all weights of {class_name}, got none for {absent[0]} "
            f"({len(absent)} in all)"
        )
    return model.eval(), _normalizes(name)


def _normalizes(name: str) -> bool:
    from transformers import Wav2Vec2FeatureExtractor
    from transformers.utils import cached_file

    try:
        files = [
            cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            for file in ("preprocessor_config.json", "processor_config.json")
        ]
        if not any(files):
            return False
        return bool(Wav2Vec2FeatureExtractor.from_pretrained(name).do_normalize)
    except Exception as error:  # not there, or not to be had at present, are two things
        why = brief(error)
        raise UserError(f"{name}: no preprocessor_config.json could be read ({why})") from None


class _Window(NamedTuple):
    """Frames [start, stop) of an utterance, of which [first, last) are kept."""

    utterance: int
    start: int
    stop: int
    first: int
    last: int


class FrameModel(nn.Module):
    """Waveforms to one state a frame.

    Args:
        base: a ``HubertModel`` or ``Wav2Vec2Model``. It is taken over, and loses the layers that
            are not asked for.
        layer: whose output is returned, 0 for the transformer's input; before the norm that
            follows the last layer in the larger models. None for the model's own output.
        normalize: whether each waveform is brought to mean 0 and variance 1 first.
        window_seconds: that the transformer sees in one pass.

    Attributes:
        stride: samples in a frame.
        width: D, the size of a state.
    """

    def __init__(
        self,
        base: Any,
        *,
        layer: int | None,
        normalize: bool,
        window_seconds: int = WINDOW_SECONDS,
    ) -> None:
        super().__init__()
        config = base.config
        self.stride = math.prod(config.conv_stride)
        self.width = config.hidden_size
        self.normalize = normalize
        self.window_seconds = window_seconds
        self._receptive = 1 + sum(
            (kernel - 1) * math.prod(config.conv_stride[:index])
            for index, kernel in enumerate(config.conv_kernel)
        )
        self._convolutions: Any = base.feature_extractor.conv_layers
        self._projection: Any = base.feature_projection
        self._encoder: Any = base.encoder
        if layer is not None:
            self._encoder.layers = self._encoder.layers[:layer]
            if config.do_stable_layer_norm:  # elsewhere this norm comes before the first layer
                self._encoder.layer_norm = nn.Identity()
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that the states depend on."""
        content = hashlib.sha256(
            f"{self.stride} {self.normalize} {self.window_seconds} {CONTEXT_SECONDS} ".encode()
        )
        for name, tensor in sorted(self.state_dict().items()):
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()

    @torch.inference_mode()
    def states(self, waveforms: Sequence[np.ndarray]) -> list[Tensor]:
        """(n,) float at 16 kHz each, n > 0 → (F, D) float32 each, F = ⌈n / stride⌉."""
        frames = [self._project(self._convolve(waveform)) for waveform in waveforms]
        states: list[Tensor | None] = [None] * len(frames)
        per_second = SAMPLE_RATE / self.stride
        windows = [
            window
            for utterance, each in enumerate(frames)
            for window in _windows(utterance, len(each), self.window_seconds, per_second)
        ]
        # Neighbours of like length are seen together.
        windows.sort(key=lambda window: window.stop - window.start)
        for batch in _batches(windows, round(BATCH_SECONDS * per_second)):
            outputs = self._transform(
                [frames[window.utterance][window.start : window.stop] for window in batch]
            )
            for window, output in zip(batch, outputs, strict=True):
                kept = output[window.first - window.start : window.last - window.start]
                whole = states[window.utterance]
                if whole is None:
                    whole = kept.new_empty(len(frames[window.utterance]), kept.shape[1])
                    states[window.utterance] = whole
                whole[window.first : window.last] = kept
        return [state for state in states if state is not None]

    def _convolve(self, waveform: np.ndarray) -> Tensor:
        """(n,) → (F, C)."""
        if waveform.ndim != 1 or not len(waveform):
            raise ValueError(f"waveform has shape {waveform.shape}, expected (n,) with n > 0")
        samples = torch.from_numpy(np.array(waveform, np.float32)).to(self.device)
        if self.normalize:
            samples = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
        num_frames = -(-len(samples) // self.stride)
        overhang = self._receptive - self.stride
        padded = samples.new_zeros(num_frames * self.stride + overhang)
        padded[overhang // 2 : overhang // 2 + len(samples)] = samples
        first = self._convolutions[0]
        norm = getattr(first, "layer_norm", None)
        statistics = None
        if isinstance(norm, nn.GroupNorm):
            statistics = self._mean_and_variance(padded)
        pieces = []
        step = PIECE_SECONDS * SAMPLE_RATE // self.stride
        for begin in range(0, num_frames, step):
            end = min(begin + step, num_frames)
            x = padded[None, None, begin * self.stride : end * self.stride + overhang]
            if statistics is None:
                x = first(x)
            else:
                assert norm is not None
                x = nn.functional.batch_norm(
                    first.conv(x), *statistics, norm.weight, norm.bias, eps=norm.eps
                )
                x = first.activation(x)
            for convolution in self._convolutions[1:]:
                x = convolution(x)
            pieces.append(x[0].T)
        return torch.cat(pieces)

    def _mean_and_variance(self, padded: Tensor) -> tuple[Tensor, Tensor]:
        """Of each channel of the first convolution, over the whole utterance."""
        conv = self._convolutions[0].conv
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        num_outputs = (len(padded) - kernel) // stride + 1
        step = PIECE_SECONDS * SAMPLE_RATE // stride
        total = torch.zeros(conv.out_channels, dtype=torch.float64, device=padded.device)
        squares = torch.zeros_like(total)
        for begin in range(0, num_outputs, step):
            end = min(begin + step, num_outputs)
            x = conv(padded[None, None, begin * stride : (end - 1) * stride + kernel])[0].double()
            total += x.sum(1)
            squares += x.square().sum(1)
        mean = total / num_outputs
        variance = (squares / num_outputs - mean.square()).clamp(min=0)
        return mean.float(), variance.float()

    def _project(self, frames: Tensor) -> Tensor:
        projected = self._projection(frames[None])
        # Wav2vec 2.0 also returns the frames as they are before the projection.
        return (projected[0] if isinstance(projected, tuple) else projected)[0]

    def _transform(self, windows: list[Tensor]) -> list[Tensor]:
        lengths = [len(window) for window in windows]
        padded = nn.utils.rnn.pad_sequence(windows, batch_first=True)
        mask = None
        if min(lengths) < max(lengths):
            ends = torch.tensor(lengths, device=padded.device)
            mask = torch.arange(max(lengths), device=padded.device) < ends[:, None]
        outputs = self._encoder(padded, attention_mask=mask).last_hidden_state
        return [output[:length] for output, length in zip(outputs, lengths, strict=True)]


def _windows(
    utterance: int, num_frames: int, seconds: int, frames_per_second: float
) -> Iterator[_Window]:
    size = round(seconds * frames_per_second)
    context = round(CONTEXT_SECONDS * frames_per_second)
    if num_frames <= size:
        yield _Window(utterance, 0, num_frames, 0, num_frames)
        return
    kept = size - 2 * context
    for first, last in pairwise([*range(0, num_frames, kept), num_frames]):
        start, stop = max(0, first - context), min(num_frames, last + context)
        yield _Window(utterance, start, stop, first, last)


def _batches(windows: Sequence[_Window], max_frames: int) -> Iterator[list[_Window]]:
    """Windows, shortest first, in batches of at most ``max_frames`` with their padding."""
    batch: list[_Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * (window.stop - window.start) > max_frames:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
