"""The studies by name."""

from lst.compare.study import Study
from lst.data.loader import DataConfig
from lst.model import ModelConfig, StackConfig
from lst.prepare.demo import DemoConfig
from lst.train.config import OptimizerConfig, TrainConfig

__all__ = ["STUDIES"]

TINY = Study(
    name="tiny",
    claim=(
        "**This is a check of the machinery and of nothing else.** The models have some hundred "
        "thousand parameters and train for seconds on minutes of speech; no accuracy below says "
        "anything about the paper's models."
    ),
    corpus=DemoConfig(
        hours=0.2, text_tokens=100_000, questions=24, validation=24, pieces=500, codes=101
    ),
    base=TrainConfig(
        name="tiny",
        model=ModelConfig(
            encoder=StackConfig(layers=1, dim=64, heads=2),
            global_transformer=StackConfig(layers=2, dim=128, heads=4),
            decoder=StackConfig(layers=1, dim=64, heads=2),
        ),
        data=DataConfig(rows=4, units_per_sequence=256),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10),
        steps=60,
        validate_every=20,
        checkpoint_every=60,
        log_every=10,
    ),
    seeds={"baseline": 2, "curriculum": 2},
)

# Meant for twenty minutes of one H100 or H200 (not measured): some 20 runs of 16 million units.
SMALL = Study(
    name="small",
    claim=(
        "Models of 30 to 40 million parameters on synthesised stories: sixty hours of speech from "
        "a handful of synthetic voices, and text of the same generator. Speech and stories this "
        "regular are far easier than the paper's, and nothing here speaks for its scale."
    ),
    corpus=DemoConfig(hours=60, text_tokens=14_000_000, questions=480, validation=64),
    base=TrainConfig(
        name="small",
        model=ModelConfig(
            encoder=StackConfig(layers=1, dim=256, heads=4),
            global_transformer=StackConfig(layers=10, dim=512, heads=8),
            decoder=StackConfig(layers=3, dim=256, heads=4),
        ),
        data=DataConfig(rows=32, units_per_sequence=1024, num_workers=4),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=100),
        steps=500,
        validate_every=100,
        checkpoint_every=250,
        log_every=20,
        precision="bfloat16",
    ),
    seeds={"baseline": 3, "curriculum": 3, "curriculum-global": 3},
)

STUDIES: dict[str, Study] = {study.name: study for study in (TINY, SMALL)}
