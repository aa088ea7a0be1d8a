"""Whether a rewritten model is the faster one: calls of it, timed in turns with calls of it as it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subquad.compiler.foreign.attention_call import AttentionCall
from subquad.compiler.foreign.capture import Call, no_autocast_cache
from subquad.compiler.foreign.same_outputs import in_eval
from subquad.compiler.report import seconds_text
from subquad_cost_model import time_rivals

SECONDS = 10.0
"""The most that timing a model may take, unless one call takes longer; six calls of it are made at least."""


@dataclass(frozen=True, kw_only=True)
class BothWays:
    """Seconds of one call of a model, with its gradients where it was planned for training: median and fastest."""

    written_s: float
    rewritten_s: float
    fastest_written_s: float
    fastest_rewritten_s: float

    @property
    def gains(self) -> bool:
        """Whether the rewritten model wins by both: other programs disturb a median, and a fastest call is one call."""
        return self.rewritten_s <= self.written_s and self.fastest_rewritten_s <= self.fastest_written_s

    def __str__(self) -> str:
        return (
            f"a call takes {seconds_text(self.written_s)} as written (fastest {seconds_text(self.fastest_written_s)}), "
            f"{seconds_text(self.rewritten_s)} rewritten (fastest {seconds_text(self.fastest_rewritten_s)})"
        )


def time_both_ways(
    model: nn.Module, call: Call, functions: Iterable[AttentionCall], *, gradients: bool, budget_s: float
) -> BothWays:
    """Time calls in eval mode, on the wall, as a caller meets them; modes, gradients and generators stay."""
    switches = list(functions)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def run(enabled: bool) -> Callable[[], None]:
        def once() -> None:
            for switch in switches:
                switch.enabled = enabled
            with torch.set_grad_enabled(gradients):
                outputs = [leaf for leaf in tree_leaves(model(*call.args, **call.kwargs)) if isinstance(leaf, Tensor)]
            outputs = [output for output in outputs if output.requires_grad]
            if outputs and trained:
                torch.autograd.grad(
                    outputs, trained, [torch.ones_like(output) for output in outputs], allow_unused=True
                )

        return once

    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    try:
        with in_eval(model), no_autocast_cache(), torch.random.fork_rng():
            timings = time_rivals(
                {"written": run(False), "rewritten": run(True)}, synchronize=synchronize, min_s=0.05, repeats=7,
                budget_s=min(budget_s, SECONDS),
            )  # fmt: skip
    finally:
        for switch in switches:
            switch.enabled = True
    written, rewritten = timings["written"], timings["rewritten"]
    return BothWays(
        written_s=written.median_s,
        rewritten_s=rewritten.median_s,
        fastest_written_s=written.low_s,
        fastest_rewritten_s=rewritten.low_s,
    )
