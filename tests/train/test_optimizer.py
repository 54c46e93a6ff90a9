"""The learning rate of every step, and which parameters decay."""

from collections.abc import Callable

import pytest
import torch

from lst.model import build_model
from lst.train.config import OptimizerConfig, TrainConfig
from lst.train.optimizer import build_optimizer, learning_rate, optimizer_tensors, parameter_groups
from lst.vocabulary import Vocabulary

CONFIG = OptimizerConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, 0.1),
        (5, 0.5),
        (10, 1.0),
        (35, 0.1 + 0.9 * (2 + 2**0.5) / 4),  # a quarter of the cosine
        (60, 0.55),
        (110, 0.1),
    ],
)
def test_learning_rate_warms_up_and_falls_as_a_cosine(step: int, expected: float) -> None:
    assert learning_rate(step, CONFIG, 110) == pytest.approx(expected)


def test_learning_rate_without_warm_up_or_shorter_than_it() -> None:
    assert learning_rate(4, OptimizerConfig(lr=1.0, warmup_steps=0), 4) == pytest.approx(0.01)
    assert learning_rate(3, CONFIG, 5) == pytest.approx(0.3)


def test_matrices_alone_decay(tiny: Callable[..., TrainConfig]) -> None:
    model = build_model(tiny().model, Vocabulary(num_pieces=25, num_units=20))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    decayed_names = {names.pop(id(parameter)) for parameter in decayed["params"]}
    free_names = {names.pop(id(parameter)) for parameter in free["params"]}
    assert names == {}
    assert "head.weight" in decayed_names
    assert {"embedding.weight", "norm.weight"} <= free_names
    assert all("norm" in name or "embedding" in name or "bias" in name for name in free_names)
    assert not any("norm" in name or "embedding" in name for name in decayed_names)


def test_an_optimizer_filled_from_its_tensors_takes_the_same_step() -> None:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        return model.weight.detach().clone()

    torch.manual_seed(0)
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    old = build_optimizer(first, OptimizerConfig())
    step(first, old)
    new = build_optimizer(second, OptimizerConfig())
    second.load_state_dict(first.state_dict())
    source = optimizer_tensors(first, old)
    for name, tensor in optimizer_tensors(second, new).items():
        tensor.copy_(source[name])
    assert torch.equal(step(first, old), step(second, new))
