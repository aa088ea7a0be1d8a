"""The adapted class computes what it did, by a kernel; the pass merges what is equal and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_and_pass.merge_equal_calls import merge_equal_calls
from adapter_and_pass.their_library import Attention
from torch import Tensor, fx, nn

from subquad import Example, build_model, compile_model, load_config
from subquad.compiler.options import CompileOptions
from subquad.compiler.pipeline import compiled_graphs
from subquad_kernels.operators import rotary, softmax_attention

QUIET = CompileOptions(measure=False)  # choose by estimates: nothing is timed here, nor undone for being slower


def calls_of(name: str, graph: fx.Graph) -> int:
    return sum(str(node.target) == f"subquad.{name}.default" for node in graph.nodes)


@pytest.mark.parametrize("causal", [True, False])
def test_the_adapted_class_computes_the_same_outputs_and_gradients_by_a_kernel(causal: bool) -> None:
    model, x = Attention(32, 4), torch.randn(2, 11, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(11) if causal else None
    twin, plan = compile_model(copy.deepcopy(model), (x, mask) if causal else (x,), target="cpu", options=QUIET)
    assert [choice.operator for choice in plan.choices] == ["softmax_attention"], plan.uncaptured
    assert any("their_library" in note for note in plan.notes)
    assert type(twin) is Attention
    assert twin.state_dict().keys() == model.state_dict().keys()
    with torch.profiler.profile() as profile:
        outputs = twin(x, mask)
    assert "subquad::softmax_attention" in {event.name for event in profile.events()}
    assert torch.allclose(outputs, model(x, mask), atol=1e-6)
    for one in (model, twin):
        one(x, mask).square().sum().backward()
    for mine, theirs in zip(twin.parameters(), model.parameters()):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-4)
    copied = copy.deepcopy(twin)
    with torch.no_grad():
        copied.proj.weight.zero_()
    assert not torch.allclose(copied(x, mask), twin(x, mask)), "a copy computes with parameters of its own"


def test_a_mask_that_no_kernel_was_checked_for_is_computed_as_written() -> None:
    model, x = Attention(32, 4), torch.randn(2, 11, 32)
    twin, _ = compile_model(copy.deepcopy(model), (x,), target="cpu", options=QUIET)
    bias = torch.randn(11, 11)
    assert torch.equal(twin(x, bias), model(x, bias))


class TwoBranches(nn.Module):
    """Two branches that rotate the same queries and keys; the second one sees a window, or other positions."""

    def __init__(self, second_start: int = 0, *, in_place: bool = False) -> None:
        super().__init__()
        self.second_start, self.in_place = second_start, in_place

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        heads = x.unflatten(-1, (2, -1))
        q, k = rotary(heads, heads)
        if self.in_place:
            q = q.mul_(2)
        far, _ = rotary(heads, heads, start=self.second_start)
        near, far = (softmax_attention(turned, k, heads, causal=True) for turned in (q, far))
        return (near + far).flatten(2)


def merged(module: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule, tuple[str, ...]]:
    graph_module = fx.symbolic_trace(module)
    before = str(graph_module.graph)
    outcome = merge_equal_calls(graph_module)
    assert str(graph_module.graph) == before, "the graph handed in is not changed"
    return graph_module, outcome.graph, outcome.report


def test_equal_calls_become_one_and_so_do_those_that_read_their_results() -> None:
    before, after, report = merged(TwoBranches())
    assert [calls_of(name, before.graph) for name in ("rotary", "softmax_attention")] == [2, 2]
    assert [calls_of(name, after.graph) for name in ("rotary", "softmax_attention")] == [1, 1]
    assert "rotary_default_1: the same as rotary_default" in report
    x = torch.randn(2, 9, 16)
    assert torch.equal(after(x), before(x))


class Halves(nn.Module):
    """The first half of the channels, taken twice, and the second."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x[..., :half] + x[..., :half] * x[..., half:]


def test_slices_are_arguments_like_others() -> None:
    before, after, report = merged(Halves())
    assert report == ("getitem_2: the same as getitem_1",)
    x = torch.randn(2, 9, 16)
    assert torch.equal(after(x), before(x))


@pytest.mark.parametrize("branches", [TwoBranches(3), TwoBranches(in_place=True)], ids=["other start", "in place"])
def test_calls_that_differ_and_graphs_that_write_are_left(branches: TwoBranches) -> None:
    before, after, _ = merged(branches)
    assert calls_of("rotary", after.graph) == 2
    x = torch.randn(2, 9, 16)
    assert torch.equal(after(x), before(x))


def test_the_pass_runs_whenever_a_model_is_compiled() -> None:
    size = ["d_model=16", "num_layers=1", "vocab_size=8", "context_len=9"]
    model = build_model(load_config(["model=transformer", *(f"model.{text}" for text in size)]).model).eval()
    model.blocks[0].mixer = TwoBranches()
    tokens = torch.randint(0, 8, (1, 9))
    expected = model(tokens)
    model, plan = compile_model(model, Example(tokens_shape=(1, 9)), target="cpu", options=QUIET)
    assert calls_of("rotary", compiled_graphs(model)[0, "forward"].graph) == 1
    assert torch.equal(model(tokens), expected)
    assert any("in forward: rotary_default_1: the same as rotary_default (layer 0)" in note for note in plan.notes)
