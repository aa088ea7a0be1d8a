"""The built-in mixers keep the suite's promises, and those of their own."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from subquad.contracts import MixerContext
from subquad.errors import ConfigError
from subquad.mixers.bidirectional_attention import BidirectionalAttention, BidirectionalWindow
from subquad.mixers.configs import SoftmaxAttentionConfig, WindowConfig
from subquad.mixers.reading_attention import ReadingAttention
from subquad.mixers.softmax_attention import SoftmaxAttention
from subquad.mixers.window import Window
from subquad.testing.mixer_suite import MixerSuite, assert_close, carry_bytes
from subquad_kernels.operators import rotary

CONTEXT = MixerContext(d_model=16, layer_index=0, num_layers=1, context_len=64)


class TestSoftmaxAttention(MixerSuite):
    mixer = "softmax_attention"
    config: ClassVar = {"num_heads": 4}


class TestSharedKeyHeads(MixerSuite):
    mixer = "softmax_attention"
    config: ClassVar = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


class TestWindow(MixerSuite):
    mixer = "window"
    config: ClassVar = {"num_heads": 2, "window": 5}


class TestSoftmaxAttentionThatPublishes(MixerSuite):
    mixer = "softmax_attention"
    config: ClassVar = {"num_heads": 4, "num_kv_heads": 2, "kv": "publish"}


class TestSoftmaxAttentionThatReads(MixerSuite):
    mixer = "softmax_attention"
    config: ClassVar = {"num_heads": 4, "num_kv_heads": 2, "kv": "read"}

    def test_keeps_no_keys(self) -> None:
        mixer = self.build().mixer
        assert carry_bytes(mixer.empty_carry(2)) == 0
        assert [name for name, _ in mixer.named_parameters()] == ["q_proj.weight", "o_proj.weight"]


class TestWindowThatPublishes(MixerSuite):
    mixer = "window"
    config: ClassVar = {"num_heads": 2, "window": 5, "kv": "publish"}


class TestWindowThatReads(MixerSuite):
    mixer = "window"
    config: ClassVar = {"num_heads": 2, "window": 5, "kv": "read"}


class TestWindowOfOneToken(MixerSuite):
    mixer = "window"
    config: ClassVar = {"num_heads": 2, "window": 1}

    def test_its_bidirectional_form_sees_both_sides(self) -> None:
        """It sees what the causal one sees: itself."""
        form = self.to_both_sides()
        assert form is not None
        x = self.tokens(2, 5)
        assert_close(form().build()(x), self.build()(x))

    def test_gradient_reaches_every_parameter(self) -> None:
        """Not to W_q and W_k: one token's softmax is 1 whatever the score."""
        mixer = self.build()
        x = self.tokens(2, 5)
        assert_close(mixer(x), mixer.o_proj(mixer.v_proj(x)))


def build_pair(window: int) -> tuple[SoftmaxAttention, Window]:
    torch.manual_seed(0)
    full = SoftmaxAttention(SoftmaxAttentionConfig(num_heads=2), CONTEXT).double()
    windowed = Window(WindowConfig(num_heads=2, window=window), CONTEXT).double()
    windowed.load_state_dict(full.state_dict())
    return full, windowed


def test_a_window_as_long_as_the_sequence_is_full_attention() -> None:
    full, windowed = build_pair(window=20)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    assert_close(windowed(x), full(x))


def test_a_token_sees_exactly_window_tokens() -> None:
    _, windowed = build_pair(window=4)
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(windowed(x)[:, 9].sum(), x)
    seen = gradient[0].abs().amax(dim=1) > 0
    assert seen.nonzero().flatten().tolist() == [6, 7, 8, 9]


def test_a_token_sees_window_tokens_to_either_side_where_it_sees_both() -> None:
    mixer = BidirectionalWindow(WindowConfig(num_heads=2, window=4, bidirectional=True), CONTEXT).double()
    x = torch.randn(1, 16, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[:, 9].sum(), x)
    seen = gradient[0].abs().amax(dim=1) > 0
    assert seen.nonzero().flatten().tolist() == [6, 7, 8, 9, 10, 11, 12]
    with pytest.raises(ConfigError, match="tokens see later ones"):
        mixer.empty_carry(1)


def test_the_window_cache_stops_growing() -> None:
    _, windowed = build_pair(window=4)
    sizes = []
    with torch.no_grad():
        carry = windowed.empty_carry(1)
        for _ in range(9):
            _, carry = windowed.decode(torch.randn(1, 16, dtype=torch.float64), carry)
            sizes.append(carry_bytes(carry))
    assert sizes[3:] == [sizes[3]] * 6
    assert carry.position == 9


def test_a_reader_of_its_own_keys_is_the_publisher() -> None:
    """With equal queries and outputs the two layers are one function."""
    publishes, reads = SoftmaxAttentionConfig(kv="publish"), SoftmaxAttentionConfig(kv="read")
    torch.manual_seed(0)
    publisher, reader = SoftmaxAttention(publishes, CONTEXT).double(), ReadingAttention(reads, CONTEXT).double()
    reader.load_state_dict({name: publisher.state_dict()[name] for name in reader.state_dict()})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, shared = publisher(x, None, {})
    assert torch.equal(reader(x, None, shared)[0], y)


@pytest.mark.parametrize(
    ("causal", "window"),
    [
        pytest.param(causal, window, marks=pytest.mark.oracle("window" if window else "softmax_attention"))
        for causal, window in ((True, 0), (False, 0), (True, 4), (False, 4))
    ],
)
def test_attention_equals_torchs_own_on_rotated_heads(causal: bool, window: int) -> None:
    """Rotation written out with complex numbers, pair (i, i + k/2) as real and imaginary part."""
    full, windowed = build_pair(window=4)
    full = windowed if window else full
    if not causal:
        weights = full.state_dict()
        if window:
            full = BidirectionalWindow(WindowConfig(num_heads=2, window=4, bidirectional=True), CONTEXT).double()
        else:
            full = BidirectionalAttention(SoftmaxAttentionConfig(num_heads=2, bidirectional=True), CONTEXT).double()
        full.load_state_dict(weights)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    half = full.head_dim // 2
    turn = torch.polar(
        torch.ones(11, half, dtype=torch.float64),
        torch.arange(11.0, dtype=torch.float64)[:, None] * 1e6 ** (-torch.arange(half, dtype=torch.float64) / half),
    )

    def heads(linear: torch.nn.Linear, rotate: bool) -> torch.Tensor:
        y = linear(x).view(2, 11, 2, full.head_dim).transpose(1, 2)
        if not rotate:
            return y
        turned = torch.complex(y[..., :half], y[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    ahead = torch.arange(11)[None, :] - torch.arange(11)[:, None]
    seen = (ahead <= 0 if causal else ahead == ahead) & (ahead.abs() < (window or 11))
    out = scaled_dot_product_attention(
        heads(full.q_proj, True), heads(full.k_proj, True), heads(full.v_proj, False), attn_mask=seen
    )
    assert_close(full(x), full.o_proj(out.transpose(1, 2).reshape(2, 11, 16)))


def test_attention_depends_on_distances_alone() -> None:
    """Rotary: shifting all positions changes nothing (Su et al. 2021, 3.2.2)."""
    full, _ = build_pair(window=4)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    q, k, _ = full._project(x)
    near_q, near_k = rotary(q, k, start=0)
    far_q, far_k = rotary(q, k, start=1000)
    scores = torch.einsum("bthk,bshk->bhts", near_q, near_k)
    assert_close(torch.einsum("bthk,bshk->bhts", far_q, far_k), scores, tolerance=1e-9)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"num_heads": 3}, "divide"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "share"),
        ({"num_heads": 4, "head_dim": 3}, "even"),
    ],
)
def test_heads_that_do_not_fit_are_named(values: dict[str, int], word: str) -> None:
    with pytest.raises(ConfigError) as error:
        SoftmaxAttention(SoftmaxAttentionConfig(**values), CONTEXT)
    assert word in str(error.value)
