"""Each mixer against the equations of its paper: a plain loop over tokens in float64, outputs and all gradients.

The loops share nothing with the operators; torch's autograd differentiates them token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from subquad import MixerContext, SharedTensor
from subquad.registry import load_registry
from subquad.testing.mixer_suite import assert_close, gradients
from subquad_kernels.catalogue import load_attribute

D_MODEL = 24
TOLERANCE = 1e-9
"""Relative to the largest value: float64, sums of a hundred terms in another order, through a norm."""


def build(
    name: str, *, layer_index: int = 1, published: Mapping[str, SharedTensor] | None = None, **config: Any
) -> Any:
    """A float64 mixer with parameters drawn wide, so that every path shows in the output."""
    spec = load_registry().mixer(name)
    context = MixerContext(
        d_model=D_MODEL, layer_index=layer_index, num_layers=4, context_len=64, published=published or {}
    )
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


def retnet_parallel(m: Any, x: Tensor, both_sides: bool = False) -> Tensor:
    """Sun et al. 2023, equation 5: (Q K^T o D) V with D_nm = gamma^(n-m) for n >= m."""
    h, t = m.num_heads, torch.arange(x.shape[1], dtype=torch.float64)
    gamma = 1 - 2.0 ** (-5 - torch.arange(h, dtype=torch.float64))
    q, k = (turned(heads(x @ w.T, h), m.rope_theta) for w in (m.q_proj.weight, m.k_proj.weight))
    v = heads(x @ m.v_proj.weight.T, h)
    distance = t[:, None] - t[None, :]
    seen = distance >= 0 if not both_sides else torch.ones_like(distance, dtype=torch.bool)
    mask = torch.where(seen, gamma[:, None, None] ** distance.abs(), 0.0)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * mask / q.shape[-1] ** 0.5
    o = rms_norm(torch.einsum("bhij,bjhv->bihv", scores, v), 1e-6).flatten(2)
    return (o * silu(x @ m.output.g_proj.weight.T)) @ m.output.o_proj.weight.T


def retnet_to_both_sides(m: Any, x: Tensor) -> Tensor:
    """Afzal et al. 2025 (LION-D): the same with D_nm = gamma^|n-m|."""
    return retnet_parallel(m, x, both_sides=True)


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


def convolved(x: Tensor, taps: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """y_t = silu( bias + sum_j taps_j x_{t-w+1+j} ), zeros before the first token.  Shapes: x: b t c   taps: c 1 w"""
    width = taps.shape[-1]
    padded = torch.cat([x.new_zeros(x.shape[0], width - 1, x.shape[2]), x], dim=1)
    rows = [sum(padded[:, t + j] * taps[:, 0, j] for j in range(width)) for t in range(x.shape[1])]
    return silu(torch.stack(rows, 1) + bias)  # type: ignore[arg-type]


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


def lightning_to_both_sides(m: Any, x: Tensor) -> Tensor:
    """Scores of all pairs of tokens, decayed by their distance; rates of MiniMax-01 in block 1 of 4."""
    h, d = m.num_heads, x.shape[-1]
    rate = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625], dtype=torch.float64) * (1 - 1 / 3.00001 + 1e-5)
    q, k, v = (heads(silu(part), h) for part in (x @ m.qkv_proj.weight.T).split([d, d, d], dim=-1))
    t = torch.arange(x.shape[1], dtype=torch.float64)
    decay = torch.exp(-rate[:, None, None] * (t[:, None] - t[None, :]).abs())
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * decay / (d // h) ** 0.5
    o = rms_norm(torch.einsum("bhij,bjhv->bihv", scores, v).flatten(2), 1e-6, m.norm.weight)
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


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def step_back(x: Tensor) -> Tensor:
    """x_{t-1} - x_t, the token before the first being zero."""
    return torch.stack([(x[:, t - 1] if t else torch.zeros_like(x[:, 0])) - x[:, t] for t in range(x.shape[1])], 1)


def low_rank(m: Any, x: Tensor, activation: Any = lambda y: y) -> Tensor:
    return activation(x @ m.down.weight.T) @ m.up.weight.T  # type: ignore[no-any-return]


def group_norm(m: Any, o: Tensor) -> Tensor:
    """Shapes:  o: b t h p  ->  b t (h p)"""
    centred = o - o.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 64e-5).sqrt()
    return normal.flatten(2) * m.weight + m.bias


def rwkv6_streams(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Receptance, key, value, decay (0 to 1) and gate of Peng et al. 2024, section 4.2: equations 14 to 18."""
    back, rank = step_back(x), m.mix_up.shape[1]
    low = torch.tanh((x + back * m.first_mix) @ m.mix_down.weight.T)
    inputs = [x + back * (m.mix[s] + low[..., s * rank : (s + 1) * rank] @ m.mix_up[s]) for s in range(5)]
    w = torch.exp(-torch.exp(m.decay_base + low_rank(m.decay, inputs[0], torch.tanh)))
    k, v, r, g = (z @ proj.weight.T for z, proj in zip(inputs[1:], (m.k_proj, m.v_proj, m.r_proj, m.g_proj)))
    return *(heads(z, m.num_heads) for z in (r, k, v, w)), silu(g)  # type: ignore[return-value]


def rwkv6_out(m: Any, outputs: list[Tensor], w: Tensor, gate: Tensor) -> Tensor:
    """Leave the heads. A last token's decay reaches no output: its gradient is zero, not absent."""
    return (group_norm(m.norm, torch.stack(outputs, 1) + 0 * w[:, -1:]) * gate) @ m.o_proj.weight.T


def rwkv6(m: Any, x: Tensor) -> Tensor:
    """Peng et al. 2024, equations 19 to 21, the recurrent form."""
    r, k, v, w, gate = rwkv6_streams(m, x)
    state, outputs = x.new_zeros(x.shape[0], m.num_heads, k.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        written = k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((r[:, t, :, :, None] * (state + m.bonus[..., None] * written)).sum(2))
        state = w[:, t, :, :, None] * state + written
    return rwkv6_out(m, outputs, w, gate)


def rwkv6_parallel(m: Any, x: Tensor) -> Tensor:
    """The same as a sum over pairs: key j reaches token i > j through the decays of the tokens between them."""
    r, k, v, w, gate = rwkv6_streams(m, x)
    outputs = []
    for i in range(x.shape[1]):
        o = (r[:, i] * m.bonus * k[:, i]).sum(-1, keepdim=True) * v[:, i]
        for j in range(i):
            o = o + (r[:, i] * w[:, j + 1 : i].prod(1) * k[:, j]).sum(-1, keepdim=True) * v[:, j]
        outputs.append(o)
    return rwkv6_out(m, outputs, w, gate)


def rwkv7_streams(m: Any, x: Tensor, first_value: Tensor | None = None) -> tuple[Tensor, ...]:
    """Receptance, replacement key, value, decay, removal key, rate and gate of Peng et al. 2025, equations 4 to 14.

    Equation 10 mixes the values of the first layer, if this is another one, into those of the layer.
    """
    h, back = m.num_heads, step_back(x)
    x_r, x_w, x_k, x_v, x_a, x_g = (x + back * mix for mix in m.mix)
    r, k, v = x_r @ m.r_proj.weight.T, x_k @ m.k_proj.weight.T, x_v @ m.v_proj.weight.T
    w = torch.exp(-(2.718281828459045**-0.5) * sigmoid(m.decay_base + low_rank(m.decay, x_w, torch.tanh)))
    a = sigmoid(m.rate_base + low_rank(m.rate, x_a))
    removal = heads(k * m.removal, h)
    removal = removal / removal.square().sum(-1, keepdim=True).sqrt()
    if first_value is not None:
        share = sigmoid(m.value_base + low_rank(m.value, x_v))
        v = (1 - share) * v + share * first_value
    written = k * (1 - m.replacement + a * m.replacement)
    gate = low_rank(m.gate, x_g, sigmoid)
    return heads(r, h), heads(written, h), heads(v, h), heads(w, h), removal, heads(a, h), gate


def rwkv7_out(m: Any, o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Peng et al. 2025, equations 20 to 22."""
    bonus = (r * m.bonus * k).sum(-1, keepdim=True) * v
    return ((group_norm(m.norm, o) + bonus.flatten(2)) * gate) @ m.o_proj.weight.T


def rwkv7(m: Any, x: Tensor, first_value: Tensor | None = None) -> Tensor:
    """Peng et al. 2025, equations 15 to 17: S_t (diag(w_t) - c_t^T (a_t * c_t)) + v_t^T k~_t, values by keys."""
    r, k, v, w, c, a, gate = rwkv7_streams(m, x, first_value)
    state, outputs = x.new_zeros(x.shape[0], m.num_heads, v.shape[-1], k.shape[-1]), []
    for t in range(x.shape[1]):
        transition = torch.diag_embed(w[:, t]) - c[:, t, :, :, None] * (a * c)[:, t, :, None, :]
        state = state @ transition + v[:, t, :, :, None] * k[:, t, :, None, :]
        outputs.append((state @ r[:, t, :, :, None]).squeeze(-1))
    return rwkv7_out(m, torch.stack(outputs, 1), r, k, v, gate)


def rwkv7_by_keys(m: Any, x: Tensor) -> Tensor:
    """The same without a state: every key written so far, as the tokens after it have turned it."""
    r, k, v, w, c, a, gate = rwkv7_streams(m, x)
    keys, outputs = k[:, :0].transpose(1, 2), []
    for t in range(x.shape[1]):
        along = (keys * c[:, t, :, None]).sum(-1, keepdim=True)
        keys = keys * w[:, t, :, None] - along * (a * c)[:, t, :, None]
        keys = torch.cat([keys, k[:, t, :, None]], dim=2)
        scores = (keys * r[:, t, :, None]).sum(-1)
        outputs.append(torch.einsum("bhj,bjhp->bhp", scores, v[:, : t + 1]))
    return rwkv7_out(m, torch.stack(outputs, 1), r, k, v, gate)


def rwkv_channel_mix(m: Any, x: Tensor) -> Tensor:
    """Peng et al. 2025, equation 23; with a receptance Peng et al. 2024, equations 22 to 25."""
    back = step_back(x)
    k = (x + back * m.k_mix) @ m.k_proj.weight.T
    y = torch.where(k > 0, k * k, 0.0) @ m.v_proj.weight.T
    return y if m.r_mix is None else sigmoid((x + back * m.r_mix) @ m.r_proj.weight.T) * y


def slstm(m: Any, x: Tensor) -> Tensor:
    """Beck et al. 2024, equations 8 to 17, with the stabiliser; c and n before it are zero, and m is i at first."""
    h, p = m.num_heads, m.head_dim
    u = heads(convolved(x, m.conv.weight, m.conv.bias), h)
    from_u, from_x = (
        torch.einsum("bthj,hjgp->bthgp", rows, weight)
        for rows, weight in ((u, m.conv_gates), (heads(x, h), m.input_gates))
    )
    hidden = c = n = scale = x.new_zeros(x.shape[0], h, p)
    outputs = []
    for t in range(x.shape[1]):
        mixed = torch.cat([from_u[:, t], from_x[:, t]], 2) + m.bias
        i, f, z, o = (mixed + (hidden[:, :, :, None, None] * m.recurrent).sum(2)).unbind(2)
        log_f = -torch.log1p(torch.exp(-f))
        new_scale = torch.maximum(log_f + scale, i) if t else i
        forget, write = torch.exp(log_f + scale - new_scale), torch.exp(i - new_scale)
        c, n, scale = forget * c + write * torch.tanh(z), forget * n + write, new_scale
        hidden = c / n / (1 + torch.exp(-o))
        outputs.append(hidden)
    o = torch.stack(outputs, 1)
    centred = o - o.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(2) * m.norm.weight


def both_ways(one: Any) -> Any:
    """The sum of two mixers, the second one (below `back`) of the sequence from its last token to its first."""

    def added(m: Any, x: Tensor) -> Tensor:
        y: Tensor = one(m, x) + one(m.back, x.flip(1)).flip(1)
        return y

    added.__name__ = f"{one.__name__}_both_ways"
    return added


CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("retnet", {"num_heads": 3}, retnet),
    ("retnet", {"num_heads": 2, "expand_v": 1, "rope_theta": 50.0}, retnet),
    ("retnet", {"num_heads": 3}, retnet_parallel),
    ("retnet", {"num_heads": 3, "bidirectional": True}, retnet_to_both_sides),
    ("gla", {}, gla),
    ("gla", {"num_heads": 3, "expand_k": 1.0, "expand_v": 2.0, "gate_rank": 5, "gate_temperature": 2.0}, gla),
    ("gated_delta_net", {}, gated_delta_net),
    ("gated_delta_net", {"num_heads": 2, "key_dim": 7, "conv_width": 2, "negative_eigenvalues": True}, gated_delta_net),
    ("gated_delta_net", {"num_heads": 6, "num_key_heads": 2, "key_dim": 5}, gated_delta_net),
    ("gla", {"bidirectional": True}, both_ways(gla)),
    ("gated_delta_net", {"bidirectional": True}, both_ways(gated_delta_net)),
    ("mlstm", {"num_heads": 3, "bidirectional": True}, both_ways(mlstm)),
    ("lightning", {"num_heads": 4}, lightning),
    ("lightning", {"num_heads": 3, "decays": "transnormer"}, lightning),
    ("lightning", {"num_heads": 4, "bidirectional": True}, lightning_to_both_sides),
    ("mlstm", {"num_heads": 3, "gate_cap": 2.0}, mlstm),
    ("mlstm", {"num_heads": 2, "expand_k": 1.0}, mlstm),
    ("slstm", {"num_heads": 3}, slstm),
    ("slstm", {"num_heads": 2, "conv_width": 1}, slstm),
    ("delta_net", {"num_heads": 4}, delta_net),
    ("delta_net", {"num_heads": 3, "conv_width": 1, "negative_eigenvalues": True}, delta_net),
    ("rwkv6", {"num_heads": 3}, rwkv6),
    ("rwkv6", {"num_heads": 2, "mix_rank": 5, "decay_rank": 7, "blocks_per_layer": 2}, rwkv6_parallel),
    ("rwkv7", {"num_heads": 3}, rwkv7),
    ("rwkv7", {"num_heads": 2, "decay_rank": 5, "rate_rank": 7, "gate_rank": 9}, rwkv7_by_keys),
    ("rwkv_channel_mix", {}, rwkv_channel_mix),
    ("rwkv_channel_mix", {"receptance": True, "d_hidden": 33}, rwkv_channel_mix),
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


@pytest.mark.oracle("rwkv7")
@pytest.mark.parametrize("t", [1, 2, 71])
def test_later_layers_of_rwkv7_mix_the_values_of_the_first_into_theirs(t: int) -> None:
    """Two layers, one behind the other; gradients of the first one's values come from both."""
    torch.manual_seed(t)
    first = build("rwkv7", layer_index=0, num_heads=3)
    later = build("rwkv7", published={"rwkv7.value": SharedTensor(shape=(D_MODEL,))}, num_heads=3, value_rank=5)
    x, pull = tokens(2, t).requires_grad_(), tokens(2, t)
    h, published = first(x, None, {})
    y, nothing = later(h, None, published)
    assert not nothing
    x_v = x + step_back(x) * first.mix[3]
    expected = rwkv7(later, rwkv7(first, x), x_v @ first.v_proj.weight.T)
    assert_close(y, expected, tolerance=TOLERANCE)
    both = torch.nn.ModuleList([first, later])
    right = gradients(expected, pull, x, both)
    for name, found in gradients(y, pull, x, both).items():
        assert_close(found, right[name], name, TOLERANCE)
