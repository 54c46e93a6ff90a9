"""Model FLOPs utilisation: how much of what the GPUs could multiply the model has needed.

::

    MFU   = FLOPs of a step / (seconds of the step × GPUs × peak of one GPU)
    FLOPs = 3 (training) × 2 × multiply-adds of every matrix product and of every attention score
            that is needed (see lst.flops)

The halves of scores that causality and windows leave out, what is computed twice to save memory
and padding are not counted, so numbers of trainers that count them are higher for the same speed.
"""

from dataclasses import dataclass

import torch

FORMULA = (
    "MFU = FLOPs of a step / (its seconds × {gpus} × {peak}); FLOPs = 3 (training) × 2 × "
    "multiply-adds of every matrix product and of the attention scores that are needed"
)

# TFLOP/s in bfloat16, without sparsity, of the makers' data sheets. The first name that is part of
# the device's own counts.
PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,  # SXM
    "A100": 312.0,
    "L40S": 362.05,
    "A40": 149.7,
    "A10G": 70.0,
    "MI300X": 1307.4,
    "MI250X": 383.0,
}


@dataclass(frozen=True)
class Peak:
    """What one device can do, and who says so."""

    tflops: float
    source: str

    def __str__(self) -> str:
        return f"{self.tflops:g} TFLOP/s, {self.source}"


def find_peak(device: torch.device, peak_tflops: float | None) -> Peak | None:
    """The peak of ``device``: ``peak_tflops`` where it is given, or by its name; None: unknown."""
    if peak_tflops is not None:
        return Peak(peak_tflops, "by --peak-tflops")
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (Peak(tflops, f"{name}, dense bfloat16") for part, tflops in PEAKS.items() if part in name),
        None,
    )


def describe(peak: Peak | None, device: torch.device, world_size: int) -> str:
    """The line that a run opens with, so that its MFU can be told from another's."""
    if peak is None:
        return (
            f"MFU is not reported: the peak FLOP/s of this {device.type} is unknown "
            "(--peak-tflops gives it)"
        )
    return FORMULA.format(gpus=world_size, peak=peak)
