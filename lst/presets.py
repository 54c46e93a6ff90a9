"""Every named configuration. A preset and its baseline differ in the architecture alone.

``lst-1b`` is the paper's 1B model (Table 7) with its optimisation settings (section A.2): 128
sequences of 4,096 units a step, 4 on each of 32 GPUs, for 200,000 steps. Of the other sizes the
paper gives the length of training alone (Table 5; version 2, compute-optimal models); their layers
and widths are ours. What they share with the 1B model is its two slots to a patch, its one encoder
and nine decoder layers, its head sizes (128 and 64) and its learning rate.
"""

from dataclasses import replace
from pathlib import Path

from lst.data.interleave import Task
from lst.data.loader import DataConfig
from lst.data.patching import PatchingConfig
from lst.model import ModelConfig, StackConfig
from lst.train.config import OptimizerConfig, TrainConfig


def _token_level(config: TrainConfig, name: str) -> TrainConfig:
    """The same run with every token a patch: the global transformer alone."""
    return replace(
        config,
        name=name,
        model=replace(config.model, architecture="token"),
        data=replace(config.data, patching=PatchingConfig(strategy="none")),
        out=Path("runs") / name,
    )


def _speech_bpe(config: TrainConfig, name: str) -> TrainConfig:
    """The token-level run with speech in BPE pieces of several units (paper, section 4.2)."""
    token_level = _token_level(config, name)
    patching = PatchingConfig(strategy="speech-bpe")
    return replace(token_level, data=replace(token_level.data, patching=patching))


DEMO = TrainConfig(
    name="demo",
    model=ModelConfig(
        encoder=StackConfig(layers=1, dim=128, heads=4),
        global_transformer=StackConfig(layers=4, dim=256, heads=4),
        decoder=StackConfig(layers=2, dim=128, heads=4),
    ),
    data=DataConfig(rows=4, units_per_sequence=512),
    optimizer=OptimizerConfig(lr=2e-3, warmup_steps=100),
    steps=1000,
    out=Path("runs/demo"),
    validate_every=200,
    checkpoint_every=200,
)

UNITS_PER_SEQUENCE = 4096


def _paper(
    name: str, *, layers: int, dim: int, steps: int, rows: int = 128, checkpoint_every: int = 1000
) -> TrainConfig:
    """A model of the paper's proportions; layers and width are those of its global transformer."""
    heads = dim // 128
    return TrainConfig(
        name=name,
        model=ModelConfig(
            encoder=StackConfig(layers=1, dim=dim // 2, heads=heads),
            global_transformer=StackConfig(layers=layers, dim=dim, heads=heads),
            decoder=StackConfig(layers=9, dim=dim // 2, heads=heads),
        ),
        data=DataConfig(
            corpus="data/corpus",
            rows=rows,
            units_per_sequence=UNITS_PER_SEQUENCE,
            num_workers=1,
        ),
        steps=steps,
        out=Path("runs") / name,
        validate_every=5 * checkpoint_every,
        checkpoint_every=checkpoint_every,
        precision="bfloat16",
        compile=True,
    )


def _optimal_steps(parameters: float) -> int:
    """Compute-optimal in the paper: 20 text tokens a parameter and half as many of speech."""
    return round(30 * parameters / (128 * UNITS_PER_SEQUENCE))


# 438 M parameters, its baseline 426 M
LST_420M = _paper("lst-420m", layers=28, dim=1024, steps=_optimal_steps(420e6))
# 1.52 B and 1.42 B
LST_1B = _paper("lst-1b", layers=25, dim=2048, steps=200_000)
# 1.88 B and 1.78 B
LST_1_8B = _paper("lst-1.8b", layers=32, dim=2048, steps=_optimal_steps(1.8e9))
# Llama's 7B: 7.30 B and 6.74 B. A step of 4 Mi units, as the paper says.
LST_7B = _paper("lst-7b", layers=32, dim=4096, steps=25_000, rows=1024, checkpoint_every=250)

PRESETS: dict[str, TrainConfig] = {
    preset.name: preset
    for preset in (
        DEMO,
        _token_level(DEMO, "demo-baseline"),
        _speech_bpe(DEMO, "demo-bpe"),
        LST_420M,
        _token_level(LST_420M, "baseline-420m"),
        LST_1B,
        _token_level(LST_1B, "baseline-1b"),
        _speech_bpe(LST_1B, "bpe-1b"),
        LST_1_8B,
        _token_level(LST_1_8B, "baseline-1.8b"),
        LST_7B,
        _token_level(LST_7B, "baseline-7b"),
    )
}

DESCRIPTIONS: dict[str, str] = {
    "demo": "a small LST with curriculum patching, minutes on two CPU cores",
    "demo-baseline": "the same, token by token",
    "demo-bpe": "the same, token by token, over BPE pieces of speech units",
    "lst-420m": "the paper's smallest size, compute-optimal, curriculum patching",
    "baseline-420m": "the same, token by token",
    "lst-1b": "the paper's 1B model, curriculum patching",
    "baseline-1b": "the paper's 1B token-level baseline",
    "bpe-1b": "the paper's 1B baseline over 1,000 BPE pieces of speech units",
    "lst-1.8b": "the paper's 1.8B size, compute-optimal, curriculum patching",
    "baseline-1.8b": "the same, token by token",
    "lst-7b": "the paper's 7B size, 25,000 steps of 4 Mi units, curriculum patching",
    "baseline-7b": "the same, token by token",
}


def fine_tuning(config: TrainConfig, task: Task) -> TrainConfig:
    """A run that learns a task from the corpus's ``speech``; speech in the patches in which the
    model of ``config`` is evaluated, as what is left of a curriculum."""
    patching = config.data.patching
    if patching.strategy in ("curriculum", "mixed"):
        patching = PatchingConfig(strategy="static", size=patching.size)
    return replace(
        config,
        name=f"{config.name}-{task}",
        data=replace(config.data, mixture={f"speech:{task}": 1.0}, patching=patching),
        out=config.out.with_name(f"{config.out.name}-{task}"),
        evaluate=False,
    )
