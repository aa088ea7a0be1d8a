"""mamba-ssm's kernels of state space duality (SSD), in chunks of 256 tokens.

Its combined function writes with dt and decays with dt A, one A per head. That is this operator without a decay (A = 0,
dt = w), or with one per head (A = g, dt = 1, values multiplied by w before the call). A decay of every token is not
bound to its write here, so its parts are called one after the other, each with its own gradient: the states of the
chunks, their passing, and the scan within the chunks, which take the write and the summed decay apart.

Source: package mamba-ssm 2.3, `triton.ssd_combined`, `ssd_chunk_state`, `ssd_state_passing` and `ssd_chunk_scan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad_kernels.determinism import deterministic
from subquad_kernels.linear_attention.definition import empty_boundaries
from subquad_kernels.torch_operator import AutogradKernel

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Outputs

_CHUNK = 256
"""As Mamba-2 calls it."""


def _ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    write_gate: Tensor | None,
    diagonal: None,
    initial_state: Tensor | None,
    cu_seqlens: None,
    scale: float,
) -> Outputs:
    before = None if initial_state is None else initial_state.transpose(2, 3).contiguous()
    one = v.new_ones(v.shape[:3], dtype=torch.float32)
    if log_decay is None:
        y, after = _bound(q, k, v, one if write_gate is None else write_gate, one.new_zeros(v.shape[2]), before)
    elif log_decay.dim() == 1:
        values = v if write_gate is None else (write_gate.unsqueeze(-1) * v).to(v.dtype)
        y, after = _bound(q, k, values, one, log_decay, before)
    else:
        y, after = _apart(q, k, v, one if write_gate is None else write_gate, log_decay, before)
    y = y if scale == 1 else scale * y
    return y, after.transpose(2, 3).contiguous(), empty_boundaries(v, q.shape[3], cu_seqlens)


class Ssd(AutogradKernel):
    """Its kernels add the gradients of the summed decay by atomics, unless they are asked not to."""

    backward = deterministic()(AutogradKernel.backward)


SSD = Ssd(_ssd)


def _bound(q: Tensor, k: Tensor, v: Tensor, write: Tensor, A: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decay and write bound by dt.  Shapes:  write: b t h    A: h    before: b h p n  ->  b t h p    b h p n"""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, after = mamba_chunk_scan_combined(v, write, A, k, q, _CHUNK, initial_states=before, return_final_states=True)
    return y, after


def _apart(
    q: Tensor, k: Tensor, v: Tensor, write: Tensor, log_decay: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Decay and write apart.  Shapes:  write, log_decay: b t h    before: b h p n  ->  b t h p    b h p n"""
    from mamba_ssm.ops.triton.ssd_chunk_scan import chunk_scan
    from mamba_ssm.ops.triton.ssd_chunk_state import chunk_state
    from mamba_ssm.ops.triton.ssd_state_passing import state_passing

    t, n = q.shape[1:4:2]
    padding = -t % _CHUNK
    queries, keys, values = (F.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in (q, k, v))
    # Padded tokens neither decay nor write.  Shapes:  b t h  ->  b h chunks 256
    writes, decays = (
        F.pad(tensor, (0, 0, 0, padding)).transpose(1, 2).unflatten(2, (-1, _CHUNK)) for tensor in (write, log_decay)
    )
    summed = decays.cumsum(dim=-1)
    own = chunk_state(keys, values, writes, summed)  # b chunks h p n
    entering, after = state_passing(own.flatten(3), summed[..., -1], None if before is None else before.flatten(2))
    y = chunk_scan(keys, queries, values, writes, summed, entering.unflatten(-1, (-1, n)))
    return y[:, :t], after.unflatten(-1, (-1, n))
