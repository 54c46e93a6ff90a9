"""The named configurations are the sizes and lengths of training that their names promise."""

import pytest
import torch

from lst.flops import PAPER_VOCABULARY
from lst.model import ModelConfig, build_model, count_parameters
from lst.presets import LST_1B, PRESETS


@pytest.mark.parametrize(
    ("size", "parameters", "steps", "units"),
    [
        ("420m", 420e6, 24_033, 2**19),
        ("1b", 1.4e9, 200_000, 2**19),  # Table 7; its 1.28 G global parameters give the name
        ("1.8b", 1.8e9, 102_997, 2**19),
        ("7b", 6.74e9, 25_000, 2**22),
    ],
)
def test_a_baseline_has_the_parameters_of_its_name_and_the_papers_steps(
    size: str, parameters: float, steps: int, units: int
) -> None:
    lst, baseline = PRESETS[f"lst-{size}"], PRESETS[f"baseline-{size}"]
    with torch.device("meta"):
        totals = [
            count_parameters(build_model(preset.model, PAPER_VOCABULARY))["total"]
            for preset in (lst, baseline)
        ]
    assert totals[1] == pytest.approx(parameters, rel=0.02)
    assert 1.02 < totals[0] / totals[1] < 1.09  # the patch encoder and decoder
    for preset in (lst, baseline):
        assert preset.steps == steps
        assert preset.data.rows * preset.data.units_per_sequence == units


def test_every_size_has_the_papers_two_slots_and_head_sizes() -> None:
    for name, preset in PRESETS.items():
        if not name.startswith("demo"):
            model = preset.model
            assert model.slots == 2, name
            assert model.global_transformer.head_dim == 128
            assert model.encoder.head_dim == model.decoder.head_dim == 64
    assert LST_1B.model == ModelConfig()  # whose defaults are Table 7
