"""The config dataclasses of the built-in mixers; importing them loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from subquad.errors import ConfigError


@dataclass(kw_only=True)
class SoftmaxAttentionConfig:
    """Softmax attention over all earlier tokens."""

    num_heads: int = 4
    num_kv_heads: int = 0  # heads of keys and values; 0: num_heads
    head_dim: int = 0  # 0: d_model / num_heads
    rope_theta: float = 1e6  # base of the rotary angles

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ConfigError(what=f"num_heads is {self.num_heads}", where="num_heads", mend="use 1 or more")
        if self.num_kv_heads < 0 or (self.num_kv_heads and self.num_heads % self.num_kv_heads):
            raise ConfigError(
                what=f"{self.num_heads} heads cannot share {self.num_kv_heads} key heads",
                where="num_kv_heads",
                mend="use a divisor of num_heads, or 0",
            )
        if self.head_dim % 2 or self.head_dim < 0:
            raise ConfigError(what=f"head_dim is {self.head_dim}", where="head_dim", mend="use an even number, or 0")


@dataclass(kw_only=True)
class WindowConfig(SoftmaxAttentionConfig):
    """Softmax attention over the last `window` tokens, itself included."""

    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ConfigError(what=f"window is {self.window}", where="window", mend="use 1 or more")
