"""The torch op `subquad::gated_norm` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.gated_norm.declaration import OPERATOR
from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor x, Tensor? z, Tensor? weight, Tensor? bias, Tensor? skip, Tensor? skip_weight, int groups, "
    "bool gate_first, bool norm, bool centre, str activation, float eps, str kernel) -> Tensor",
)


def gated_norm(
    x: Tensor,
    z: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    gate_first: bool = False,
    norm: bool = True,
    centre: bool = False,
    activation: str = "silu",
    eps: float = 1e-6,
    skip: Tensor | None = None,
    skip_weight: Tensor | None = None,
    kernel: str = DEFAULT,
) -> Tensor:
    """Normalise groups of channels, and gate:  y = (N(v) weight + bias) act(z),  or  N( v act(z) ) weight + bias.

    Shapes:  x, z, skip: b t c    weight, bias: c, or c / groups, shared by them    skip_weight: h  ->  b t c
    The second with `gate_first`; no gate without z. v = x + skip_weight skip, a number for each c / h channels.
    N(s) = s / sqrt(mean s^2 + eps), with `centre` of s - mean s; without `norm` s itself. `activation` is silu, sigmoid
    or identity. Inside all is fp32 or wider, y has the type of x. `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes that do not fit; CatalogueError for an unknown kernel.
    Source: Zhang and Sennrich 2019; Wu and He 2018 (group norm); Dao and Gu 2024 (Mamba-2), section 7.3; Sun et al.
            2023 (RetNet), equation 8.
    """
    y: Tensor = OP(x, z, weight, bias, skip, skip_weight, groups, gate_first, norm, centre, activation, eps, kernel)
    return y
