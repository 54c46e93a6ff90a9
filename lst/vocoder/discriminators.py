"""What tells speech from what a generator says: HiFi-GAN's two kinds of discriminators.

    by period p:  samples (B, n) → (B, 1, n / p, p), convolved along the p columns apart
    by scale:     samples (B, n), or their averages at half the rate, convolved with wide kernels

Each returns the outputs of all its layers; the last of them are its verdicts, near 1 for speech.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lst.vocoder.config import DiscriminatorConfig
from lst.vocoder.generator import SLOPE

__all__ = ["Discriminators"]


class PeriodDiscriminator(nn.Module):
    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, max(1, channels // 32), channels // 8, channels // 2, channels]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, (5, 1), (3, 1), padding=(2, 0)))
            for before, after in pairwise(widths)
        )
        self.convs.append(weight_norm(nn.Conv2d(channels, channels, (5, 1), padding=(2, 0))))
        self.conv_post = weight_norm(nn.Conv2d(channels, 1, (3, 1), padding=(1, 0)))

    def forward(self, samples: Tensor) -> list[Tensor]:
        missing = -samples.shape[1] % self.period
        x = F.pad(samples[:, None], (0, missing), mode="reflect")
        x = x.unflatten(2, (-1, self.period))
        outputs = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            outputs.append(x)
        return [*outputs, self.conv_post(x)]


class ScaleDiscriminator(nn.Module):
    """Of samples averaged over ``2 ** halvings``."""

    def __init__(self, halvings: int, channels: int) -> None:
        super().__init__()
        self.halvings = halvings
        # The published one has spectral norm where nothing is averaged, weight norm elsewhere.
        norm = weight_norm if halvings else spectral_norm
        eighth, quarter, half = channels // 8, channels // 4, channels // 2
        groups = max(1, channels // 64)
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(before, after, kernel, stride, padding=kernel // 2, groups=split))
            for before, after, kernel, stride, split in (
                (1, eighth, 15, 1, 1),
                (eighth, eighth, 41, 2, max(1, groups // 4)),
                (eighth, quarter, 41, 2, groups),
                (quarter, half, 41, 4, groups),
                (half, channels, 41, 4, groups),
                (channels, channels, 41, 1, groups),
                (channels, channels, 5, 1, 1),
            )
        )
        self.conv_post = norm(nn.Conv1d(channels, 1, 3, padding=1))

    def forward(self, samples: Tensor) -> list[Tensor]:
        x = samples[:, None]
        for _ in range(self.halvings):
            x = F.avg_pool1d(x, 4, 2, padding=2)
        outputs = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            outputs.append(x)
        return [*outputs, self.conv_post(x)]


class Discriminators(nn.Module):
    """All of them: samples (B, n) → each one's outputs by layer, the last its verdicts."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.each = nn.ModuleList(
            [PeriodDiscriminator(period, config.channels) for period in config.periods]
            + [ScaleDiscriminator(scale, config.channels) for scale in range(config.num_scales)]
        )

    def forward(self, samples: Tensor) -> list[list[Tensor]]:
        return [discriminator(samples) for discriminator in self.each]
