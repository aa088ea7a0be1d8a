"""How segment attention is configured; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from subquad import ConfigError, MixerContext, SharedTensor, Sharing

KV = ("own", "publish", "read")


@dataclass(kw_only=True)
class SegmentAttentionConfig:
    """Attention to oneself and to the last token of every complete segment before."""

    segment_len: int | str = 10  # tokens one summary stands for; "sqrt": the square root of the model's context_len
    num_heads: int = 4  # heads of queries
    num_kv_heads: int = 0  # heads of keys and values; 0: num_heads
    head_dim: int = 0  # width of a head; 0: d_model / num_heads
    rope_theta: float = 1e6  # base of the rotary angles
    kv: str = "own"  # keys and values: own | publish (for later layers too) | read (those of the last that publishes)

    def __post_init__(self) -> None:
        if isinstance(self.segment_len, str) and self.segment_len != "sqrt":
            raise ConfigError(
                what=f"segment_len is '{self.segment_len}'", where="segment_len", mend="use a number, or sqrt"
            )
        if isinstance(self.segment_len, int) and self.segment_len < 1:
            raise ConfigError(
                what=f"segment_len is {self.segment_len}",
                where="segment_len",
                mend="use 1 (full attention) or more, or sqrt",
            )
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

    def resolved_segment_len(self, context_len: int) -> int:
        """The number of tokens in a segment, for a model built for sequences of `context_len` tokens."""
        return math.isqrt(context_len - 1) + 1 if isinstance(self.segment_len, str) else self.segment_len

    def resolved_head_dim(self, d_model: int) -> int:
        """`head_dim`, or what the heads have of `d_model` each.  Raises: ConfigError."""
        if not self.head_dim and d_model % self.num_heads:
            raise ConfigError(
                what=f"{self.num_heads} heads do not divide the width {d_model}",
                where="num_heads",
                mend="use a divisor of model.d_model, or set head_dim",
            )
        return self.head_dim or d_model // self.num_heads


def share_summaries(config: SegmentAttentionConfig, context: MixerContext) -> Sharing:
    """Rotated keys, and values, of the segments' last tokens so far and of all tokens of the call."""
    if config.kv == "own":
        return Sharing()
    segment_len = config.resolved_segment_len(context.context_len)
    tensor = SharedTensor(
        shape=(config.num_kv_heads or config.num_heads, config.resolved_head_dim(context.d_model)),
        history=True,
        every=segment_len,
        options={"rope_theta": config.rope_theta, "segment_len": segment_len},
    )
    shared = {"segment_attention.keys": tensor, "segment_attention.values": tensor}
    return Sharing(reads=shared) if config.kv == "read" else Sharing(publishes=shared)
