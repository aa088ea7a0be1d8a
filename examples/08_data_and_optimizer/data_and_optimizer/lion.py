"""Lion: p <- p - lr ( sign(b1 m + (1 - b1) g) + weight_decay p ),  then  m <- b2 m + (1 - b2) g.

Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch

from data_and_optimizer.plugin import LionConfig


class Lion(torch.optim.Optimizer):
    """One momentum a parameter, half of Adam's state; it travels in checkpoints by torch's own state_dict."""

    def __init__(self, parameter_groups: list[dict[str, Any]], config: LionConfig) -> None:
        defaults = {"lr": config.lr, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
        super().__init__(parameter_groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                direction = momentum.lerp(parameter.grad, 1 - first).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)
        return loss


def build(config: LionConfig, parameter_groups: list[dict[str, Any]]) -> Lion:
    """Lion over the model's groups, which say where weight decay applies."""
    return Lion(parameter_groups, config)
