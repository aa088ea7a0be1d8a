"""How the mixers of this plugin are configured; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from subquad import ConfigError


@dataclass(kw_only=True)
class MambaConfig:
    """A selective state-space model per channel, behind a short convolution and a gate (Mamba, 2023)."""

    expand: int = 2  # d_inner / d_model
    state_dim: int = 16  # states per channel
    conv_width: int = 4  # tokens the short convolution sees, the current one included
    dt_rank: int = 0  # rank of the map to the step sizes; 0: d_model / 16, rounded up
    bidirectional: bool = False  # a second block from the last token to the first, whole sequences alone

    def __post_init__(self) -> None:
        for name in ("expand", "state_dim", "conv_width"):
            if getattr(self, name) < 1:
                raise ConfigError(what=f"{name} is {getattr(self, name)}", where=name, mend="use 1 or more")
        if self.dt_rank < 0:
            raise ConfigError(what=f"dt_rank is {self.dt_rank}", where="dt_rank", mend="use 1 or more, or 0")

    def resolved_dt_rank(self, d_model: int) -> int:
        """The rank of the step-size map in a model of width `d_model`."""
        return self.dt_rank or -(-d_model // 16)


@dataclass(kw_only=True)
class Mamba2Config:
    """A selective state-space model with one decay per head, behind a short convolution and a gate (Mamba-2, 2024)."""

    expand: int = 2  # channels / d_model
    state_dim: int = 128  # states per channel
    head_dim: int = 64  # channels that share a decay
    num_groups: int = 1  # input and output maps B, C; each is shared by the heads of its group
    conv_width: int = 4  # tokens the short convolution sees, the current one included
    bidirectional: bool = False  # a second block from the last token to the first, whole sequences alone

    def __post_init__(self) -> None:
        for name in ("expand", "state_dim", "head_dim", "num_groups", "conv_width"):
            if getattr(self, name) < 1:
                raise ConfigError(what=f"{name} is {getattr(self, name)}", where=name, mend="use 1 or more")


RATE_MAPS = ("softplus", "heavy_tail")


@dataclass(kw_only=True)
class Mamba3Config:
    """A complex state-space model by a trapezoidal rule, with one input a token or several (Mamba-3, 2026)."""

    expand: int = 2  # channels / d_model
    state_dim: int = 128  # states per channel
    head_dim: int = 64  # channels that share a decay
    num_groups: int = 1  # input and output maps B, C; each is shared by the heads of its group
    mimo_rank: int = 1  # inputs and outputs a token and head; 1: SISO, 4: the paper's MIMO
    rotated_share: float = 0.5  # share of the states that a token's angles turn: 0.5 or 1
    rate_map: str = "softplus"  # softplus: the paper's; heavy_tail: its authors' for high learning rates
    out_norm: bool = False  # a norm of each head before the gate

    def __post_init__(self) -> None:
        for name in ("expand", "state_dim", "head_dim", "num_groups", "mimo_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(what=f"{name} is {getattr(self, name)}", where=name, mend="use 1 or more")
        if self.rotated_share not in (0.5, 1):
            raise ConfigError(what=f"rotated_share is {self.rotated_share}", where="rotated_share", mend="use 0.5 or 1")
        if self.num_angles < 1:
            raise ConfigError(
                what=f"{self.rotated_share:g} of {self.state_dim} states hold no pair to turn",
                where="state_dim",
                mend="use 2 / rotated_share or more",
            )
        if self.rate_map not in RATE_MAPS:
            raise ConfigError(
                what=f"rate_map is '{self.rate_map}'", where="rate_map", mend=f"use {' or '.join(RATE_MAPS)}"
            )

    @property
    def num_angles(self) -> int:
        """Pairs of states that turn."""
        return int(self.state_dim * self.rotated_share) // 2


@dataclass(kw_only=True)
class LogLinearMamba2Config:
    """Mamba-2 with log t states instead of one, each read with a weight of its own (log-linear attention, 2025)."""

    expand: int = 2  # channels / d_model
    state_dim: int = 128  # states per channel
    head_dim: int = 64  # channels that share a decay
    num_groups: int = 1  # input and output maps B, C; each is shared by the heads of its group
    conv_width: int = 4  # tokens the short convolution sees, the current one included
    num_levels: int = 0  # weights of a token; 0: as many as model.context_len asks for, its bits and one

    def __post_init__(self) -> None:
        for name in ("expand", "state_dim", "head_dim", "num_groups", "conv_width"):
            if getattr(self, name) < 1:
                raise ConfigError(what=f"{name} is {getattr(self, name)}", where=name, mend="use 1 or more")
        if self.num_levels < 0:
            raise ConfigError(what=f"num_levels is {self.num_levels}", where="num_levels", mend="use 1 or more, or 0")

    def resolved_levels(self, context_len: int) -> int:
        """The bits of the largest number below `context_len`, and one for the token itself."""
        return self.num_levels or (context_len - 1).bit_length() + 1


def grouped_channels(config: Mamba2Config | Mamba3Config | LogLinearMamba2Config, d_model: int) -> int:
    """The channels of a mixer, which its groups of heads share evenly.  Raises: ConfigError."""
    channels = config.expand * d_model
    if channels % config.head_dim or (channels // config.head_dim) % config.num_groups:
        raise ConfigError(
            what=f"{channels} channels are not {config.num_groups} equal groups of heads of {config.head_dim}",
            where="head_dim",
            mend="use a divisor of expand * model.d_model, and num_groups a divisor of the number of heads",
        )
    return channels
