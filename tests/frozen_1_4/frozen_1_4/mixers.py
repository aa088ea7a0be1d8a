from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from frozen_1_4.plugin import ListenConfig, TellConfig
from subquad import Mixer, MixerContext
from subquad_kernels.operators import softmax_attention


class PastCarry(NamedTuple):
    keys: Tensor
    values: Tensor


class CountCarry(NamedTuple):
    position: int


class Teller(nn.Module):
    def __init__(self, config: TellConfig, context: MixerContext) -> None:
        super().__init__()
        self.heads = (config.num_heads, context.d_model // config.num_heads)
        self.qkv = nn.Linear(context.d_model, 3 * context.d_model, bias=False)
        self.out = nn.Linear(context.d_model, context.d_model, bias=False)

    def init_parameters(self, std: float) -> None:
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, shared: Mapping[str, Tensor] | None = None):
        q, k, v = self._project(x)
        y = self.out(softmax_attention(q, k, v, cu_seqlens).flatten(2))
        return y if shared is None else (y, self._told(k, v, y))

    def empty_carry(self, batch_size: int) -> PastCarry:
        nothing = self.qkv.weight.new_zeros(batch_size, 0, *self.heads)
        return PastCarry(nothing, nothing.clone())

    def prefill(self, x: Tensor, carry: PastCarry, shared: Mapping[str, Tensor] | None = None):
        q, k, v = self._project(x)
        keys, values = torch.cat([carry.keys, k], dim=1), torch.cat([carry.values, v], dim=1)
        y = self.out(softmax_attention(q, keys, values).flatten(2))
        after = PastCarry(keys, values)
        return (y, after) if shared is None else (y, after, self._told(keys, values, y))

    def decode(self, x_t: Tensor, carry: PastCarry, shared: Mapping[str, Tensor] | None = None):
        y, *rest = self.prefill(x_t.unsqueeze(1), carry, shared)
        return y.squeeze(1), *rest

    def _project(self, x: Tensor):
        return self.qkv(x).unflatten(-1, (3, *self.heads)).unbind(2)

    def _told(self, keys: Tensor, values: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"frozen.keys": keys, "frozen.values": values, "frozen.tokens": y}


class Listener(nn.Module):
    def __init__(self, config: ListenConfig, context: MixerContext) -> None:
        super().__init__()
        assert context.published["frozen.tokens"].shape == (context.d_model,)
        self.heads = (config.num_heads, context.d_model // config.num_heads)
        self.share = config.share
        self.q = nn.Linear(context.d_model, context.d_model, bias=False)
        self.gain = nn.Parameter(torch.empty(context.d_model))

    def init_parameters(self, std: float) -> None:
        nn.init.normal_(self.q.weight, std=std)
        nn.init.ones_(self.gain)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None, shared: Mapping[str, Tensor]):
        q = self.q(x).unflatten(-1, self.heads)
        out = softmax_attention(q, shared["frozen.keys"], shared["frozen.values"], cu_seqlens).flatten(2)
        return x * out + self.share * self.gain * shared["frozen.tokens"], {}

    def empty_carry(self, batch_size: int) -> CountCarry:
        return CountCarry(0)

    def prefill(self, x: Tensor, carry: CountCarry, shared: Mapping[str, Tensor]):
        y, published = self.forward(x, None, shared)
        return y, CountCarry(carry.position + x.shape[1]), published

    def decode(self, x_t: Tensor, carry: CountCarry, shared: Mapping[str, Tensor]):
        y, after, published = self.prefill(x_t.unsqueeze(1), carry, shared)
        return y.squeeze(1), after, published


PROMISED: type[Mixer] = Teller
