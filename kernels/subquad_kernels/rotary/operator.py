"""The torch op `subquad::rotary` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.rotary.declaration import OPERATOR
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor q, Tensor k, Tensor? angles, Tensor? cu_seqlens, Tensor? position, int start, float theta, str kernel)"
    " -> (Tensor, Tensor)",
)


def rotary(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    angles: Tensor | None = None,
    position: Tensor | None = None,
    start: int = 0,
    theta: float = 1e6,
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions:  (x_i, x_{i+k/2}) turned by  p theta^(-2 i / k).

    Shapes:  q: b t h k    k: b t h_kv k    cu_seqlens: documents + 1 (int32; then b is 1)    position: 1 (int64)
             angles: b t a s with 2 s <= k, of all heads (a = 1) or each (a = h = h_kv)  ->  as q and k
    Positions count from `start`, and what `position` holds on the device is added; from 0 at each document when packed.
    Where `angles` are given, they turn neighbours (x_2i, x_2i+1), i < s, and positions are not asked for.
    `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes that do not fit; CatalogueError for an unknown kernel.
    Source: Su et al. 2021, section 3.4.2; half-split pairs. Given angles: Lahoti et al. 2026, section 3.2.
    """
    rotated_q, rotated_k = OP(q, k, angles, cu_seqlens, position, start, theta, kernel)
    return rotated_q, rotated_k
