"""Layers left open: what they cost, which mixer they are given, and that the choice can be repeated."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_tensors import saved_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from conftest import TinyRun
from subquad.compiler.assign_mixers import assign_mixers, assigned, outside_bytes, with_mixers
from subquad.compiler.assignment import Assignment
from subquad.compiler.example import Example
from subquad.compiler.explain import explain, explained_plan
from subquad.compiler.plan import Plan
from subquad.compiler.quality.table import QualityTable
from subquad.compiler.run_shapes import sized_model
from subquad.compiler.target import Target, resolve_target
from subquad.errors import ConfigError, NotFoundError
from subquad.model.build import build_model
from subquad.schema import BudgetConfig, ChannelMixerConfig, CompilerConfig, ModelConfig, RunConfig, TrainerConfig
from subquad.training.fit import train
from subquad.training.generate import load_run

MIXERS: dict[str, Any] = {
    "softmax_attention": {"mixer": "softmax_attention", "num_heads": 2},
    "segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 4},
    "mamba": {"mixer": "mamba", "state_dim": 4},
    "window": {"mixer": "window", "num_heads": 2, "window": 8},
}


def run_config(*schedule: str, target: str = "cpu", budget: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    values: dict[str, Any] = {
        "d_model": 32, "num_layers": len(schedule), "schedule": list(schedule), "mixers": MIXERS,
        "channel_mixer": ChannelMixerConfig(d_hidden=32),
    }  # fmt: skip
    return RunConfig(
        model=ModelConfig(**values | model),
        data={"name": "python_source"},
        trainer=TrainerConfig(batch_size=2, seq_len=24, accelerator="cpu"),
        compiler=CompilerConfig(measure=False),
        budget=BudgetConfig(**budget or {}),
        target=target,
    )


@pytest.fixture
def cpu() -> Target:
    return resolve_target("cpu")


@pytest.fixture
def absent() -> Target:
    return resolve_target("h100")


def chosen(config: RunConfig, target: Target) -> tuple[RunConfig, Assignment]:
    filled, assignment = assign_mixers(config, target)
    assert assignment is not None
    return filled, assignment


def test_a_schedule_without_open_layers_is_left_as_it_is(absent: Target) -> None:
    config = run_config("mamba", "window")
    assert assign_mixers(config, absent) == (config, None)


def test_without_budgets_every_open_layer_gets_the_first_candidate_and_the_argument_stays(absent: Target) -> None:
    config = run_config("mamba", "auto", "auto", candidates=["window", "softmax_attention"])
    before = dataclasses.asdict(config)
    filled, assignment = chosen(config, absent)
    assert filled.model.schedule == ["mamba", "window", "window"] == list(assignment.schedule)
    assert dataclasses.asdict(config) == before
    assert assignment.auto == (1, 2)
    assert assignment.reasons[0] == "fixed by the recipe"
    assert "nothing was measured" in assignment.quality
    model = build_model(sized_model(filled))
    assert [block.mixer_name for block in model.blocks] == list(assignment.schedule)


def test_half_of_a_block_is_a_candidate_only_where_the_recipe_names_it(absent: Target) -> None:
    """A mixer may declare `candidate=False`, as RWKV's channel mix does: it sees two tokens, and costs least of all."""
    mixers = {"half": {"mixer": "rwkv_channel_mix"}, "window": MIXERS["window"]}
    filled, assignment = chosen(run_config("half", "auto", mixers=mixers), absent)
    assert filled.model.schedule == ["half", "window"]
    assert "half" not in assignment.reasons[1]
    filled, _ = chosen(run_config("auto", mixers=mixers, candidates=["half"]), absent)
    assert filled.model.schedule == ["half"]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_schedule_is_the_best_of_all_that_meet_the_budgets(share: float, absent: Target) -> None:
    keys = ["softmax_attention", "segment_attention", "mamba", "window"]
    _, free = chosen(run_config("window", "auto", "auto", "auto", candidates=keys), absent)
    limits = {}
    for name in ("latency_s", "carry_bytes"):
        figures = [getattr(cost, "charged_s" if name == "latency_s" else name) for cost in free.candidates.values()]
        limits[name] = 4 * (min(figures) + share * (max(figures) - min(figures)))
    config = run_config("window", "auto", "auto", "auto", candidates=keys, budget=limits)
    _, assignment = chosen(config, absent)
    totals = {}
    for rest in itertools.product(keys, repeat=3):
        costs = [free.candidates[key] for key in ("window", *rest)]
        used = sum(cost.charged_s for cost in costs), sum(cost.carry_bytes for cost in costs)
        if used[0] <= limits["latency_s"] and used[1] <= limits["carry_bytes"]:
            totals[rest] = sum(map(keys.index, rest))
    assert assignment.proven
    assert assignment.total_loss == min(totals.values())
    assert totals[assignment.schedule[1:]] == assignment.total_loss
    assert assignment.totals["latency_s"] <= limits["latency_s"]
    assert assignment.totals["carry_bytes"] <= limits["carry_bytes"]
    assert [other.loss for other in assignment.alternatives] == sorted(totals.values())[1 : 1 + 3]
    for reason in assignment.reasons[1:]:
        assert reason == "loses least of its candidates" or "here alone exceeds" in reason


def test_budgets_that_no_schedule_meets_name_the_cheapest_and_what_it_takes(absent: Target) -> None:
    config = run_config("auto", "auto", candidates=["softmax_attention", "window"], budget={"carry_bytes": 100})
    with pytest.raises(ConfigError, match="the cheapest, window, window, takes carry_bytes") as caught:
        assign_mixers(config, absent)
    assert caught.value.exit_code == 2
    assert caught.value.where == "budget.carry_bytes"
    _, free = chosen(run_config("auto", "auto", candidates=["window"]), absent)
    enough = free.totals["carry_bytes"]
    _, met = chosen(replace(config, budget=BudgetConfig(carry_bytes=enough)), absent)
    assert met.schedule == ("window", "window")


def test_memory_that_the_embedding_alone_exceeds_is_said(absent: Target) -> None:
    config = run_config("auto", candidates=["window"], budget={"memory_bytes": 1000})
    with pytest.raises(ConfigError, match="the embedding, the head and the logits alone take"):
        assign_mixers(config, absent)


def test_without_names_all_that_is_installed_is_asked_and_what_does_not_fit_is_declined(absent: Target) -> None:
    config = run_config("auto", mixers={}, d_model=34, budget={"carry_bytes": 1e9})
    _, assignment = chosen(config, absent)
    assert "mamba" in assignment.candidates
    assert "softmax_attention" in assignment.declined  # 34 is no multiple of its 4 heads
    assert assignment.schedule[0] in assignment.candidates
    assert "rwkv_channel_mix" not in {**assignment.candidates, **assignment.declined}  # it is half of a block
    with pytest.raises(ConfigError, match="34"):
        assign_mixers(run_config("auto", mixers={}, d_model=34, candidates=["softmax_attention"]), absent)


def test_an_unknown_candidate_is_named(absent: Target) -> None:
    with pytest.raises(NotFoundError, match="mambo"):
        assign_mixers(run_config("auto", candidates=["mambo"]), absent)


def test_a_model_is_not_built_while_layers_are_open() -> None:
    with pytest.raises(ConfigError, match="leaves layers to be chosen"):
        build_model(sized_model(run_config("mamba", "auto")))


@pytest.mark.parametrize("key", list(MIXERS))
@pytest.mark.parametrize("t", [24, 37])
def test_memory_and_carry_counted_on_shapes_are_those_of_tensors(key: str, t: int, cpu: Target) -> None:
    config = run_config("auto", candidates=[key], budget={"seq_len": t, "batch_size": 3})
    config.trainer.precision = "float32"
    cost = chosen(config, cpu)[1].candidates[key]
    (block,) = build_model(replace(sized_model(config), schedule=[key], context_len=64)).blocks
    x = torch.randn(1, 3 * t, 32, requires_grad=True)  # documents bound the rows of a batch
    bounds = torch.arange(0, 3 * t + 1, t, dtype=torch.int32)
    kept = saved_bytes(block, lambda: block(x, bounds), held=(bounds,))
    x = x.view(3, t, 32)
    parameters = sum(parameter.numel() for parameter in block.parameters())
    _, carry = block.mixer.prefill(x.detach(), block.mixer.empty_carry(3))
    assert cost.carry_bytes == sum(leaf.nbytes for leaf in tree_leaves(carry) if isinstance(leaf, Tensor))
    assert cost.memory_bytes == 16 * parameters + kept


def test_with_activation_checkpointing_a_block_keeps_its_input_and_takes_longer(absent: Target) -> None:
    config = run_config("auto", candidates=["window"])
    plain = chosen(config, absent)[1].candidates["window"]
    config.trainer.activation_checkpointing = True
    again = chosen(config, absent)[1].candidates["window"]
    (block,) = build_model(replace(sized_model(config), schedule=["window"])).blocks
    parameters = sum(parameter.numel() for parameter in block.parameters())
    assert again.memory_bytes == 16 * parameters + 4 * 2 * 24 * 32
    assert again.memory_bytes + again.workspace_bytes <= plain.memory_bytes + plain.workspace_bytes
    assert again.workspace_bytes > plain.memory_bytes - again.memory_bytes  # what is computed again comes and goes
    # Launches count here as well, which are no more in a second forward than in the first.
    assert 1.2 < again.latency_s / plain.latency_s < 1.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_is_charged_what_a_step_is_predicted_to_take_in_it(checkpointing: bool) -> None:
    """The same operators and the same calls around them, counted for one block and for the whole step."""
    config = run_config("auto", "auto", "auto", candidates=["mamba"], target="h100")
    config.trainer.activation_checkpointing = checkpointing
    plan = explained_plan(config)
    assert plan.assignment is not None and plan.prediction is not None
    parts = plan.prediction.parts
    blocks = parts["operators"] + parts["matrix products"] + parts["elementwise"]
    assert 3 * plan.assignment.candidates["mamba"].latency_s == pytest.approx(blocks)


def test_what_autograd_keeps_is_counted_once_and_without_parameters() -> None:
    layer = torch.nn.Linear(5, 7, bias=False)
    x = torch.randn(4, 5, requires_grad=True)
    # x is kept by the product (twice, in one storage); tanh keeps its output, which its square keeps as well.
    assert saved_bytes(layer, lambda: (layer(x) + layer(x)).tanh().square()) == 4 * (4 * 5 + 4 * 7)
    with FakeTensorMode():
        fake, wide = torch.nn.Linear(5, 7, bias=False), torch.randn(4, 5, requires_grad=True)
        assert saved_bytes(fake, lambda: (fake(wide) + fake(wide)).tanh().square()) == 4 * (4 * 5 + 4 * 7)


def test_longer_sequences_make_carries_of_attention_longer_and_leave_those_of_mamba(absent: Target) -> None:
    def carries(t: int) -> dict[str, int]:
        config = run_config("auto", candidates=list(MIXERS), budget={"seq_len": t})
        return {key: cost.carry_bytes for key, cost in chosen(config, absent)[1].candidates.items()}

    short, long = carries(64), carries(128)
    assert long["softmax_attention"] == 2 * short["softmax_attention"]
    assert long["mamba"] == short["mamba"] and long["window"] == short["window"]


def test_on_the_device_itself_blocks_are_timed(cpu: Target) -> None:
    config = run_config("auto", candidates=["window", "mamba"])
    config.compiler = CompilerConfig(measure=True, measure_budget_s=0.5)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _, assignment = chosen(config, cpu)
    assert torch.equal(torch.rand(3), expected), "measuring must not move the run's random state"
    for cost in assignment.candidates.values():
        assert cost.source == "measured"
        assert 0 < cost.latency_s <= cost.latency_high_s
        assert cost.charged_s == pytest.approx(1.01 * cost.latency_high_s), "blocks take more together than alone"


def table(loss: list[dict[str, float]], **given: Any) -> QualityTable:
    values = {"proxy": "planted", "origin": "a test", "loss": tuple(loss), "mixers": MIXERS, "d_model": 32}
    return QualityTable(**values | given)


def test_measured_losses_decide_where_the_one_long_memory_goes(tmp_path: Path, absent: Target) -> None:
    keys = ["softmax_attention", "window"]
    loss = [{key: 0.0 for key in MIXERS} | {"window": value} for value in (0.1, 0.7, 0.3)]
    file = tmp_path / "quality.json"
    table(loss).save(file)
    assert QualityTable.load(file) == table(loss)
    _, free = chosen(run_config("auto", "auto", "auto", candidates=keys), absent)
    carry = {key: cost.carry_bytes for key, cost in free.candidates.items()}
    limit = carry["softmax_attention"] + 2 * carry["window"]
    budget = {"carry_bytes": limit, "quality": str(file)}
    _, assignment = chosen(run_config("auto", "auto", "auto", candidates=keys, budget=budget), absent)
    assert assignment.schedule == ("window", "softmax_attention", "window")
    assert assignment.total_loss == pytest.approx(0.4)
    assert assignment.quality == "planted: a test"


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"d_model": 64}, "d_model 64"),
        ({"loss": ({"window": 0.0},)}, "layers 1"),
        ({"mixers": {}}, "does not know the candidate 'window'"),
        ({"mixers": {"window": MIXERS["window"] | {"window": 16}}}, "was measured as"),
    ],
)
def test_a_table_of_another_model_is_refused(
    changed: dict[str, Any], what: str, tmp_path: Path, absent: Target
) -> None:
    file = tmp_path / "quality.json"
    table(**{"loss": [{"window": 0.0}, {"window": 0.0}], **changed}).save(file)
    with pytest.raises(ConfigError, match=what):
        assign_mixers(run_config("auto", "auto", candidates=["window"], budget={"quality": str(file)}), absent)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 9}', '{"format_version": 1, "loss": 3}'])
def test_a_file_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"quality\.json"):
        QualityTable.load(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        QualityTable.load(tmp_path / "absent.json")


def test_explain_shows_candidates_budgets_reasons_and_what_comes_next() -> None:
    config = run_config("mamba", "auto", target="h100", candidates=["softmax_attention", "window"])
    limit = explained_plan(config).assignment
    assert limit is not None
    config.budget = BudgetConfig(carry_bytes=limit.totals["carry_bytes"] - 1)
    text = explain(config)
    for part in (
        "mixers of 1 auto layers, budgets at batch 2, 24 tokens",
        "quality  prior: the order softmax_attention > window; nothing was measured",
        "* window", "carry_bytes", " of ", "no schedule within the budgets has less",
        "window: softmax_attention loses 1 less, and here alone exceeds carry_bytes by",
    ):  # fmt: skip
        assert part in text
    assert "window.packed, layer 1" in text


def test_a_plan_keeps_the_choice_and_following_it_repeats_it(tmp_path: Path, absent: Target) -> None:
    config = run_config("auto", "auto", target="h100", candidates=["window", "mamba"])
    plan = explained_plan(config)
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan and read.assignment == plan.assignment
    config.model.candidates = ["mamba", "window"]  # would choose otherwise now
    filled, assignment = with_mixers(config, absent, read)
    assert filled.model.schedule == ["window", "window"]
    assert assignment == plan.assignment
    with pytest.raises(ConfigError, match="says nothing of them"):
        with_mixers(config, absent, replace(read, assignment=None))
    assert read.assignment is not None
    with pytest.raises(ConfigError, match="the plan assigns"):
        assigned(run_config("auto", "mamba"), read.assignment)


def test_a_plan_of_other_kernel_code_is_stale() -> None:
    plan = explained_plan(run_config("window", target="h100"))
    assert plan.kernel_versions
    (kernel, *_) = plan.kernel_versions
    same = dict(plan.kernel_versions)
    assert plan.staleness(plan.target, plan.versions, same) is None
    assert plan.staleness(plan.target, plan.versions, same | {kernel: "another"}) == f"{kernel} has other code"
    del same[kernel]
    assert plan.staleness(plan.target, plan.versions, same) == f"{kernel} is not installed"


def test_outside_of_blocks_are_matrices_and_logits() -> None:
    model = replace(sized_model(run_config("window")), vocab_size=100, tie_embeddings=False)
    example = Example(tokens_shape=(2, 8), training=True)
    assert outside_bytes(model, example) == 16 * 2 * 100 * 32 + 8 * 2 * 8 * 100
    in_chunks = 8 * 16 * 100 + 8 * 100 * 32 + 4 * 16 * 32
    assert outside_bytes(model, example, chunked_loss=True) == 16 * 2 * 100 * 32 + in_chunks


def test_a_run_with_open_layers_trains_resumes_and_generates(tiny_run: TinyRun) -> None:
    def asked(**given: Any) -> RunConfig:
        config = tiny_run("run", max_steps=4, **given)
        config.model = replace(
            config.model, schedule=["auto"], candidates=["window", "softmax_attention"], mixers=MIXERS
        )
        config.budget = BudgetConfig(alternatives=1)
        return config

    result = train(asked())
    plan = Plan.load(result.run_dir / "plan.json")
    assert plan.assignment is not None
    assert list(plan.assignment.schedule) == ["window", "window"] == list(plan.schedule)
    longer = asked()
    longer.resume, longer.trainer.max_steps = str(result.run_dir), 6
    assert train(longer, overrides=["trainer.max_steps=6", "model.schedule=[auto]"]).step == 6
    assert Plan.load(result.run_dir / "plan.json").assignment == plan.assignment
    model, _, _ = load_run(result.run_dir)
    assert [block.mixer_name for block in model.blocks] == ["window", "window"]
