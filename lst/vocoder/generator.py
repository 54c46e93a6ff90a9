"""Units to samples: HiFi-GAN's generator over an embedding of the units.

    units (B, F) → embedding, and beside it the speaker's at each frame      (B, 1 or 2 · E, F)
                 → convolution over 7 frames                                 (B, C, F)
                 → for each rate r:  LeakyReLU, transposed convolution × r   (B, C / 2, r F), …
                                     mean of residual blocks of several kernel sizes
                 → LeakyReLU, convolution over 7 samples, tanh               (B, 640 F)

J. Kong, J. Kim and J. Bae, HiFi-GAN, NeurIPS 2020; over units: A. Polyak et al., Speech resynthesis
from discrete disentangled self-supervised representations, Interspeech 2021. Modules are named as
in the checkpoints of CodeHiFiGAN, so that theirs and ours are one format.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lst.vocoder.config import DurationConfig, GeneratorConfig

__all__ = ["Generator", "add_weight_norm", "fold_weight_norm"]

SLOPE = 0.1  # of the LeakyReLUs, but for the last, which has torch's own
LAST_SLOPE = 0.01
INITIAL_STD = 0.01  # of all kernels but the first


class ResBlock(nn.Module):
    """Pairs of convolutions, the first of each dilated, each pair added to its input."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=dilation, padding="same")
            for dilation in dilations
        )
        self.convs2 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, padding="same") for _ in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class DurationPredictor(nn.Module):
    """log(1 + frames) of each unit: two convolutions, each with ReLU, norm and dropout (FastSpeech
    2's variance predictor, Y. Ren et al., ICLR 2021)."""

    def __init__(self, config: DurationConfig) -> None:
        super().__init__()
        hidden, kernel = config.var_pred_hidden_dim, config.var_pred_kernel_size
        self.conv1 = nn.Sequential(
            nn.Conv1d(config.encoder_embed_dim, hidden, kernel, padding="same"), nn.ReLU()
        )
        self.ln1 = nn.LayerNorm(hidden)
        self.conv2 = nn.Sequential(nn.Conv1d(hidden, hidden, kernel, padding="same"), nn.ReLU())
        self.ln2 = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(config.var_pred_dropout)
        self.proj = nn.Linear(hidden, 1)

    def forward(self, embedded: Tensor) -> Tensor:
        """(B, E, F) → (B, F)."""
        x = self.dropout(self.ln1(self.conv1(embedded).transpose(1, 2)))
        x = self.dropout(self.ln2(self.conv2(x.transpose(1, 2)).transpose(1, 2)))
        return self.proj(x).squeeze(2)


class Generator(nn.Module):
    """Without weight norm, which is for training: :func:`add_weight_norm`."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width, kernels = config.embedding_dim, config.resblock_kernel_sizes
        self.dict = nn.Embedding(config.num_embeddings, width)
        if config.num_speakers:
            self.spkr = nn.Embedding(config.num_speakers, width)
        if config.dur_predictor_params is not None:
            self.dur_predictor = DurationPredictor(config.dur_predictor_params)
        channels = config.upsample_initial_channel
        inputs = width * (2 if config.num_speakers else 1)
        self.conv_pre = nn.Conv1d(inputs, channels, 7, padding="same")
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
            channels //= 2
            self.ups.append(
                nn.ConvTranspose1d(
                    2 * channels, channels, kernel, rate, padding=(kernel - rate) // 2
                )
            )
            self.resblocks.extend(
                ResBlock(channels, size, dilations)
                for size, dilations in zip(kernels, config.resblock_dilation_sizes, strict=True)
            )
        self.conv_post = nn.Conv1d(channels, 1, 7, padding="same")
        for module in (*self.ups.modules(), *self.resblocks.modules(), self.conv_post):
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                nn.init.normal_(module.weight, std=INITIAL_STD)

    def forward(self, units: Tensor, speakers: Tensor | None = None) -> Tensor:
        """Units at their full rate to samples.

        Args:
            units: (B, F) int64 in [0, num_embeddings), F > 0.
            speakers: (B,) int64 in [0, num_speakers), where there are any.

        Returns:
            (B, samples_per_unit · F) in (−1, 1).
        """
        x = self.dict(units).transpose(1, 2)
        if self.config.num_speakers:
            assert speakers is not None
            x = torch.cat([x, self.spkr(speakers)[:, :, None].expand_as(x)], dim=1)
        x = self.conv_pre(x)
        blocks = len(self.config.resblock_kernel_sizes)
        for index, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            here = self.resblocks[index * blocks : (index + 1) * blocks]
            x = torch.stack([block(x) for block in here]).mean(0)
        return torch.tanh(self.conv_post(F.leaky_relu(x, LAST_SLOPE))).squeeze(1)

    def log_durations(self, units: Tensor) -> Tensor:
        """Units without repetitions (B, R) → log(1 + frames) of each (B, R)."""
        return self.dur_predictor(self.dict(units).transpose(1, 2))

    def durations(self, units: Tensor) -> Tensor:
        """Units without repetitions (B, R) → whole frames of each (B, R), 1 at least."""
        return torch.expm1(self.log_durations(units)).round().long().clamp(min=1)


def add_weight_norm(generator: Generator) -> Generator:
    """Every convolution's kernel as a direction and a length g · v / |v| (T. Salimans and
    D. P. Kingma, Weight normalization, NeurIPS 2016), but for the duration predictor's."""
    parts = (generator.conv_pre, generator.ups, generator.resblocks, generator.conv_post)
    for part in parts:
        for module in part.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
                weight_norm(module)
    return generator


def fold_weight_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's lengths and directions as plain kernels; what is plain stays as it is.

    Both of torch's spellings are read: ``weight_g`` and ``weight_v``, and those of its
    parametrizations. A length without its direction, or the reverse, is left as it is.
    """
    pairs = (
        (".weight_g", ".weight_v"),
        (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    )
    folded = dict(tensors)
    for length_end, direction_end in pairs:
        for name in tensors:
            stem = name.removesuffix(length_end)
            if stem == name or stem + direction_end not in tensors:
                continue
            length, direction = folded.pop(name), folded.pop(stem + direction_end)
            over = tuple(range(1, direction.ndim))
            norm = direction.norm(dim=over, keepdim=True)
            folded[f"{stem}.weight"] = direction * (length / norm)
    return folded
