"""Projections that ranks share (tensor parallel): who takes part, with what, and what a rank is left with.

Megatron's pairing: of the first projections of a module each rank computes some outputs, whole heads or hidden
channels, and goes on with them alone; of the last one it multiplies the columns that meet these, and the ranks' results
are added up. `training/sharding.py` lets it happen; here it is counted and checked.

Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from subquad.contracts import ProjectionSplit
from subquad.errors import ConfigError
from subquad.model.block import Block


@runtime_checkable
class SharesProjections(Protocol):
    """A mixer, or a channel mixer, that ranks may share."""

    def tensor_parallel_plan(self) -> ProjectionSplit:
        """Which projections are dealt out, and in what units."""


def shared_projections(block: Block, ranks: int) -> dict[str, ProjectionSplit]:
    """What ranks share of a block, by the module's name in it; a mixer that exchanges tensors with other layers stays.

    Raises: ConfigError where heads or hidden channels cannot be dealt out evenly.
    """
    parts = {"mixer": None if block.sharing else block.mixer, "channel_mixer": block.channel_mixer}
    found = {}
    for name, module in parts.items():
        if not isinstance(module, SharesProjections):
            continue
        split = found[name] = module.tensor_parallel_plan()
        for unit, count in split.units.items():
            if count % ranks:
                owner = f"mixer '{block.mixer_name}'" if name == "mixer" else "channel mixer"
                raise ConfigError(
                    what=f"{unit} is {count} in the {owner} of layer {block.layer_index},"
                    f" which {ranks} ranks cannot share evenly",
                    where="trainer.tensor_parallel",
                    mend=f"use a divisor of {count}, or another {unit}",
                )
    return found


def kept_whole(blocks: Iterable[Block], ranks: int) -> str | None:
    """Says which mixers every rank computes whole; None: no mixer.  Raises: ConfigError."""
    layers: dict[str, list[str]] = {}
    for block in blocks:
        if "mixer" not in shared_projections(block, ranks):
            layers.setdefault(block.mixer_name, []).append(str(block.layer_index))
    named = ", ".join(f"{name} (layer {','.join(indices)})" for name, indices in layers.items())
    return f"tensor_parallel={ranks}: every rank computes the whole of {named}" if layers else None


def keep_share(blocks: Iterable[Block], ranks: int) -> None:
    """Cut the projections down to one rank's share, in place: shapes to count and to choose kernels by, not to train.

    Raises: ConfigError.
    """
    for block in blocks:
        for name, split in shared_projections(block, ranks).items():
            module = block.get_submodule(name)
            for linear in split.columns:
                _cut(module.get_submodule(linear), "out_features", ranks)
            for linear in split.rows:
                _cut(module.get_submodule(linear), "in_features", ranks)


def _cut(linear: nn.Module, side: str, ranks: int) -> None:
    assert isinstance(linear, nn.Linear), "a projection is an nn.Linear"
    size = getattr(linear, side) // ranks
    setattr(linear, side, size)
    linear.weight = nn.Parameter(linear.weight.detach().narrow(0 if side == "out_features" else 1, 0, size))
    bias: Tensor | None = linear.bias
    if bias is not None and side == "out_features":
        linear.bias = nn.Parameter(bias.detach()[:size])
