"""How the blocks of a model compute: in float8, checkpointed, compiled; the recipe, in order.

All of it happens in place, before weights are shared among processes, and renames no weight:

1. **float8** puts torchao's ``Float8Linear`` in the place of the global transformer's linears: both
   factors of each product are scaled, tensor by tensor, into eight bits. Weights, stream, norms,
   attention and all local modules stay as they were.
2. **checkpointing** keeps less for the backward pass and computes it again there. "selective" does
   so for the feed-forward branch of every layer, whose wide product is about half of what a layer
   keeps; attention and its projections are kept. "full" keeps the input of every block and
   nothing else.
3. **compile** makes one graph of every kind of block (``fullgraph``), for any number of tokens,
   patches and documents (``dynamic``), and of what stands between blocks. Layers of the same shape
   share their code, so that 25 of them compile once. Attention is an operator in the graph.
   Inductor fuses norms, rotations, SwiGLU, casts and residual sums around the matrix products.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes
from torch.utils.checkpoint import checkpoint

from lst.model import LanguageModel
from lst.model.layers import Layer
from lst.model.patch_encoder import PatchEncoder
from lst.train.config import Checkpointing, TrainConfig
from lst.train.distributed import SharedError

FLOAT8_CAPABILITY = (8, 9)  # of the first GPUs that multiply in eight bits
FLOAT8_MULTIPLE = 16  # of rows and columns, for those products

# How many graphs there may be of one block's code: one for each stack's shape, with and without
# gradients, in and out of autocast, and for numbers of 0 and 1. More than PyTorch's default of 8.
GRAPHS = 64


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of every stack, in the order of the forward pass."""
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [block for stack in stacks for block in stack]


def prepare_blocks(model: LanguageModel, config: TrainConfig, device: torch.device) -> None:
    """Make the blocks of ``model`` compute on ``device`` as ``config`` says.

    Raises:
        SharedError: the device, or what is installed, cannot.
    """
    if config.float8:
        check_float8(config, device)
        use_float8(model)
    checkpoint_blocks(model, config.checkpointing)
    if config.compile:
        check_compiler(device)
        compile_blocks(model)


# float8 -------------------------------------------------------------------------------------------


def check_float8(config: TrainConfig, device: torch.device) -> None:
    """Raise SharedError where products in eight bits are not possible."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise SharedError(
            "--float8: expected a GPU of compute capability 8.9 or more (H100, L40S, …), "
            f"got {name}"
        )
    if config.data.units_per_sequence % FLOAT8_MULTIPLE:
        raise SharedError(
            f"--data.units-per-sequence: expected a multiple of {FLOAT8_MULTIPLE} with --float8, "
            f"got {config.data.units_per_sequence}"
        )


def use_float8(model: LanguageModel, *, emulate: bool = False) -> None:
    """Multiply in float8 in the global transformer, with scales that follow each tensor.

    Args:
        emulate: round to eight bits, but multiply in float32, which any device can.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise SharedError("--float8 needs torchao: pip install 'lst[float8]'") from None
    convert_to_float8_training(
        model.get_submodule("global_transformer"),
        module_filter_fn=_fits_float8,
        config=Float8LinearConfig(emulate=emulate),
    )


def _fits_float8(module: nn.Module, name: str) -> bool:
    sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (1,)
    return all(size % FLOAT8_MULTIPLE == 0 for size in sizes)


# Checkpointing ------------------------------------------------------------------------------------


def checkpoint_blocks(model: nn.Module, how: Checkpointing) -> None:
    """Compute again in the backward pass what ``how`` says is not kept."""
    if how == "selective":
        for layer in (module for module in model.modules() if isinstance(module, Layer)):
            layer.feed = checkpointed(layer.feed)  # type: ignore[method-assign]
    elif how == "full":
        for block in blocks(model):
            block.forward = checkpointed(block.forward)


def checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    def again(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        # There is no dropout, so no random state to keep.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return again


# Compilation --------------------------------------------------------------------------------------


def check_compiler(device: torch.device) -> None:
    """Raise SharedError where Inductor has no compiler to hand its code to."""
    names = (os.environ.get("CXX") or "c++", "g++", "clang++")
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            raise SharedError(
                "--compile: expected Triton, which comes with PyTorch for GPUs on Linux, got none; "
                "train without by --no-compile"
            ) from None
        names = (os.environ.get("CC") or "cc", "gcc", "clang")  # for Triton's launchers
    if not any(map(shutil.which, names)):
        raise SharedError(
            f"--compile: expected a compiler ({', '.join(names)}) on the PATH, got none; "
            "train without by --no-compile"
        )


def compile_blocks(model: LanguageModel, backend: str = "inductor") -> None:
    """Compile every block, the encoder's way from tokens to patches, and the loss."""
    torch._dynamo.config.recompile_limit = GRAPHS
    # Two numbers that are equal in the first batch need not be in the next.
    shapes.use_duck_shape = False

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    for block in blocks(model):
        # Not the module: hooks, by which FSDP gathers and lets go of weights, run outside.
        block.forward = compiled(block.forward)
    for encoder in (module for module in model.modules() if isinstance(module, PatchEncoder)):
        encoder.patches = compiled(encoder.patches)  # type: ignore[method-assign]
    row_losses = compiled(model.row_losses)

    def piece_losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        # Pieces are views of one tensor, which compiled code would tell from each other.
        return row_losses(x.clone(), weight, targets.clone())

    model.row_losses = piece_losses  # type: ignore[method-assign]
