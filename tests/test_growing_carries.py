"""Carries whose caches grow in place: a step copies no cache, and whatever goes on from a carry, each is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subquad.compiler.capture import capture, install
from subquad.component_config import typed_config
from subquad.contracts import MixerContext
from subquad.registry import load_registry
from subquad.testing.mixer_suite import assert_close
from subquad_kernels.catalogue import load_attribute

CONFIGS = {
    "softmax_attention": {"num_heads": 4, "num_kv_heads": 2},
    "window": {"num_heads": 2, "window": 70},
    "segment_attention": {"num_heads": 2, "segment_len": 3},
}


def built(name: str, *, graphs: bool) -> Any:
    """A mixer in float64, which runs its own methods or the graphs of them."""
    spec = load_registry().mixer(name)
    torch.manual_seed(0)
    context = MixerContext(d_model=16, layer_index=0, num_layers=1, context_len=256)
    mixer: Any = load_attribute(spec.build)(typed_config(spec.config, CONFIGS[name], "config"), context)  # type: ignore[operator]
    mixer.init_parameters(0.3)
    mixer.double()
    if graphs:
        install(mixer, capture(mixer).graphs)
    return mixer


@pytest.mark.parametrize("graphs", [False, True], ids=["methods", "graphs"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_steps_stay_in_one_memory_until_its_room_is_used_up(name: str, graphs: bool) -> None:
    mixer, x = built(name, graphs=graphs), torch.randn(2, 240, 16, dtype=torch.float64)
    y, carry = mixer.prefill(x[:, :100], mixer.empty_carry(2))
    outputs, memories = [y], set[int]()
    for t in range(100, 240):
        y_t, carry = mixer.decode(x[:, t], carry)
        outputs.append(y_t.unsqueeze(1))
        memories.add(carry.keys.untyped_storage().data_ptr())
    assert_close(torch.cat(outputs, 1), mixer(x), name)
    assert len(memories) <= 4, f"140 steps used {len(memories)} memories"


@pytest.mark.parametrize("graphs", [False, True], ids=["methods", "graphs"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_carry_is_continued_twice_turn_by_turn(name: str, graphs: bool) -> None:
    mixer = built(name, graphs=graphs)
    start, ends = torch.randn(2, 8, 16, dtype=torch.float64), torch.randn(2, 2, 90, 16, dtype=torch.float64)
    _, carry = mixer.prefill(start, mixer.empty_carry(2))
    carries, outputs = [carry, carry], ([], [])  # type: ignore[var-annotated]
    for t in range(90):
        for branch in range(2):
            y_t, carries[branch] = mixer.decode(ends[branch, :, t], carries[branch])
            outputs[branch].append(y_t)
    for branch in range(2):
        whole = mixer(torch.cat([start, ends[branch]], dim=1))
        assert_close(torch.stack(outputs[branch], dim=1), whole[:, 8:], f"{name}, continuation {branch}")
