"""Models of torch's own attention modules, and of anybody's that call the fused function, run chosen kernels."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from foreign_models import QUIET, assert_same, calls_in, compiled, tensors
from torch import Tensor, nn
from torch.nn import functional as F

from subquad import AdapterSpec, ConfigError, compile_model
from subquad.compiler.foreign import compile_foreign, faster, rewrite, torch_private
from subquad.compiler.foreign.analysis import analyse
from subquad.compiler.foreign.capture import Call
from subquad.compiler.foreign.compile_foreign import attention_calls
from subquad.compiler.foreign.replaced_forward import ReplacedForward
from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import Plan
from subquad.compiler.report import format_plan
from subquad.registry import load_registry
from subquad.schema import BudgetConfig

T = 11


def encoder(*, norm_first: bool = False, batch_first: bool = True, dropout: float = 0.0) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        16, 2, 24, dropout=dropout, norm_first=norm_first, batch_first=batch_first, activation="gelu"
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def causal_mask(t: int = T) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(t)


class Mixing(nn.Module):
    """One nn.MultiheadAttention, called as its owner likes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, **({"batch_first": True} | options))

    def forward(self, x: Tensor, memory: Tensor | None = None, **options: Any) -> Tensor:
        memory = x if memory is None else memory
        out, _ = self.attention(x, memory, memory, **({"need_weights": False} | options))
        return out  # type: ignore[no-any-return]


class Fused(nn.Module):
    """A stranger's class that calls scaled_dot_product_attention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(16, 48), dropout

    def forward(self, x: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=is_causal)
        return out.transpose(1, 2).flatten(2)


class WrittenOut(nn.Module):
    """A stranger's class that writes its softmax out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2)) * 8**-0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_runs_kernels_and_stays_the_same_function(norm_first: bool, batch_first: bool, masked: bool) -> None:
    x = torch.randn(3, T, 16) if batch_first else torch.randn(T, 3, 16)
    inputs = {"src": x, "mask": causal_mask() if masked else None}
    model = encoder(norm_first=norm_first, batch_first=batch_first)
    before, after, plan = compiled(model, inputs)

    def run(some: nn.Module) -> object:
        dtype = next(some.parameters()).dtype
        return some(x.to(dtype), mask=None if not masked else causal_mask().to(dtype))

    assert [(c.options["causal"], c.options["window"]) for c in plan.choices] == [(masked, 0)] * 2
    assert not plan.uncaptured
    assert calls_in(lambda: run(after)) == [(masked, 0)] * 2
    assert calls_in(lambda: run(before)) == []
    assert_same(before, after, run)
    # Without gradients, in eval mode, torch would take its fused path.
    before.eval(), after.eval()
    with torch.no_grad():
        assert calls_in(lambda: run(after)) == [(masked, 0)] * 2
    assert_same(before, after, run)


def test_padding_is_what_it_was_also_where_a_whole_sequence_is_padding() -> None:
    x, padding = torch.randn(3, T, 16), torch.zeros(3, T, dtype=torch.bool)
    padding[0, 7:], padding[1, :3], padding[2] = True, True, True
    before, after, plan = compiled(encoder(), {"src": x, "src_key_padding_mask": padding})
    assert all("padding" in note for note in plan.notes if note.startswith("layer"))
    for mode in (True, False):
        before.train(mode), after.train(mode)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                old, new = (some(x, src_key_padding_mask=padding) for some in (before, after))
            assert torch.equal(old.isnan(), new.isnan())
            assert torch.allclose(old, new, atol=1e-5, equal_nan=True)
    assert calls_in(lambda: after(x, src_key_padding_mask=padding)) == []
    assert calls_in(lambda: after(x)) == [(False, 0)] * 2


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 16, "vdim": 16}, {"batch_first": False}], ids=str)
def test_multihead_attention_equals_its_equation(options: dict[str, Any]) -> None:
    x, batch_first = torch.randn(2, T, 16), options.get("batch_first", True)
    given = x if batch_first else x.transpose(0, 1).contiguous()
    hidden = ~torch.ones(T, T, dtype=torch.bool).tril()
    before, after, _ = compiled(Mixing(**options), {"x": given, "attn_mask": hidden})
    assert calls_in(lambda: after(given, attn_mask=hidden)) == [(True, 0)]
    assert_same(before, after, lambda some: some(given.to(next(some.parameters()).dtype), attn_mask=hidden))

    # By the equation, in float64, from the parameters alone.
    held = {name: value.double() for name, value in before.attention.state_dict().items()}
    q, k, v = (
        F.linear(x.double(), weight, held["in_proj_bias"].chunk(3)[part] if "in_proj_bias" in held else None)
        .unflatten(-1, (2, 8)).transpose(1, 2)
        for part, weight in enumerate(held["in_proj_weight"].chunk(3))
    )  # fmt: skip
    scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(hidden, float("-inf"))
    expected = F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), held["out_proj.weight"],
                        held.get("out_proj.bias"))  # fmt: skip
    found = after(given, attn_mask=hidden)
    assert ((found if batch_first else found.transpose(0, 1)) - expected).abs().max() < 1e-5


def test_cross_attention_of_more_keys_than_queries_runs_a_kernel() -> None:
    x, memory = torch.randn(2, 5, 16), torch.randn(2, T, 16)
    before, after, _ = compiled(Mixing(), {"x": x, "memory": memory})
    assert calls_in(lambda: after(x, memory)) == [(False, 0)]
    assert_same(before, after, lambda some: some(*(part.to(next(some.parameters()).dtype) for part in (x, memory))))
    assert calls_in(lambda: after(memory, x)) == []
    assert torch.allclose(after(memory, x), before(memory, x), atol=1e-6)


@pytest.mark.parametrize(
    "asked", [{"need_weights": True}, {"key_padding_mask": torch.zeros(2, T, dtype=torch.bool)}], ids=["weights", "pad"]
)
def test_what_a_kernel_does_not_give_comes_from_the_module_itself(asked: dict[str, Any]) -> None:
    x = torch.randn(2, T, 16)
    before, after, _ = compiled(Mixing(), (x,))
    old, new = (some.attention(x, x, x, **asked) for some in (before, after))
    assert calls_in(lambda: after.attention(x, x, x, **asked)) == []
    for a, b in zip(tensors(old), tensors(new)):
        assert torch.equal(a, b)


def test_weights_that_are_asked_for_decline_the_module_by_name() -> None:
    _, after, plan = compiled(Mixing(), {"x": torch.randn(2, T, 16), "need_weights": True})
    assert [entry.mixer for entry in plan.uncaptured] == ["MultiheadAttention"]
    assert "need_weights" in plan.uncaptured[0].reason
    assert attention_calls(after) == {}


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_strangers_call_of_the_fused_function_is_answered(is_causal: bool) -> None:
    x = torch.randn(2, T, 16)
    before, after, plan = compiled(Fused(), {"x": x, "is_causal": is_causal})
    assert calls_in(lambda: after(x, is_causal=is_causal)) == [(is_causal, 0)]
    assert "rewritten by sdpa_calls" in plan.notes[-1]
    assert_same(before, after, lambda some: some(x.to(next(some.parameters()).dtype), is_causal=is_causal))


def test_a_window_written_as_a_mask_runs_as_a_window() -> None:
    x, place = torch.randn(2, 40, 16), torch.arange(40)
    behind = place[:, None] - place[None, :]
    mask = (behind >= 0) & (behind < 6)
    before, after, _ = compiled(Fused(), {"x": x, "mask": mask}, options=CompileOptions(
        measure=False, pins={"softmax_attention": "windowed"}))  # fmt: skip
    assert calls_in(lambda: after(x, mask)) == [(True, 6)]
    assert_same(before, after, lambda some: some(x.to(next(some.parameters()).dtype), mask))


@pytest.mark.parametrize("kind", ["entry", "bias", "learned", "bidirectional window"])
def test_a_mask_that_is_not_understood_is_declined_by_name(kind: str) -> None:
    x = torch.randn(2, T, 16)
    masks = {"entry": torch.ones(T, T).tril().bool(), "bias": torch.randn(T, T), "learned": torch.zeros(T, T),
             "bidirectional window": torch.ones(T, T).tril(2).triu(-2).bool()}  # fmt: skip
    masks["entry"][3, 8] = True
    if kind == "learned":

        class Learned(Fused):
            def __init__(self) -> None:
                super().__init__()
                self.bias = nn.Parameter(masks["learned"])

            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(x, self.bias)

        before, after, plan = compiled(Learned(), x)
        run = lambda some: some(x)  # noqa: E731
    else:
        before, after, plan = compiled(Fused(), (x, masks[kind]))
        run = lambda some: some(x, masks[kind])  # noqa: E731
    (entry,) = plan.uncaptured
    assert "its mask" in entry.reason
    assert entry.reason in format_plan(plan)
    assert not plan.choices
    assert attention_calls(after) == {}
    assert torch.equal(run(before), run(after))


def test_another_mask_than_the_examples_is_never_taken_for_it() -> None:
    x, mask = torch.randn(2, T, 16), torch.ones(T, T).tril().bool()
    before, after, _ = compiled(Fused(), (x, mask))
    assert calls_in(lambda: after(x, mask)) == [(True, 0)]
    mask[4, 9] = True  # the very tensor, changed in place
    assert calls_in(lambda: after(x, mask)) == []
    assert torch.equal(after(x, mask), before(x, mask))
    bias = torch.zeros(T, T, requires_grad=True)
    for some in (before, after):
        some(x, bias).sum().backward()
    assert bias.grad is not None and bias.grad.abs().max() > 0


def test_a_softmax_written_out_in_a_class_nobody_adapts_is_declined_by_name() -> None:
    x, mask = torch.randn(2, T, 16), torch.ones(T, T).tril().bool()
    before, after, plan = compiled(WrittenOut(), (x, mask))
    (entry,) = plan.uncaptured
    assert "no adapter knows the class WrittenOut" in entry.reason
    assert torch.equal(before(x, mask), after(x, mask))


@pytest.mark.parametrize("model", [encoder(dropout=0.3), Fused(dropout=0.3)], ids=["encoder", "stranger"])
def test_dropout_stays_while_training_and_kernels_run_in_eval(model: nn.Module) -> None:
    x = torch.randn(2, T, 16)
    before, after, plan = compiled(model.train(), (x,))
    assert any("dropout of 0.3" in note for note in plan.notes)
    assert calls_in(lambda: after(x)) == []

    def drawn(some: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return some(x)  # type: ignore[no-any-return]

    assert torch.equal(drawn(after, 1), drawn(before, 1))
    assert not torch.equal(drawn(after, 1), drawn(after, 2))
    before.eval(), after.eval()
    assert calls_in(lambda: after(x)) != []
    assert torch.equal(drawn(after, 1), drawn(after, 2))
    assert torch.allclose(drawn(after, 1), drawn(before, 1), atol=1e-5)


def test_a_compiled_model_learns_as_the_original_does() -> None:
    x, wanted = torch.randn(4, T, 16), torch.randn(4, T, 16)
    before, after, _ = compiled(encoder().train(), {"src": x, "mask": causal_mask()})
    losses: list[list[float]] = []
    for some in (before, after):
        optimizer = torch.optim.AdamW(some.parameters(), lr=1e-2)
        history = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = (some(x, mask=causal_mask()) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[1][-1] < losses[1][0]
    assert torch.tensor(losses[0]).allclose(torch.tensor(losses[1]), atol=1e-4)


def test_keys_copies_pickles_and_moves_stay() -> None:
    x = torch.randn(2, T, 16)
    before, after, _ = compiled(encoder().eval(), {"src": x, "mask": causal_mask()})
    assert list(after.state_dict()) == list(before.state_dict())
    assert [name for name, _ in after.named_modules()] == [name for name, _ in before.named_modules()]
    assert [type(module) for module in after.modules()] == [type(module) for module in before.modules()]
    saved = io.BytesIO()
    torch.save(after.state_dict(), saved)
    saved.seek(0)
    other = encoder().eval()
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.allclose(other(x, mask=causal_mask()), after(x, mask=causal_mask()), atol=1e-5)
    expected = after(x, mask=causal_mask())
    for twin in (copy.deepcopy(after), pickle.loads(pickle.dumps(after))):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert calls_in(lambda: twin(x, mask=causal_mask())) == [(True, 0)] * 2  # noqa: B023
        assert not torch.equal(twin(x, mask=causal_mask()), expected)
        assert torch.equal(after(x, mask=causal_mask()), expected)
    after.double(), before.double()
    assert calls_in(lambda: after(x.double(), mask=causal_mask().double())) == []  # checked in float32 only
    assert torch.equal(after(x.double()), before(x.double()))


def test_autocast_computes_in_its_own_type() -> None:
    x = torch.randn(2, T, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before, after, plan = compiled(encoder().train(), (x,))
        assert {choice.dtype for choice in plan.choices} == {"bfloat16"}
        assert calls_in(lambda: after(x)) == [(False, 0)] * 2
        assert torch.allclose(after(x), before(x), atol=5e-2)
        after(x).float().sum().backward()
    assert all(parameter.grad is not None for parameter in after.parameters())
    assert calls_in(lambda: after(x)) == []  # float32 was not checked


def test_compiling_again_finds_the_model_as_it_was_written() -> None:
    x = torch.randn(2, T, 16)
    _, after, plan = compiled(encoder().eval(), (x,))
    again, second = compile_model(after, (x,), target="cpu", options=QUIET)
    assert again is after
    assert second.schedule == plan.schedule
    assert [choice.place for choice in second.choices] == [choice.place for choice in plan.choices]
    assert calls_in(lambda: after(x)) == [(False, 0)] * 2


def test_a_plan_is_followed_and_one_of_another_model_is_refused(tmp_path: Any) -> None:
    x = torch.randn(2, T, 16)
    before, _, plan = compiled(Fused(), (x,), options=CompileOptions(
        measure=False, pins={"softmax_attention": "reference"}))  # fmt: skip
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    twin, followed = compile_model(copy.deepcopy(before), (x,), target="cpu", plan=loaded)
    assert [choice.chosen for choice in followed.choices] == ["reference"]
    assert [call.chosen[False, 0].kernel for call in attention_calls(twin).values()] == ["reference"]
    with pytest.raises(ConfigError, match="the plan is for attention in"):
        compile_model(encoder(), (x,), target="cpu", plan=loaded)


def test_a_budget_that_attention_alone_breaks_is_refused() -> None:
    x = torch.randn(2, T, 16)
    with pytest.raises(ConfigError, match="attention alone"):
        compiled(Fused(), x, budget=BudgetConfig(latency_s=1e-12))
    compiled(Fused(), x, budget=BudgetConfig(latency_s=1e3))
    with pytest.raises(ConfigError, match="memory"):
        compiled(Fused(), x, budget=BudgetConfig(memory_bytes=1e9))


def test_a_model_that_cannot_be_captured_is_named() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ConfigError, match="cannot be captured"):
        compiled(Branching(), torch.randn(3))


def test_inputs_that_are_none_are_named() -> None:
    with pytest.raises(ConfigError, match="of type int"):
        compiled(Fused(), 3)


def test_a_wrong_adapter_is_found_out_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AdapterSpec(name="wrong", module_class=f"{Fused.__module__}:Fused", build="wrong:adapt")

    def wrong(module: nn.Module, attention: Any) -> dict[str, str]:
        def forward(self: Any, function: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = type(self).forward(self, x, *args, **kwargs)
            return out if not function.enabled else 1.1 * out  # type: ignore[no-any-return]

        module.__dict__["forward"] = ReplacedForward(module, attention[""], forward)
        return {}

    monkeypatch.setattr(rewrite, "adapters_for", lambda model, owner, registry: iter([("", spec)]))
    monkeypatch.setattr(rewrite, "load_attribute", lambda build: wrong)
    x = torch.randn(2, T, 16)
    before, after, plan = compiled(Fused(), x)
    assert "undone" in plan.uncaptured[0].reason
    assert not plan.choices
    assert torch.equal(before(x), after(x))


@pytest.mark.parametrize(("rewritten_s", "fastest_s"), [(0.9, 0.7), (0.9, 0.85), (1.1, 0.7)])
def test_a_rewrite_that_does_not_surely_gain_is_undone(
    rewritten_s: float, fastest_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(model: nn.Module, call: Call, functions: Any, *, gradients: bool, budget_s: float) -> faster.BothWays:
        assert gradients  # the model is in training mode, without dropout
        return faster.BothWays(
            written_s=1.0, rewritten_s=rewritten_s, fastest_written_s=0.8, fastest_rewritten_s=fastest_s
        )

    monkeypatch.setattr(compile_foreign, "time_both_ways", timed)
    x = torch.randn(2, T, 16)
    before, after, plan = compiled(Fused(), x, options=CompileOptions(measure_budget_s=1.0))
    if rewritten_s < 1 and fastest_s < 0.8:
        assert calls_in(lambda: after(x)) == [(False, 0)]
        assert plan.notes[-1] == (
            "a call takes 1.00 s as written (fastest 800.00 ms), "
            "900.00 ms rewritten (fastest 700.00 ms) (with gradients)"
        )
    else:
        assert calls_in(lambda: after(x)) == []
        assert not plan.choices
        assert "undone: a call takes" in plan.uncaptured[0].reason
        assert torch.equal(before(x), after(x))


def test_timing_a_model_both_ways_leaves_it_as_it_was() -> None:
    x = torch.randn(2, T, 16)
    _, after, _ = compiled(encoder(dropout=0.2).train(), (x,))
    functions = attention_calls(after).values()
    kept = {name: value.clone() for name, value in after.state_dict().items()}
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    both = faster.time_both_ways(after, Call((x,), {}), functions, gradients=True, budget_s=0.3)
    assert 0 < both.written_s < 1
    assert 0 < both.rewritten_s < 1
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in after.modules())
    assert all(parameter.grad is None for parameter in after.parameters())
    assert all(torch.equal(value, kept[name]) for name, value in after.state_dict().items())
    assert functions and all(function.enabled for function in functions)


def test_an_outer_module_is_asked_before_its_parts_and_any_module_last() -> None:
    asked = [(path, spec.name) for path, spec in rewrite.adapters_for(encoder(), "layers.0.self_attn", load_registry())]
    assert asked == [("layers.0", "torch_encoder_layer"), ("layers.0.self_attn", "torch_multihead"),
                     ("layers.0.self_attn", "sdpa_calls")]  # fmt: skip


def test_an_instance_whose_forward_somebody_replaced_is_left_alone() -> None:
    x, model = torch.randn(2, T, 16), Fused()
    model.forward = model.forward  # type: ignore[method-assign]
    _, plan = compile_model(model, x, target="cpu", options=QUIET)
    assert "replaced its forward" in plan.uncaptured[0].reason


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch, about its own kernel
def test_a_transform_of_torch_func_runs_the_model_as_written() -> None:
    x = torch.randn(2, T, 16)
    before, after, _ = compiled(Fused(), x)
    old, new = (torch.func.vmap(lambda row, some=some: some(row[None]))(x) for some in (before, after))
    assert torch.allclose(old, new, atol=1e-5)


def test_torch_compile_keeps_a_whole_graph() -> None:
    x = torch.randn(2, T, 16)
    before, after, _ = compiled(Fused().eval(), {"x": x, "is_causal": True})
    fast = torch.compile(after, fullgraph=True, backend="aot_eager")
    assert torch.allclose(fast(x, is_causal=True), before(x, is_causal=True), atol=1e-5)
    before, after, _ = compiled(encoder(), (x,))
    fast = torch.compile(after, fullgraph=True, backend="aot_eager")
    assert torch.allclose(fast(x), before(x), atol=1e-5)


# What torch does not promise, line by line.


def test_the_encoders_own_look_at_its_mask_is_off_while_capturing_and_back_afterwards() -> None:
    from torch.nn.modules import transformer

    before = transformer._detect_is_causal_mask
    with torch_private.no_look_at_mask_values():
        assert transformer._detect_is_causal_mask(causal_mask(), None, T) is False
        assert transformer._detect_is_causal_mask(None, True) is True
    assert transformer._detect_is_causal_mask is before
    assert before(causal_mask(), None, T) is True
    (owner, _) = analyse(encoder(), Call((torch.randn(2, T, 16), causal_mask()), {}), load_registry())
    assert owner.first.mask.causal


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_by_parts_is_the_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, norm_first=norm_first, batch_first=True)
    x = torch.randn(2, T, 16)
    found = torch_private.encoder_layer_by_parts(layer, x, causal_mask(), False)
    assert torch.equal(found, layer(x, src_mask=causal_mask()))


def test_a_transformed_tensor_is_told_from_a_plain_one() -> None:
    seen: list[bool] = []

    def look(row: Tensor) -> Tensor:
        seen.append(torch_private.is_inside_transform(row))
        return row

    torch.func.vmap(look)(torch.randn(3, 2))
    assert seen == [True]
    assert not torch_private.is_inside_transform(torch.randn(2))
