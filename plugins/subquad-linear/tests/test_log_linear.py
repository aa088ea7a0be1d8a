"""Log-linear attention keeps the suite's promises, is the paper's product of masks, and starts as its authors start."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from subquad import ConfigError, MixerContext
from subquad.testing.mixer_suite import MixerSuite, assert_close, carry_bytes, gradients
from subquad_linear.config import LogLinearConfig
from subquad_linear.log_linear import LogLinear

D_MODEL = 12
TOLERANCE = 1e-9
"""Relative to the largest value: float64, sums of a hundred terms in another order, through a norm."""


class TestLogLinear(MixerSuite):
    mixer = "log_linear"

    def test_the_carry_has_a_state_for_each_bit_of_the_length(self) -> None:
        mixer = self.build().float()
        for t in (1, 5, 64, 100):
            with torch.no_grad():
                _, carry = mixer.prefill(self.tokens(3, t).float(), mixer.empty_carry(3))
            assert carry_bytes(carry) == 3 * t.bit_length() * 4 * 4 * 2 * 4

    def test_in_bfloat16_the_states_stay_float32(self) -> None:
        mixer, x = self.build().float(), self.tokens(2, 9).float()
        with torch.no_grad():
            expected = mixer(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, carry = mixer.prefill(x, mixer.empty_carry(2))
                y_t, carry = mixer.decode(x[:, 0], carry)
        assert carry.state.dtype == torch.float32
        # Four matrix products in a row with factors rounded to 8 bits, relative to the largest output.
        assert (y - expected).abs().max() < 5e-2 * expected.abs().max()
        assert y_t.isfinite().all()


class TestLogLinearOfFewLevels(MixerSuite):
    mixer = "log_linear"
    config: ClassVar = {"num_heads": 2, "expand_k": 0.75, "expand_v": 2.0, "gate_temperature": 4.0, "num_levels": 3}


def build(context_len: int = 64, **config: Any) -> LogLinear:
    context = MixerContext(d_model=D_MODEL, layer_index=0, num_layers=2, context_len=context_len)
    torch.manual_seed(0)
    mixer = LogLinear(LogLinearConfig(**config), context)
    mixer.init_parameters(0.3)
    return mixer


def equation(m: LogLinear, x: Tensor) -> Tensor:
    """Guo et al. 2025, section 3.2: (Q K^T o M_S o M_H) V, a row at a time, buckets peeled off as section 3.1 does."""
    h, t = m.num_heads, x.shape[1]
    q, k, v = ((x @ linear.weight.T).reshape(*x.shape[:2], h, -1) for linear in (m.q_proj, m.k_proj, m.v_proj))
    a = (1 / (1 + torch.exp(-(x @ m.decay_proj.weight.T + m.decay_proj.bias)))) ** (1 / m.gate_temperature)
    scales = torch.log1p(torch.exp(m.L * (x @ m.level_proj.weight.T).reshape(*x.shape[:2], h, -1)))
    rows = []
    for i in range(t):
        terms, end, decay = [], i, a[:, i]
        level_of = {i: 0}
        while end:  # the bucket of the lowest one, then of the next
            size = end & -end
            level_of |= dict.fromkeys(range(end - size, end), size.bit_length())
            end -= size
        kept = torch.ones_like(decay)
        for j in range(i, -1, -1):
            weight = scales[:, i, :, min(level_of[j], m.num_levels - 1)] * kept * (q[:, i] * k[:, j]).sum(-1)
            terms.append(weight[..., None] * v[:, j])
            kept = kept * a[:, j]
        rows.append(torch.stack(terms).sum(0) / q.shape[-1] ** 0.5)
    o = torch.stack(rows, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.output.norm.weight
    gate = x @ m.output.g_proj.weight.T
    return (o.flatten(2) * gate / (1 + torch.exp(-gate))) @ m.output.o_proj.weight.T


@pytest.mark.oracle("log_linear")
@pytest.mark.parametrize("t", [2, 75])  # a single token reads nothing that decays; 75: more than one chunk
@pytest.mark.parametrize("config", [{"num_heads": 2}, {"num_heads": 3, "expand_k": 1.0, "num_levels": 4}], ids=str)
def test_the_mixer_equals_the_paper_s_equation_with_all_gradients(config: dict[str, Any], t: int) -> None:
    mixer = build(**config).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, pull = (torch.randn(2, t, D_MODEL, dtype=torch.float64) for _ in range(2))
    y, expected = mixer(x.requires_grad_()), equation(mixer, x)
    assert_close(y, expected, tolerance=TOLERANCE)
    right = gradients(expected, pull, x, mixer)
    for name, found in gradients(y, pull, x, mixer).items():
        assert_close(found, right[name], name, TOLERANCE)


def test_all_levels_start_with_one_weight_and_the_states_by_forgetting_slowly() -> None:
    mixer = build(num_heads=2)
    assert (mixer.L == 1).all() and (mixer.decay_proj.bias == 0).all() and (mixer.output.norm.weight == 1).all()
    with torch.no_grad():
        mixer.level_proj.weight.zero_()
    x = torch.randn(1, 20, D_MODEL)
    rest = mixer(x)
    mixer.num_levels, mixer.L = 1, torch.nn.Parameter(torch.ones(2, 1))
    mixer.level_proj = torch.nn.Linear(D_MODEL, 2, bias=False)
    torch.nn.init.zeros_(mixer.level_proj.weight)
    torch.testing.assert_close(mixer(x), rest)  # one level for everything: gated linear attention


def test_as_many_levels_as_the_context_has_bits_and_one() -> None:
    for context_len, levels in ((1, 1), (2, 2), (64, 7), (65, 8), (2**14, 15)):
        assert build(context_len, num_heads=2).L.shape == (2, levels)
    assert build(num_heads=2, num_levels=15).L.shape == (2, 15)


@pytest.mark.parametrize("key", ["num_heads", "expand_k", "expand_v", "gate_temperature"])
def test_sizes_that_make_no_sense_are_refused_by_name(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 0"):
        LogLinearConfig(**{key: 0})
    with pytest.raises(ConfigError, match="num_levels is -1"):
        LogLinearConfig(num_levels=-1)
