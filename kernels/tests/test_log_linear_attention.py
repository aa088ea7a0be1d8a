"""Log-linear attention: its kernel against the definition, the definition against the paper's matrices, promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fenwick_suite import BY_TOKEN, FenwickSuite, close, fenwick_level

from subquad_kernels.log_linear_attention import chunked, declaration, definition
from subquad_kernels.log_linear_attention.operator import OP
from subquad_kernels.operators import linear_attention, log_linear_attention


def test_buckets_partition_the_past_and_their_levels_are_the_bits_in_which_two_places_differ() -> None:
    for t in range(200):
        levels = [fenwick_level(t, j) for j in range(t + 1)]
        assert levels == [(t ^ j).bit_length() for j in range(t + 1)]
        assert len(set(levels)) == t.bit_count() + 1


class TestLogLinearAttention(FenwickSuite):
    declaration, definition, chunked, op = declaration, definition, chunked, OP
    function = staticmethod(log_linear_attention)

    @pytest.mark.parametrize("kernel", ["reference", "chunked"])
    def test_it_is_the_product_with_both_masks_with_all_gradients(self, kernel: str) -> None:
        """Guo et al. 2025, section 3.2: Y = (Q K^T o M_S o M_H) V, M_S = exp(segsum g), M_H[t, j] = lambda_t[level]."""
        t = 75
        arguments = self.sample(self.workload(t), scale=1.0)
        wanted = [arguments[name].requires_grad_() for name in BY_TOKEN]
        q, k, v = (arguments[name].transpose(1, 2) for name in "qkv")
        q, k = (rows.repeat_interleave(2, dim=1) for rows in (q, k))
        g, w, scales = (arguments[name].transpose(1, 2) for name in ("log_decay", "write_gate", "level_scales"))
        sums = torch.stack([torch.stack([g[..., j + 1 : i + 1].sum(-1) for j in range(t)], -1) for i in range(t)], -2)
        past = torch.ones(t, t, dtype=torch.bool).tril()
        level = torch.tensor([[fenwick_level(i, min(i, j)) for j in range(t)] for i in range(t)]).clamp(max=5)
        H = torch.stack([scales[:, :, i, level[i]] for i in range(t)], dim=2)
        weights = torch.where(past, (q @ k.mT) * sums.exp() * H, 0.0) * w[..., None, :]
        expected = (weights @ v).transpose(1, 2)
        pull = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found = log_linear_attention(**arguments, kernel=kernel)[0]
        assert close(found, expected)
        for mine, theirs in zip(torch.autograd.grad(found, wanted, pull), torch.autograd.grad(expected, wanted, pull)):
            assert close(mine, theirs)

    @pytest.mark.parametrize("kernel", ["reference", "chunked"])
    def test_with_equal_scales_it_is_linear_attention(self, kernel: str) -> None:
        case = self.workload(150)
        arguments = self.sample(case, **self.after(75, case, 2))
        arguments["level_scales"] = torch.ones_like(arguments["level_scales"])
        y, state = log_linear_attention(**arguments, kernel=kernel)
        plain = {name: arguments[name] for name in ("q", "k", "v", "log_decay", "write_gate", "scale")}
        expected, expected_state = linear_attention(**plain, initial_state=arguments["initial_state"].sum(1))
        assert close(y, expected)
        assert close(state.sum(1), expected_state)

    def test_arithmetic_grows_by_a_level_when_the_tokens_double(self) -> None:
        """Per token 64 n a key head, 64 p a head within a chunk; a head 2 n p to write, n p a level between chunks."""
        case = self.workload(1024, dtype="bfloat16", full=False, h=8, n=64, p=64)
        found = [declaration.work(replace(case, shape={**case.shape, "t": t})) for t in (1024, 4096)]
        for work, t, levels in zip(found, (1024, 4096), (4, 6)):
            assert work.matmul_flops == 2 * t * (64 * (2 * 64 + 8 * 64) + 8 * (2 + levels) * 64 * 64)
            assert work.serial_steps == levels + 1
