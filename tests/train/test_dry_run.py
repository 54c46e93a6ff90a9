"""A dry run tells what a run takes: exactly where it can, elsewhere by a formula that holds."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lst.data.batch import Batch, make_batch
from lst.data.packing import Packed
from lst.data.patching import PatchingConfig
from lst.errors import UserError
from lst.flops import Mix, batch_counts
from lst.model import LanguageModel, ModelConfig, StackConfig, build_model
from lst.presets import PRESETS, fine_tuning
from lst.train.config import OptimizerConfig, ParallelConfig
from lst.train.dry_run import activation_bytes, dry_run, expected_rows, own_parameters
from lst.train.optimizer import build_optimizer
from lst.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_pieces=395, num_units=100)


def small(architecture: str, text_path: str = "local") -> ModelConfig:
    return ModelConfig(
        architecture=architecture,  # type: ignore[arg-type]
        text_path=text_path,  # type: ignore[arg-type]
        encoder=StackConfig(layers=1, dim=64, heads=1),
        global_transformer=StackConfig(layers=3, dim=128, heads=2),
        decoder=StackConfig(layers=2, dim=64, heads=2),
        local_window=64,
        decoder_window=64,
    )


def stream(config: ModelConfig, documents: int = 8) -> Batch:
    """Documents of 100 text tokens, <s> and 50 patches of 4 speech units."""
    rng = np.random.default_rng(0)
    patch = 4 if config.architecture == "lst" else 1
    text, speech = 100, 200
    tokens = np.concatenate(
        [
            np.concatenate([rng.integers(5, 400, text), [4], rng.integers(400, 500, speech)])
            for _ in range(documents)
        ]
    ).astype(np.int32)
    lengths = np.array(([1] * (text + 1) + [patch] * (speech // patch)) * documents, np.int32)
    # A unit is followed by a unit or a special, everything else by anything.
    targets = np.where(tokens >= 400, 400, tokens).astype(np.int32)
    row = Packed(
        tokens=tokens,
        targets=targets,
        lengths=lengths,
        closed_late=np.zeros(len(lengths), bool),
        patches_per_document=np.full(documents, len(lengths) // documents, np.int32),
        record_ids=("r",) * documents,
    )
    return make_batch([row], VOCABULARY, config.plan(), step=0)


def kept_bytes(model: LanguageModel, batch: Batch) -> int:
    """What a forward pass keeps for the backward pass, counted storage by storage."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


@pytest.mark.parametrize(
    ("architecture", "text_path"), [("token", "local"), ("lst", "local"), ("lst", "global")]
)
def test_the_formula_of_activations_is_what_a_forward_pass_keeps(
    architecture: str, text_path: str
) -> None:
    config = small(architecture, text_path)
    model, batch = build_model(config, VOCABULARY), stream(config)
    norms = 0  # outside CUDA, an RMSNorm keeps its input divided by its length as well

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal norms
        norms += 4 * inputs[0].numel()

    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.register_forward_pre_hook(count)
    kept = kept_bytes(model, batch)
    layout, split, local = batch.layout, batch.split, batch.local_layout
    rows = replace(  # with the dead tail, which is kept as well
        batch_counts(batch),
        units=layout.num_patches,
        tokens=layout.num_tokens,
        local_tokens=0 if local is None else local.num_tokens,
        local_units=0 if local is None else local.num_patches,
        read_units=layout.num_patches if split is None else len(split.read_patches),
    )
    formula = activation_bytes(model, rows, stream=4, product=4)
    assert formula + norms == pytest.approx(kept, rel=0.03)


def test_weights_gradients_and_moments_are_exact() -> None:
    model = build_model(small("lst"), VOCABULARY)
    optimizer = build_optimizer(model, OptimizerConfig())
    model(stream(small("lst"))).sum().backward()
    optimizer.step()
    held = sum(
        tensor.nbytes
        for parameter in model.parameters()
        for tensor in (parameter, parameter.grad, *optimizer.state[parameter].values())
        if tensor is not None and tensor.ndim
    )
    assert held == 16 * own_parameters(model, 1)


def memory(text: str, name: str) -> float:
    """In GB, of a line of the report."""
    found = re.search(rf"^  {name} +([0-9.]+) GB$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def test_the_papers_run_as_the_paper_has_it() -> None:
    text = dry_run(PRESETS["lst-1b"], 32)
    assert text.startswith("lst-1b on 32 GPUs, fsdp, bfloat16 products\n")
    assert "  a GPU, each time        4 × 4,096 units\n" in text
    assert "  a step                  128 × 4,096 = 524,288 units\n" in text
    assert "  the run                 104,857,600,000 units\n" in text
    assert "about 649,273 tokens, 1.85 hours of speech in them\n" in text
    assert memory(text, "weights") == pytest.approx(4 * 1_523_704_832 / 32 / 1e9, abs=1e-3)
    assert memory(text, "AdamW's moments") == pytest.approx(2 * memory(text, "weights"), abs=2e-3)
    assert memory(text, "total") < 80  # as 32 H100 trained it
    units_per_token = 2.42 / 3  # Table 13
    rows = expected_rows(PRESETS["lst-1b"], Mix())
    assert rows.tokens == pytest.approx(rows.units / units_per_token, rel=2e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_planned(name: str) -> None:
    text = dry_run(PRESETS[name], 1)
    assert text.startswith(f"{name} on 1 GPU, ")
    assert ("hours of speech" in text) == (PRESETS[name].data.patching.strategy != "speech-bpe")


def test_documents_of_a_task_all_have_speech() -> None:
    plan = dry_run(fine_tuning(PRESETS["lst-1b"], "asr"), 32)
    assert "expected: 0% of the tokens in text alone, 77% of the others speech, in patches" in plan
    # 524,288 units a step, each 1 / (0.23 + 0.77 / 4) tokens, 77 % of them frames of 40 ms.
    hours = 524_288 / (0.23 + 0.77 / 4) * 0.77 / 25 / 3600
    assert f"{hours:,.2f} hours of speech in them" in plan


def test_strategies_differ_in_what_a_gpu_holds() -> None:
    config = replace(PRESETS["lst-420m"], accumulation=2)
    one = dry_run(config, 1)
    assert one.startswith("lst-420m on 1 GPU, bfloat16")
    hsdp = replace(config, parallel=ParallelConfig(strategy="hsdp", replicas=2))
    reports = {
        "ddp": dry_run(config, 8),
        "hsdp of 2 replicas": dry_run(hsdp, 8),
        "fsdp": dry_run(replace(config, parallel=ParallelConfig(strategy="fsdp")), 8),
    }
    for name, text in reports.items():
        assert text.startswith(f"lst-420m on 8 GPUs, {name}, ")
    weights = [memory(text, "weights") for text in reports.values()]
    assert weights == pytest.approx([memory(one, "weights") / part for part in (1, 4, 8)], rel=0.01)
    sums = [memory(text, "sums of micro-batches") for text in reports.values()]
    assert sums == [0, pytest.approx(4 * 0.438, rel=0.01), pytest.approx(4 * 0.438, rel=0.01)]
    activations = [memory(text, r"activations \(estimate\)") for text in reports.values()]
    assert activations[0] == activations[1] == activations[2]


def test_replicas_are_not_guessed_where_machines_are_unknown() -> None:
    config = replace(PRESETS["lst-7b"], parallel=ParallelConfig(strategy="hsdp"))
    with pytest.raises(UserError, match=r"--parallel\.replicas: expected a number"):
        dry_run(config, 64)


def test_the_7b_model_is_planned_in_little_memory_from_nothing(tmp_path: Path) -> None:
    """Its weights alone are 29 GB. There is no corpus, and nothing is written."""
    program = (
        "import resource, runpy, sys\n"
        "import lst.train.dry_run, lst.train.loop  # torch and all\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "sys.argv[1:] = ['lst-7b', '--dry-run', '--gpus', '256']\n"
        "runpy.run_module('lst.train', run_name='__main__')\n"
        "print('kB', peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "lst-7b on 256 GPUs, fsdp, bfloat16 products" in done.stdout
    assert int(done.stdout.split()[-1]) < 1e6
    assert list(tmp_path.iterdir()) == []


def test_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "demo on 2 GPUs, ddp, float32 products" in dry_run(PRESETS["demo"])


def test_a_plan_of_patches_that_the_model_cannot_read_is_refused() -> None:
    preset = PRESETS["demo-baseline"]
    static = replace(preset.data, patching=PatchingConfig(strategy="static"))
    with pytest.raises(UserError, match="a token-level model reads every token as a patch"):
        dry_run(replace(preset, data=static))
