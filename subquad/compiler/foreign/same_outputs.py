"""Whether a rewritten model still says what it said: its outputs on the example, before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subquad.compiler.foreign.capture import Call, no_autocast_cache

_SEED = 0


def outputs_in_eval(model: nn.Module, call: Call) -> list[Tensor]:
    """The floating-point tensors of a call's output, in eval mode and without gradients; modes and generators stay."""
    with in_eval(model), no_autocast_cache(), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(_SEED)
        output = model(*call.args, **call.kwargs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest  max |after - before| / max |before|  of all outputs; infinite where one has NaN and one has not."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return float("inf")
    worst = 0.0
    for old, new in zip(before, after):
        if old.numel() == 0:
            continue
        old, new = old.double(), new.double()
        if not torch.equal(old.isfinite(), new.isfinite()):
            return float("inf")
        old, new = (tensor.where(old.isfinite(), 0.0) for tensor in (old, new))
        worst = max(worst, float((new - old).abs().max()) / max(float(old.abs().max()), 1e-2))
    return worst


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each is in its own mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
