"""Every named configuration. A preset and its baseline differ in the architecture alone.

``lst-1b`` and ``baseline-1b`` are the paper's 1B models (Table 7) with its optimisation settings
(section A.2): 128 sequences of 4,096 units a step, 4 on each of 32 GPUs, for 200,000 steps.
"""

from dataclasses import replace
from pathlib import Path

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

LST_1B = TrainConfig(
    name="lst-1b",
    data=DataConfig(corpus="data/corpus", rows=128, units_per_sequence=4096, num_workers=4),
    steps=200_000,
    out=Path("runs/lst-1b"),
    validate_every=5000,
    checkpoint_every=1000,
    precision="bfloat16",
)

PRESETS: dict[str, TrainConfig] = {
    preset.name: preset
    for preset in (
        DEMO,
        _token_level(DEMO, "demo-baseline"),
        LST_1B,
        _token_level(LST_1B, "baseline-1b"),
    )
}

DESCRIPTIONS: dict[str, str] = {
    "demo": "a small LST with curriculum patching, minutes on two CPU cores",
    "demo-baseline": "the same, token by token",
    "lst-1b": "the paper's 1B model, curriculum patching",
    "baseline-1b": "the paper's 1B token-level baseline",
}
