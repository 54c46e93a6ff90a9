"""Steps that went wrong, by their numbers alone: a loss that is not finite, or that jumps.

Every rank reads the same loss of the global batch, so every rank comes to the same answer and none
has to ask the others, or the device, first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from lst.data.batch import Batch
from lst.train.distributed import World
from lst.train.metrics import Loss

WINDOW = 32  # steps that a loss is compared with: few, as a loss that falls is soon another
ENOUGH = 20  # of them, before any comparison
DEVIATIONS = 8.0  # standard deviations that make a spike
LEAST = 0.1  # and this part of the median: a loss that hardly varies has a tiny deviation
SIGMA = 1.4826  # standard deviations of a normal distribution to its median absolute deviation


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A step whose loss stands out."""

    modality: str  # "text" or "speech"
    loss: float
    usual: float  # the median of the steps before

    def __str__(self) -> str:
        return f"the {self.modality} loss jumped from about {self.usual:.4f} to {self.loss:.4f}"


Recent = dict[str, list[float]]  # losses of the last steps, by modality


def find_spike(recent: Recent, loss: Loss) -> tuple[Spike | None, Recent]:
    """What stands out in a step's loss, if anything, and the ``recent`` losses with this one.

    Text and speech apart, as the share of speech in a batch moves their common mean.
    """
    found, means, after = None, loss.per_token(), dict(recent)
    for modality in ("text", "speech"):
        mean, before = means[f"loss_{modality}"], recent.get(modality, [])
        if mean is None:
            continue
        usual = stands_out(mean, before)
        if usual is not None:
            found = Spike(modality=modality, loss=mean, usual=usual)
        after[modality] = [*before, mean][-WINDOW:]
    return found, after


def stands_out(loss: float, before: Sequence[float]) -> float | None:
    """The median of the losses ``before`` where ``loss`` is far above them, else None.

    Median and median absolute deviation, unlike mean and standard deviation, are not moved by the
    spikes themselves.
    """
    if len(before) < ENOUGH:
        return None
    middle = median(before)
    deviation = SIGMA * median(abs(value - middle) for value in before)
    return middle if loss - middle > max(DEVIATIONS * deviation, LEAST * middle) else None


def is_finite(loss: Loss, grad_norm: float) -> bool:
    return math.isfinite(loss.text + loss.speech + grad_norm)


def global_records(
    micro_batches: Sequence[Batch], sums: Sequence[Tensor], loss: Loss, world: World
) -> list[str]:
    """Ids of the records of the global batch; where its loss is not finite, those at fault alone.

    Waits for the device and the other ranks; every rank must call it.

    Args:
        sums: what :func:`lst.train.step.backward` returned for ``micro_batches``.
    """
    whole = math.isfinite(loss.text + loss.speech)
    ours = [
        name
        for batch, part in zip(micro_batches, sums, strict=True)
        if whole or not part.isfinite().all()
        for name in batch.record_ids
    ]
    return list(dict.fromkeys(name for part in world.gather(ours) for name in part))
