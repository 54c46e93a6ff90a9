"""Compiled, checkpointed and in float8, a model computes what it did; only how changes."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lst.data.batch import Batch, make_batch
from lst.data.packing import Packed
from lst.data.patching import PatchingConfig
from lst.errors import UserError
from lst.model import LanguageModel, ModelConfig, StackConfig, build_model
from lst.train import blocks
from lst.train.blocks import (
    check_compiler,
    checkpoint_blocks,
    compile_blocks,
    prepare_blocks,
    use_float8,
)
from lst.train.config import Checkpointing, TrainConfig
from lst.train.loop import train
from lst.vocabulary import Vocabulary

Tiny = Callable[..., TrainConfig]
VOCABULARY = Vocabulary(num_pieces=395, num_units=100)
CPU = torch.device("cpu")
MODELS = [("token", "local"), ("lst", "local"), ("lst", "global")]
NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="Inductor needs a C++ compiler"
)


def small(architecture: str, text_path: str, layers: int = 2) -> ModelConfig:
    return ModelConfig(
        architecture=architecture,  # type: ignore[arg-type]
        text_path=text_path,  # type: ignore[arg-type]
        encoder=StackConfig(layers=1, dim=32, heads=2),
        global_transformer=StackConfig(layers=layers, dim=64, heads=2),
        decoder=StackConfig(layers=layers, dim=32, heads=2),
        local_window=16,
        decoder_window=8,
    )


def model_of(config: ModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    return build_model(config, VOCABULARY)


def stream(config: ModelConfig, documents: Sequence[tuple[int, int]], seed: int = 0) -> Batch:
    """A training batch of documents of some text tokens, <s>, and some patches of speech."""
    rng = np.random.default_rng(seed)
    size = 4 if config.architecture == "lst" else 1
    tokens, lengths, patches = [], [], []
    for text, speech in documents:
        spoken = [np.array([4]), rng.integers(400, 500, speech * 4)] if speech else []
        parts = [rng.integers(5, 400, text), *spoken]
        tokens += parts
        runs = [1] * (text + bool(speech)) + [size] * (speech * 4 // size)
        lengths += runs
        patches.append(len(runs))
    ids = np.concatenate(tokens).astype(np.int32)
    row = Packed(
        tokens=ids,
        targets=np.where(ids >= 400, 400, ids).astype(np.int32),
        lengths=np.array(lengths, np.int32),
        closed_late=np.zeros(len(lengths), bool),
        patches_per_document=np.array(patches, np.int32),
        record_ids=("r",) * len(documents),
    )
    return make_batch([row], VOCABULARY, config.plan(), step=0)


def passes(model: LanguageModel, batch: Batch) -> list[Tensor]:
    """Losses and gradients."""
    model.zero_grad(set_to_none=True)
    losses = model(batch)
    losses.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [losses.detach(), *(g for g in gradients if g is not None)]


def expect_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-7)


# Ten more of other numbers of tokens, patches and documents; the first two are met before.
# All have more than BLOCK_ROWS rows on every side: a size of 1 may cost a graph of its own.
MIXED = [(120, 80), (140, 0)]
TEXT = [(150, 0), (160, 0)]
OTHERS = [
    [(125, 90), (7, 0)],
    [(73, 7), (59, 51), (30, 0), (2, 50)],
    [(270, 0)],
    [(1, 160)],
    [(20, 15)] * 7,
    [(400, 300)],
    [(95, 0), (36, 0), (57, 0)],
    [(111, 0), (4, 73)],
    [(2, 200), (3, 100)],
    [(90, 93), (17, 2), (1000, 0)],
]


@pytest.mark.parametrize(("architecture", "text_path"), MODELS)
def test_one_compilation_serves_batches_of_any_size(architecture: str, text_path: str) -> None:
    """No graph breaks (``fullgraph``), and none of the ten batches is compiled for."""
    torch._dynamo.reset()
    config = small(architecture, text_path)
    model, eager = model_of(config), model_of(config)
    compile_blocks(model, backend="aot_eager")
    passes(model, stream(config, MIXED))
    if text_path == "global":
        # Without any speech some sizes of the local modules are 1, which costs a graph of its own.
        passes(model, stream(config, TEXT))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, documents in enumerate(OTHERS):
            batch = stream(config, documents, seed)
            expect_close(passes(model, batch), passes(eager, batch))
    with torch.no_grad():  # as validation
        expect_close([model(batch)], [eager(batch)])


def test_layers_of_one_shape_share_their_code() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for layers in (2, 6):
        config = small("lst", "local", layers)
        model = model_of(config)
        compile_blocks(model, backend="eager")
        passes(model, stream(config, MIXED))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # Layer of the encoder, of the global transformer, of the decoder; encoder's patches; loss.
    assert graphs == [5, 5]


@NEEDS_COMPILER
def test_inductors_run_is_the_eager_one_within_rounding(
    make_tiny: Tiny, tmp_path: Path, undrawn: None
) -> None:
    """The baseline, of which there is least to compile."""
    lines = []
    for compiled in (False, True):
        torch._dynamo.reset()
        config = make_tiny(tmp_path / str(compiled), steps=3, compile=compiled)
        config = replace(
            config,
            model=replace(config.model, architecture="token"),
            data=replace(config.data, patching=PatchingConfig(strategy="none")),
        )
        train(config)
        text = (config.out / "metrics.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
    assert len(lines[0]) == len(lines[1]) >= 3
    for a, b in zip(*lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        if a["split"] == "train":
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_without_a_compiler_the_way_out_is_named(
    make_tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"--compile: expected a compiler .* by --no-compile$"):
        check_compiler(CPU)
    with pytest.raises(UserError, match="--no-compile"):
        train(make_tiny(tmp_path / "run", compile=True))


# Checkpointing ------------------------------------------------------------------------------------


def kept_bytes(model: LanguageModel, batch: Batch) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(batch)
    del losses
    return sum(size for at, size in kept.items() if at not in weights)


@pytest.mark.parametrize(("architecture", "text_path"), MODELS)
def test_checkpointed_blocks_keep_less_and_give_the_same_bits(
    architecture: str, text_path: str
) -> None:
    config = small(architecture, text_path)
    batch = stream(config, MIXED)
    results, kept = {}, {}
    hows: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for how in hows:
        model = model_of(config)
        checkpoint_blocks(model, how)
        results[how], kept[how] = passes(model, batch), kept_bytes(model, batch)
    for how in ("selective", "full"):
        for a, b in zip(results[how], results["none"], strict=True):
            assert torch.equal(a, b)
    assert kept["full"] < 0.6 * kept["selective"] < 0.6 * 0.75 * kept["none"]


@pytest.mark.parametrize("how", ["selective", "full"])
def test_attention_is_computed_again_only_where_all_of_a_block_is(how: Checkpointing) -> None:
    config = small("lst", "local")
    model = model_of(config)
    checkpoint_blocks(model, how)
    losses = model(stream(config, MIXED))
    with torch.profiler.profile() as profiler:
        losses.sum().backward()
    names = [event.name for event in profiler.events()]
    again = names.count("lst_kernels::range_attention")
    num_blocks = len(blocks.blocks(model))
    # A decoder block has two; the encoder's cross-attention is in none.
    assert again == {"selective": 0, "full": num_blocks + config.decoder.layers}[how]


@pytest.mark.parametrize("how", ["selective", "full"])
def test_checkpointed_blocks_are_compiled_as_one_graph(how: Checkpointing) -> None:
    torch._dynamo.reset()
    config = small("lst" if how == "full" else "token", "local", layers=1)
    model, eager = model_of(config), model_of(config)
    checkpoint_blocks(model, how)
    compile_blocks(model, backend="aot_eager")
    for documents in (OTHERS[0], OTHERS[1]):
        batch = stream(config, documents)
        expect_close(passes(model, batch), passes(eager, batch))


# float8 -------------------------------------------------------------------------------------------


def test_float8_takes_the_global_transformers_linears_and_no_others() -> None:
    pytest.importorskip("torchao")
    config = small("lst", "local")
    model, exact = model_of(config), model_of(config)
    names = list(model.state_dict())
    use_float8(model, emulate=True)
    converted = {name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    assert converted == {
        f"global_transformer.layers.{layer}.{part}"
        for layer in range(2)
        for part in (
            "attention.qkv",
            "attention.output",
            "feed_forward.gate_up",
            "feed_forward.down",
        )
    }
    assert list(model.state_dict()) == names
    batch = stream(config, MIXED)
    got, expected = passes(model, batch), passes(exact, batch)
    for a, b in zip(got, expected, strict=True):
        assert 0 < float((a - b).norm()) < 0.15 * float(b.norm())


def test_float8_is_refused_where_the_device_cannot(make_tiny: Tiny, tmp_path: Path) -> None:
    config = make_tiny(tmp_path / "run", float8=True)
    with pytest.raises(UserError, match=r"--float8: expected a GPU .* 8\.9 or more .* got cpu"):
        prepare_blocks(model_of(small("lst", "local")), config, CPU)


def test_float8_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"pip install 'lst\[float8\]'"):
        use_float8(model_of(small("lst", "local")))
