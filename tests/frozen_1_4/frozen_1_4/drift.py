from typing import NamedTuple

import torch
from torch import Tensor, nn

from frozen_1_4.plugin import DriftConfig
from subquad import Bidirectional, MixerContext, ReversedDocuments
from subquad_kernels.operators import linear_attention


class DriftCarry(NamedTuple):
    state: Tensor


class Drift(nn.Module):
    def __init__(self, config: DriftConfig, context: MixerContext) -> None:
        super().__init__()
        self.width = context.d_model
        self.qkv = nn.Linear(context.d_model, 3 * context.d_model, bias=False)
        self.register_buffer("log_decay", torch.full((1,), -0.1))

    def init_parameters(self, std: float) -> None:
        nn.init.normal_(self.qkv.weight, std=std)
        self.log_decay.fill_(-0.1)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        q, k, v = self._project(x)
        return linear_attention(q, k, v, self.log_decay, cu_seqlens=cu_seqlens)[0].flatten(2)

    def empty_carry(self, batch_size: int) -> DriftCarry:
        exact = torch.promote_types(self.qkv.weight.dtype, torch.float32)
        return DriftCarry(self.qkv.weight.new_zeros(batch_size, 1, self.width, self.width, dtype=exact))

    def prefill(self, x: Tensor, carry: DriftCarry) -> tuple[Tensor, DriftCarry]:
        q, k, v = self._project(x)
        y, state = linear_attention(q, k, v, self.log_decay, initial_state=carry.state)
        return y.flatten(2), DriftCarry(state)

    def decode(self, x_t: Tensor, carry: DriftCarry) -> tuple[Tensor, DriftCarry]:
        y, after = self.prefill(x_t.unsqueeze(1), carry)
        return y.squeeze(1), after

    def _project(self, x: Tensor):
        return self.qkv(x).unflatten(-1, (3, 1, self.width)).unbind(2)


class BothDrifts(Bidirectional, Drift):
    def __init__(self, config: DriftConfig, context: MixerContext) -> None:
        super().__init__(config, context)
        self.backwards = ReversedDocuments()

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        q, k, v = self._project(x)
        ahead, _ = linear_attention(q, k, v, self.log_decay, cu_seqlens=cu_seqlens)
        turned = [self.backwards(tensor, cu_seqlens) for tensor in (q, k, v)]
        back, _ = linear_attention(*turned, self.log_decay, cu_seqlens=cu_seqlens)
        return (ahead + self.backwards(back, cu_seqlens)).flatten(2)


def build(config: DriftConfig, context: MixerContext) -> Drift:
    return (BothDrifts if config.bidirectional else Drift)(config, context)
