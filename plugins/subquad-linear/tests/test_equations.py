"""Each mixer against the equations of its paper: a plain loop over tokens in float64, outputs and all gradients.

The loops share nothing with the operators; torch's autograd differentiates them token by token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import MixerContext
from subquad.registry import load_registry
from subquad.testing.mixer_suite import assert_close, gradients
from subquad_kernels.catalogue import load_attribute

D_MODEL = 24
TOLERANCE = 1e-9
"""Relative to the largest value: float64, sums of a hundred terms in another order, through a norm."""


def build(name: str, *, layer_index: int = 1, **config: Any) -> Any:
    """A float64 mixer with parameters drawn wide, so that every path shows in the output."""
    spec = load_registry().mixer(name)
    context = MixerContext(d_model=D_MODEL, layer_index=layer_index, num_layers=4, context_len=64)
    mixer = load_attribute(spec.build)(spec.config(**config), context).double()  # type: ignore[operator]
    mixer.init_parameters(0.3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def tokens(b: int, t: int) -> Tensor:
    return torch.randn(b, t, D_MODEL, dtype=torch.float64)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """Shapes:  x: b t (h k)  ->  b t h k"""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    normal = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normal if weight is None else normal * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def turned(x: Tensor, theta: float) -> Tensor:
    """Every pair (i, i + k/2) as a complex number, times e^(i position theta^(-2 i / k)).  Shape: b t h k"""
    half = x.shape[-1] // 2
    rates = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * rates
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def retnet(m: Any, x: Tensor) -> Tensor:
    """Sun et al. 2023, equations 5 to 8, the recurrent form."""
    h = m.num_heads
    gamma = 1 - 2.0 ** (-5 - torch.arange(h, dtype=torch.float64))
    q, k = (turned(heads(x @ w.T, h), m.rope_theta) for w in (m.q_proj.weight, m.k_proj.weight))
    v = heads(x @ m.v_proj.weight.T, h)
    state, outputs = x.new_zeros(x.shape[0], h, q.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        state = gamma[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(2) / q.shape[-1] ** 0.5)
    o = rms_norm(torch.stack(outputs, 1), 1e-6).flatten(2)
    return (o * silu(x @ m.output.g_proj.weight.T)) @ m.output.o_proj.weight.T


def retnet_parallel(m: Any, x: Tensor) -> Tensor:
    """Sun et al. 2023, equation 5: (Q K^T o D) V with D_nm = gamma^(n-m) for n >= m."""
    h, t = m.num_heads, torch.arange(x.shape[1], dtype=torch.float64)
    gamma = 1 - 2.0 ** (-5 - torch.arange(h, dtype=torch.float64))
    q, k = (turned(heads(x @ w.T, h), m.rope_theta) for w in (m.q_proj.weight, m.k_proj.weight))
    v = heads(x @ m.v_proj.weight.T, h)
    distance = t[:, None] - t[None, :]
    mask = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * mask / q.shape[-1] ** 0.5
    o = rms_norm(torch.einsum("bhij,bjhv->bihv", scores, v), 1e-6).flatten(2)
    return (o * silu(x @ m.output.g_proj.weight.T)) @ m.output.o_proj.weight.T


def gla(m: Any, x: Tensor) -> Tensor:
    """Yang et al. 2023, section 4.4."""
    h = m.num_heads
    q, k, v = (heads(x @ linear.weight.T, h) for linear in (m.q_proj, m.k_proj, m.v_proj))
    logits = x @ m.decay_down.weight.T @ m.decay_up.weight.T + m.decay_up.bias
    alpha = heads((1 / (1 + torch.exp(-logits))) ** (1 / m.gate_temperature), h)
    state, outputs = x.new_zeros(x.shape[0], h, q.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(2) / q.shape[-1] ** 0.5)
    o = rms_norm(torch.stack(outputs, 1), 1e-6, m.output.norm.weight).flatten(2)
    return (o * silu(x @ m.output.g_proj.weight.T)) @ m.output.o_proj.weight.T


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """y_t = silu( sum_j taps_j x_{t-w+1+j} ), zeros before the first token.  Shapes:  x: b t c    taps: c 1 w"""
    width = taps.shape[-1]
    padded = torch.cat([x.new_zeros(x.shape[0], width - 1, x.shape[2]), x], dim=1)
    rows = [sum(padded[:, t + j] * taps[:, 0, j] for j in range(width)) for t in range(x.shape[1])]
    return silu(torch.stack(rows, 1))  # type: ignore[arg-type]


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_states(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, the transition written out as a matrix."""
    n = k.shape[-1]
    state, outputs = q.new_zeros(q.shape[0], q.shape[2], n, v.shape[-1]), []
    for t in range(q.shape[1]):
        outer = k[:, t, :, :, None] * k[:, t, :, None, :]
        gate = beta[:, t, :, None, None]
        transition = alpha[:, t, :, None, None] * (torch.eye(n, dtype=q.dtype) - gate * outer)
        state = transition @ state + gate * k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(2) / n**0.5)
    return torch.stack(outputs, 1)


def gated_delta_net(m: Any, x: Tensor) -> Tensor:
    """Yang, Kautz and Hatamizadeh 2024, equation 10 and section 3.4."""
    h, h_k, n, p = m.num_heads, m.num_key_heads, m.key_dim, m.value_dim
    q, k, v = convolved(x @ m.qkv_proj.weight.T, m.conv.weight).split([h_k * n, h_k * n, h * p], dim=-1)
    q, k = (heads(part, h_k).repeat_interleave(h // h_k, dim=2) for part in (q, k))
    beta = m.largest_write / (1 + torch.exp(-x @ m.write_proj.weight.T))
    step = torch.log1p(torch.exp(x @ m.decay_proj.weight.T + m.dt_bias))
    alpha = torch.exp(-torch.exp(m.A_log) * step)
    o = delta_states(unit(q), unit(k), heads(v, h), alpha, beta)
    o = rms_norm(o, 1e-6, m.output.norm.weight).flatten(2)
    return (o * silu(x @ m.output.g_proj.weight.T)) @ m.output.o_proj.weight.T


def delta_net(m: Any, x: Tensor) -> Tensor:
    """Yang et al. 2024, section 3."""
    h, d = m.num_heads, x.shape[-1]
    q, k, v = convolved(x @ m.qkv_proj.weight.T, m.conv.weight).split([d, d, d], dim=-1)
    beta = m.largest_write / (1 + torch.exp(-x @ m.write_proj.weight.T))
    o = delta_states(unit(heads(q, h)), unit(heads(k, h)), heads(v, h), torch.ones_like(beta), beta)
    return rms_norm(o, 1e-6, m.norm.weight).flatten(2) @ m.o_proj.weight.T


def lightning(m: Any, x: Tensor) -> Tensor:
    """Qin et al. 2024, as block 1 of 4 of MiniMax-01 or TransNormerLLM."""
    h, d = m.num_heads, x.shape[-1]
    if h == 4:  # the case with MiniMax-01's rates
        rate = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625], dtype=torch.float64) * (1 - 1 / 3.00001 + 1e-5)
    else:
        rate = torch.tensor([0.0, 8 / 3, 16 / 3], dtype=torch.float64) * 0.75
    q, k, v = (heads(silu(part), h) for part in (x @ m.qkv_proj.weight.T).split([d, d, d], dim=-1))
    state, outputs = x.new_zeros(x.shape[0], h, d // h, d // h), []
    for t in range(x.shape[1]):
        state = torch.exp(-rate)[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(2) / (d // h) ** 0.5)
    o = rms_norm(torch.stack(outputs, 1).flatten(2), 1e-6, m.norm.weight)
    return (o / (1 + torch.exp(-x @ m.g_proj.weight.T))) @ m.o_proj.weight.T


def mlstm(m: Any, x: Tensor) -> Tensor:
    """Beck et al. 2024, section 2.3, as the authors carry it: scaled by exp(-m); gates capped (Beck et al. 2025)."""
    h = m.num_heads
    q, k, v = (heads(x @ linear.weight.T, h) for linear in (m.q_proj, m.k_proj, m.v_proj))
    k = k / k.shape[-1] ** 0.5
    raw_i, raw_f = (x @ gate.weight.T + gate.bias for gate in (m.input_gate, m.forget_gate))
    i = m.gate_cap * torch.tanh(raw_i / m.gate_cap)
    log_f = -torch.log1p(torch.exp(-m.gate_cap * torch.tanh(raw_f / m.gate_cap)))
    state, normalizer = x.new_zeros(x.shape[0], h, k.shape[-1], v.shape[-1]), torch.zeros_like(k[:, 0])
    scale, outputs = torch.zeros_like(i[:, 0]), []
    for t in range(x.shape[1]):
        new_scale = torch.maximum(log_f[:, t] + scale, i[:, t])
        forget, write = torch.exp(log_f[:, t] + scale - new_scale), torch.exp(i[:, t] - new_scale)
        scale = new_scale
        state = forget[..., None, None] * state + write[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        normalizer = forget[..., None] * normalizer + write[..., None] * k[:, t]
        floor = torch.maximum((normalizer * q[:, t]).sum(-1).abs(), torch.exp(-scale))
        outputs.append((q[:, t, :, :, None] * state).sum(2) / floor[..., None])
    o = torch.stack(outputs, 1)
    centred = o - o.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (normal.flatten(2) * m.norm.weight / (1 + torch.exp(-x @ m.o_proj.weight.T))) @ m.out_proj.weight.T


CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("retnet", {"num_heads": 3}, retnet),
    ("retnet", {"num_heads": 2, "expand_v": 1, "rope_theta": 50.0}, retnet),
    ("retnet", {"num_heads": 3}, retnet_parallel),
    ("gla", {}, gla),
    ("gla", {"num_heads": 3, "expand_k": 1.0, "expand_v": 2.0, "gate_rank": 5, "gate_temperature": 2.0}, gla),
    ("gated_delta_net", {}, gated_delta_net),
    ("gated_delta_net", {"num_heads": 2, "key_dim": 7, "conv_width": 2, "negative_eigenvalues": True}, gated_delta_net),
    ("gated_delta_net", {"num_heads": 6, "num_key_heads": 2, "key_dim": 5}, gated_delta_net),
    ("lightning", {"num_heads": 4}, lightning),
    ("lightning", {"num_heads": 3, "decays": "transnormer"}, lightning),
    ("mlstm", {"num_heads": 3, "gate_cap": 2.0}, mlstm),
    ("mlstm", {"num_heads": 2, "expand_k": 1.0}, mlstm),
    ("delta_net", {"num_heads": 4}, delta_net),
    ("delta_net", {"num_heads": 3, "conv_width": 1, "negative_eigenvalues": True}, delta_net),
]


@pytest.mark.parametrize(
    ("name", "config", "equations"),
    [pytest.param(*case, marks=pytest.mark.oracle(case[0])) for case in CASES],
    ids=[f"{case[2].__name__}-{case[1]}" for case in CASES],
)
@pytest.mark.parametrize("t", [1, 2, 71])  # 71: more than one chunk of the kernels
def test_the_mixer_equals_the_paper_s_equations_with_all_gradients(
    name: str, config: dict[str, Any], equations: Any, t: int
) -> None:
    torch.manual_seed(t)
    mixer = build(name, **config)
    x, pull = tokens(2, t).requires_grad_(), tokens(2, t)
    y, expected = mixer(x), equations(mixer, x)
    assert_close(y, expected, tolerance=TOLERANCE)
    right = gradients(expected, pull, x, mixer)
    for name_of, found in gradients(y, pull, x, mixer).items():
        assert_close(found, right[name_of], name_of, TOLERANCE)
