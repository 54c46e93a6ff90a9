"""Waveforms and seconds: speech from text, units from speech, and speech from units."""
