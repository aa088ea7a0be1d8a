"""The torch op `subquad::softmax_attention` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.softmax_attention.declaration import OPERATOR
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, bool causal, int window, float? scale, str kernel)"
    " -> (Tensor, Tensor)",
)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
    kernel: str = DEFAULT,
) -> Tensor:
    """Softmax attention  o_i = sum_j softmax_j( scale q_i . k_j ) v_j  over the keys that token i may see.

    Shapes:  q: b t h k    k: b s h_kv k    v: b s h_kv v    cu_seqlens: documents + 1 (int32)  ->  b t h v
    Queries are the last t of the s positions. `window` counts tokens, itself included, to either side that is seen; 0
    is no window. `scale` None is k^-0.5. `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes that do not fit; CatalogueError for an unknown kernel.
    Source: Vaswani et al. 2017, section 3.2.
    """
    return OP(q, k, v, cu_seqlens, causal, window, scale, kernel)[0]  # type: ignore[no-any-return]
