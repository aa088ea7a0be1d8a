"""The torch op `subquad::leaky_sum` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from leaky_sum.plugin import KERNELS, OPERATOR
from subquad_kernels import CATALOGUE
from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.torch_operator import define

# subquad does the same when it loads the plugin; this is for who imports the operator alone.
CATALOGUE.add_operators([OPERATOR])
CATALOGUE.add_kernels(KERNELS)

OP = define(
    OPERATOR,
    "(Tensor x, Tensor log_decay, Tensor? initial_state, Tensor? cu_seqlens, str kernel) -> (Tensor, Tensor)",
)


def leaky_sum(
    x: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Decayed sum  y_t = exp(log_decay) y_{t-1} + x_t,  each channel by itself.

    Shapes:  x: b t c    log_decay: c    initial_state: q c    cu_seqlens: documents + 1 (int32)
             ->  y: b t c    final_state: q c
    Raises: ValueError for shapes that do not fit; CatalogueError for an unknown kernel.
    """
    y, final_state = OP(x, log_decay, initial_state, cu_seqlens, kernel)
    return y, final_state
