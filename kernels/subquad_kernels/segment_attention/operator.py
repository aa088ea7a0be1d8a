"""The torch op `subquad::segment_attention` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.segment_attention.declaration import OPERATOR
from subquad_kernels.torch_operator import define

# `start` grows by one a decoded token: a SymInt, or torch.compile would compile each length anew.
OP = define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor v, Tensor? summary_k, Tensor? summary_v, Tensor? cu_seqlens, int segment_len,"
    " SymInt start, float? scale, str kernel) -> (Tensor, Tensor)",
)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary_k: Tensor | None = None,
    summary_v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    segment_len: int,
    start: int = 0,
    scale: float | None = None,
    kernel: str = DEFAULT,
) -> Tensor:
    """Attention of each token to itself and to the last token of every complete segment strictly before it.

    Shapes:  q: b t h k    k: b t h_kv k    v: b t h_kv v    summary_k, summary_v: b m h_kv k | v    ->  b t h v
    `start` tokens came before this call; their m = start // segment_len summaries are handed in. `scale` None is
    k^-0.5. `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes that do not fit; CatalogueError for an unknown kernel.
    Source: SCOUT 2025 (arXiv 2509.00935).
    """
    return OP(q, k, v, summary_k, summary_v, cu_seqlens, segment_len, start, scale, kernel)[0]  # type: ignore[no-any-return]
