"""The torch op `subquad::cached_attention` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.cached_attention.declaration import OPERATOR
from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor position, int segment_len, float? scale,"
    " str kernel) -> Tensor",
)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    segment_len: int = 1,
    scale: float | None = None,
    kernel: str = DEFAULT,
) -> Tensor:
    """Attention of one token to itself and to what of a ring of m places was written (`subquad_kernels.ring`).

    Shapes:  q: b 1 h k    k: b 1 h_kv k    v: b 1 h_kv v    keys, values: b m h_kv k | v    position: 1 (int64)
             ->  b 1 h v
    `position` counts the tokens before this one, of which the last of each `segment_len` were kept. The place that this
    token is due to take is not seen. `scale` None is k^-0.5. `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes that do not fit; CatalogueError for an unknown kernel.
    Source: Vaswani et al. 2017, section 3.2; SCOUT 2025 (arXiv 2509.00935).
    """
    return OP(q, k, v, keys, values, position, segment_len, scale, kernel)  # type: ignore[no-any-return]
