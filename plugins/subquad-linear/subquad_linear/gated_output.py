"""How RetNet, GLA and Gated DeltaNet leave a mixer: heads normalised, gated by the input, projected."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from subquad_linear.exact_norm import ExactNorm


class GatedOutput(nn.Module):
    """y = W_o concat_heads( RMSNorm(o) * silu(W_g x) ), the norm over each head by itself; no biases.

    Shapes:  o: b t h p    x: b t d  ->  b t d      `affine`: the norm has a weight of p, shared by the heads
    Source: Sun et al. 2023 (RetNet), equation 8; Yang et al. 2023 (GLA), section 4.4.
    """

    def __init__(self, d_model: int, num_heads: int, value_dim: int, *, affine: bool = True) -> None:
        super().__init__()
        self.norm = ExactNorm(value_dim, affine=affine)
        self.g_proj = nn.Linear(d_model, num_heads * value_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * value_dim, d_model, bias=False)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        """Leave the heads.  Shapes:  o: b t h p    x: b t d  ->  b t d"""
        return self.o_proj(self.norm(o).flatten(2) * silu(self.g_proj(x)))  # type: ignore[no-any-return]
