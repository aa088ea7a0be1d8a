"""How the mixers of this plugin are configured; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from subquad import ConfigError


def at_least_one(config: object, *names: str) -> None:
    """Refuse a size below 1 by name.  Raises: ConfigError."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(what=f"{name} is {getattr(config, name)}", where=name, mend="use 1 or more")


def positive(config: object, *names: str) -> None:
    """Refuse a number that is not above 0 by name.  Raises: ConfigError."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(what=f"{name} is {getattr(config, name)}", where=name, mend="use a number above 0")


def width_of_a_head(total: float, num_heads: int, what: str) -> int:
    """`total / num_heads` channels, which must be whole.  Raises: ConfigError."""
    if total != int(total) or int(total) % num_heads or total < num_heads:
        raise ConfigError(
            what=f"{num_heads} heads do not share {total:g} channels of {what} evenly",
            where="num_heads",
            mend="use a divisor of them, or change model.d_model",
        )
    return int(total) // num_heads


@dataclass(kw_only=True)
class RetNetConfig:
    """Linear attention with rotary positions and one constant decay per head (RetNet, 2023)."""

    num_heads: int = 4  # the paper's heads are 256 keys wide
    expand_v: int = 2  # width of all values / d_model
    rope_theta: float = 10_000.0  # base of the rotary angles

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "expand_v")
        positive(self, "rope_theta")


@dataclass(kw_only=True)
class GatedLinearAttentionConfig:
    """Linear attention whose every key channel forgets at a rate that the token decides (GLA, 2023)."""

    num_heads: int = 4
    expand_k: float = 0.5  # width of all keys / d_model
    expand_v: float = 1.0  # width of all values / d_model
    gate_rank: int = 16  # rank of the map from a token to its decays
    gate_temperature: float = 16.0  # divides log decays: the larger, the slower the state forgets

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "gate_rank")
        positive(self, "expand_k", "expand_v", "gate_temperature")


@dataclass(kw_only=True)
class GatedDeltaNetConfig:
    """The delta rule with a decay per head and token, behind a short convolution (Gated DeltaNet, 2024)."""

    num_heads: int = 6
    num_key_heads: int = 0  # heads of queries and keys, each shared by as many heads of values; 0: num_heads
    key_dim: int = 0  # width of one head's keys; 0: 0.75 d_model / num_heads, which makes a mixer 6 d_model^2
    expand_v: int = 2  # width of a head's values / width of its keys
    conv_width: int = 4  # tokens the short convolution sees, the current one included
    negative_eigenvalues: bool = False  # write gates in (0, 2) instead of (0, 1): a state may flip its sign

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "expand_v", "conv_width")
        if self.key_dim < 0:
            raise ConfigError(what=f"key_dim is {self.key_dim}", where="key_dim", mend="use 1 or more, or 0")
        if self.num_key_heads < 0 or (self.num_key_heads and self.num_heads % self.num_key_heads):
            raise ConfigError(
                what=f"{self.num_heads} heads cannot share {self.num_key_heads} key heads",
                where="num_key_heads",
                mend="use a divisor of num_heads, or 0",
            )


@dataclass(kw_only=True)
class DeltaNetConfig:
    """The delta rule behind a short convolution (DeltaNet, 2024)."""

    num_heads: int = 8
    conv_width: int = 4  # tokens the short convolution sees, the current one included
    negative_eigenvalues: bool = False  # write gates in (0, 2) instead of (0, 1): a state may flip its sign

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "conv_width")


DECAYS = ("alibi", "transnormer")


@dataclass(kw_only=True)
class LightningConfig:
    """Linear attention of activated queries, keys and values, with a constant decay per head and layer (Lightning)."""

    num_heads: int = 8
    decays: str = "alibi"  # alibi: MiniMax-01's rates 2^(-8 (h+1) / H); transnormer: TransNormerLLM's 8 h / H

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads")
        if self.decays not in DECAYS:
            raise ConfigError(what=f"decays is '{self.decays}'", where="decays", mend=f"use {' or '.join(DECAYS)}")


@dataclass(kw_only=True)
class MatrixLSTMConfig:
    """Linear attention with an exponential input gate, a forget gate and a normaliser (mLSTM of xLSTM 7B, 2025)."""

    num_heads: int = 4
    expand_k: float = 0.5  # width of all keys / d_model
    gate_cap: float = 15.0  # gates stay within +- this, softly: exp(15) is still exact enough to add up in float32

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads")
        positive(self, "expand_k", "gate_cap")
