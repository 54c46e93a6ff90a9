"""One optimizer step over the micro-batches that the ranks hold together."""

import operator
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lst.data.batch import Batch
from lst.flops import Counts as WorkCounts
from lst.flops import batch_counts
from lst.train.distributed import World
from lst.train.metrics import Counts, Loss
from lst.train.parallel import autocast, reducing


def global_counts(micro_batches: Sequence[Batch], world: World) -> Counts:
    """What the micro-batches of all ranks hold together; asks no GPU."""
    names = (
        "num_targets",
        "num_speech_targets",
        "num_units_to_predict",
        "num_text_tokens",
        "num_speech_tokens",
    )
    ours = [sum(getattr(batch, name) for batch in micro_batches) for name in names]
    work = vars(reduce(operator.add, map(batch_counts, micro_batches)))
    # Whole numbers are exact in float64 up to 2^53.
    totals = world.sum(torch.tensor([*ours, *work.values()], dtype=torch.float64)).tolist()
    targets, speech_targets, units_to_predict, text_tokens, speech_units = map(
        int, totals[: len(ours)]
    )
    return Counts(
        targets=targets,
        speech_targets=speech_targets,
        units_to_predict=units_to_predict,
        text_tokens=text_tokens,
        speech_units=speech_units,
        work=WorkCounts(**dict(zip(work, totals[len(ours) :], strict=True))),
    )


def loss_sums(losses: Tensor, batch: Batch) -> Tensor:
    """(2,) float64: the token losses (T,) of text and of speech targets, added up."""
    losses = losses.detach()
    speech = batch.speech_targets
    return torch.stack(
        [(losses * ~speech).sum(dtype=torch.float64), (losses * speech).sum(dtype=torch.float64)]
    )


def backward(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    *,
    targets: int,
    precision: str,
    world: World,
) -> list[Tensor]:
    """Leave on every rank the gradient of the global batch's loss per target.

    Args:
        targets: of the global batch.

    Returns:
        :func:`loss_sums` of each micro-batch of this rank.
    """
    # Every strategy averages over the ranks; times their number that is their sum.
    scale = world.size / max(1, targets)
    sums = []
    for number, batch in enumerate(micro_batches, start=1):
        with reducing(model, number == len(micro_batches)):
            batch = batch.to(world.device, non_blocking=True)
            with autocast(model, precision, world.device):
                losses = model(batch)
            (losses.sum() * scale).backward()
        sums.append(loss_sums(losses, batch))
    return sums


def rehearse(
    model: nn.Module, micro_batches: Sequence[Batch], *, precision: str, world: World
) -> None:
    """Before the first step under DDP, one backward pass whose gradient is thrown away.

    DistributedDataParallel lays out its buckets anew after its first backward pass, and the
    rounding of sums over three or more ranks depends on where in a bucket a gradient lies. So that
    a resumed run rounds like one that never stopped, both begin with the final layout.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    backward(model, micro_batches[-1:], targets=1, precision=precision, world=world)
    model.zero_grad(set_to_none=True)


def read_step(
    sums: Sequence[Tensor], norm: Tensor, stop: bool, counts: Counts, world: World
) -> tuple[Loss, float, bool]:
    """The one time a step waits for the device.

    Returns:
        The loss of the global batch, the gradient's norm, and whether any rank wants to stop.
    """
    ours = torch.stack(list(sums)).sum(0)
    totals = world.sum(torch.cat([ours, ours.new_tensor([float(stop)])]))
    text, speech, stops, grad_norm = torch.cat([totals, norm.detach().double()[None]]).tolist()
    loss = Loss(
        text=text,
        speech=speech,
        text_targets=counts.targets - counts.speech_targets,
        speech_targets=counts.speech_targets,
        units_to_predict=counts.units_to_predict,
    )
    return loss, grad_norm, stops > 0
