"""First weights are normal, cut off at three deviations, and as large as their place asks for."""

import math

import pytest
import torch

from lst.model import ModelConfig, StackConfig, build_model
from lst.model.layers import truncated_normal
from lst.vocabulary import Vocabulary


def test_a_truncated_normal_is_one() -> None:
    x = torch.empty(1000, 1000)
    truncated_normal(x, 0.1, torch.Generator().manual_seed(0))
    assert x.abs().max() <= 0.3 * (1 + 1e-5)
    assert x.abs().max() > 0.299
    assert abs(x.mean()) < 5e-4
    # Of a normal cut off at c deviations: 1 − 2 c φ(c) / (Φ(c) − Φ(−c)).
    variance = 1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2))
    assert x.std() == pytest.approx(0.1 * math.sqrt(variance), rel=3e-3)
    for c in (0.5, 1, 2):
        within = math.erf(c / math.sqrt(2)) / math.erf(3 / math.sqrt(2))
        assert (x.abs() < 0.1 * c).float().mean() == pytest.approx(within, abs=2e-3)


def test_deviations_follow_the_inputs_and_branches_are_scaled_down() -> None:
    config = ModelConfig(
        encoder=StackConfig(layers=1, dim=64, heads=2),
        global_transformer=StackConfig(layers=4, dim=128, heads=2),
        decoder=StackConfig(layers=2, dim=64, heads=2),
    )
    torch.manual_seed(0)
    model = build_model(config, Vocabulary(num_pieces=500, num_units=100))
    weights = dict(model.named_parameters())
    cut = 0.9866  # what truncation leaves of a deviation
    expected = {
        "embedding.weight": 64**-0.5,
        "head.weight": 64**-0.5,
        "global_transformer.layers.3.attention.qkv.weight": 128**-0.5,
        "global_transformer.layers.0.attention.output.weight": (128 * 8) ** -0.5,
        "global_transformer.layers.0.feed_forward.down.weight": (512 * 8) ** -0.5,
        "encoder.output.weight": (64 * 3) ** -0.5,
        "decoder.layers.1.cross_output.weight": (64 * 6) ** -0.5,
    }
    for name, deviation in expected.items():
        assert weights[name].std().item() == pytest.approx(cut * deviation, rel=0.05), name
    assert all((w == 1).all() for name, w in weights.items() if "norm" in name)
