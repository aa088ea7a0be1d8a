"""The compiler: what it captures, what it chooses and why, and that rewriting changes nothing but kernels."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.compiler.capture import capture, kernel_of, operator_nodes
from subquad.compiler.example import Example
from subquad.compiler.explain import explain, explained_plan
from subquad.compiler.layer_numbers import layer_numbers
from subquad.compiler.measure_kernels import Measurer
from subquad.compiler.options import CompileOptions
from subquad.compiler.passes.select_kernels import select_kernels
from subquad.compiler.pipeline import compile_model, compiled_graphs, kernel_versions
from subquad.compiler.plan import NodeChoice, Plan
from subquad.compiler.report import format_plan
from subquad.compiler.target import is_same_model, require_local, resolve_target
from subquad.compiler.workload import node_workloads
from subquad.errors import ConfigError, NotFoundError
from subquad.model.build import build_model
from subquad.model.language_model import LanguageModel
from subquad.registry import load_registry
from subquad.schema import ChannelMixerConfig, ModelConfig, RunConfig, TrainerConfig
from subquad_cost_model import Decision, Estimate, decide
from subquad_kernels.catalogue import CATALOGUE, Kernel
from subquad_kernels.torch_operator import default_kernels, named_arguments
from subquad_kernels.workload import Workload

load_registry()  # fills the catalogue: any test may be the first

EXAMPLE = Example(tokens_shape=(2, 24), packed=True, training=True)
QUIET = CompileOptions(measure=False)
MIXERS: dict[str, Any] = {
    "mamba": {"mixer": "mamba", "state_dim": 4},
    "segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 4},
    "window": {"mixer": "window", "num_heads": 2, "window": 8},
    "softmax_attention": {"mixer": "softmax_attention", "num_heads": 2},
}


def small_config(*schedule: str) -> ModelConfig:
    return ModelConfig(
        d_model=32,
        num_layers=len(schedule),
        vocab_size=40,
        context_len=24,
        schedule=list(schedule),
        mixers={key: MIXERS[key] for key in schedule},
        channel_mixer=ChannelMixerConfig(d_hidden=32),
    )


def small_model(*schedule: str) -> LanguageModel:
    torch.manual_seed(0)
    return build_model(small_config(*schedule))


@pytest.fixture(scope="module")
def scout() -> tuple[LanguageModel, Plan]:
    return compile_model(small_model("mamba", "segment_attention"), EXAMPLE, target="cpu", options=QUIET)


def test_a_compiled_scout_has_one_node_per_operator_with_its_kernel(scout: tuple[LanguageModel, Plan]) -> None:
    graphs = compiled_graphs(scout[0])
    assert set(graphs) == {(layer, method) for layer in (0, 1) for method in ("forward", "packed", "prefill", "decode")}
    for (layer, _), graph_module in graphs.items():
        found = [(operator.name, kernel_of(node)) for node, operator in operator_nodes(graph_module.graph)]
        expected = [("causal_conv", "taps"), ("selective_scan", "chunked")] if layer == 0 else [
            ("rotary", "tables"), ("segment_attention", "compacted"),
        ]  # fmt: skip
        assert found == expected
    printed = graphs[1, "packed"].code
    print(printed)
    assert printed.count("torch.ops.subquad.segment_attention.default(") == 1
    assert "'compacted'" in printed


def test_compiling_changes_no_key_and_no_result(scout: tuple[LanguageModel, Plan]) -> None:
    model, plain = scout[0], small_model("mamba", "segment_attention")
    assert list(model.state_dict()) == list(plain.state_dict())
    tokens = torch.randint(0, 40, (2, 24))
    boundaries = torch.tensor([0, 5, 24, 30, 48], dtype=torch.int32)
    assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model(tokens, boundaries), plain(tokens, boundaries))


def test_parameters_loaded_moved_or_replaced_later_reach_the_graphs() -> None:
    model, _ = compile_model(small_model("mamba"), EXAMPLE, target="cpu", options=QUIET)
    other = build_model(small_config("mamba"))
    tokens = torch.randint(0, 40, (1, 9))
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert torch.equal(model(tokens), other(tokens))
    model.double()
    assert (model(tokens) - other.double()(tokens)).abs().max() < 1e-6


def test_a_model_may_be_compiled_again() -> None:
    """For other shapes or options; what is captured is each mixer as it is written, not the graphs that it runs."""
    config = small_config("mamba", "segment_attention", "softmax_attention")
    model, tokens = build_model(config).eval(), torch.randint(0, 40, (2, 12))
    with torch.no_grad():
        expected = model(tokens)
        for length in (16, 32):
            example = Example(tokens_shape=(2, length), decoding=True)
            plan = compile_model(model, example, target="cpu", options=QUIET)[1]
            assert not plan.uncaptured
            prefilled, carry = model.prefill(tokens[:, :-1], model.empty_carry(2))
            last, _ = model.decode(tokens[:, -1], carry)
            found = torch.cat([prefilled, last.unsqueeze(1)], dim=1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # torch's pytree, about itself
def test_a_deep_copy_has_graphs_of_its_own() -> None:
    model, _ = compile_model(small_model("segment_attention"), EXAMPLE, target="cpu", options=QUIET)
    tokens = torch.randint(0, 40, (1, 9))
    before = model(tokens)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.blocks.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens), before)
    assert not torch.equal(twin(tokens), before)


def test_select_kernels_leaves_the_graph_it_was_given_alone() -> None:
    mixer = small_model("softmax_attention").blocks[0].mixer
    before = capture(mixer).graphs["forward"]
    *_, (node, _) = operator_nodes(before.graph)
    outcome = select_kernels({node.name: "reference"})(before)
    *_, (after, _) = operator_nodes(outcome.graph.graph)
    assert kernel_of(node) == "default"
    assert kernel_of(after) == "reference"
    assert outcome.report[-1] == f"{node.name}: softmax_attention default -> reference"
    x = torch.randn(1, 7, 32)
    assert (outcome.graph(x, None) - before(x, None)).abs().max() < 1e-5
    assert "keeps default" in select_kernels({})(before).report[0]


class Branching(nn.Module):
    """A mixer whose Python looks at values: it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x

    def empty_carry(self, batch_size: int) -> tuple[()]:
        return ()

    def prefill(self, x: Tensor, carry: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return self.linear(x), carry

    def decode(self, x_t: Tensor, carry: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return self.linear(x_t), carry


def test_a_method_that_cannot_be_captured_runs_as_written_and_is_named() -> None:
    model = small_model("softmax_attention", "softmax_attention")
    model.blocks[1].mixer = Branching()
    tokens = torch.randint(0, 40, (1, 9))
    before = model(tokens)
    model, plan = compile_model(model, EXAMPLE, target="cpu", options=QUIET)
    assert (model(tokens) - before).abs().max() < 1e-5
    assert {(entry.layer, entry.method) for entry in plan.uncaptured} == {(1, "forward"), (1, "packed")}
    (line,) = (line for line in format_plan(plan).splitlines() if "runs as written: " in line)
    assert line.startswith("layer 1 softmax_attention.forward, packed runs as written: TraceError")
    assert "for all operators (bound), without what runs as written" in format_plan(plan)
    # What was written is shown, where it stands: the author of a mixer has only this line to go by.
    assert re.search(r"\(test_compiler\.py, line \d+: return self\.linear\(x\) if x\.sum\(\) > 0 else x\)$", line)


class Shaped(Branching):
    """A mixer that makes tensors as large as its input, in the ways that people write."""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        b, t = x.shape[:2]
        ones = x.new_ones(*x.shape[:2], 1) + x.new_ones(*x.size()[:-1], 1) + x.new_ones(*x.shape)
        heads = self.linear(x).view(*x.shape[:-1], 4, -1)
        return (heads.flatten(-2) + ones + x.new_zeros(b, t, 1)) * heads.new_ones(*heads.shape[1:2], 1)

    def prefill(self, x: Tensor, carry: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return self.forward(x), carry

    def decode(self, x_t: Tensor, carry: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return self.linear(x_t).view(*x_t.shape[:-1], 4, -1).flatten(-2), carry


def test_sizes_may_be_unpacked_where_their_number_is_known() -> None:
    mixer = Shaped()
    captured = capture(mixer)
    assert not captured.declined
    for b, t in ((2, 5), (3, 7)):
        x = torch.randn(b, t, 32)
        assert torch.equal(captured.graphs["forward"](x, None), mixer(x))
        assert torch.equal(captured.graphs["decode"](x[:, 0], ())[0], mixer.decode(x[:, 0], ())[0])


def test_sizes_whose_number_is_not_known_are_not_guessed() -> None:
    class Unknown(Shaped):
        def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
            heads = self.linear(x).unflatten(-1, (4, -1))
            return heads.reshape(*heads.shape[:-2], -1)

    declined = capture(Unknown()).declined
    assert set(declined) == {"forward", "packed", "prefill"}
    assert "heads.reshape(*heads.shape[:-2], -1)" in declined["forward"]


@pytest.mark.parametrize(("documents", "lengths"), [(0, (24, 24)), (5, ())])
def test_packed_rows_are_whole_unless_the_example_says_how_many_documents_there_are(
    documents: int, lengths: tuple[int, ...]
) -> None:
    mixer: Any = small_model("softmax_attention").blocks[0].mixer
    example = replace(EXAMPLE, documents=documents)
    found = node_workloads(mixer, capture(mixer).graphs["packed"], "packed", example, 32)
    attention = [workload for workload in found.values() if workload.operator == "softmax_attention"]
    assert [workload.document_lengths for workload in attention] == [lengths]


@pytest.mark.parametrize("method", ["forward", "packed", "prefill", "decode"])
@pytest.mark.parametrize("mixer_name", list(MIXERS))
def test_workloads_are_those_of_a_real_call(mixer_name: str, method: Any) -> None:
    mixer: Any = small_model(mixer_name).blocks[0].mixer
    graph_module = capture(mixer).graphs[method]
    predicted = node_workloads(mixer, graph_module, method, EXAMPLE, 32)
    seen: list[Workload] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "subquad":
                arguments = named_arguments(op, args, kwargs or {})
                half = CATALOGUE.operator(op._opname).torch_half
                seen.append(half.workload_of(arguments, "decode" if method == "decode" else "forward"))
            return op(*args, **(kwargs or {}))

    with torch.no_grad(), Calls():
        if method == "forward":
            mixer(torch.randn(2, 24, 32))
        elif method == "packed":
            mixer(torch.randn(1, 48, 32), torch.tensor([0, 24, 48], dtype=torch.int32))
        else:
            _, carry = mixer.prefill(torch.randn(2, 24, 32), mixer.empty_carry(2))
            if method == "decode":
                seen.clear()
                mixer.decode(torch.randn(2, 32), carry)
    assert list(predicted.values()) == seen


def add_kernel(monkeypatch: pytest.MonkeyPatch, name: str, half: Any) -> Kernel:
    """A rival of segment attention, for the duration of a test."""
    kernel = replace(CATALOGUE.kernel("segment_attention", "compacted"), name=name, origin="a test")
    kernel.__dict__["torch_half"] = half
    monkeypatch.setitem(CATALOGUE._kernels["segment_attention"], name, kernel)
    return kernel


class Slow:
    """Compacted, after a sleep that is long beside what it computes, also on a busy machine."""

    @staticmethod
    def forward(**arguments: Any) -> Any:
        time.sleep(0.05)
        return CATALOGUE.kernel("segment_attention", "compacted").torch_half.forward(**arguments)

    @staticmethod
    def backward(*arguments: Any) -> Any:
        return CATALOGUE.kernel("segment_attention", "compacted").torch_half.backward(*arguments)


class Wrong(Slow):
    """Returns twice the output."""

    @staticmethod
    def forward(**arguments: Any) -> Any:
        out, lse = CATALOGUE.kernel("segment_attention", "compacted").torch_half.forward(**arguments)
        return 2 * out, lse


def segment_plan(**options: Any) -> Plan:
    model = small_model("segment_attention")
    return compile_model(model, EXAMPLE, target="cpu", options=CompileOptions(**options))[1]


def segment_choices(plan: Plan, *, used_alone: bool = True) -> list[NodeChoice]:
    """What the plan chose for segment attention, beside which the mixer has a rotation."""
    return [
        choice for choice in plan.choices if choice.operator == "segment_attention" and (choice.used or not used_alone)
    ]


def default_of_segments(name: str) -> Any:
    """Another default for segment attention; other operators keep theirs."""
    return lambda operator, kind: (name,) if operator.name == "segment_attention" else default_kernels(operator, kind)


def test_a_wrong_kernel_is_excluded_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    add_kernel(monkeypatch, "doubled", Wrong)
    plan = segment_plan(measure=False)
    choice = next(choice for choice in segment_choices(plan))
    assert "failed its self-check: out is off by" in choice.declined["doubled"]
    assert "doubled: failed its self-check" in format_plan(plan)


def test_a_failing_default_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE.kernel("segment_attention", "compacted").__dict__, "torch_half", _Broken)
    # A version of its own: the verdict on the honest kernel must not answer.
    monkeypatch.setitem(CATALOGUE.kernel("segment_attention", "compacted").__dict__, "version", "broken")
    plan = segment_plan(measure=False)
    assert {choice.chosen for choice in segment_choices(plan)} == {"sdpa_merge"}
    assert all("out of order" in choice.declined["compacted"] for choice in segment_choices(plan))


class _Broken:
    @staticmethod
    def forward(**arguments: Any) -> Any:
        raise RuntimeError("out of order")


def test_unsure_estimates_are_measured_and_the_slow_kernel_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    add_kernel(monkeypatch, "sleepy", Slow)
    plan = segment_plan(measure_budget_s=5.0)
    choice = next(choice for choice in segment_choices(plan))
    assert choice.chosen != "sleepy"
    figures = {figure.kernel: figure for figure in choice.figures}
    assert figures["sleepy"].source == "measured"
    assert figures["sleepy"].seconds > figures[choice.chosen].seconds
    assert any("measured for" in note for note in plan.notes)


def test_a_slow_default_loses_to_a_measured_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subquad.compiler.choose.default_kernels", default_of_segments("sleepy"))
    add_kernel(monkeypatch, "sleepy", Slow)
    choice = next(choice for choice in segment_choices(segment_plan(measure_budget_s=5.0)))
    assert choice.chosen in ("compacted", "sdpa_merge")
    assert choice.kernel == f"b<=1,t<=48: {choice.chosen}; sleepy"


def add_kernel_that_fails_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """`small`: passes its self-check, and raises where the measurer runs it at the size of the run."""
    checked = CATALOGUE.kernel("segment_attention", "compacted").torch_half

    class Small:
        @staticmethod
        def forward(**arguments: Any) -> Any:
            if measuring:
                raise RuntimeError("too long for me")
            return checked.forward(**arguments)

        backward = staticmethod(checked.backward)

    measuring: list[bool] = []
    failure = Measurer.failure

    def at_full_size(*call: Any) -> str | None:
        measuring.append(True)
        try:
            return failure(*call)
        finally:
            measuring.clear()

    monkeypatch.setattr(Measurer, "failure", at_full_size)
    add_kernel(monkeypatch, "small", Small)


@pytest.mark.parametrize("is_default", [False, True])
def test_a_kernel_that_fails_beyond_the_size_of_its_check_is_left_out_and_named(
    is_default: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_kernel_that_fails_at_full_size(monkeypatch)
    if is_default:
        monkeypatch.setattr("subquad.compiler.choose.default_kernels", default_of_segments("small"))
    choice = next(choice for choice in segment_choices(segment_plan(measure_budget_s=5.0)))
    assert choice.chosen in ("compacted", "sdpa_merge")
    assert choice.declined["small"] == "failed at this size: RuntimeError: too long for me"
    assert "small" not in choice.kernel


def test_a_kernel_that_is_chosen_on_an_estimate_alone_is_run_once_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate so sure that nothing need be measured does not spare a kernel its first run."""

    def certain(estimates: dict[str, Estimate], default: str) -> Decision:
        sure = Decision(choice="small", certain=True, to_measure=(), reason="sure of it")
        return sure if "small" in estimates else decide(estimates, default)

    add_kernel_that_fails_at_full_size(monkeypatch)
    monkeypatch.setattr("subquad.compiler.choose.decide", certain)
    choice = next(choice for choice in segment_choices(segment_plan(measure_budget_s=5.0)))
    assert choice.chosen in ("compacted", "sdpa_merge")
    assert choice.declined["small"] == "failed at this size: RuntimeError: too long for me"


def test_without_measuring_the_default_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    add_kernel(monkeypatch, "sleepy", Slow)
    monkeypatch.setattr("subquad.compiler.estimators.user_cache", lambda name: None)  # nothing known from before
    choice = next(choice for choice in segment_choices(segment_plan(measure=False)))
    assert choice.chosen == "compacted"
    assert "nothing was measured" in choice.reason


def test_a_pinned_kernel_runs_and_a_denied_one_does_not() -> None:
    pinned = segment_plan(measure=False, pins={"segment_attention": "sdpa_merge"})
    assert {choice.chosen for choice in segment_choices(pinned)} == {"sdpa_merge"}
    denied = segment_plan(measure=False, deny=("segment_attention/compacted",))
    choices = segment_choices(denied, used_alone=False)
    assert {choice.chosen for choice in choices} == {"sdpa_merge"}
    assert choices[0].declined["compacted"] == "denied by the recipe"


def test_results_are_equal_under_any_choice_of_kernels() -> None:
    tokens, boundaries = torch.randint(0, 40, (2, 24)), torch.tensor([0, 5, 24, 48], dtype=torch.int32)
    results = []
    for pin in ("reference", "compacted", "sdpa_merge"):
        model, _ = compile_model(
            small_model("segment_attention").double(),
            EXAMPLE,
            target="cpu",
            options=CompileOptions(measure=False, pins={"segment_attention": pin}),
        )
        results.append(model(tokens, boundaries))
    assert (results[0] - results[1]).abs().max() < 1e-12
    assert (results[0] - results[2]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pins": {"segment_atention": "compacted"}}, "did you mean 'segment_attention'"),
        ({"pins": {"segment_attention": "compact"}}, "did you mean 'compacted'"),
        ({"deny": ("compactd",)}, "did you mean 'compacted'"),
        ({"estimator": "oracle"}, "measured, learned, roofline, constant"),
        ({"estimator": "roofline", "fit": "folder"}, "leave fit out"),
        ({"measure_budget_s": 0.0}, "above 0"),
    ],
)
def test_options_that_name_nothing_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises((ConfigError, NotFoundError)) as error:
        CompileOptions(**options)
    assert word in str(error.value)


def test_a_pin_that_cannot_run_is_refused_with_its_reason() -> None:
    model = small_model("softmax_attention")
    with pytest.raises(ConfigError, match="computes windows only"):
        compile_model(
            model,
            EXAMPLE,
            target="cpu",
            options=CompileOptions(measure=False, pins={"softmax_attention": "windowed"}),
        )


def test_denying_every_kernel_is_refused() -> None:
    with pytest.raises(ConfigError, match="no kernel of segment_attention is left"):
        segment_plan(measure=False, deny=("compacted", "sdpa_merge", "reference"))


def test_a_plan_survives_its_file(scout: tuple[LanguageModel, Plan], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    scout[1].save(path)
    assert Plan.load(path) == scout[1]
    assert json.loads(path.read_text())["format_version"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 99, "choices": []}'])
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"plan\.json"):
        Plan.load(path)


def test_a_plan_is_followed_without_choosing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = segment_plan(measure=False, pins={"segment_attention": "sdpa_merge"})
    monkeypatch.setattr("subquad.compiler.pipeline.make_plan", None)
    model, followed = compile_model(small_model("segment_attention"), EXAMPLE, target="cpu", plan=plan)
    assert followed is plan
    *_, (node, _) = operator_nodes(compiled_graphs(model)[0, "packed"].graph)
    assert kernel_of(node) == "sdpa_merge"


def test_a_plan_of_another_model_is_refused() -> None:
    plan = segment_plan(measure=False)
    with pytest.raises(ConfigError, match="the plan is for the mixers segment_attention"):
        compile_model(small_model("mamba"), EXAMPLE, target="cpu", plan=plan)


def test_a_plan_made_elsewhere_is_stale(scout: tuple[LanguageModel, Plan]) -> None:
    plan = scout[1]
    assert plan.staleness(plan.target, plan.versions, kernel_versions(plan)) is None
    assert "torch" in str(plan.staleness(plan.target, {**plan.versions, "torch": "1.0"}, kernel_versions(plan)))
    assert "device" in str(plan.staleness("another", plan.versions, kernel_versions(plan)))


def run_config(*schedule: str, **changes: Any) -> RunConfig:
    trainer = TrainerConfig(batch_size=2, seq_len=24)
    return RunConfig(model=small_config(*schedule), data={"name": "python_source"}, trainer=trainer, **changes)


def test_explain_gives_shape_kernel_rivals_sources_reason_and_total() -> None:
    config = run_config("mamba", "segment_attention", "mamba", "segment_attention", target="cpu")
    config.compiler.measure_budget_s = 5.0
    text = explain(config)
    print(text)
    for expected in (
        "selective_scan  in mamba.packed, layer 0,2", "documents=2", "kernel   chunked", "compacted", "sdpa_merge",
        "measured", "why ", "not ", "reference: defines the operator", "total ",
    ):  # fmt: skip
        assert expected in text


def test_explain_works_for_a_device_that_is_absent_and_calls_its_figures_bounds() -> None:
    text = explain(run_config("softmax_attention", target="l40s"))
    assert "figures marked bound come from a data sheet" in text
    assert "bfloat16" in text
    # Its rival there needs triton, which is an extra.
    assert "sdpa_flash stays: the estimates" in text or "flex_attention: triton is not installed" in text


def test_explaining_a_billion_parameters_allocates_none() -> None:
    config = run_config("mamba", "segment_attention", target="h100")
    config.model.d_model, config.model.num_layers, config.model.vocab_size = 2048, 26, 32000
    plan = explained_plan(config)
    assert len({choice.layer for choice in plan.choices}) == 26
    assert plan.seconds > 0


def test_training_needs_the_target_itself() -> None:
    target = resolve_target("a100")
    with pytest.raises(ConfigError, match="this machine has no NVIDIA A100"):
        require_local(target, "a100")
    assert require_local(resolve_target("cpu"), "cpu").local == "cpu"


def test_an_unknown_target_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="h101") as error:
        resolve_target("h101")
    assert "h100" in str(error.value)
    path = tmp_path / "mine.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a device file"):
        resolve_target(str(path))


@pytest.mark.parametrize(
    ("file_name", "device_name", "same"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H200", False),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", False),
    ],
)
def test_a_device_file_is_known_by_the_devices_own_name(file_name: str, device_name: str, same: bool) -> None:
    assert is_same_model(file_name, device_name) is same


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], ""),
        ([3], "3"),
        ([0, 1, 2, 3], "0,1,2,3"),
        (range(48), "0,1,..,47"),
        (range(0, 28, 2), "0,2,..,26"),
        ([0, 0, 2, 2], "0,2"),
        ([0, 1, 2, 4, 5, 6], "0,1,2,4,5,6"),
    ],
    ids=str,
)
def test_a_long_series_of_layers_is_written_by_its_ends(layers: Sequence[int], text: str) -> None:
    assert layer_numbers(layers) == text
