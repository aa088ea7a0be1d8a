"""What a block holds is counted storage by storage: figures by hand, operators with scratch, whole models, a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad import load_config
from subquad.compiler.block_memory import BlockMemory, MemoryTimeline, block_memory
from subquad.compiler.example import Example
from subquad.compiler.explain import explained_plan
from subquad.compiler.plan import Figure
from subquad.model.block import Block
from subquad.model.build import build_model
from subquad.schema import ChannelMixerConfig, ModelConfig
from subquad_cost_model.timed_rows import read_timed_rows
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.linear_attention.declaration import several_heads, states_kept
from subquad_kernels.workload import Workload

ROOT = Path(__file__).parents[1]
D = 32
X = 4 * 2 * 24 * D
"""Bytes of a block's input."""
W = 4 * D * D
"""Bytes of a square map."""
EXAMPLE = Example(tokens_shape=(2, 24), training=True)


class TwoMaps(nn.Module):
    """A map, tanh, a map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Shapes:  x: b t d  ->  b t d"""
        return self.second(self.first(x).tanh())  # type: ignore[no-any-return]


class Unchanged(nn.Identity):
    """In place of a norm, which would keep more."""

    normalized_shape = (D,)


def planted_block(mixer: nn.Module) -> Block:
    block = Block(mixer, None, mixer_name="planted", layer_index=0, d_model=D, norm_eps=1e-6)
    block.norm = Unchanged()  # type: ignore[assignment]
    return block


def memory_of(build: Any, *, checkpointing: bool = False, example: Example = EXAMPLE, **figures: Figure) -> BlockMemory:
    with FakeTensorMode():
        return block_memory(build(), example, checkpointing=checkpointing, figures=figures)


def figure(kernel: str, peak_bytes: int, source: str = "measured") -> Figure:
    return Figure(kernel=kernel, seconds=1.0, low_s=1.0, high_s=1.0, peak_bytes=peak_bytes, source=source)


# --- by hand --------------------------------------------------------------------------


def test_a_storage_counts_from_the_call_that_makes_it_until_nobody_holds_it() -> None:
    with FakeTensorMode():
        weight = torch.empty(10)
        timeline = MemoryTimeline([weight], {}, "forward")
        with timeline:
            a = torch.empty(100)
            assert timeline.live_bytes == 400
            b = a.view(10, 10).T + weight
            assert timeline.live_bytes == timeline.peak_bytes == 800
            part = b[:5]
            del a, b
            assert timeline.live_bytes == 400  # the view holds all of it
            weight.view(2, 5)
            assert timeline.live_bytes == 400
            del part
        assert (timeline.live_bytes, timeline.peak_bytes) == (0, 800)


def test_gradients_that_meet_are_added_in_place() -> None:
    """Two of a tensor of 4,000 bytes stand before they are added, and no third beside them; an addition forward has."""
    with FakeTensorMode():
        x = torch.empty(1000, requires_grad=True)
        timeline = MemoryTimeline([x], {}, "backward")
        with timeline:
            loss = (2 * x).sum() + (3 * x).sum()
            loss.backward()
        assert 8000 <= timeline.peak_bytes < 8100
        forward = MemoryTimeline([x], {}, "forward")
        with forward:
            a, b = 2 * x, 3 * x
            a + b
        assert forward.peak_bytes == 12_000


def test_a_block_of_two_maps_is_counted_by_hand() -> None:
    memory = memory_of(lambda: planted_block(TwoMaps()))
    assert memory.parameters == 2 * D * D
    assert memory.kept_bytes == 2 * X  # x and tanh's result
    # At most, where tanh is differentiated: x, tanh's result and its gradient, that of its argument, that of y, which
    # the sum behind needs too, and that of the second map. Later dx is added to the gradient of y in place.
    assert memory.kept_bytes + memory.passing_bytes == 5 * X + W


def test_with_checkpointing_what_is_kept_moves_into_the_backward_and_is_not_counted_twice() -> None:
    plain, again = (memory_of(lambda: planted_block(TwoMaps()), checkpointing=flag) for flag in (False, True))
    assert again.kept_bytes == X
    assert again.kept_bytes + again.passing_bytes == plain.kept_bytes + plain.passing_bytes
    config = ModelConfig(
        d_model=D, vocab_size=40, context_len=64, num_layers=1, schedule=["mamba"],
        mixers={"mamba": {"mixer": "mamba", "state_dim": 4}}, channel_mixer=ChannelMixerConfig(d_hidden=96),
    )  # fmt: skip
    whole = memory_of(lambda: build_model(config).blocks[0])  # type: ignore[index]
    parts = memory_of(lambda: build_model(config).blocks[0], checkpointing=True)  # type: ignore[index]
    assert parts.kept_bytes == X < whole.kept_bytes
    # The channel mixer's are not yet there when the mixer runs backward, nor the mixer's when it runs itself.
    assert parts.kept_bytes + parts.passing_bytes <= whole.kept_bytes + whole.passing_bytes


def test_without_gradients_nothing_is_kept() -> None:
    memory = memory_of(lambda: planted_block(TwoMaps()), example=replace(EXAMPLE, training=False))
    assert memory.kept_bytes == 0
    assert memory.passing_bytes == 3 * X  # what a map takes and makes, and x for the sum


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_blocks_of_a_model_add_up_to_what_it_holds_as_a_whole(checkpointing: bool) -> None:
    config = ModelConfig(
        d_model=D, vocab_size=40, context_len=64, num_layers=4, schedule=["attention", "mamba"],
        mixers={"attention": {"mixer": "softmax_attention", "num_heads": 2},
                "mamba": {"mixer": "mamba", "state_dim": 4}},
        channel_mixer=ChannelMixerConfig(d_hidden=96),
    )  # fmt: skip
    with FakeTensorMode():
        model = build_model(config)
        blocks: list[Any] = list(model.blocks)  # type: ignore[arg-type]
        head = torch.empty(1, D)
        timeline = MemoryTimeline([*model.parameters(), head], {}, "backward")
        with timeline:
            x = torch.empty(2, 24, D, requires_grad=True)
            for block in blocks:
                x = checkpoint(block, x, None, use_reentrant=False) if checkpointing else block(x, None)
            loss = F.linear(x, head).sum()
            del x
            loss.backward()
        memory = [block_memory(block, EXAMPLE, checkpointing=checkpointing) for block in blocks]
    expected = max(
        sum(one.kept_bytes for one in memory[: i + 1])
        + memory[i].passing_bytes
        + 4 * sum(one.parameters for one in memory[i + 1 :])
        for i in range(4)
    )
    assert timeline.peak_bytes == pytest.approx(expected, rel=1e-3)  # the loss itself


# --- operators ------------------------------------------------------------------------


def attention() -> Block:
    config = ModelConfig(
        d_model=D, vocab_size=40, context_len=64, num_layers=1, schedule=["attention"],
        mixers={"attention": {"mixer": "softmax_attention", "num_heads": 2}}, channel_mixer=None,
    )  # fmt: skip
    return build_model(config).blocks[0]  # type: ignore[index, return-value]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_operator_adds_what_its_kernel_needs_beside_its_tensors(checkpointing: bool) -> None:
    def passing(peak_bytes: int, source: str = "measured") -> int:
        needs = figure("sdpa_flash", peak_bytes, source)
        return memory_of(attention, checkpointing=checkpointing, softmax_attention=needs).passing_bytes

    nothing = memory_of(attention, checkpointing=checkpointing).passing_bytes
    # Its gradient's tensors: q, k, v, their gradients, y and its own; a figure for every token and head.
    tensors = 8 * X + 4 * 2 * 24 * 2
    assert passing(0) == passing(tensors) == nothing
    assert passing(50 * X) == passing(40 * X) + 10 * X > nothing
    assert nothing < passing(tensors + 20 * X) < nothing + 20 * X + 1
    assert passing(50 * X, "bound") == nothing


def test_a_kernel_that_declares_its_scratch_needs_no_estimate() -> None:
    config = ModelConfig(
        d_model=D, vocab_size=40, context_len=64, num_layers=1, schedule=["mamba2"],
        mixers={"mamba2": {"mixer": "mamba2", "head_dim": 4, "state_dim": 64, "num_groups": 1}}, channel_mixer=None,
    )  # fmt: skip
    found = [
        memory_of(lambda: build_model(config).blocks[0], linear_attention=needs)  # type: ignore[index]
        for needs in (figure("fused", 0, "bound"), figure("fused", 10**9), figure("chunked", 0))
    ]
    assert found[0] == found[1]
    assert found[0].passing_bytes > found[2].passing_bytes


@pytest.mark.parametrize(("name", "kernel"), [("linear_attention", "fused")])
def test_declared_scratch_is_what_was_measured_on_gpus(name: str, kernel: str) -> None:
    """Of rows of an H100 and an H200 that ship with the cost model; torch rounds what it allocates."""
    pytest.importorskip("pyarrow")
    rows = [
        timed
        for table in sorted((ROOT / "cost_model" / "data").glob("*.parquet"))
        for timed in read_timed_rows(table)
        if (timed.row.operator, timed.row.kernel, timed.row.phase) == (name, kernel, "backward") and timed.peak_bytes
    ]
    assert len(rows) > 70
    operator, declared = CATALOGUE.operator(name), CATALOGUE.kernel(name, kernel).scratch_bytes
    assert declared is not None
    ways = {several_heads: 0, states_kept: 0}
    for timed in rows:
        row = timed.row
        workload = Workload(
            operator=name, shape=dict(row.shape), dtype=row.dtype, phase="backward",  # type: ignore[arg-type]
            options=dict(row.options), document_lengths=row.document_lengths,
        )  # fmt: skip
        with FakeTensorMode():
            arguments = operator.torch_half.sample_inputs(workload, seed=0, device="cpu")
            results = operator.torch_half.empty_outputs(arguments)
        given = [value for value in arguments.values() if isinstance(value, Tensor)]
        found = [tensor for tensor in given if tensor.is_floating_point()]  # their gradients
        tensors = sum(tensor.nbytes for tensor in (*given, *found, *results, *results[: len(operator.outputs)]))
        assert tensors + declared(workload) == pytest.approx(timed.peak_bytes, rel=0.05), row
        ways = {way: seen + way(workload) for way, seen in ways.items()}
    assert all(ways.values()), "each way to compute it is among them"


# --- whole steps ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "measured_bytes"),
    [
        ("scout_mamba_430m", 31_243_002_368),
        ("scout_swa_470m", 32_699_806_208),
        ("mamba2_370m", 38_355_299_328),
    ],
)
def test_a_step_with_checkpointing_takes_what_a_gpu_was_seen_to_take(model: str, measured_bytes: int) -> None:
    """Peaks of steps of 131,072 tokens: tools/results/longest_context_h200_2026-11-29.json."""
    config = load_config([
        f"model={model}", "target=h200", "trainer.precision=bfloat16", "trainer.seq_len=131072", "trainer.batch_size=1",
        "trainer.activation_checkpointing=true", "trainer.loss=chunked", "compiler.measure=false",
    ])  # fmt: skip
    config.model.context_len = 131_072
    step = explained_plan(config).prediction
    assert step is not None and step.peak_bytes is not None
    assert step.peak_bytes == pytest.approx(measured_bytes, rel=0.02)
