"""A unit HiFi-GAN: speech units to a waveform, learnt from recordings."""

from lst.vocoder.vocoder import Vocoder, load_vocoder

__all__ = ["Vocoder", "load_vocoder"]
