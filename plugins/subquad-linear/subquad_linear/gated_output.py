"""How RetNet, GLA and Gated DeltaNet leave a mixer: heads normalised, gated by the input, projected."""

from __future__ import annotations

from torch import Tensor, nn

from subquad_kernels.operators import gated_norm
from subquad_linear.exact_norm import EPS, ExactNorm


class GatedOutput(nn.Module):
    """y = W_o concat_heads( RMSNorm(o) * silu(W_g x) ), the norm over each head by itself; no biases.

    Shapes:  o: b t h p    x: b t d  ->  b t d      `affine`: the norm has a weight of p, shared by the heads
    Source: Sun et al. 2023 (RetNet), equation 8; Yang et al. 2023 (GLA), section 4.4.
    """

    def __init__(self, d_model: int, num_heads: int, value_dim: int, *, affine: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = ExactNorm(value_dim, affine=affine)
        self.g_proj = nn.Linear(d_model, num_heads * value_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * value_dim, d_model, bias=False)

    def leave(self, o: Tensor, x: Tensor) -> Tensor:
        """Leave the heads; not `forward`, so that the operator is a node of the mixer.

        Shapes:  o: b t h p    x: b t d  ->  b t d
        """
        y = gated_norm(o.flatten(2), self.g_proj(x), self.norm.weight, groups=self.num_heads, eps=EPS)
        return self.o_proj(y)  # type: ignore[no-any-return]
