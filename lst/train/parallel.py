"""How the processes of a run share the model; the recipe, in order.

======== ============================================ ============================================
strategy each process holds                           and between processes travel
======== ============================================ ============================================
(one)    everything                                   nothing
ddp      everything                                   gradients, once a step (``DDP``)
fsdp     1 / processes of every weight                weights block by block, in each pass;
                                                      gradients, once a step (``fully_shard``)
hsdp     replicas / processes of every weight         the same, weights within a replica alone
======== ============================================ ============================================

Weights, AdamW's moments and the sums of gradients are float32 always. With ``precision="bfloat16"``
one process and DDP multiply in bfloat16 by autocast; FSDP gathers the weights as bfloat16, so that
half the bytes travel. Either way the residual stream is bfloat16, and norms are taken, positions
turned and losses computed in float32: ``RMSNorm`` (but its result), ``rotate`` and ``row_losses``
raise their input to it. So strategies agree to the rounding of bfloat16, and in float32 to that of
a sum's order.

What the blocks themselves do, compiled or checkpointed, is arranged first (blocks.py).
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lst.errors import UserError
from lst.model import LanguageModel
from lst.model.layers import truncated_normal
from lst.train.blocks import blocks, prepare_blocks
from lst.train.config import ParallelConfig, TrainConfig
from lst.train.distributed import SharedError, World, processes_of_a_machine

# DDP below: its weights, gradients and moments are 16 bytes a parameter, so at most 16 GB on every
# GPU, which even a small one has; and nothing but gradients travels.
DDP_PARAMETERS = 10**9


def parallelise(model: LanguageModel, config: TrainConfig, world: World) -> nn.Module:
    """Bring ``model`` to the device, shared as ``config.parallel`` says; every rank calls it.

    A model on the meta device gets memory for the rank's own part alone, which
    :func:`initialise_weights` or a checkpoint must fill then.

    Returns:
        The module for forward and backward passes. Under FSDP it is ``model`` itself, which has
        DTensors for parameters then. The names of ``model``'s parameters never change.

    Raises:
        SharedError: replicas that do not divide the processes.
        SharedError: the device cannot run the blocks as the configuration says.
    """
    prepare_blocks(model, config, world.device)
    strategy = choose_strategy(config.parallel, num_parameters(model), world.size)
    if strategy in ("fsdp", "hsdp"):
        _shard(model, config, make_mesh(strategy, config.parallel, world))
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=world.device)
        model.tie()
    model.to(world.device)
    if strategy == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def choose_strategy(config: ParallelConfig, parameters: int, processes: int) -> str:
    """``"none"``, ``"ddp"``, ``"fsdp"`` or ``"hsdp"``.

    One process shares with nobody, so a run may go on with a single one whatever it was started as.
    """
    if processes == 1:
        return "none"
    if config.strategy != "auto":
        return config.strategy
    return "ddp" if parameters < DDP_PARAMETERS else "fsdp"


def make_mesh(strategy: str, config: ParallelConfig, world: World) -> DeviceMesh:
    """The ranks in a row, or in one row a replica."""
    device = world.device.type
    if strategy == "fsdp":
        return init_device_mesh(device, (world.size,), mesh_dim_names=("shard",))
    replicas = num_replicas(config, world.size)
    shape = (replicas, world.size // replicas)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def num_replicas(config: ParallelConfig, processes: int) -> int:
    """Groups of processes that each hold the whole model under ``hsdp``.

    Raises:
        SharedError: they do not divide the processes.
    """
    replicas = config.replicas or max(1, processes // processes_of_a_machine())
    if processes % replicas:
        raise SharedError(
            f"--parallel.replicas: expected a number that divides the {processes} processes, "
            f"got {replicas}"
        )
    return replicas


def _shard(model: nn.Module, config: TrainConfig, mesh: DeviceMesh) -> None:
    """Each block is gathered when it runs and let go after it; the rest stays from then on."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if config.precision == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the stream has that dtype already; rotations stay float32
    )
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # Embedding, head and what stands between the stacks. The backward pass begins with the head.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _sharded(model):
        module.set_force_sum_reduction_for_comms(True)  # gloo has no average; the result is one


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


# Weights ------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise_weights(model: LanguageModel, seed: int) -> None:
    """The first weights, the same bit for bit whatever the processes, strategy and device.

    Every rank draws every matrix whole on the CPU, one at a time, and keeps its part; so the host
    needs memory for one matrix.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(weight: Tensor, deviation: float) -> None:
        whole = torch.empty(weight.shape, dtype=weight.dtype)
        truncated_normal(whole, deviation, generator)
        _fill(weight, whole)

    model.initialise(draw)


def fill_weights(model: LanguageModel, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give some weights, by their names, whole values that every rank has read.

    Raises:
        UserError: a value of another shape.
    """
    ours = model.weights()
    for name, whole in weights:
        if whole.shape != ours[name].shape:
            raise UserError(
                f"{name}: expected shape {tuple(ours[name].shape)}, got {tuple(whole.shape)}"
            )
        _fill(ours[name], whole)


def _fill(weight: Tensor, whole: Tensor) -> None:
    if isinstance(weight, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    weight.copy_(whole)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """In the block every rank holds the whole model, in the precision of its products.

    So a forward pass is no collective there: ranks may make different numbers of them. Every rank
    must enter.
    """
    for module in _sharded(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in _sharded(model):
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


# Steps --------------------------------------------------------------------------------------------


def autocast(
    model: nn.Module, precision: str, device: torch.device
) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 where ``precision`` says so, of weights that are float32."""
    if precision == "float32" or isinstance(model, FSDPModule):  # FSDP's weights are what they are
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def reducing(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Gradients travel once a step, with the last micro-batch; until then they add up in float32.

    Under FSDP the sums of a step with several micro-batches are of whole gradients, 4 bytes a
    parameter on every rank.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradient down to a global norm of ``largest``; the norm before, a scalar."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
