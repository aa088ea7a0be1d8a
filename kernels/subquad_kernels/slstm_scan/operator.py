"""The torch op `subquad::slstm_scan` and the function that mixers call."""

from __future__ import annotations

from torch import Tensor

from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.slstm_scan.declaration import OPERATOR
from subquad_kernels.torch_operator import define

OP = define(
    OPERATOR,
    "(Tensor inputs, Tensor recurrent, Tensor bias, Tensor? initial_state, Tensor? cu_seqlens, str kernel)"
    " -> (Tensor, Tensor, Tensor)",
)


def slstm_scan(
    inputs: Tensor,
    recurrent: Tensor,
    bias: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    kernel: str = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """sLSTM  c_t = sig(f_t) c_{t-1} + e^i_t tanh z_t,   n_t = sig(f_t) n_{t-1} + e^i_t,   y_t = sig(o_t) c_t / n_t.

        i_t, f_t, z_t, o_t = inputs_t + bias + R y_{t-1}                    sig: the logistic function

    Shapes:  inputs: b t h 4 p    recurrent: h p 4 p    bias: h 4 p    cu_seqlens: documents + 1 (int32)
             initial_state: states 3 h p  ->  y: b t h p    final_state: states 3 h p (fp32; fp64 for fp64 inputs)
    `states` is b, or the number of documents when packed (then b is 1); a state holds y, c / n and log n, and that of
    no token 0, 0 and -inf. `kernel` names a kernel or a table of kernels.
    Raises: ValueError for shapes that do not fit; CatalogueError for an unknown kernel.
    Source: Beck et al. 2024 (xLSTM), section 2.2.
    """
    results = OP(inputs, recurrent, bias, initial_state, cu_seqlens, kernel)
    return results[0], results[1]
