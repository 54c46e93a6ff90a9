"""``python -m lst.train PRESET --dry-run``: what a run would take, without data, model or GPU.

Everything is arithmetic on the configuration and on a model of the meta device, whose weights have
shapes and no memory. Memory per GPU, with W GPUs in R replicas (each holds a 1 / (W / R) of every
weight under FSDP, everything otherwise), is what PyTorch would allocate at the height of a step:

========================= =======================================================================
weights, gradients        float32, of a GPU's own part: 4 bytes a parameter each
AdamW's moments           the same: 8 bytes
copies                    one process and DDP: bfloat16 of what is multiplied, 2 bytes. FSDP, with
                          e bytes a number: e of the root (embeddings, heads, what stands between
                          the stacks) and of two blocks; and on the way, gradients: e of the root,
                          e + 4 of a block or, at the end, of the root
sums of micro-batches     FSDP with several of them: 4 bytes of every parameter of the whole model
activations (an estimate) what the backward pass reads again, see below
logits (an estimate)      of some rows at a time (0.5 GiB of float32): (12 + 2 e) V bytes a row
========================= =======================================================================

Activations of a row of the residual stream, d wide, s bytes a number (e in training)::

    a layer    2 s d                    its two norms' inputs
               e (2 d + q + 2 d + d)    their outputs; queries, keys, values (q); rotated; attended
               4 e f                    SwiGLU, f wide: gate and up, silu(gate), product
    decoder    s d + 3 e d              cross-attention's norm, its output, query, attended
    patches    (s + e) d + 2 e d        of the encoder's tokens: norm; keys and values
               e d + (s + 3 e) S d      of its patches: pooled; slots, their norm, query, attended
               (s + e) S d + 2 L e d S  of the decoder's: norm; keys and values of L layers
    a head     (s + e) d                norm

Checkpointing leaves out, and holds of one block at a time, "selective": e d + 4 e f of a layer;
"full": all of a block but its input, s d. Compiled blocks keep less than eager ones, of which the
formula is: norms' outputs and SwiGLU's product are computed again where they are read.

What CUDA, NCCL and the allocator keep for themselves (1 to 3 GB) is not in it.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import ceil, prod

import torch
from torch import nn

from lst.data.loader import expect_patching
from lst.data.records import FRAMES_PER_SECOND
from lst.errors import UserError
from lst.flops import (
    DEMO_CORPUS,
    DEMO_VOCABULARY,
    PAPER_VOCABULARY,
    Counts,
    Mix,
    expected_counts,
    training_flops,
)
from lst.model import LanguageModel, build_model, count_parameters
from lst.model.cross_entropy import piece_rows
from lst.model.global_transformer import GlobalTransformer
from lst.model.layers import Layer
from lst.model.patch_decoder import DecoderLayer, PatchDecoder
from lst.model.patch_encoder import PatchEncoder
from lst.train.blocks import blocks
from lst.train.config import Checkpointing, ParallelConfig, TrainConfig
from lst.train.distributed import launched_processes
from lst.train.parallel import choose_strategy, num_parameters, num_replicas
from lst.vocabulary import Vocabulary

SHARDED = ("fsdp", "hsdp")


def dry_run(config: TrainConfig, gpus: int | None = None) -> str:
    """What the command prints.

    Args:
        gpus: how many processes share the run; None: as many as torchrun has started.

    Raises:
        UserError: rows that do not divide, or patches that the model cannot read, as of training;
            replicas that only torchrun, which knows the machines, could tell.
    """
    if gpus is not None and config.parallel == ParallelConfig(strategy="hsdp"):
        raise UserError(
            "--parallel.replicas: expected a number, as --gpus says nothing of machines"
        )
    gpus = gpus or launched_processes()
    if config.data.rows % (gpus * config.accumulation):
        raise UserError(
            f"data: expected rows that divide by {gpus} processes × {config.accumulation} "
            f"micro-batches, got {config.data.rows}"
        )
    expect_patching(config.data.patching, config.model.plan())
    vocabulary = DEMO_VOCABULARY if config.data.corpus == DEMO_CORPUS else PAPER_VOCABULARY
    with torch.device("meta"):
        model = build_model(config.model, vocabulary)
    strategy = choose_strategy(config.parallel, num_parameters(model), gpus)
    mix = Mix(patch_size=config.data.patching.size)
    if config.data.task is not None:  # its documents all have speech
        mix = replace(mix, text=0.0)
    replicas = num_replicas(config.parallel, gpus) if strategy == "hsdp" else 1
    shared = {"none": "", "hsdp": f", hsdp of {replicas} replicas"}.get(strategy, f", {strategy}")
    sections = (
        [f"{config.name} on {gpus} GPU{'s' * (gpus > 1)}{shared}, {config.precision} products"],
        _parameters(model),
        _compute(config, vocabulary, mix),
        _memory(config, model, mix, gpus, gpus // replicas if strategy in SHARDED else None),
        _batch(config, mix, gpus),
    )
    return "\n\n".join("\n".join(section) for section in sections)


def _parameters(model: LanguageModel) -> Iterator[str]:
    yield "parameters"
    for part, number in count_parameters(model).items():
        yield _row(part.replace("_", " "), f"{number:,}")


def _compute(config: TrainConfig, vocabulary: Vocabulary, mix: Mix) -> Iterator[str]:
    counts = expected_counts(config.model, mix)
    flops = training_flops(config.model, vocabulary, counts)
    units = config.data.rows * config.data.units_per_sequence
    a_unit = sum(flops.values()) / counts.units
    yield "compute: FLOPs = 3 (training) × 2 × multiply-adds of products and of needed scores"
    for part, value in flops.items():
        yield _row(part.replace("_", " "), f"{value / counts.units / 1e6:,.1f} MFLOPs a unit")
    yield _row("total", f"{a_unit / 1e6:,.1f} MFLOPs a unit")
    yield _row("a step", f"{a_unit * units / 1e15:,.3f} PFLOPs")
    yield _row("the run", f"{a_unit * units * config.steps / 1e18:,.3f} EFLOPs")


# Memory -------------------------------------------------------------------------------------------


def _memory(
    config: TrainConfig, model: LanguageModel, mix: Mix, gpus: int, shards: int | None
) -> Iterator[str]:
    sharded = shards is not None
    product = 2 if config.precision == "bfloat16" else 4
    own = own_parameters(model, shards or 1)
    rows = expected_rows(config, mix) * (1 / (gpus * config.accumulation))
    lines = {
        "weights": 4 * own,
        "gradients": 4 * own,
        "AdamW's moments": 8 * own,
        "copies": _gathered(model, product) if sharded else _cast(model, product),
        "sums of micro-batches": (
            4 * num_parameters(model) if sharded and config.accumulation > 1 else 0
        ),
        "activations (estimate)": activation_bytes(
            model, rows, stream=product, product=product, how=config.checkpointing
        ),
        "logits (estimate)": _logits(model, rows, product),
    }
    yield f"memory of a GPU, which holds 1 / {shards or 1} of the weights"
    for name, size in (lines | {"total": sum(lines.values())}).items():
        yield _row(name, f"{size / 1e9:,.3f} GB")
    yield "  without CUDA, NCCL and what the allocator keeps; estimates: see lst/train/dry_run.py"


def own_parameters(model: nn.Module, shards: int) -> int:
    """Of the GPU that holds most: FSDP cuts every weight along its first dimension."""
    shapes = [parameter.shape for parameter in model.parameters()]
    return sum(ceil(shape[0] / shards) * prod(shape[1:]) for shape in shapes)


def _gathered(model: nn.Module, product: int) -> int:
    sizes = [num_parameters(block) for block in blocks(model)]
    root, block = num_parameters(model) - sum(sizes), max(sizes)
    return 2 * product * root + 2 * product * block + (product + 4) * max(block, root)


def _cast(model: nn.Module, product: int) -> int:
    if product == 4:
        return 0
    return product * sum(num_parameters(m) for m in model.modules() if isinstance(m, nn.Linear))


def expected_rows(config: TrainConfig, mix: Mix) -> Counts:
    """Of a step, all GPUs together, at the paper's mix of speech and text."""
    token = expected_counts(config.model, mix)
    return token * (config.data.rows * config.data.units_per_sequence / token.units)


def activation_bytes(
    model: LanguageModel,
    rows: Counts,
    *,
    stream: int,
    product: int,
    how: Checkpointing = "none",
) -> float:
    """What a forward pass keeps for the backward pass, by the formula above; an estimate.

    Args:
        stream, product: bytes of a number of the residual stream, of one that is multiplied.
        how: what is checkpointed. What one block then holds for a while is not counted.
    """
    s, e, config = stream, product, model.config
    layers = partial(_layers, s=s, e=e, how=how)
    assert isinstance(model.global_transformer, GlobalTransformer)
    size = layers(model.global_transformer) * rows.units
    dim = config.global_transformer.dim
    if config.architecture == "lst":
        encoder, decoder = model.encoder, model.decoder
        assert isinstance(encoder, PatchEncoder)
        assert isinstance(decoder, PatchDecoder)
        local, slots = config.encoder.dim, config.slots
        size += (layers(encoder) + (s + 3 * e) * local) * rows.local_tokens
        size += (e + (s + 3 * e) * slots) * local * rows.local_units
        size += layers(decoder) * rows.local_tokens
        size += ((s + e) * local + e * decoder.key_value.out_features) * slots * rows.read_units
        if config.text_path == "local":
            dim = local
        else:
            size += (s + e) * local * rows.local_tokens
            return size + (s + e) * dim * (rows.tokens - rows.local_tokens)
    return size + (s + e) * dim * rows.tokens


def _layers(module: nn.Module, s: int, e: int, how: Checkpointing) -> int:
    """Bytes a row of the layers in ``module``."""
    if how == "full":
        inputs = [next(block.parameters()).shape[-1] for block in blocks(module)]
        return s * sum(inputs)
    size = 0
    for layer in module.modules():
        if isinstance(layer, DecoderLayer):
            size += (s + 3 * e) * layer.cross_query.in_features
        elif isinstance(layer, Layer):
            attention, f = layer.attention.qkv, layer.feed_forward.down.in_features
            d = attention.in_features
            size += 2 * s * d + e * (4 * d + attention.out_features)
            if how == "none":
                size += e * (d + 4 * f)
    return size


def _logits(model: LanguageModel, rows: Counts, product: int) -> float:
    return (
        min(piece_rows(model.head.out_features, "cuda"), rows.tokens)
        * model.head.out_features
        * (12 + 2 * product)
    )


# The batch ----------------------------------------------------------------------------------------


def _batch(config: TrainConfig, mix: Mix, gpus: int) -> Iterator[str]:
    data, micro_batches = config.data, config.accumulation
    rows = expected_rows(config, mix)
    hours = rows.tokens * (1 - mix.text) * mix.speech / FRAMES_PER_SECOND / 3600
    a_gpu = data.rows // (gpus * micro_batches)

    def holds(steps: int) -> str:
        if data.patching.strategy == "speech-bpe":
            return "how much speech, the pieces of the corpus say"
        tokens, speech = rows.tokens * steps, hours * steps
        return f"about {tokens:,.0f} tokens, {speech:,.2f} hours of speech in them"

    patched = f", in patches of {mix.patch_size:g}" if config.model.architecture == "lst" else ""
    yield (
        f"batch (expected: {mix.text:.0%} of the tokens in text alone, {mix.speech:.0%} of the "
        f"others speech{patched})"
    )
    yield _row("a GPU, each time", f"{a_gpu:,} × {data.units_per_sequence:,} units")
    yield _row("micro-batches a step", f"{micro_batches:,}")
    yield _row("a step", f"{data.rows:,} × {data.units_per_sequence:,} = {rows.units:,.0f} units")
    yield _row("", holds(1))
    yield _row("steps", f"{config.steps:,}")
    yield _row("the run", f"{rows.units * config.steps:,.0f} units")
    yield _row("", holds(config.steps))


def _row(name: str, value: str) -> str:
    return f"  {name:24}{value}"
