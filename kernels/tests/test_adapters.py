"""Kernels of other people's packages, with stand-ins that have the packages' signatures, layouts and demands.

A stand-in is the package's function in plain torch, written from its own documentation. An adapter that agrees with our
definition in float64, outputs and every gradient, hands each tensor over in the right place, layout and meaning.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from spread_inputs import LAYOUTS
from torch import Tensor, einsum
from torch.nn import functional as F

from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.operators import linear_attention
from subquad_kernels.self_check import judge, kernel_errors
from subquad_kernels.workload import Option, Workload

# fla: [b t h k] and [b t h v], decays as logarithms, states [documents h k v]


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, scale: float, state: Tensor | None, bounds: Tensor | None,
    beta: Tensor | None = None, u: Tensor | None = None, low_rank: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every function of fla that is used: `decay` per key, `beta` the delta rule, `u` RWKV-6, `low_rank` DPLR."""
    b, t, h, n = q.shape
    assert k.shape == q.shape
    assert v.shape[:3] == q.shape[:3]
    assert decay.shape == q.shape
    cuts = [0, t] if bounds is None else bounds.tolist()
    assert bounds is None or b == 1
    count = b if bounds is None else len(cuts) - 1
    assert state is None or state.shape == (count, h, n, v.shape[3])
    outputs, finals = [], []
    for number, (start, stop) in enumerate(pairwise(cuts)):
        rows = slice(None) if bounds is None else slice(number, number + 1)
        memory = q.new_zeros(b, h, n, v.shape[3]) if state is None else state[rows]
        for i in range(start, stop):
            key, value, query = k[:, i].unsqueeze(-1), v[:, i].unsqueeze(-2), scale * q[:, i].unsqueeze(-1)
            if u is not None:
                outputs.append((query * (memory + u.unsqueeze(-1) * key * value)).sum(-2))
            kept = decay[:, i].exp().unsqueeze(-1) * memory
            if low_rank is not None:
                a, inserted = (tensor[:, i].unsqueeze(-1) for tensor in low_rank)
                kept = kept + inserted * (a * memory).sum(-2, keepdim=True)
            if beta is not None:
                value = beta[:, i, :, None, None] * (value - (key * kept).sum(-2, keepdim=True))
            memory = kept + key * value
            if u is None:
                outputs.append((query * memory).sum(-2))
        finals.append(memory)
    return torch.stack(outputs, 1), torch.cat(finals)


def simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, *,
               state_v_first=False, cu_seqlens=None):  # type: ignore[no-untyped-def]  # fmt: skip
    assert output_final_state
    assert g_gamma is None or g is None
    decay = torch.zeros_like(q) if g is None else g.unsqueeze(-1).expand(q.shape)
    return recurrence(q, k, v, decay, scale, initial_state, cu_seqlens)


def gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False, *, cu_seqlens=None):  # type: ignore[no-untyped-def]
    assert output_final_state
    return recurrence(q, k, v, g, scale, initial_state, cu_seqlens)


def recurrent_gla(q, k, v, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False, *,
                  reverse=False, cu_seqlens=None):  # type: ignore[no-untyped-def]  # fmt: skip
    assert output_final_state
    return recurrence(q, k, v, gk, scale, initial_state, cu_seqlens)


def rwkv6(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, *, cu_seqlens=None):  # type: ignore[no-untyped-def]
    assert output_final_state
    assert u.shape == r.shape[2:]
    return recurrence(r, k, v, w, scale, initial_state, cu_seqlens, u=u)


def delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False, *, cu_seqlens=None):  # type: ignore[no-untyped-def]
    assert output_final_state
    return recurrence(q, k, v, torch.zeros_like(q), scale, initial_state, cu_seqlens, beta=beta)


def gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, *, cu_seqlens=None):  # type: ignore[no-untyped-def]
    assert g.shape == v.shape[:3]
    return recurrent_delta_rule(q, k, v, g, None, None, beta, scale, initial_state, output_final_state,
                                cu_seqlens=cu_seqlens)  # fmt: skip


def kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, *, cu_seqlens=None):  # type: ignore[no-untyped-def]
    return recurrent_delta_rule(q, k, v, None, g, None, beta, scale, initial_state, output_final_state,
                                cu_seqlens=cu_seqlens)  # fmt: skip


def recurrent_delta_rule(q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None,
                         output_final_state=False, *, cu_seqlens=None):  # type: ignore[no-untyped-def]  # fmt: skip
    """Grouped value heads, as in fla: head i of v reads head i // (HV // H) of q and k."""
    assert output_final_state
    q, k = (tensor.repeat_interleave(v.shape[2] // tensor.shape[2], dim=2) for tensor in (q, k))
    decay = torch.zeros_like(q)
    decay = decay if g is None else decay + g.unsqueeze(-1)
    decay = decay if gk is None else decay + gk
    return recurrence(q, k, v, decay, scale, initial_state, cu_seqlens, beta=beta)


def dplr(q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, *, cu_seqlens=None):  # type: ignore[no-untyped-def]
    assert output_final_state
    return recurrence(q, k, v, gk, scale, initial_state, cu_seqlens, low_rank=(a, b))


# mamba-ssm: x [b c t] for the scan; x [b t h p], B and C [b t g n], states [b h p n] for SSD


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):  # type: ignore[no-untyped-def]  # fmt: skip
    """The gradient of the last state is not considered, as its documentation says."""
    assert return_last_state
    assert all(tensor.stride(-1) == 1 for tensor in (u, delta, B, C))
    assert delta_bias is None or delta_bias.stride(-1) == 1
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    state, outputs = A.new_zeros(u.shape[0], *A.shape), []
    for i in range(u.shape[2]):
        write = (step[..., i] * u[..., i]).unsqueeze(-1) * B[:, None, :, i]
        state = (step[..., i, None] * A).exp() * state + write
        outputs.append((state * C[:, None, :, i]).sum(-1))
    y = torch.stack(outputs, dim=2)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), state.detach()


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):  # type: ignore[no-untyped-def]
    """One step; it fails without D or dt_bias, and changes the state in place."""
    assert D is not None
    assert dt_bias is not None
    step = F.softplus(dt + dt_bias) if dt_softplus else dt + dt_bias
    state.mul_((step.unsqueeze(-1) * A).exp()).add_((step * x).unsqueeze(-1) * B[:, None])
    y = (state * C[:, None]).sum(-1) + D * x
    return y if z is None else y * F.silu(z)


def chunk_state(B, x, dt, dA_cumsum, states_in_fp32=True):  # type: ignore[no-untyped-def]
    """States that each chunk adds.  Shapes:  dt, dA_cumsum: b h chunks l  ->  b chunks h p n"""
    chunks, length = dt.shape[2:]
    B, x = _heads_and_chunks(B, x.shape[2], chunks, length), _heads_and_chunks(x, x.shape[2], chunks, length)
    weights = dt * (dA_cumsum[..., -1:] - dA_cumsum).exp()
    return einsum("bhcl,bclhn,bclhp->bchpn", weights, B, x)


def state_passing(states, dA_chunk_cumsum, initial_states=None):  # type: ignore[no-untyped-def]
    """States [b chunks h (p n)] that enter the chunks, and the last one."""
    state, entering = torch.zeros_like(states[:, 0]) if initial_states is None else initial_states, []
    for chunk in range(states.shape[1]):
        entering.append(state)
        state = dA_chunk_cumsum[..., chunk].exp().unsqueeze(-1) * state + states[:, chunk]
    return torch.stack(entering, dim=1), state


def chunk_scan(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):  # type: ignore[no-untyped-def]
    b, t, h, p = x.shape
    chunks, length = dt.shape[2:]
    assert t == chunks * length
    assert prev_states.shape == (b, chunks, h, p, B.shape[3])
    B, C, x = (_heads_and_chunks(tensor, h, chunks, length) for tensor in (B, C, x))
    decay = (dA_cumsum.unsqueeze(-1) - dA_cumsum.unsqueeze(-2)).masked_fill(
        torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf")
    )
    y = einsum("bclhn,bcshn,bhcls,bhcs,bcshp->bclhp", C, B, decay.exp(), dt, x)
    y = y + einsum("bclhn,bchpn,bhcl->bclhp", C, prev_states, dA_cumsum.exp())
    return y.flatten(1, 2)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              return_final_states=False):  # type: ignore[no-untyped-def]  # fmt: skip
    """Token after token: h_t = exp(dt A) h_{t-1} + dt x B^T."""
    assert return_final_states
    h = x.shape[2]
    B, C = (tensor.repeat_interleave(h // tensor.shape[2], dim=2) for tensor in (B, C))
    state = x.new_zeros(x.shape[0], h, x.shape[3], B.shape[3]) if initial_states is None else initial_states
    outputs = []
    for i in range(x.shape[1]):
        write = (dt[:, i, :, None] * x[:, i]).unsqueeze(-1) * B[:, i].unsqueeze(-2)
        state = (dt[:, i] * A).exp()[..., None, None] * state + write
        outputs.append((state * C[:, i].unsqueeze(-2)).sum(-1))
    return torch.stack(outputs, dim=1), state


def _heads_and_chunks(tensor: Tensor, h: int, chunks: int, length: int) -> Tensor:
    """Shapes:  b t g n, t up to chunks l  ->  b chunks l h n"""
    padded = F.pad(tensor, (0, 0, 0, 0, 0, chunks * length - tensor.shape[1]))
    return padded.repeat_interleave(h // tensor.shape[2], dim=2).unflatten(1, (chunks, length))


# causal-conv1d: x [b c t] with the channels side by side, states [b c w-1]


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):  # type: ignore[no-untyped-def]  # fmt: skip
    assert activation in (None, "silu", "swish")
    assert seq_idx is None or (initial_states is None and not return_final_states and seq_idx.dtype == torch.int32)
    y, final = _convolve(x, weight, bias, seq_idx, initial_states, activation is not None)
    return (y, final) if return_final_states else y


def causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx,
                               return_dinitial_states, silu_activation):  # type: ignore[no-untyped-def]  # fmt: skip
    assert dx is None
    assert return_dinitial_states == (initial_states is not None)
    assert bias is None or bias.stride(0) == 1
    assert all(tensor is None or tensor.stride(1) == 1 for tensor in (dout, dfinal_states))
    inputs = [
        None if tensor is None else tensor.detach().requires_grad_() for tensor in (x, weight, bias, initial_states)
    ]
    with torch.enable_grad():
        y, final = _convolve(*inputs[:3], seq_idx, inputs[3], silu_activation)
        given = [(y, dout)] + ([] if dfinal_states is None else [(final, dfinal_states)])
        wanted = [tensor for tensor in inputs if tensor is not None]
        found = iter(torch.autograd.grad([out for out, _ in given], wanted, [pull for _, pull in given]))
    return tuple(None if tensor is None else next(found) for tensor in inputs)


def _convolve(x, weight, bias, seq_idx, initial_states, silu):  # type: ignore[no-untyped-def]
    assert x.stride(1) == 1
    assert x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert x.shape[1] % 8 == 0
    assert initial_states is None or initial_states.stride(1) == 1
    b, c, t = x.shape
    w = weight.shape[1]
    before = x.new_zeros(b, c, w - 1) if initial_states is None else initial_states
    seen = torch.cat([before, x], dim=2)
    document = None if seq_idx is None else F.pad(seq_idx, (w - 1, 0), value=-1)
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand(b, c, t)
    for tap in range(w):
        part = weight[:, tap, None] * seen[..., tap : tap + t]
        y = y + (part if document is None else part * (document[:, None, tap : tap + t] == seq_idx[:, None]))
    return (F.silu(y) if silu else y), seen[..., t:]


# flash-attn: [b t h k], or [tokens h k] packed; the log-sum-exp is [b h t], or [h tokens]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    return_attn_probs=False):  # type: ignore[no-untyped-def]  # fmt: skip
    assert return_attn_probs
    scores = _scores(q, k, softmax_scale, causal, *window_size, None)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return einsum("bhts,bshv->bthv", scores.softmax(-1), values), scores.logsumexp(-1), None


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1),
                           return_attn_probs=False):  # type: ignore[no-untyped-def]  # fmt: skip
    assert return_attn_probs
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    scores = _scores(q[None], k[None], softmax_scale, causal, *window_size, cu_seqlens_q)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return einsum("hts,shv->thv", scores[0].softmax(-1), values), scores[0].logsumexp(-1), None


def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
                         window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
                         bounds=None):  # type: ignore[no-untyped-def]  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, True)
    scores = _scores(q, k, softmax_scale, causal, window_size_left, window_size_right, bounds)
    p = (scores - softmax_lse.unsqueeze(-1)).exp()
    groups = q.shape[2] // k.shape[2]
    keys, values = (tensor.repeat_interleave(groups, dim=2) for tensor in (k, v))
    dscores = p * (einsum("bthv,bshv->bhts", dout, values) - (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1))
    dq.copy_(softmax_scale * einsum("bhts,bshk->bthk", dscores, keys))
    dk.copy_(softmax_scale * einsum("bhts,bthk->bshk", dscores, q).unflatten(2, (-1, groups)).sum(3))
    dv.copy_(einsum("bhts,bthv->bshv", p, dout).unflatten(2, (-1, groups)).sum(3))


def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,
                                max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,
                                window_size_right, softcap, alibi_slopes, deterministic):  # type: ignore[no-untyped-def]  # fmt: skip
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()
    packed = [tensor[None] for tensor in (dout, q, k, v, out, softmax_lse, dq, dk, dv)]
    _flash_attn_backward(*packed, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                         alibi_slopes, deterministic, bounds=cu_seqlens_q)  # fmt: skip


def _scores(q, k, scale, causal, left, right, bounds):  # type: ignore[no-untyped-def]
    """The mask is aligned to the last key.  Shapes:  q: b t h k    k: b s h_kv k  ->  b h t s"""
    t, s = q.shape[1], k.shape[1]
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    distance = torch.arange(t)[:, None] + s - t - torch.arange(s)[None, :]
    hidden = (distance < 0) if causal else torch.zeros(t, s, dtype=torch.bool)
    hidden = hidden | (distance > left) if left >= 0 else hidden
    hidden = hidden | (-distance > right) if right >= 0 else hidden
    if bounds is not None:
        document = torch.bucketize(torch.arange(t), bounds[1:].long(), right=True)
        hidden = hidden | (document[:, None] != document[None, :])
    return scale * einsum("bthk,bshk->bhts", q, keys).masked_fill(hidden, float("-inf"))


STAND_INS: dict[str, dict[str, Any]] = {
    "fla.ops.simple_gla": {"chunk_simple_gla": simple_gla, "fused_recurrent_simple_gla": simple_gla},
    "fla.ops.gla": {"chunk_gla": gla, "fused_recurrent_gla": recurrent_gla},
    "fla.ops.rwkv6": {"chunk_rwkv6": rwkv6, "fused_recurrent_rwkv6": rwkv6},
    "fla.ops.delta_rule": {"chunk_delta_rule": delta_rule},
    "fla.ops.gated_delta_rule": {
        "chunk_gated_delta_rule": gated_delta_rule, "fused_recurrent_gated_delta_rule": recurrent_delta_rule,
    },
    "fla.ops.kda": {"chunk_kda": kda},
    "fla.ops.generalized_delta_rule": {"chunk_dplr_delta_rule": dplr, "fused_recurrent_dplr_delta_rule": dplr},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
    "mamba_ssm.ops.triton.ssd_chunk_state": {"chunk_state": chunk_state},
    "mamba_ssm.ops.triton.ssd_state_passing": {"state_passing": state_passing},
    "mamba_ssm.ops.triton.ssd_chunk_scan": {"chunk_scan": chunk_scan},
    "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
    "causal_conv1d.cpp_functions": {"causal_conv1d_bwd_function": causal_conv1d_bwd_function},
    "flash_attn": {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func},
    "flash_attn.flash_attn_interface": {
        "_flash_attn_backward": _flash_attn_backward, "_flash_attn_varlen_backward": _flash_attn_varlen_backward,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `import` finds instead of the packages, whether they are installed or not."""
    for name, functions in STAND_INS.items():
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            whole = ".".join(parts[:length])
            if length < len(parts) and whole in STAND_INS:
                continue
            module = ModuleType(whole)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, whole, module)
        vars(sys.modules[name]).update(functions)


LINEAR = {"b": 2, "t": 19, "h": 4, "h_k": 2, "n": 4, "p": 6}
GATED = {"b": 2, "t": 19, "h": 2, "n": 4, "p": 6}
SCAN = {"b": 2, "t": 19, "c": 6, "n": 4}
CONV = {"b": 2, "t": 19, "c": 8, "w": 4}
SOFTMAX = {"b": 2, "t": 19, "s": 19, "h": 4, "h_kv": 2, "k": 8, "v": 8}
PACKED = {"b": 1, "documents": 5}  # one of them empty, one a single token


def linear(decay: str, gate: bool, state: bool) -> dict[str, Option]:
    return {"decay": decay, "write_gate": gate, "diagonal": False, "initial_state": state}


def gated(read: str, bonus: bool, state: bool) -> dict[str, Option]:
    return {"read": read, "bonus": bonus, "initial_state": state, "decay_dtype": "float64"}


def delta(decay: str, gate: bool, low_rank: bool, state: bool) -> dict[str, Option]:
    return {"decay": decay, "write_gate": gate, "low_rank": low_rank, "initial_state": state}


def scan(softplus: bool, given: bool, state: bool = False) -> dict[str, Option]:
    return {"softplus": softplus, "skip": given, "gate": given, "dt_bias": given, "initial_state": state}


def conv(activation: str, bias: bool, state: bool) -> dict[str, Option]:
    return {"activation": activation, "bias": bias, "initial_state": state}


BOTH_FLA = ("fla_chunked", "fla_recurrent")
CASES: list[tuple[str, str, dict[str, int], dict[str, Option]]] = [
    *(("linear_attention", kernel, LINEAR, linear("token", False, False)) for kernel in (*BOTH_FLA, "mamba_ssd")),
    *(("linear_attention", kernel, LINEAR, linear("token", True, True)) for kernel in (*BOTH_FLA, "mamba_ssd")),
    *(("linear_attention", kernel, LINEAR, linear("head", True, True)) for kernel in (*BOTH_FLA, "mamba_ssd")),
    *(("linear_attention", kernel, LINEAR, linear("none", True, True)) for kernel in (*BOTH_FLA, "mamba_ssd")),
    *(("linear_attention", kernel, LINEAR | PACKED, linear("token", True, True)) for kernel in BOTH_FLA),
    *(("linear_attention", kernel, LINEAR | PACKED, linear("head", False, False)) for kernel in BOTH_FLA),
    ("linear_attention", "mamba_ssd", LINEAR | {"t": 300, "h": 2}, linear("token", True, True)),
    *(("gated_linear_attention", kernel, GATED, gated("after", False, True)) for kernel in BOTH_FLA),
    *(("gated_linear_attention", kernel, GATED | PACKED, gated("after", False, True)) for kernel in BOTH_FLA),
    *(("gated_linear_attention", kernel, GATED, gated("before", False, False)) for kernel in BOTH_FLA),
    *(("gated_linear_attention", kernel, GATED | PACKED, gated("before", True, True)) for kernel in BOTH_FLA),
    *(("delta_rule", kernel, LINEAR, delta(decay, gate, False, state))
      for kernel in BOTH_FLA
      for decay, gate, state in (("none", False, True), ("scalar", True, False), ("vector", True, True))),
    *(("delta_rule", kernel, LINEAR, delta(decay, decay != "none", True, True))
      for kernel in BOTH_FLA for decay in ("none", "scalar", "vector")),
    *(("delta_rule", kernel, LINEAR | PACKED, delta(decay, True, decay == "vector", True))
      for kernel in BOTH_FLA for decay in ("none", "scalar", "vector")),
    *(("selective_scan", "mamba_scan", SCAN, scan(softplus, given))
      for softplus, given in ((True, True), (True, False), (False, False))),
    *(("selective_scan", "mamba_step", SCAN | {"t": 1}, scan(softplus, softplus, state))
      for softplus in (True, False) for state in (True, False)),
    ("causal_conv", "causal_conv1d", CONV, conv("silu", True, False)),
    ("causal_conv", "causal_conv1d", CONV | {"w": 2}, conv("none", False, True)),
    ("causal_conv", "causal_conv1d", CONV | {"t": 2}, conv("silu", True, True)),
    ("causal_conv", "causal_conv1d", CONV | PACKED, conv("silu", True, False)),
    ("softmax_attention", "flash_attn", SOFTMAX, {"causal": True, "window": 0}),
    ("softmax_attention", "flash_attn", SOFTMAX, {"causal": False, "window": 0}),
    ("softmax_attention", "flash_attn", SOFTMAX | {"t": 5}, {"causal": True, "window": 7}),
    ("softmax_attention", "flash_attn", SOFTMAX | PACKED, {"causal": True, "window": 3}),
    ("softmax_attention", "flash_attn", SOFTMAX | PACKED, {"causal": False, "window": 0}),
    ("softmax_attention", "flash_attn", SOFTMAX | {"t": 5}, {"causal": False, "window": 4}),
    ("softmax_attention", "flash_attn", SOFTMAX | PACKED, {"causal": False, "window": 3}),
]  # fmt: skip
FORWARD_ONLY = {("delta_rule", "fla_recurrent"), ("selective_scan", "mamba_step")}


@pytest.mark.parametrize(
    ("operator", "kernel", "shape", "options"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{number}") for number, case in enumerate(CASES)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_adapter_agrees_with_the_definition_on_outputs_and_every_gradient(
    operator: str, kernel: str, shape: dict[str, int], options: dict[str, Option], seed: int
) -> None:
    record = CATALOGUE.operator(operator)
    workload = Workload(operator=operator, shape=shape, dtype="float64", options=options)
    arguments = record.torch_half.sample_inputs(workload, seed=seed, device="cpu")
    adapter = CATALOGUE.kernel(operator, kernel)
    errors = kernel_errors(record, adapter, arguments, gradients=(operator, kernel) not in FORWARD_ONLY, seed=seed)
    verdict = judge(record, adapter, workload, errors)
    assert verdict.passed, verdict.reason
    expected = record.torch_half.empty_outputs(arguments)
    found = adapter.torch_half.forward(**arguments)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("operator", "kernel", "shape", "options"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{number}") for number, case in enumerate(CASES)],
)
def test_an_adapter_agrees_where_inputs_do_not_lie_close(
    operator: str, kernel: str, shape: dict[str, int], options: dict[str, Option], layout: str
) -> None:
    """What a package demands of layouts it raises for, or takes for granted."""
    record = CATALOGUE.operator(operator)
    workload = Workload(operator=operator, shape=shape, dtype="float64", options=options)
    arguments = LAYOUTS[layout](record.torch_half.sample_inputs(workload, seed=2, device="cpu"))
    adapter = CATALOGUE.kernel(operator, kernel)
    errors = kernel_errors(record, adapter, arguments, gradients=(operator, kernel) not in FORWARD_ONLY)
    verdict = judge(record, adapter, workload, errors)
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    ("operator", "kernel", "shape", "options"),
    [
        ("linear_attention", "fla_chunked", LINEAR, linear("token", True, True)),
        ("linear_attention", "mamba_ssd", LINEAR, linear("token", True, True)),
        ("gated_linear_attention", "fla_chunked", GATED, gated("before", True, True)),
        ("delta_rule", "fla_chunked", LINEAR, delta("scalar", True, False, True)),
        ("selective_scan", "mamba_scan", SCAN, scan(True, True)),
        ("causal_conv", "causal_conv1d", CONV, conv("silu", True, True)),
    ],
)
def test_a_loss_of_the_first_output_alone_has_the_same_gradients(
    operator: str, kernel: str, shape: dict[str, int], options: dict[str, Option]
) -> None:
    record = CATALOGUE.operator(operator)
    workload = Workload(operator=operator, shape=shape, dtype="float64", options=options)
    arguments = record.torch_half.sample_inputs(workload, seed=3, device="cpu")
    definition = CATALOGUE.kernel(operator, "reference").torch_half
    outputs = definition.forward(**arguments)
    pull = torch.randn(outputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = definition.backward(arguments, outputs, (pull, None))
    adapter = CATALOGUE.kernel(operator, kernel).torch_half
    found = adapter.backward(arguments, adapter.forward(**arguments), (pull, None))
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("operator", "kernel", "shape", "options", "differentiates"),
    [
        ("linear_attention", "mamba_ssd", LINEAR, linear("token", True, True), "torch.autograd.grad"),
        ("selective_scan", "mamba_scan", SCAN, scan(True, True), "torch.autograd.grad"),
        ("causal_conv", "causal_conv1d", CONV, conv("silu", True, True),
         "causal_conv1d.cpp_functions.causal_conv1d_bwd_function"),
    ],
)  # fmt: skip
def test_packages_that_add_by_atomics_are_asked_not_to(
    operator: str, kernel: str, shape: dict[str, int], options: dict[str, Option], differentiates: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    module, _, name = differentiates.rpartition(".")
    backward, asked = getattr(sys.modules[module], name), []

    def watched(*values: Any, **named: Any) -> Any:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return backward(*values, **named)

    monkeypatch.setattr(sys.modules[module], name, watched)
    record = CATALOGUE.operator(operator)
    workload = Workload(operator=operator, shape=shape, dtype="float64", options=options)
    arguments = record.torch_half.sample_inputs(workload, seed=7, device="cpu")
    adapter = CATALOGUE.kernel(operator, kernel).torch_half
    outputs = adapter.forward(**arguments)
    adapter.backward(arguments, outputs, (torch.ones(outputs[0].shape, dtype=torch.float64), None))
    assert asked == [True]
    assert not torch.are_deterministic_algorithms_enabled()


class _Doubled(torch.autograd.Function):
    """As packages differentiate: a function of their own in the midst of torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return 2 * dx


@pytest.mark.parametrize("kernel", ["fla_chunked", "mamba_ssd"])
def test_an_adapter_differentiates_inside_the_torch_operator(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def through_a_function_of_its_own(q: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return simple_gla(_Doubled.apply(q) / 2, *rest, **named)  # type: ignore[no-any-return]

    monkeypatch.setattr(sys.modules["fla.ops.simple_gla"], "chunk_simple_gla", through_a_function_of_its_own)
    record = CATALOGUE.operator("linear_attention")
    workload = Workload(operator="linear_attention", shape=LINEAR, dtype="float64", options=linear("token", True, True))
    arguments = record.torch_half.sample_inputs(workload, seed=6, device="cpu")
    inputs = [value for value in arguments.values() if isinstance(value, Tensor)]
    results = []
    for name in ("reference", kernel):
        for tensor in inputs:
            tensor.requires_grad_()
        y, final_state = linear_attention(**arguments, kernel=name)
        results.append(torch.autograd.grad((y.square().sum() + final_state.square().sum()), inputs))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_a_step_leaves_the_state_it_was_given_as_it_is() -> None:
    record = CATALOGUE.operator("selective_scan")
    workload = Workload(
        operator="selective_scan",
        shape=SCAN | {"t": 1},
        dtype="float64",
        phase="decode",
        options=scan(True, True, True),
    )
    arguments = record.torch_half.sample_inputs(workload, seed=5, device="cpu")
    state = arguments["initial_state"]
    assert isinstance(state, Tensor)
    before = state.clone()
    _, after, *_ = CATALOGUE.kernel("selective_scan", "mamba_step").torch_half.forward(**arguments)
    assert torch.equal(state, before)
    assert not torch.equal(after, before)
