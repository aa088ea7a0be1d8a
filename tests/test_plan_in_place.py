"""What decodes in place runs the kernels that the plan chose: pins, denials, self-checks and measuring reach it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_models import model_of, taped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subquad import Example, load_config
from subquad.compiler.capture import capture, kernel_of, operator_nodes
from subquad.compiler.example import IN_PLACE
from subquad.compiler.html_report import write_html
from subquad.compiler.options import CompileOptions
from subquad.compiler.pipeline import compile_model, compiled_graphs
from subquad.compiler.plan import NodeChoice, Plan
from subquad.compiler.report import format_plan
from subquad.compiler.run_shapes import sized_model
from subquad.compiler.target import resolve_target
from subquad.compiler.workload import node_workloads
from subquad.errors import ConfigError
from subquad.mixers.softmax_attention import SoftmaxAttention
from subquad.model.build import build_model
from subquad.model.cuda_graph import cuda_graphs
from subquad.model.decoder import ROOM, Decoder
from subquad.model.language_model import LanguageModel
from subquad.training.denial import without_denied
from subquad_kernels.catalogue import CATALOGUE, Kernel
from subquad_kernels.torch_operator import default_kernels, named_arguments
from subquad_kernels.workload import Workload

EXAMPLE = Example(tokens_shape=(2, 24), decoding=True)
QUIET = CompileOptions(measure=False)
MIXERS = ("softmax_attention", "window", "segment_attention")
"""Those that decode in place."""


class Counted:
    """The reference, which counts its calls; `wait_s` seconds late, and `factor` times what is right."""

    def __init__(self, wait_s: float = 0.0, factor: float = 1.0) -> None:
        self.calls, self._wait_s, self._factor = 0, wait_s, factor

    def forward(self, **arguments: Any) -> tuple[Tensor, ...]:
        self.calls += 1
        time.sleep(self._wait_s)
        (out,) = CATALOGUE.kernel("cached_attention", "reference").torch_half.forward(**arguments)
        return (self._factor * out,)

    def backward(self, *arguments: Any) -> Any:
        return CATALOGUE.kernel("cached_attention", "reference").torch_half.backward(*arguments)


@pytest.fixture
def add_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counted]:
    """Adds a rival of cached attention, of a name that no other test uses; with `default`, it is the most wanted."""

    def add(name: str, half: Counted, *, default: bool = False) -> Counted:
        kernel: Kernel = replace(CATALOGUE.kernel("cached_attention", "reference"), name=name, origin="a test")
        kernel.__dict__["torch_half"] = half
        monkeypatch.setitem(CATALOGUE._kernels["cached_attention"], name, kernel)
        if default:
            for module in ("subquad.compiler.choose", "subquad_kernels.torch_operator"):
                monkeypatch.setattr(
                    f"{module}.default_kernels",
                    lambda operator, kind: (
                        (name, "reference") if operator.name == "cached_attention" else default_kernels(operator, kind)
                    ),
                )
        return half

    return add


def small_model(*mixers: str) -> LanguageModel:
    return model_of(*mixers, dtype=torch.float32)


def compiled(*mixers: str, plan: Plan | None = None, **options: Any) -> tuple[LanguageModel, Plan]:
    chosen = CompileOptions(**{"measure": False, **options})
    return compile_model(small_model(*mixers), EXAMPLE, target="cpu", options=chosen, plan=plan)


def kernels_in_place(model: LanguageModel, layer: int = 0) -> dict[str, str]:
    nodes = operator_nodes(compiled_graphs(model)[layer, IN_PLACE].graph)
    return {operator.name: kernel_of(node) for node, operator in nodes}


def in_place_choice(plan: Plan, operator: str = "cached_attention") -> NodeChoice:
    (choice,) = [choice for choice in plan.choices if choice.method == IN_PLACE and choice.operator == operator]
    return choice


def decodes_as_its_forward(model: LanguageModel) -> Decoder:
    """Behind a prefill of five tokens, every step taken down and replayed."""
    tokens = torch.randint(16, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, carry = model(tokens), model.prefill(tokens[:, :5], model.empty_carry(2))[1]
        decoder = Decoder(model, carry, capture=taped)
        logits = torch.stack([decoder.step(token) for token in tokens[:, 5:].T], dim=1)
    torch.testing.assert_close(logits, expected[:, 5:], rtol=0, atol=1e-4)
    return decoder


def test_what_decodes_in_place_is_captured_where_decoding_is_asked_for_and_nowhere_else() -> None:
    mixers = ("mamba", *MIXERS)
    model, plan = compiled(*mixers)
    assert [layer for layer, method in compiled_graphs(model) if method == IN_PLACE] == [1, 2, 3]
    assert not plan.uncaptured
    found = {(choice.layer, choice.operator) for choice in plan.choices if choice.method == IN_PLACE and choice.used}
    assert found == {(layer, operator) for layer in (1, 2, 3) for operator in ("rotary", "cached_attention")}
    for layer in (1, 2, 3):
        assert kernels_in_place(model, layer) == {"rotary": "tables", "cached_attention": "reference"}
    trained, plan = compile_model(
        small_model(*mixers), Example(tokens_shape=(2, 24), training=True), target="cpu", options=QUIET
    )
    assert not [method for _, method in compiled_graphs(trained) if method == IN_PLACE]
    assert not [choice for choice in plan.choices if choice.method == IN_PLACE]


@pytest.mark.parametrize("mixer_name", MIXERS)
def test_workloads_are_those_of_a_real_call(mixer_name: str) -> None:
    mixer: Any = small_model(mixer_name).blocks[0].mixer
    predicted = node_workloads(mixer, capture(mixer).graphs[IN_PLACE], IN_PLACE, EXAMPLE, 32)
    seen: list[Workload] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "subquad":
                arguments = named_arguments(op, args, kwargs or {})
                seen.append(CATALOGUE.operator(op._opname).torch_half.workload_of(arguments, "decode"))
            return op(*args, **(kwargs or {}))

    with torch.no_grad():
        _, carry = mixer.prefill(torch.randn(2, 24, 32), mixer.empty_carry(2))
        roomy = mixer.with_room(carry, ROOM)
        with Calls():
            mixer.decode_in_place(torch.randn(2, 32), roomy)
    assert list(predicted.values()) == seen
    assert [workload.operator for workload in seen] == ["rotary", "cached_attention"]


def test_a_pinned_kernel_runs_in_every_step(add_kernel: Callable[..., Counted]) -> None:
    half = add_kernel("counted_pin", Counted())
    model, plan = compiled("softmax_attention", "mamba", pins={"cached_attention": "counted_pin"})
    assert (in_place_choice(plan).kernel, in_place_choice(plan).reason) == ("counted_pin", "pinned by the recipe")
    before = half.calls
    decoder = decodes_as_its_forward(model)
    assert (len(decoder.graphs), decoder.why_not) == (1, {})
    assert half.calls - before >= 10  # all eleven but the first, which is watched


def test_a_denied_kernel_does_not_run(add_kernel: Callable[..., Counted]) -> None:
    half = add_kernel("counted_deny", Counted(), default=True)
    free, plan = compiled("softmax_attention")
    assert in_place_choice(plan).kernel == "counted_deny"
    model, plan = compiled("softmax_attention", deny=("cached_attention/counted_deny",))
    assert in_place_choice(plan).kernel == "reference"
    assert in_place_choice(plan).declined["counted_deny"] == "denied by the recipe"
    before = half.calls
    decoder = decodes_as_its_forward(model)
    assert (len(decoder.graphs), decoder.why_not, half.calls) == (1, {}, before)
    decodes_as_its_forward(free)
    assert half.calls > before


def test_a_kernel_that_fails_its_self_check_does_not_run(add_kernel: Callable[..., Counted]) -> None:
    half = add_kernel("counted_wrong", Counted(factor=1.01), default=True)
    model, plan = compiled("window")
    assert in_place_choice(plan).kernel == "reference"
    assert in_place_choice(plan).declined["counted_wrong"].startswith("failed its self-check: out is off by")
    assert half.calls  # by the check
    before = half.calls
    assert decodes_as_its_forward(model).why_not == {}
    assert half.calls == before


def test_rivals_are_measured(add_kernel: Callable[..., Counted]) -> None:
    add_kernel("counted_slow", Counted(wait_s=0.05), default=True)
    add_kernel("counted_quick", Counted())
    _, plan = compiled("softmax_attention", measure=True, measure_budget_s=30.0)
    choice = in_place_choice(plan)
    assert (choice.chosen, choice.figures[0].source) == ("counted_quick", "measured")
    assert choice.kernel == "b<=2,t<=1: counted_quick; counted_slow"  # no bound of the cache, which gets more room


def test_a_plan_survives_its_file_and_is_followed(add_kernel: Callable[..., Counted], tmp_path: Path) -> None:
    add_kernel("counted_file", Counted())
    _, plan = compiled("mamba", "segment_attention", pins={"cached_attention": "counted_file"})
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    model, followed = compiled("mamba", "segment_attention", plan=loaded)
    assert followed is loaded
    assert kernels_in_place(model, 1) == {"rotary": "tables", "cached_attention": "counted_file"}
    assert decodes_as_its_forward(model).why_not == {}


def test_a_plan_of_before_is_followed_and_what_it_does_not_name_is_said(tmp_path: Path) -> None:
    mixers = ("softmax_attention", "softmax_attention")
    _, plan = compiled(*mixers)
    replace(plan, choices=tuple(choice for choice in plan.choices if choice.method != IN_PLACE)).save(tmp_path / "p")
    model, followed = compiled(*mixers, plan=Plan.load(tmp_path / "p"))
    said = "layer 0,1 softmax_attention.decode_in_place: the plan names no kernel of {}, its default runs"
    assert set(followed.notes) == {said.format("rotary"), said.format("cached_attention")}
    assert said.format("cached_attention") in format_plan(followed)
    assert kernels_in_place(model) == {"rotary": "default", "cached_attention": "default"}
    assert decodes_as_its_forward(model).why_not == {}
    assert compiled(*mixers, plan=followed)[1].notes == followed.notes


def test_the_report_shows_it(tmp_path: Path) -> None:
    _, plan = compiled("softmax_attention", "softmax_attention")
    text = format_plan(plan)
    start = text.index("cached_attention  in softmax_attention.decode_in_place, layer 0,1")
    shape, kernel = text[start:].splitlines()[1:3]
    assert f"m={24 + ROOM}" in shape
    assert kernel == "  kernel   reference   x 2"
    write_html(plan, resolve_target("cpu"), QUIET, tmp_path / "plan.html")
    assert "cached_attention" in (tmp_path / "plan.html").read_text()


def test_where_no_kernel_is_left_caches_grow_and_the_report_says_why() -> None:
    """Nothing else can decode in place then; the run goes on, and may be compiled again with another recipe."""
    model, plan = compiled("mamba", "softmax_attention", deny=("cached_attention/reference",))
    said = "no kernel of cached_attention is left (reference: denied by the recipe; tiled: runs on cuda only)"
    assert [(entry.layer, entry.method, entry.reason) for entry in plan.uncaptured] == [(1, IN_PLACE, said)]
    assert f"layer 1 softmax_attention.decode_in_place is left out: {said}" in format_plan(plan)
    assert "without what runs as written" not in format_plan(plan)
    assert (1, IN_PLACE) not in compiled_graphs(model)
    assert decodes_as_its_forward(model).why_not == {1: f"its carry grows, and it does not decode in place: {said}"}
    followed, _ = compiled("mamba", "softmax_attention", plan=plan)
    assert decodes_as_its_forward(followed).why_not == {1: f"its carry grows, and it does not decode in place: {said}"}
    again, _ = compile_model(model, EXAMPLE, target="cpu", options=QUIET)
    assert decodes_as_its_forward(again).why_not == {}


def test_a_pin_that_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="cached_attention/tiled cannot run here: runs on cuda only"):
        compiled("softmax_attention", pins={"cached_attention": "tiled"})


class ReadsValues(SoftmaxAttention):
    """Its Python depends on what the device knows."""

    def decode_in_place(self, x_t: Tensor, carry: Any) -> Any:
        return super().decode_in_place(x_t if carry.position >= 0 else -x_t, carry)


def test_what_cannot_be_captured_does_not_decode_in_place() -> None:
    """As written it would run the operators' defaults, whatever is denied or fails its check; `decode` does not."""
    model = small_model("softmax_attention", "softmax_attention")
    mixer: Any = model.blocks[1].mixer
    mixer.__class__ = ReadsValues
    model, plan = compile_model(model, EXAMPLE, target="cpu", options=QUIET)
    (entry,) = plan.uncaptured
    assert (entry.layer, entry.method) == (1, IN_PLACE)
    assert "control flow" in entry.reason
    assert decodes_as_its_forward(model).why_not == {
        1: f"its carry grows, and it does not decode in place: {entry.reason}"
    }


def test_a_run_that_does_not_decode_drops_a_denied_choice_in_place() -> None:
    """A plan that was made for decoding may be followed in training, where what decodes in place is not captured."""
    config = load_config(["model=transformer", "trainer.accelerator=cpu", "compiler=constant"])
    config.model = sized_model(config)
    _, plan = compile_model(build_model(config.model), EXAMPLE, target="cpu", options=QUIET)
    config.deny = ["cached_attention/reference"]
    after = without_denied(plan, config, packed=False)
    assert not [choice for choice in after.choices if choice.operator == "cached_attention"]
    assert [choice for choice in after.choices if choice.method == IN_PLACE and choice.operator == "rotary"]


@pytest.mark.gpu
@pytest.mark.parametrize(("deny", "kernel"), [((), "tiled"), (("cached_attention/tiled",), "reference")])
def test_on_a_gpu_the_chosen_kernel_is_in_the_graph(deny: tuple[str, ...], kernel: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plain, model = (model_of(*MIXERS, dtype=torch.float32, device="cuda") for _ in range(2))
    compile_model(model, EXAMPLE, target="cuda", options=CompileOptions(measure=False, deny=deny))
    assert [kernels_in_place(model, layer)["cached_attention"] for layer in range(3)] == [kernel] * 3
    tokens = torch.randint(16, (2, 40), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        carry = model.prefill(tokens[:, :5], model.empty_carry(2))[1]
        decoder = Decoder(model, carry, capture=cuda_graphs(torch.device("cuda")))
        logits = torch.stack([decoder.step(token) for token in tokens[:, 5:].T], dim=1)
        torch.testing.assert_close(logits, plain(tokens)[:, 5:], rtol=0, atol=1e-3)
    assert (len(decoder.graphs), decoder.why_not) == (1, {})
