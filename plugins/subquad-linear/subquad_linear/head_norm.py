"""How RWKV and the LSTMs leave their heads: each centred and scaled by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from subquad_kernels.operators import gated_norm


class HeadNorm(nn.Module):
    """y = ((x - mean x) / sqrt(var x + eps) * weight + bias) * act(gate), a head each; y has the type of x.

    In fp32 or wider. No bias where it has none, no gate where none is given.
    Shapes:  x: b t h p    gate: b t (h p)  ->  b t (h p)    weight, bias: h p
    Source: Peng et al. 2024 (Eagle and Finch), section 4; Beck et al. 2024 (xLSTM), figures 10 and 11; Wu and He 2018
            (group norm).
    """

    def __init__(self, num_heads: int, width: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.weight = nn.Parameter(torch.ones(num_heads * width))
        self.bias = nn.Parameter(torch.zeros(num_heads * width)) if bias else None

    def init_parameters(self, weight: float) -> None:
        """One weight for all channels, no bias."""
        nn.init.constant_(self.weight, weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def leave(self, x: Tensor, gate: Tensor | None = None, activation: str = "silu") -> Tensor:
        """Centre, scale and gate each head; not `forward`, so that the operator is a node of the mixer."""
        return gated_norm(
            x.flatten(2), gate, self.weight, self.bias,
            groups=self.num_heads, centre=True, activation=activation, eps=self.eps,
        )  # fmt: skip
