"""The losses of HiFi-GAN (section 2.4 of its paper), of samples x and generated x̂:

discriminators   Σ_D  mean (D(x) − 1)² + mean D(x̂)²
generator        Σ_D  mean (D(x̂) − 1)²  +  2 Σ_D Σ_layers mean |D_l(x) − D_l(x̂)|
                 +  45 mean |mel(x) − mel(x̂)|
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lst.speech.audio import SAMPLE_RATE

__all__ = [
    "FEATURE_WEIGHT",
    "MEL_WEIGHT",
    "adversarial_loss",
    "discriminator_loss",
    "feature_loss",
    "log_mel_spectrogram",
]

FEATURE_WEIGHT, MEL_WEIGHT = 2.0, 45.0
WINDOW, HOP, NUM_MELS = 1024, 256, 80
FLOOR = 1e-5  # of a mel band's magnitude


def discriminator_loss(real: list[list[Tensor]], made: list[list[Tensor]]) -> Tensor:
    return torch.stack(
        [
            (speech[-1] - 1).square().mean() + said[-1].square().mean()
            for speech, said in zip(real, made, strict=True)
        ]
    ).sum()


def adversarial_loss(made: list[list[Tensor]]) -> Tensor:
    return torch.stack([(said[-1] - 1).square().mean() for said in made]).sum()


def feature_loss(real: list[list[Tensor]], made: list[list[Tensor]]) -> Tensor:
    return torch.stack(
        [
            F.l1_loss(output, layer)
            for speech, said in zip(real, made, strict=True)
            for layer, output in zip(speech[:-1], said[:-1], strict=True)
        ]
    ).sum()


def log_mel_spectrogram(samples: Tensor) -> Tensor:
    """(B, n) at 16 kHz, n > 384 → (B, 80, n / 256): natural logs of magnitudes in mel bands.

    Hann windows of 1024 samples every 256, reflected at the ends; bands up to 8 kHz.
    """
    beside = (WINDOW - HOP) // 2
    padded = F.pad(samples[:, None], (beside, beside), mode="reflect")[:, 0]
    window = torch.hann_window(WINDOW, device=samples.device)
    spectra = torch.stft(padded, WINDOW, HOP, window=window, center=False, return_complex=True)
    magnitudes = (spectra.real.square() + spectra.imag.square() + 1e-9).sqrt()
    return (_bands().to(samples.device) @ magnitudes).clamp(min=FLOOR).log()


@cache
def _bands() -> Tensor:
    """(80, 513): triangles on the mel scale m = 2595 log10(1 + f / 700), each of area 2 / width in
    Hz, so that noise of one level is of one level in all bands."""
    top = 2595.0 * torch.log10(torch.tensor(1.0 + SAMPLE_RATE / 2 / 700.0, dtype=torch.float64))
    edges = 700.0 * (10.0 ** (torch.linspace(0, 1, NUM_MELS + 2).double() * top / 2595.0) - 1.0)
    bins = torch.arange(WINDOW // 2 + 1).double() * SAMPLE_RATE / WINDOW
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = torch.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    return (triangles.clamp(min=0) * 2 / (high - low)).float()
