"""The per-token half of a block: SwiGLU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from subquad.contracts import ProjectionSplit


class ChannelMixer(nn.Module):
    """y = W_down( silu(W_gate x) * W_up x ), no biases.  Shapes:  x: ... d  ->  ... d

    Source: Shazeer 2020, equation 6 (SwiGLU).
    """

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden, bias=False)
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def init_parameters(self, std: float) -> None:
        """Every map normal(0, std)."""
        for linear in (self.gate, self.up, self.down):
            nn.init.normal_(linear.weight, std=std)

    def tensor_parallel_plan(self) -> ProjectionSplit:
        """Hidden channels are dealt out."""
        return ProjectionSplit(columns=("gate", "up"), rows=("down",), units={"d_hidden": self.gate.out_features})

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of each token."""
        return self.down(silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]
