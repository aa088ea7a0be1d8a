"""The torch op `subquad::gated_norm` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.gated_norm.declaration import OPERATOR
from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor x, Tensor z, Tensor? weight, Tensor? skip, Tensor? skip_weight, int groups, bool gate_first, "
    "str activation, float eps, str kernel) -> Tensor",
)


def gated_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None = None,
    *,
    groups: int = 1,
    gate_first: bool = False,
    activation: str = "silu",
    eps: float = 1e-6,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    kernel: str = DEFAULT,
) -> Tensor:
    """Normalise groups of channels, and gate:  y = RMS(v) weight act(z),  or RMS( v act(z) ) weight  (`gate_first`).

    Shapes:  x, z, skip: b t c    weight: c, or c / groups, shared by them    skip_weight: h  ->  b t c
    v = x + skip_weight skip, a number for each c / h channels; `activation` is silu or sigmoid. Inside all is fp32 or
    wider, y has the type of x. `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes that do not fit; CatalogueError for an unknown kernel.
    Source: Zhang and Sennrich 2019; Dao and Gu 2024 (Mamba-2), section 7.3; Sun et al. 2023 (RetNet), equation 8.
    """
    y: Tensor = OP(x, z, weight, skip, skip_weight, groups, gate_first, activation, eps, kernel)
    return y
