"""Another forward for one instance of a foreign class: keys, attributes and the class itself stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from subquad.contracts import AttentionFunction


@dataclass(frozen=True)
class ReplacedForward:
    """Calls `run(module, attention, *args, **kwargs)`; a deep copy calls it with copies of its own."""

    module: nn.Module
    attention: AttentionFunction
    run: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.module, self.attention, *args, **kwargs)


def replace_forward(module: nn.Module, attention: AttentionFunction, run: Callable[..., Any]) -> str | None:
    """Let the instance's forward be `run`; None, or why it cannot be replaced."""
    present = module.__dict__.get("forward")
    if present is not None and not isinstance(present, ReplacedForward):
        return "somebody replaced its forward before"
    # Not a submodule, nor a bound method: a deep copy of the module must not call the first one.
    module.__dict__["forward"] = ReplacedForward(module, attention, run)
    return None


def restore_forward(module: nn.Module) -> None:
    """Take our forward off an instance."""
    if isinstance(module.__dict__.get("forward"), ReplacedForward):
        del module.__dict__["forward"]


def forward_as_written(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class."""
    return partial(type(module).forward, module)  # dynamo of torch 2.11 cannot trace __get__
