"""The torch op `subquad::selective_scan` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.selective_scan.declaration import OPERATOR
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? cu_seqlens, bool softplus, bool reversed, str kernel) -> (Tensor, Tensor, Tensor, Tensor)",
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    softplus: bool = True,
    reversed: bool = False,
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Selective scan  h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,   y_t = (C_t . h_t + D x_t) silu(z_t).

    Shapes:  x, dt, z: b t c    A: c n (negative)    B, C: b t n    D, dt_bias: c    cu_seqlens: documents + 1 (int32)
             initial_state: q c n  ->  y: b t c    final_state: q c n (fp32; fp64 for fp64 inputs)
    q is b, or the number of documents when packed (then b is 1). With `softplus` the step size is
    softplus(dt + dt_bias), else dt + dt_bias. `reversed` scans each sequence or document from its last token to its
    first: the initial state enters at the last, final_state leaves the first. `kernel` names a
    kernel or a table of kernels.
    Raises: ValueError for shapes that do not fit; CatalogueError for an unknown kernel.
    Source: Gu and Dao 2023 (Mamba), section 3.
    """
    results = OP(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, softplus, reversed, kernel)
    return results[0], results[1]
