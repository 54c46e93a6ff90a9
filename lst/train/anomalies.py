"""Steps that went wrong, by their numbers alone: a loss that is not finite, or that jumps.

Every rank reads the same loss of the global batch, so every rank comes to the same answer and none
has to ask the others, or the device, first.
"""

import math
from collections import deque
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


class Spikes:
    """Compares each step's loss with those of the last steps, text and speech apart.

    Apart, as the share of speech in a batch moves their common mean. A resumed run starts anew.
    """

    def __init__(self) -> None:
        self._windows = {"text": LossWindow(), "speech": LossWindow()}

    def find(self, loss: Loss) -> Spike | None:
        """Take note of a step's loss; what stands out in it, if anything."""
        found = None
        means = loss.per_token()
        for modality, window in self._windows.items():
            mean = means[f"loss_{modality}"]
            usual = None if mean is None else window.add(mean)
            if mean is not None and usual is not None:
                found = Spike(modality=modality, loss=mean, usual=usual)
        return found


class LossWindow:
    """The losses of the last steps of one kind."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float) -> float | None:
        """Take note of a loss; the median of those before it where it stands out, else None.

        Median and median absolute deviation, unlike mean and standard deviation, are not moved by
        the spikes themselves.
        """
        before = list(self._losses)
        self._losses.append(loss)
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
