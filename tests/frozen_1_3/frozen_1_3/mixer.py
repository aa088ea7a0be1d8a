from typing import NamedTuple

import torch
from torch import Tensor, nn

from frozen_1_3.operator import scale
from frozen_1_3.plugin import MixConfig
from subquad import Mixer, MixerContext


class MixCarry(NamedTuple):
    seen: int


class Mix(nn.Module):
    def __init__(self, config: MixConfig, context: MixerContext) -> None:
        super().__init__()
        assert 0 <= context.layer_index < context.num_layers
        assert context.context_len > 0
        self.factor = config.factor
        self.gain = nn.Parameter(torch.empty(context.d_model))

    def init_parameters(self, std: float) -> None:
        nn.init.normal_(self.gain, mean=1.0, std=std)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return scale(x * self.gain, self.factor)

    def empty_carry(self, batch_size: int) -> MixCarry:
        return MixCarry(0)

    def prefill(self, x: Tensor, carry: MixCarry) -> tuple[Tensor, MixCarry]:
        return self(x), MixCarry(carry.seen + x.shape[1])

    def decode(self, x_t: Tensor, carry: MixCarry) -> tuple[Tensor, MixCarry]:
        y, carry = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), carry


PROMISED: type[Mixer] = Mix
