"""AdamW, which weights decay, and the learning rate of every step."""

import math

import torch
from torch import Tensor, nn

from lst.train.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """The rate of optimizer step ``step`` (the first is 1).

    ::

        lr · step / warmup                                            up to the end of the warm-up
        lr · (r + (1 − r) · (1 + cos(π · u)) / 2)                     then, r = min_lr_ratio,
             u = (step − warmup) / (total_steps − warmup)             lr · r at the last step
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    u = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, u))) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices decay; embeddings, norms and biases do not."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        group = free if parameter.ndim < 2 or id(parameter) in embeddings else decayed
        group.append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What AdamW keeps of every parameter, by name: ``step.NAME``, ``exp_avg.NAME``, …

    A parameter that has had no gradient yet gets the zeros that AdamW would start it with, so that
    an optimizer just made can be filled in place from a checkpoint.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors.update({f"{key}.{name}": value for key, value in state.items()})
    return tensors
