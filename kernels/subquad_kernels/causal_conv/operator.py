"""The torch op `subquad::causal_conv` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.causal_conv.declaration import OPERATOR
from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, str activation, str kernel)"
    " -> (Tensor, Tensor)",
)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    activation: str = "silu",
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Causal convolution  y_t = act( bias + sum_j weight[:, j] x_{t-w+1+j} ),  each channel by itself.

    Shapes:  x: b t c    weight: c w    bias: c    initial_state: q (w-1) c    cu_seqlens: documents + 1 (int32)
             ->  y: b t c    final_state: q (w-1) c, the last w-1 inputs, oldest first
    q is b, or the number of documents when packed (then b is 1). `activation` is "silu" or "none". `kernel` names a
    kernel or a table of kernels.
    Raises: ValueError for shapes or options that do not fit; CatalogueError for an unknown kernel.
    Source: Gu and Dao 2023 (Mamba), figure 3.
    """
    results = OP(x, weight, bias, initial_state, cu_seqlens, activation, kernel)
    return results[0], results[1]
