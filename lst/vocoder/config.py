"""Sizes of a unit HiFi-GAN, by the names that CodeHiFiGAN's ``config.json`` has for them."""

import math
from dataclasses import dataclass

from lst.errors import UserError
from lst.speech.units import FRAME_SAMPLES

__all__ = ["SIZES", "DiscriminatorConfig", "DurationConfig", "GeneratorConfig", "SizeConfig"]

LARGEST = 2**20  # no size is larger: a number beyond is damage, which would fill the memory


@dataclass(frozen=True, kw_only=True)
class DurationConfig:
    """The predictor of how many frames a unit lasts (``dur_predictor_params``)."""

    encoder_embed_dim: int = 128  # that of the unit embedding
    var_pred_hidden_dim: int = 128
    var_pred_kernel_size: int = 3
    var_pred_dropout: float = 0.5

    def __post_init__(self) -> None:
        sizes = (self.encoder_embed_dim, self.var_pred_hidden_dim, self.var_pred_kernel_size)
        if not 1 <= min(sizes) <= max(sizes) <= LARGEST or not 0 <= self.var_pred_dropout <= 1:
            raise UserError(
                f"dur_predictor_params: expected sizes of 1 to {LARGEST:,} and a share of dropout, "
                f"got {self}"
            )


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """Units to samples."""

    num_embeddings: int  # units
    num_speakers: int = 0  # 0: one voice, without an embedding
    embedding_dim: int = 128
    upsample_initial_channel: int = 512  # halved by each upsampling
    upsample_rates: tuple[int, ...] = (8, 5, 4, 2, 2)  # their product: samples a unit
    upsample_kernel_sizes: tuple[int, ...] = (16, 11, 8, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    dur_predictor_params: DurationConfig | None = None

    def __post_init__(self) -> None:
        numbers = (
            self.num_embeddings,
            self.embedding_dim,
            self.upsample_initial_channel,
            *self.upsample_rates,
            *self.upsample_kernel_sizes,
            *self.resblock_kernel_sizes,
            *(each for dilations in self.resblock_dilation_sizes for each in dilations),
        )
        if not self.upsample_rates or not 1 <= min(numbers) <= max(numbers) <= LARGEST:
            raise UserError(f"expected sizes of 1 to {LARGEST:,}, got {self}")
        pairs = tuple(zip(self.upsample_rates, self.upsample_kernel_sizes, strict=False))
        if len(self.upsample_rates) != len(self.upsample_kernel_sizes) or any(
            kernel < rate or (kernel - rate) % 2 for rate, kernel in pairs
        ):
            raise UserError(
                "expected for each of upsample_rates a kernel size as large and as even or odd, "
                f"got {self.upsample_rates} and {self.upsample_kernel_sizes}"
            )
        if len(self.resblock_kernel_sizes) != len(self.resblock_dilation_sizes) or not all(
            kernel % 2 for kernel in self.resblock_kernel_sizes
        ):
            raise UserError(
                "expected odd resblock_kernel_sizes and dilations for each, got "
                f"{self.resblock_kernel_sizes} and {self.resblock_dilation_sizes}"
            )
        if self.upsample_initial_channel % 2 ** len(self.upsample_rates):
            raise UserError(
                f"upsample_initial_channel: expected a number that can be halved "
                f"{len(self.upsample_rates)} times, got {self.upsample_initial_channel}"
            )
        durations = self.dur_predictor_params
        if durations is not None and durations.encoder_embed_dim != self.embedding_dim:
            raise UserError(
                f"dur_predictor_params: expected encoder_embed_dim {self.embedding_dim}, "
                f"the embedding_dim, got {durations.encoder_embed_dim}"
            )

    @property
    def samples_per_unit(self) -> int:
        return math.prod(self.upsample_rates)


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """What tells speech from what the generator says, in training only."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)  # samples
    num_scales: int = 3  # each at half the rate of the one before
    channels: int = 1024  # of the widest layers


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """A size by its name: what does not depend on the corpus."""

    embedding_dim: int = 128
    upsample_initial_channel: int = 512
    upsample_rates: tuple[int, ...] = (8, 5, 4, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (16, 11, 8, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def generator(
        self, *, num_units: int, num_speakers: int, predict_durations: bool
    ) -> GeneratorConfig:
        return GeneratorConfig(
            num_embeddings=num_units,
            num_speakers=num_speakers,
            embedding_dim=self.embedding_dim,
            upsample_initial_channel=self.upsample_initial_channel,
            upsample_rates=self.upsample_rates,
            upsample_kernel_sizes=self.upsample_kernel_sizes,
            resblock_kernel_sizes=self.resblock_kernel_sizes,
            resblock_dilation_sizes=self.resblock_dilation_sizes,
            dur_predictor_params=DurationConfig(
                encoder_embed_dim=self.embedding_dim, var_pred_hidden_dim=self.embedding_dim
            )
            if predict_durations
            else None,
        )


#: ``hifigan``: as published (V1), for 25 units a second. ``tiny``: learns on a CPU, in minutes.
SIZES = {
    "hifigan": SizeConfig(),
    "tiny": SizeConfig(
        embedding_dim=64,
        upsample_initial_channel=128,
        upsample_rates=(10, 8, 8),
        upsample_kernel_sizes=(20, 16, 16),
        resblock_kernel_sizes=(3, 7),
        resblock_dilation_sizes=((1, 3), (1, 3)),
        discriminator=DiscriminatorConfig(periods=(2, 5), num_scales=1, channels=64),
    ),
}
for _size in SIZES.values():
    assert math.prod(_size.upsample_rates) == FRAME_SAMPLES
