"""What a step is predicted to take: the work that is counted is the work that is done, and the parts add up."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_tensors import saved_bytes
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from subquad.compiler import predict_step as module
from subquad.compiler.example import Example
from subquad.compiler.explain import explained_plan
from subquad.compiler.plan import Plan
from subquad.compiler.predict_step import predict_step
from subquad.compiler.report import format_plan
from subquad.compiler.step_work import StepWork, step_work
from subquad.compiler.target import resolve_target
from subquad.model.build import build_model
from subquad.schema import BudgetConfig, ChannelMixerConfig, CompilerConfig, ModelConfig, RunConfig, TrainerConfig

MIXERS: dict[str, Any] = {
    "mamba": {"mixer": "mamba", "state_dim": 4},
    "segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 4},
    "softmax_attention": {"mixer": "softmax_attention", "num_heads": 2},
}


def model_config(*schedule: str, num_layers: int = 0, **sizes: Any) -> ModelConfig:
    return ModelConfig(
        **{"d_model": 32, "vocab_size": 40, "context_len": 64, **sizes},
        num_layers=num_layers or len(schedule),
        schedule=list(schedule),
        mixers={key: MIXERS[key] for key in schedule},
        channel_mixer=ChannelMixerConfig(d_hidden=48),
    )


def run_config(*schedule: str, target: str = "cpu", **changes: Any) -> RunConfig:
    sizes = changes.pop("sizes", {})
    return RunConfig(
        model=model_config(*schedule, **sizes),
        data={"name": "synthetic"},
        trainer=TrainerConfig(**{"batch_size": 2, "seq_len": 24, **changes.pop("trainer", {})}),
        compiler=CompilerConfig(estimator="roofline", measure=False),
        target=target,
        **changes,
    )


def work_of(config: RunConfig) -> StepWork:
    example = Example(tokens_shape=(2, 24), training=True)
    return step_work(config.model, example, kind="cpu", checkpointing=config.trainer.activation_checkpointing)


def predicted(config: RunConfig) -> tuple[Any, Plan]:
    plan = explained_plan(config)
    assert plan.prediction is not None
    return plan.prediction, plan


# --- the count ------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "schedule", [("softmax_attention",), ("mamba", "segment_attention", "mamba")], ids=lambda keys: "-".join(keys)
)
def test_the_products_of_a_step_are_those_that_a_real_step_computes(schedule: tuple[str, ...], packed: bool) -> None:
    config = model_config(*schedule)
    example = Example(tokens_shape=(2, 24), packed=packed, training=True)
    work = step_work(config, example, kind="cpu", checkpointing=False)
    torch.manual_seed(1)
    model = build_model(config)
    tokens = torch.randint(40, (2, 24))
    bounds = torch.tensor([0, 24, 48], dtype=torch.int32) if packed else None
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens, bounds)
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="sum").backward()
    by_call = counter.get_flop_counts()["Global"]
    expected = sum(flops for call, flops in by_call.items() if not str(call).startswith("subquad"))
    counted = sum(call.matmul_flops * times for calls in (work.blocks, work.outside) for call, times in calls.items())
    assert counted == expected
    assert work.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_what_a_linear_map_moves_is_counted_by_hand() -> None:
    config = model_config("softmax_attention", tie_embeddings=False)
    config.channel_mixer = None
    work = step_work(config, Example(tokens_shape=(2, 24), training=True), kind="cpu", checkpointing=False)
    rows, d = 48, 32
    maps = Counter({(2 * rows * d * d, 4 * (2 * rows * d + d * d)): 12})  # q, k, v, o; forward, two gradients each
    assert Counter({(call.matmul_flops, call.bytes_moved): times for call, times in work.blocks.items()
                    if call.matmul_flops}) == maps  # fmt: skip
    head = Counter({(2 * rows * d * 40, 4 * (rows * d + rows * 40 + d * 40)): 3})
    assert Counter({(call.matmul_flops, call.bytes_moved): times for call, times in work.outside.items()
                    if call.matmul_flops}) == head  # fmt: skip


def test_work_grows_with_layers_and_not_outside_of_them() -> None:
    example = Example(tokens_shape=(2, 24), training=True)

    def count(layers: int) -> Any:
        return step_work(model_config("mamba", num_layers=layers), example, kind="cpu", checkpointing=False)

    one, three = count(1), count(3)
    assert three.outside == one.outside
    assert three.blocks == Counter({call: 3 * times for call, times in one.blocks.items()})
    assert three.operator_calls == 3 * one.operator_calls == 3 * 4  # convolution and scan, forward and backward
    assert three.kept_bytes == 3 * one.kept_bytes


def test_what_is_kept_is_what_autograd_keeps_of_a_real_block() -> None:
    config = model_config("segment_attention")
    work = step_work(config, Example(tokens_shape=(2, 24), training=True), kind="cpu", checkpointing=False)
    block: Any = build_model(config).blocks[0]
    x = torch.randn(2, 24, 32, requires_grad=True)
    assert work.kept_bytes == saved_bytes(block, lambda: block(x))


def test_checkpointing_computes_the_forward_twice_and_keeps_the_input_alone() -> None:
    example = Example(tokens_shape=(2, 24), training=True)
    config = model_config("softmax_attention")
    plain, again = (step_work(config, example, kind="cpu", checkpointing=flag) for flag in (False, True))

    def products(work: Any) -> int:
        return sum(call.matmul_flops * times for call, times in work.blocks.items())

    last = 2 * 48 * 48 * 32  # the block's last product, of which nothing is kept, is not computed again
    assert 3 * (products(again) + last) == 4 * products(plain)
    assert again.kept_bytes == 4 * 2 * 24 * 32
    (whole,), (parts,) = plain.memory, again.memory
    assert parts.kept_bytes + parts.passing_bytes <= whole.kept_bytes + whole.passing_bytes  # no second copy beside it
    assert 2 * again.operator_calls == 3 * plain.operator_calls


def test_a_norm_is_one_call_each_way_on_cuda() -> None:
    example = Example(tokens_shape=(2, 24), training=True)
    work = {kind: step_work(model_config("softmax_attention"), example, kind=kind, checkpointing=False)
            for kind in ("cpu", "cuda")}  # fmt: skip
    assert work["cuda"].calls < work["cpu"].calls
    x = 4 * 2 * 24 * 32
    moved = [call.bytes_moved for call in work["cuda"].blocks if not call.matmul_flops]
    assert any(2 * x <= size <= 2 * x + 4 * (32 + 2 * 48) for size in moved)  # x, y, the weight, two figures a row


# --- the prediction -------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_the_parts_add_up_and_lie_inside_their_interval(target: str) -> None:
    step, plan = predicted(run_config("mamba", "segment_attention", target=target))
    assert list(step.parts) == ["operators", "matrix products", "elementwise", "embedding, head, loss", "optimizer"]
    assert all(seconds > 0 for seconds in step.parts.values())
    assert step.seconds == pytest.approx(max(sum(step.parts.values()), step.host_s))
    assert step.low_s <= step.seconds <= step.high_s
    assert step.parts["operators"] == pytest.approx(plan.seconds)


def test_a_small_model_waits_for_the_host_of_a_gpu_and_a_large_one_does_not() -> None:
    small, plan = predicted(run_config("softmax_attention", target="h100"))
    assert small.seconds == small.host_s > sum(small.parts.values())
    assert "the host is the slower" in format_plan(plan)
    sizes = {"d_model": 2048, "vocab_size": 32000, "context_len": 4096}
    large, plan = predicted(
        run_config("softmax_attention", target="h100", sizes=sizes, trainer={"batch_size": 16, "seq_len": 4096})
    )
    assert large.seconds == pytest.approx(sum(large.parts.values()))
    assert large.seconds > large.host_s
    assert "the host is the slower" not in format_plan(plan)
    assert predicted(run_config("softmax_attention"))[0].host_s == 0.0


def test_micro_batches_repeat_everything_but_the_optimizer() -> None:
    one, _ = predicted(run_config("mamba"))
    four, _ = predicted(run_config("mamba", trainer={"accumulate": 4}))
    for part, seconds in one.parts.items():
        assert four.parts[part] == pytest.approx(seconds * (1 if part == "optimizer" else 4))
    assert four.calls == 4 * one.calls
    assert four.peak_bytes - one.peak_bytes == one.memory["gradients"] - 4 * 40 * 32  # the head's stands in one as well


def test_the_peak_stands_at_the_loss_or_in_the_backward_of_a_block() -> None:
    config = run_config("segment_attention", "mamba", "segment_attention")
    step, _ = predicted(config)
    model = build_model(config.model)
    blocks: Any = model.blocks
    x = torch.randn(2, 24, 32, requires_grad=True)
    kept = [saved_bytes(block, lambda: block(x)) for block in blocks]  # noqa: B023
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert step.memory["weights and moments"] == 12 * parameters
    assert step.memory["gradients"] == 4 * parameters
    assert step.memory["kept for the backward"] == sum(kept)
    assert step.memory["loss"] == 12 * 2 * 24 * 40
    assert step.peak_bytes > 12 * parameters + sum(kept) + step.memory["loss"]  # so small a vocabulary is not it
    passing = [block.passing_bytes for block in work_of(config).memory]
    behind = [0, *itertools.accumulate(4 * sum(map(torch.numel, block.parameters())) for block in reversed(blocks))]
    found = [
        sum(kept[: layer + 1]) + passing[layer] + behind[2 - layer] + 4 * 40 * 32  # the head's is there from the start
        for layer in range(3)
    ]
    assert step.peak_bytes == 12 * parameters + max(found)
    large, _ = predicted(run_config("segment_attention", sizes={"vocab_size": 5000}))
    parts = ("weights and moments", "kept for the backward", "loss")
    assert large.peak_bytes == sum(large.memory[part] for part in parts)


def test_a_loss_in_chunks_is_predicted_to_take_the_same_products_and_less_memory() -> None:
    sizes = {"vocab_size": 50_000, "context_len": 2048}
    whole, chunked = (
        predicted(
            run_config("softmax_attention", sizes=sizes, trainer={"seq_len": 2048, "loss": loss}, target="h100")
        )[0]
        for loss in ("whole", "chunked")
    )
    assert whole.memory["loss"] == 12 * 2 * 2048 * 50_000
    chunk = 2**26 // 50_000
    assert chunked.memory["loss"] == 8 * chunk * 50_000 + 8 * 50_000 * 32 + 2 * 2 * 2048 * 32  # of bfloat16
    assert chunked.peak_bytes < whole.peak_bytes
    example = Example(tokens_shape=(2, 24), training=True)
    counts = [
        step_work(model_config("softmax_attention"), example, kind="cpu", checkpointing=False, chunked_loss=flag)
        for flag in (False, True)
    ]
    whole_products, products = (
        sum(call.matmul_flops * times for call, times in work.outside.items()) for work in counts
    )
    assert products == whole_products


def test_checkpointing_is_predicted_to_take_longer_and_less_memory() -> None:
    sizes = {"num_layers": 6}
    plain, _ = predicted(run_config("mamba", sizes=sizes))
    again, _ = predicted(run_config("mamba", sizes=sizes, trainer={"activation_checkpointing": True}))
    assert again.parts["operators"] == pytest.approx(plain.parts["operators"] * 4 / 3)
    assert again.seconds > plain.seconds
    assert again.peak_bytes < plain.peak_bytes


def test_explain_holds_the_totals_against_the_budget() -> None:
    step, _ = predicted(run_config("mamba", target="h100"))
    blocks_s = sum(step.parts[name] for name in ("operators", "matrix products", "elementwise"))
    for factor, over in ((0.5, True), (2.0, False)):
        budget = BudgetConfig(latency_s=factor * blocks_s, memory_bytes=factor * step.peak_bytes)
        text = format_plan(explained_plan(run_config("mamba", target="h100", budget=budget)))
        lines = [line for line in text.splitlines() if line.endswith(("(budget.latency_s)", "(budget.memory_bytes)"))]
        assert len(lines) == 2
        assert all(("over it" in line) == over for line in lines)


def test_what_is_not_modelled_is_said() -> None:
    step, plan = predicted(run_config("mamba", compile=True, trainer={"devices": 2}))
    assert step.notes == (
        "torch.compile fuses elementwise maps, which are counted one by one here",
        "the exchange of gradients between devices is not counted",
    )
    assert all(note in format_plan(plan) for note in step.notes)


def test_a_model_that_cannot_be_counted_has_no_prediction_and_the_report_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("it looks at numbers\nand more")

    monkeypatch.setattr(module, "step_work", refuse)
    step, plan = predicted(run_config("mamba"))
    assert (step.seconds, step.peak_bytes) == (None, None)
    assert "the step is not predicted: RuntimeError: it looks at numbers" in format_plan(plan)


def test_a_plan_for_other_batches_predicts_nothing_for_these() -> None:
    config = run_config("mamba")
    _, plan = predicted(config)
    config.trainer.batch_size = 3
    step = predict_step(config, resolve_target("cpu"), plan)
    assert step.seconds is None
    assert step.notes == ("the step is not predicted: the plan is for batches of (2, 24)",)


def test_predicting_leaves_the_random_state_and_the_plan_keeps_the_prediction(tmp_path: Path) -> None:
    config = run_config("mamba")
    _, plan = predicted(config)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = replace(plan, prediction=predict_step(config, resolve_target("cpu"), plan))
    assert torch.equal(torch.get_rng_state(), before)
    again.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == again
