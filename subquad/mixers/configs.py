"""The config dataclasses of the built-in mixers; importing them loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from subquad.contracts import MixerContext, SharedTensor, Sharing
from subquad.errors import ConfigError

KV = ("own", "publish", "read")


@dataclass(kw_only=True)
class SoftmaxAttentionConfig:
    """Softmax attention over all earlier tokens."""

    num_heads: int = 4  # heads of queries
    num_kv_heads: int = 0  # heads of keys and values; 0: num_heads
    head_dim: int = 0  # width of a head; 0: d_model / num_heads
    rope_theta: float = 1e6  # base of the rotary angles
    bidirectional: bool = False  # see later tokens too, whole sequences alone
    kv: str = "own"  # keys and values: own | publish (for later layers too) | read (those of the last that publishes)

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
        if self.kv not in KV:
            raise ConfigError(what=f"kv is '{self.kv}'", where="kv", mend=f"use {', '.join(KV[:-1])} or {KV[-1]}")
        if self.bidirectional and self.kv != "own":
            raise ConfigError(
                what=f"bidirectional attention has its own keys and values, and kv is '{self.kv}'",
                where="bidirectional",
                mend="use kv: own, or leave bidirectional out",
            )

    def resolved_head_dim(self, d_model: int) -> int:
        """`head_dim`, or what the heads have of `d_model` each.  Raises: ConfigError."""
        if not self.head_dim and d_model % self.num_heads:
            raise ConfigError(
                what=f"{self.num_heads} heads do not divide the width {d_model}",
                where="num_heads",
                mend="use a divisor of model.d_model, or set head_dim",
            )
        return self.head_dim or d_model // self.num_heads


@dataclass(kw_only=True)
class WindowConfig(SoftmaxAttentionConfig):
    """Softmax attention over the last `window` tokens, itself included, or as many to either side."""

    window: int = 64  # tokens that a token sees, itself included

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ConfigError(what=f"window is {self.window}", where="window", mend="use 1 or more")


def share_keys(config: SoftmaxAttentionConfig, context: MixerContext) -> Sharing:
    """Rotated keys, and values, of all tokens so far; a window's go to windows of its width alone."""
    if config.kv == "own":
        return Sharing()
    options: dict[str, object] = {"rope_theta": config.rope_theta}
    kind = "softmax_attention"
    if isinstance(config, WindowConfig):
        kind, options["window"] = "window", config.window
    heads = config.num_kv_heads or config.num_heads
    tensor = SharedTensor(shape=(heads, config.resolved_head_dim(context.d_model)), history=True, options=options)
    shared = {f"{kind}.keys": tensor, f"{kind}.values": tensor}
    return Sharing(reads=shared) if config.kv == "read" else Sharing(publishes=shared)
