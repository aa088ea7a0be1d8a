"""The log-linear delta rule: its kernel against the definition, that against products of transitions, promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fenwick_suite import BY_TOKEN, FenwickSuite, close, fenwick_level
from torch import Tensor

from subquad_kernels.log_linear_attention.declaration import slots
from subquad_kernels.log_linear_delta_rule import chunked, declaration, definition
from subquad_kernels.log_linear_delta_rule.operator import OP
from subquad_kernels.operators import delta_rule, log_linear_attention, log_linear_delta_rule


def products_of_transitions(arguments: dict[str, Any]) -> Tensor:
    """Guo et al. 2025, section 3.4: every pair by itself, through the matrices between, a distance at a time."""
    q, k, v = (arguments[name].transpose(1, 2) for name in "qkv")
    b, h, t, _ = v.shape
    q, k = (rows.repeat_interleave(h // rows.shape[1], dim=1) for rows in (q, k))
    g, beta, scales = (arguments[name].transpose(1, 2) for name in ("log_decay", "write_gate", "level_scales"))
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    M = g.exp()[..., None, None] * (eye - beta[..., None, None] * k[..., :, None] * k[..., None, :])
    y = torch.zeros_like(v)
    reading = q  # (M_i M_{i-1} .. M_{j+1})^T q_i of every i > distance
    for distance in range(t):
        later, earlier = slice(distance, t), slice(0, t - distance)
        level = torch.tensor([min(fenwick_level(i, i - distance), 5) for i in range(distance, t)])
        scale = scales[:, :, later].gather(-1, level[:, None].expand(b, h, -1, 1)).squeeze(-1)
        weight = scale * beta[:, :, earlier] * (reading * k[:, :, earlier]).sum(-1)
        y = y + torch.nn.functional.pad(weight[..., None] * v[:, :, earlier], (0, 0, distance, 0))
        reading = torch.einsum("bhtnm,bhtn->bhtm", M[:, :, earlier], reading)[:, :, 1:]
    return y.transpose(1, 2)


class TestLogLinearDeltaRule(FenwickSuite):
    declaration, definition, chunked, op = declaration, definition, chunked, OP
    function = staticmethod(log_linear_delta_rule)

    @pytest.mark.parametrize("kernel", ["reference", "chunked"])
    def test_it_is_every_pair_through_the_product_of_its_transitions_with_all_gradients(self, kernel: str) -> None:
        arguments = self.sample(self.workload(75), scale=1.0)
        wanted = [arguments[name].requires_grad_() for name in BY_TOKEN]
        found, expected = log_linear_delta_rule(**arguments, kernel=kernel)[0], products_of_transitions(arguments)
        pull = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert close(found, expected)
        for mine, theirs in zip(torch.autograd.grad(found, wanted, pull), torch.autograd.grad(expected, wanted, pull)):
            assert close(mine, theirs)

    @pytest.mark.parametrize("kernel", ["reference", "chunked"])
    def test_with_equal_scales_it_is_the_delta_rule(self, kernel: str) -> None:
        case = self.workload(150)
        arguments = self.sample(case, **self.after(75, case, 2))
        arguments["level_scales"] = torch.ones_like(arguments["level_scales"])
        y, state = log_linear_delta_rule(**arguments, kernel=kernel)
        plain = {name: arguments[name] for name in ("q", "k", "v", "log_decay", "write_gate", "scale")}
        expected, expected_state = delta_rule(**plain, initial_state=arguments["initial_state"].sum(1))
        assert close(y, expected)
        assert close(state.sum(1), expected_state)

    @pytest.mark.parametrize("kernel", ["reference", "chunked"])
    def test_with_orthogonal_keys_nothing_is_replaced_and_it_is_log_linear_attention(self, kernel: str) -> None:
        arguments = self.sample(self.workload(70, n=70))
        arguments["k"] = torch.eye(70, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
        y, state = log_linear_delta_rule(**arguments, kernel=kernel)
        expected, expected_state = log_linear_attention(**arguments)
        assert close(y, expected)
        assert close(state, expected_state)

    def test_arithmetic_grows_by_a_level_when_the_tokens_double(self) -> None:
        """A level costs a token and head n (n + p): half of the tokens read a state and go through a transition."""
        case = self.workload(1024, dtype="bfloat16", full=False, h=8, n=64, p=64)
        flops = {}
        for t in (1024, 2048, 4096):
            work = declaration.work(replace(case, shape={**case.shape, "t": t}))
            flops[t] = work.matmul_flops / (2 * t * 8)
            assert work.serial_steps == slots(t // 64 - 1) + 1
        joined = 2 * 64 * 64 * 128  # two halves become one
        for t in (2048, 4096):
            assert flops[t] - flops[t // 2] == 64 * 128 + joined * (1 / (t // 2) - 1 / t)
