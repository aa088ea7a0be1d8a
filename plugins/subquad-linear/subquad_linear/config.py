"""How the mixers of this plugin are configured; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from subquad import ConfigError, MixerContext, SharedTensor, Sharing


def at_least_one(config: object, *names: str) -> None:
    """Refuse a size below 1 by name.  Raises: ConfigError."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(what=f"{name} is {getattr(config, name)}", where=name, mend="use 1 or more")


def at_least_zero(config: object, *names: str) -> None:
    """Refuse a negative size by name, where 0 stands for a rule.  Raises: ConfigError."""
    for name in names:
        if getattr(config, name) < 0:
            raise ConfigError(what=f"{name} is {getattr(config, name)}", where=name, mend="use 1 or more, or 0")


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

    num_heads: int = 4  # heads, each with a state of its own; the paper's are 256 keys wide
    expand_v: int = 2  # width of all values / d_model
    rope_theta: float = 10_000.0  # base of the rotary angles
    bidirectional: bool = False  # see later tokens too, whole sequences alone

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "expand_v")
        positive(self, "rope_theta")


@dataclass(kw_only=True)
class GatedLinearAttentionConfig:
    """Linear attention whose every key channel forgets at a rate that the token decides (GLA, 2023)."""

    num_heads: int = 4  # heads, each with a state of its own
    expand_k: float = 0.5  # width of all keys / d_model
    expand_v: float = 1.0  # width of all values / d_model
    gate_rank: int = 16  # rank of the map from a token to its decays
    gate_temperature: float = 16.0  # divides log decays: the larger, the slower the state forgets
    bidirectional: bool = False  # a second mixer from the last token to the first, whole sequences alone

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "gate_rank")
        positive(self, "expand_k", "expand_v", "gate_temperature")


@dataclass(kw_only=True)
class GatedDeltaNetConfig:
    """The delta rule with a decay per head and token, behind a short convolution (Gated DeltaNet, 2024)."""

    num_heads: int = 6  # heads, each with a state of its own
    num_key_heads: int = 0  # heads of queries and keys, each shared by as many heads of values; 0: num_heads
    key_dim: int = 0  # width of one head's keys; 0: 0.75 d_model / num_heads, which makes a mixer 6 d_model^2
    expand_v: int = 2  # width of a head's values / width of its keys
    conv_width: int = 4  # tokens the short convolution sees, the current one included
    negative_eigenvalues: bool = False  # write gates in (0, 2) instead of (0, 1): a state may flip its sign
    bidirectional: bool = False  # a second mixer from the last token to the first, whole sequences alone

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

    num_heads: int = 8  # heads, each with a state of its own
    conv_width: int = 4  # tokens the short convolution sees, the current one included
    negative_eigenvalues: bool = False  # write gates in (0, 2) instead of (0, 1): a state may flip its sign

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "conv_width")


DECAYS = ("alibi", "transnormer")


@dataclass(kw_only=True)
class LightningConfig:
    """Linear attention of activated queries, keys and values, with a constant decay per head and layer (Lightning)."""

    num_heads: int = 8  # heads, each with a state of its own
    decays: str = "alibi"  # alibi: MiniMax-01's rates 2^(-8 (h+1) / H); transnormer: TransNormerLLM's 8 h / H
    bidirectional: bool = False  # see later tokens too, whole sequences alone

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads")
        if self.decays not in DECAYS:
            raise ConfigError(what=f"decays is '{self.decays}'", where="decays", mend=f"use {' or '.join(DECAYS)}")


@dataclass(kw_only=True)
class MatrixLSTMConfig:
    """Linear attention with an exponential input gate, a forget gate and a normaliser (mLSTM of xLSTM 7B, 2025)."""

    num_heads: int = 4  # heads, each with a state of its own
    expand_k: float = 0.5  # width of all keys / d_model
    gate_cap: float = 15.0  # gates stay within +- this, softly: exp(15) is still exact enough to add up in float32
    bidirectional: bool = False  # a second mixer from the last token to the first, whole sequences alone

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads")
        positive(self, "expand_k", "gate_cap")


@dataclass(kw_only=True)
class RWKV6Config:
    """Decays per channel and token behind a token shift that the token decides itself (RWKV-6, 2024)."""

    num_heads: int = 4  # heads, each with a state of its own; the authors' are 64 wide
    mix_rank: int = 32  # rank of each stream's map from a token to its share of the one before
    decay_rank: int = 64  # rank of the map from a token to its decays
    blocks_per_layer: int = 1  # blocks that the authors count as one layer: 2 with rwkv_channel_mix

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "mix_rank", "decay_rank", "blocks_per_layer")


@dataclass(kw_only=True)
class RWKV7Config:
    """A delta rule with decays per channel and a removal of its own, behind a token shift (RWKV-7, 2025)."""

    num_heads: int = 4  # heads, each with a state of its own; the authors' are 64 wide
    decay_rank: int = 0  # rank of the map from a token to its decays; 0: 2.5 sqrt(d_model)
    rate_rank: int = 0  # rank of the map from a token to its rates in context; 0: 2.5 sqrt(d_model)
    gate_rank: int = 0  # rank of the output gate; 0: 5 sqrt(d_model)
    value_residual: bool = True  # layers after the first mix its values into theirs
    value_rank: int = 0  # rank of the map from a token to their shares; 0: 1.7 sqrt(d_model); all rounded to 32
    blocks_per_layer: int = 1  # blocks that the authors count as one layer: 2 with rwkv_channel_mix

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "blocks_per_layer")
        at_least_zero(self, "decay_rank", "rate_rank", "gate_rank", "value_rank")

    def resolved_decay_rank(self, d_model: int) -> int:
        """`decay_rank`, or what the authors suggest."""
        return self.decay_rank or _suggested_rank(2.5, d_model)

    def resolved_rate_rank(self, d_model: int) -> int:
        """`rate_rank`, or what the authors suggest."""
        return self.rate_rank or _suggested_rank(2.5, d_model)

    def resolved_gate_rank(self, d_model: int) -> int:
        """`gate_rank`, or what the authors suggest."""
        return self.gate_rank or _suggested_rank(5.0, d_model)

    def resolved_value_rank(self, d_model: int) -> int:
        """`value_rank`, or what the authors suggest."""
        return self.value_rank or _suggested_rank(1.7, d_model)


FIRST_VALUE = "rwkv7.value"
"""What the first layer of RWKV-7 publishes: its values."""


def share_values(config: RWKV7Config, context: MixerContext) -> Sharing:
    """The first layer publishes its values, b t d; every later one reads them."""
    if not config.value_residual:
        return Sharing()
    value = {FIRST_VALUE: SharedTensor(shape=(context.d_model,))}
    return Sharing(reads=value) if FIRST_VALUE in context.published else Sharing(publishes=value)


def _suggested_rank(factor: float, d_model: int) -> int:
    """factor sqrt(d), rounded to 32, at least 32 (the authors' code of RWKV-7)."""
    return max(32, round(factor * math.sqrt(d_model) / 32) * 32)


@dataclass(kw_only=True)
class RWKVChannelMixConfig:
    """A squared-ReLU channel mix behind a token shift, in a block of its own (RWKV-6 and RWKV-7)."""

    d_hidden: int = 0  # hidden width; 0: 4 d_model, or with `receptance` 3.5 d_model, rounded down to 32
    receptance: bool = False  # a gate of the token: RWKV-6 has it, RWKV-7 has not
    blocks_per_layer: int = 2  # blocks that the authors count as one layer

    def __post_init__(self) -> None:
        at_least_one(self, "blocks_per_layer")
        at_least_zero(self, "d_hidden")

    def resolved_d_hidden(self, d_model: int) -> int:
        """`d_hidden`, or the authors' choice."""
        if self.d_hidden:
            return self.d_hidden
        return max(32, int(3.5 * d_model) // 32 * 32) if self.receptance else 4 * d_model


@dataclass(kw_only=True)
class ScalarLSTMConfig:
    """A recurrent network with exponential gates, whose heads mix their hidden states (sLSTM of xLSTM, 2024)."""

    num_heads: int = 4  # heads, each with a state of its own
    conv_width: int = 4  # tokens that the input and the forget gate see, the current one included

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "conv_width")


@dataclass(kw_only=True)
class LogLinearConfig:
    """Gated linear attention over log t states, each read with a weight of its own (log-linear attention, 2025)."""

    num_heads: int = 4  # heads, each with a state of its own
    expand_k: float = 0.5  # width of all keys / d_model
    expand_v: float = 1.0  # width of all values / d_model
    gate_temperature: float = 16.0  # divides log decays: the larger, the slower the states forget
    num_levels: int = 0  # weights of a token; 0: as many as model.context_len asks for, its bits and one

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads")
        positive(self, "expand_k", "expand_v", "gate_temperature")
        if self.num_levels < 0:
            raise ConfigError(what=f"num_levels is {self.num_levels}", where="num_levels", mend="use 1 or more, or 0")

    def resolved_levels(self, context_len: int) -> int:
        """The bits of the largest number below `context_len`, and one for the token itself."""
        return self.num_levels or (context_len - 1).bit_length() + 1


@dataclass(kw_only=True)
class LogLinearGatedDeltaNetConfig(GatedDeltaNetConfig):
    """Gated DeltaNet with log t states, each read with a weight of its own (log-linear attention, 2025)."""

    num_levels: int = 0  # weights of a token; 0: as many as model.context_len asks for, its bits and one

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(self, "num_levels")

    def resolved_levels(self, context_len: int) -> int:
        """The bits of the largest number below `context_len`, and one for the token itself."""
        return self.num_levels or (context_len - 1).bit_length() + 1


@dataclass(kw_only=True)
class TTTLinearConfig:
    """A linear map as state, trained on the tokens it meets (TTT-Linear, 2024)."""

    num_heads: int = 4  # heads, each with a state of its own
    mini_batch: int = 16  # tokens whose gradients are taken at the same weights
    base_rate: float = 1.0  # largest learning rate of the inner model, before it is divided by a head's width
    rope_theta: float = 10_000.0  # base of the rotary angles, whose positions restart with every mini-batch
    gate: bool = False  # multiply the output by gelu(W_g x), as in the paper's Mamba backbone

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "mini_batch")
        positive(self, "base_rate", "rope_theta")


@dataclass(kw_only=True)
class TTTMLPConfig(TTTLinearConfig):
    """A two-layer model as state, trained on the tokens it meets (TTT-MLP, 2024)."""

    base_rate: float = 0.1  # largest learning rate of the inner model, before it is divided by a head's width


@dataclass(kw_only=True)
class TTTLinearMambaConfig(TTTLinearConfig):
    """TTT-Linear with convolved queries and keys of one map, and a gate: that of the paper's Mamba backbone (2024)."""

    gate: bool = True  # multiply the output by gelu(W_g x)
    conv_width: int = 4  # tokens that the convolutions of queries and of keys see, the current one included

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "conv_width")


@dataclass(kw_only=True)
class TTTMLPMambaConfig(TTTLinearMambaConfig):
    """TTT-MLP with convolved queries and keys of one map, and a gate: that of the paper's Mamba backbone (2024)."""

    base_rate: float = 0.1  # largest learning rate of the inner model, before it is divided by a head's width


@dataclass(kw_only=True)
class ShortConvConfig:
    """A short convolution in a block of its own, before each TTT layer of the paper's Mamba backbone (TTT, 2024)."""

    conv_width: int = 4  # tokens it sees, the current one included

    def __post_init__(self) -> None:
        at_least_one(self, "conv_width")
