"""SCOUT-Mamba written from its equations alone, slowly: loops over time and layers, one token at a time.

Imports nothing of the project, so that it can disagree with it. Weights are a dictionary with names of its own:
`layers[i]` holds norm_1 .. norm_4, the Mamba matrices (W_in, conv_w, conv_b, W_x, W_dt, b_dt, A_log, D, W_out), two
SwiGLU triples (gate, up, down) and W_q, W_k, W_v, W_o; every W multiplies from the left, as in y = W x.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
THETA = 1e6


def logits(weights: dict[str, Any], tokens: Tensor, *, heads: int, segment_len: int) -> Tensor:
    """Logits of one sequence.  Shapes:  tokens: t  ->  t vocab"""
    stream = [weights["embedding"][token] for token in tokens.tolist()]
    for layer in weights["layers"]:
        stream = add(stream, mamba(layer, [norm(x, layer["norm_1"]) for x in stream]))
        stream = add(stream, [swiglu(layer["mlp_1"], norm(x, layer["norm_2"])) for x in stream])
        stream = add(stream, attention(layer, [norm(x, layer["norm_3"]) for x in stream], heads, segment_len))
        stream = add(stream, [swiglu(layer["mlp_2"], norm(x, layer["norm_4"])) for x in stream])
    head = weights.get("head", weights["embedding"])
    return torch.stack([head @ norm(x, weights["norm"]) for x in stream])


def add(stream: list[Tensor], branch: list[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(stream, branch)]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + EPS)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def swiglu(mlp: dict[str, Tensor], x: Tensor) -> Tensor:
    return mlp["down"] @ (silu(mlp["gate"] @ x) * (mlp["up"] @ x))


def mamba(layer: dict[str, Any], xs: list[Tensor]) -> list[Tensor]:
    d_inner, states = layer["A_log"].shape
    rank = layer["W_dt"].shape[1]
    width = layer["conv_w"].shape[1]
    A = -torch.exp(layer["A_log"])
    h = torch.zeros(d_inner, states, dtype=torch.float64)
    inputs: list[Tensor] = [torch.zeros(d_inner, dtype=torch.float64)] * (width - 1)
    outputs = []
    for token in xs:
        both = layer["W_in"] @ token
        x, z = both[:d_inner], both[d_inner:]
        inputs = [*inputs, x]
        taps = inputs[-width:]
        x = silu(sum(layer["conv_w"][:, j] * taps[j] for j in range(width)) + layer["conv_b"])
        mixed = layer["W_x"] @ x
        B, C = mixed[rank : rank + states], mixed[rank + states :]
        dt = torch.log1p(torch.exp(layer["W_dt"] @ mixed[:rank] + layer["b_dt"]))
        h = torch.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
        y = h @ C + layer["D"] * x
        outputs.append(layer["W_out"] @ (y * silu(z)))
    return outputs


def rotate(x: Tensor, position: int) -> Tensor:
    """Turn feature pairs (i, i + half) by position * THETA^(-i / half)."""
    half = x.shape[-1] // 2
    angles = torch.tensor([position * THETA ** (-i / half) for i in range(half)], dtype=torch.float64)
    first, second = x[..., :half], x[..., half:]
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def attention(layer: dict[str, Any], xs: list[Tensor], heads: int, segment_len: int) -> list[Tensor]:
    width = layer["W_q"].shape[0] // heads
    q, k, v = ([(layer[name] @ x).view(heads, width) for x in xs] for name in ("W_q", "W_k", "W_v"))
    q = [rotate(x, t) for t, x in enumerate(q)]
    k = [rotate(x, t) for t, x in enumerate(k)]
    outputs = []
    for t in range(len(xs)):
        visible = [t, *(p for p in range(t) if p % segment_len == segment_len - 1)]
        scores = torch.stack([(q[t] * k[j]).sum(dim=1) / math.sqrt(width) for j in visible])
        weights = torch.exp(scores - scores.max(dim=0).values)
        weights = weights / weights.sum(dim=0)
        mixed = sum(weights[n][:, None] * v[j] for n, j in enumerate(visible))
        outputs.append(layer["W_o"] @ mixed.reshape(-1))
    return outputs
