"""Segment attention keeps the suite's promises, and the claims of the paper."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from subquad.contracts import MixerContext
from subquad.errors import ConfigError
from subquad.mixers.configs import SoftmaxAttentionConfig
from subquad.mixers.softmax_attention import SoftmaxAttention
from subquad.testing.mixer_suite import MixerSuite, assert_close, carry_bytes
from subquad_scout.config import SegmentAttentionConfig
from subquad_scout.reading_segment_attention import ReadingSegmentAttention
from subquad_scout.segment_attention import SegmentAttention

CONTEXT = MixerContext(d_model=16, layer_index=0, num_layers=1, context_len=64)


class TestSegmentAttention(MixerSuite):
    mixer = "segment_attention"
    config: ClassVar = {"num_heads": 4, "segment_len": 3}


class TestSharedKeyHeads(MixerSuite):
    mixer = "segment_attention"
    config: ClassVar = {"num_heads": 4, "num_kv_heads": 1, "segment_len": 4}


class TestSegmentAttentionThatPublishes(MixerSuite):
    mixer = "segment_attention"
    config: ClassVar = {"num_heads": 4, "num_kv_heads": 2, "segment_len": 3, "kv": "publish"}


class TestSegmentAttentionThatReads(MixerSuite):
    mixer = "segment_attention"
    config: ClassVar = {"num_heads": 4, "num_kv_heads": 2, "segment_len": 3, "kv": "read"}

    def test_keeps_no_summaries(self) -> None:
        mixer = self.build().mixer
        assert carry_bytes(mixer.empty_carry(2)) == 0
        assert [name for name, _ in mixer.named_parameters()] == ["q_proj.weight", "o_proj.weight"]


class TestSegmentsOfTheSquareRoot(MixerSuite):
    mixer = "segment_attention"
    config: ClassVar = {"num_heads": 2, "segment_len": "sqrt"}
    context_len = 9


def build(segment_len: int, seed: int = 0) -> SegmentAttention:
    torch.manual_seed(seed)
    return SegmentAttention(SegmentAttentionConfig(num_heads=2, segment_len=segment_len), CONTEXT).double()


def tokens(t: int) -> Tensor:
    return torch.randn(1, t, 16, dtype=torch.float64)


def test_segments_of_one_token_are_full_attention() -> None:
    segments = build(1)
    full = SoftmaxAttention(SoftmaxAttentionConfig(num_heads=2), CONTEXT).double()
    full.load_state_dict(segments.state_dict())
    x = tokens(19).requires_grad_()
    assert_close(segments(x), full(x))
    pull = tokens(19)
    (found,) = torch.autograd.grad((segments(x) * pull).sum(), x)
    (expected,) = torch.autograd.grad((full(x) * pull).sum(), x)
    assert_close(found, expected)


def test_before_the_first_segment_ends_a_token_sees_itself_alone() -> None:
    mixer, x = build(50), tokens(20)
    assert_close(mixer(x), mixer.o_proj(mixer.v_proj(x)))


def test_a_token_sees_itself_and_the_last_token_of_each_earlier_segment() -> None:
    segment_len, t = 4, 14
    mixer, x = build(segment_len), tokens(t).requires_grad_()
    y = mixer(x)
    for g in range(t):
        (gradient,) = torch.autograd.grad(y[:, g].sum(), x, retain_graph=True)
        seen = set((gradient[0].abs().amax(dim=1) > 0).nonzero().flatten().tolist())
        assert seen == {g} | {p for p in range(segment_len - 1, g, segment_len)}
        assert len(seen) == 1 + g // segment_len


def test_history_is_seen_only_through_segment_summaries() -> None:
    mixer, x = build(4), tokens(14)
    y = mixer(x)
    inside = x.clone()
    inside[:, 1] += 1
    outside = mixer(inside)
    assert torch.equal(outside[:, 2:], y[:, 2:])
    last = x.clone()
    last[:, 3] += 1
    assert ((mixer(last) - y)[:, 4:].abs().amax(dim=2) > 0).all()


def test_the_cache_holds_one_entry_per_complete_segment() -> None:
    mixer = build(4)
    with torch.no_grad():
        carry = mixer.empty_carry(1)
        for n in range(1, 14):
            _, carry = mixer.decode(tokens(1)[:, 0], carry)
            assert carry.keys.shape[1] == n // 4
            assert carry.position == n


def test_a_reader_of_its_own_keys_is_the_publisher() -> None:
    """With equal queries and outputs the two layers are one function, in forward, prefill and every decode."""
    config = {"num_heads": 2, "segment_len": 4}
    torch.manual_seed(0)
    publisher = SegmentAttention(SegmentAttentionConfig(**config, kv="publish"), CONTEXT).double()
    reader = ReadingSegmentAttention(SegmentAttentionConfig(**config, kv="read"), CONTEXT).double()
    reader.load_state_dict({name: publisher.state_dict()[name] for name in reader.state_dict()})
    x = tokens(19)
    y, shared = publisher(x, None, {})
    assert torch.equal(reader(x, None, shared)[0], y)
    carry, position = publisher.empty_carry(1), reader.empty_carry(1)
    for piece in (slice(0, 6), slice(6, 14), *(slice(t, t + 1) for t in range(14, 19))):
        published, carry, shared = publisher.prefill(x[:, piece], carry, {})
        read, position, _ = reader.prefill(x[:, piece], position, shared)
        assert shared["segment_attention.keys"].shape[1] == piece.start // 4 + piece.stop - piece.start
        assert_close(published, y[:, piece])
        assert torch.equal(read, published)


def test_the_order_of_summaries_matters_only_through_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rotation, permuting summaries leaves every output after the last permuted one unchanged."""
    monkeypatch.setattr("subquad_scout.segment_attention.rotary", lambda q, k, *_, **__: (q, k))
    mixer: Any = build(3)
    x = tokens(20)
    permuted = x.clone()
    permuted[:, [2, 5, 8]] = x[:, [8, 2, 5]]
    y, z = mixer(x), mixer(permuted)
    assert_close(z[:, 9:], y[:, 9:])
    assert (z[:, 2:9] - y[:, 2:9]).abs().max() > 1e-3


@pytest.mark.parametrize("context_len", [1, 2, 4, 5, 100, 4096, 4097])
def test_sqrt_segments_grow_with_the_root_of_the_context(context_len: int) -> None:
    segment_len = SegmentAttentionConfig(segment_len="sqrt").resolved_segment_len(context_len)
    assert (segment_len - 1) ** 2 < context_len <= segment_len**2
    assert segment_len == math.ceil(math.sqrt(context_len))


@pytest.mark.parametrize("segment_len", [0, -3, "root"])
def test_a_segment_length_that_is_none_is_refused(segment_len: int | str) -> None:
    with pytest.raises(ConfigError, match="segment_len"):
        SegmentAttentionConfig(segment_len=segment_len)
