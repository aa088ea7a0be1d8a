"""mamba-ssm's kernels of this operator: the scan of CUDA, and the step of one token (decode) in Triton.

The scan hands out the final state and ignores its gradient. Where one is asked for, n more tokens follow the sequence:
of step zero, so that they leave the state as it is, and the j-th reads column j of it, as an output that has a
gradient. They cannot be gated, so the gate is then applied here.

Source: package mamba-ssm 2.3, `selective_scan_interface` and `triton.selective_state_update`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad_kernels.determinism import deterministic
from subquad_kernels.selective_scan.cuts import CHUNK
from subquad_kernels.torch_operator import AutogradKernel

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Arguments, Outputs

_STEP_ZERO = -1e4
"""softplus of it, and its gradient, are 0 in every type."""


class Scan:
    """The scan, forward and backward; it has neither an initial state nor documents."""

    @staticmethod
    def forward(**arguments: Any) -> Outputs:
        """y and final_state."""
        return _SCAN.forward(**arguments)

    @staticmethod
    @deterministic()
    def backward(
        arguments: Arguments, outputs: Outputs, gradients: tuple[Tensor | None, ...]
    ) -> dict[str, Tensor | None]:
        """Gradients by mamba-ssm's autograd, those through the final state too."""
        kernel = _SCAN if gradients[1] is None else _SCAN_WITH_STATE
        return kernel.backward(arguments, outputs, gradients)


def _scan(
    *,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    **_refused: object,
) -> Outputs:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y, final_state = selective_scan_fn(
        _over_time(x), _over_time(dt), A, _over_time(B), _over_time(C), D, None if z is None else _over_time(z),
        delta_bias=None if dt_bias is None else dt_bias.contiguous(), delta_softplus=softplus, return_last_state=True,
    )  # fmt: skip
    return y.transpose(1, 2), final_state.contiguous(), *_unused(x, A, z)


def _scan_with_state(
    *, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, softplus: bool, **rest: Any
) -> Outputs:
    (b, t, _), n = x.shape, A.shape[1]
    reads = torch.eye(n, dtype=C.dtype, device=C.device).expand(b, n, n)
    y, _, *_ = _scan(
        x=F.pad(x, (0, 0, 0, n)),
        dt=F.pad(dt, (0, 0, 0, n), value=_STEP_ZERO if softplus else 0.0),
        A=A,
        B=F.pad(B, (0, 0, 0, n)),
        C=torch.cat([C, reads], dim=1),
        z=None,
        softplus=softplus,
        **rest,
    )
    y, final_state = y[:, :t], y[:, t:].transpose(1, 2).to(A.dtype)
    if z is not None:
        y = (y.to(A.dtype) * F.silu(z.to(A.dtype))).to(x.dtype)
    return y, final_state, *_unused(x, A, z)


_SCAN = AutogradKernel(_scan)
_SCAN_WITH_STATE = AutogradKernel(_scan_with_state)


def _step(
    *,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    softplus: bool,
    **_unread: object,
) -> Outputs:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    b, _, c = x.shape
    state = A.new_zeros(b, *A.shape) if initial_state is None else initial_state.clone()  # it is changed in place
    none = A.new_zeros(c)  # the function takes both to be given
    y = selective_state_update(
        state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], none if D is None else D, None if z is None else z[:, 0],
        none if dt_bias is None else dt_bias, softplus,
    )  # fmt: skip
    return y.unsqueeze(1), state, *_unused(x, A, z)


STEP = AutogradKernel(_step)


def _over_time(tensor: Tensor) -> Tensor:
    """Channels first, as the scan reads them.  Shapes:  b t c  ->  b c t"""
    return tensor.transpose(1, 2).contiguous()


def _unused(x: Tensor, A: Tensor, z: Tensor | None) -> Outputs:
    """Room for the residuals, which nobody reads.  Shapes:  (t-1)//16 b n c    b t c or 0"""
    (b, t, c), n = x.shape, A.shape[1]
    boundaries = A.new_empty((t - 1) // CHUNK, b, n, c)
    return boundaries, A.new_empty(0) if z is None else A.new_empty(b, t, c)
