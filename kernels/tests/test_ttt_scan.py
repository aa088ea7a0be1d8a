"""Test-time training: its kernel against the definition, the definition against autograd's descent, promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.operators import delta_rule, ttt_scan
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.ttt_scan import declaration, definition, dual_form
from subquad_kernels.ttt_scan.operator import OP
from subquad_kernels.workload import Option, Workload

OPERATOR = declaration.OPERATOR
BY_TOKEN = ("q", "k", "v", "rates")
DIFFERENTIABLE = tuple(name for name in OPERATOR.tensors if name != "cu_seqlens")
EXACT = 1e-9
"""Errors are maxima over entries, relative to the largest entry of the reference."""
C = 4
"""Tokens of a mini-batch, unless told."""


def workload(t: int, *, inner: str = "linear", dtype: str = "float64", mini_batch: int = C, **shape: int) -> Workload:
    """b = 2 (1 when packed), two heads of five unless told."""
    axes = {"b": 1 if "documents" in shape else 2, "t": t, "h": 2, "k": 5} | shape
    options: dict[str, Option] = {"inner": inner, "mini_batch": mini_batch}
    return Workload(operator="ttt_scan", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


def sample(case: Workload, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Drawn arguments; sums of gradients are there where the call begins within a mini-batch."""
    arguments = definition.sample_inputs(case, seed=seed, device="cpu") | changes
    if arguments["position"] % case.options["mini_batch"] == 0:  # type: ignore[operator]
        arguments["initial_state"][:, 1] = 0
    return arguments


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def errors_of(arguments: dict[str, Any], kernel: Any = dual_form.DUAL_FORM) -> dict[str, float]:
    """Errors of outputs and of every gradient against the float64 reference."""
    record = replace(CATALOGUE.kernel("ttt_scan", "dual_form"))
    record.__dict__["torch_half"] = kernel
    found = kernel_errors(OPERATOR, record, arguments, gradients=True)
    assert set(found) == {"y", "final_state", *(f"d_{name}" for name in DIFFERENTIABLE)}
    return found


def worst(arguments: dict[str, Any], kernel: Any = dual_form.DUAL_FORM) -> float:
    return max(errors_of(arguments, kernel).values())


def close(found: Tensor, expected: Tensor) -> bool:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    return True


def tokens(arguments: dict[str, Any], part: slice) -> dict[str, Any]:
    """The same call on a part of its tokens, unpacked."""
    return {name: value[:, part] if name in BY_TOKEN else value for name, value in arguments.items()} | {
        "cu_seqlens": None
    }


# --- the kernel against the definition


@pytest.mark.parametrize("inner", declaration.INNER)
@pytest.mark.parametrize(("t", "position"), [(1, 0), (1, 3), (1, 6), (3, 0), (4, 0), (13, 0), (2, 3), (13, 6), (7, 5)])
def test_the_dual_form_equals_the_reference_with_all_gradients(inner: str, t: int, position: int) -> None:
    assert worst(sample(workload(t, inner=inner), position=position)) < EXACT


@pytest.mark.parametrize("mini_batch", [1, 2, 16, 50])
def test_mini_batches_of_any_length(mini_batch: int) -> None:
    for inner in declaration.INNER:
        assert worst(sample(workload(19, inner=inner, mini_batch=mini_batch), seed=5)) < EXACT


@pytest.mark.parametrize("inner", declaration.INNER)
@pytest.mark.parametrize("position", [0, 7])
@pytest.mark.parametrize("lengths", [(9,), (0, 10, 1, 0, 1, 5, 0), (4, 8, 3), (0, 0, 1), (1,) * 5], ids=str)
def test_packed_equals_the_reference_with_empty_and_single_token_documents(
    lengths: tuple[int, ...], position: int, inner: str
) -> None:
    case = workload(sum(lengths), inner=inner, documents=len(lengths))
    assert worst(sample(case, cu_seqlens=bounds(*lengths), position=position)) < EXACT


@pytest.mark.parametrize("kernel", ["reference", "dual_form"])
def test_packed_equals_each_document_by_itself(kernel: str) -> None:
    lengths = (0, 10, 1, 7)
    case = workload(sum(lengths), documents=len(lengths))
    arguments = sample(case, cu_seqlens=bounds(*lengths), position=2)
    y, final = ttt_scan(**arguments, kernel=kernel)
    for document, part in enumerate(pairwise(np.cumsum((0, *lengths)))):
        state = arguments["initial_state"][document : document + 1]
        if part[0] < part[1]:
            own = tokens(arguments, slice(*part)) | {"initial_state": state}
            own_y, state = ttt_scan(**own, kernel="reference")
            assert close(y[:, slice(*part)], own_y)
        assert close(final[document : document + 1], state)


@pytest.mark.parametrize("inner", declaration.INNER)
@pytest.mark.parametrize("m", [1, 3, 4, 5, 12])
def test_splitting_and_passing_the_state_changes_nothing(m: int, inner: str) -> None:
    arguments = sample(workload(14, inner=inner), position=0)
    y, final = ttt_scan(**arguments)
    first, state = ttt_scan(**tokens(arguments, slice(0, m)))
    second, state = ttt_scan(**tokens(arguments, slice(m, None)) | {"initial_state": state, "position": m})
    assert close(torch.cat([first, second], dim=1), y)
    assert close(state, final)


@pytest.mark.parametrize("kernel", ["reference", "dual_form"])
def test_token_after_token_equals_the_whole_and_sums_restart_with_every_mini_batch(kernel: str) -> None:
    arguments = sample(workload(10), position=0)
    y, final = ttt_scan(**arguments)
    state, outputs = arguments["initial_state"], []
    for token in range(10):
        before = state
        part = tokens(arguments, slice(token, token + 1)) | {"initial_state": state, "position": token}
        output, state = ttt_scan(**part, kernel=kernel)
        outputs.append(output)
        committed = (token + 1) % C == 0
        assert torch.equal(state[:, 0], before[:, 0]) != committed
        assert bool((state[:, 1] == 0).all()) == committed
    assert close(torch.cat(outputs, dim=1), y)
    assert close(state, final)


@pytest.mark.parametrize("kernel", ["reference", "dual_form"])
@pytest.mark.parametrize("cu_seqlens", [None, bounds(9, 14)], ids=["whole", "packed"])
def test_no_output_depends_on_a_later_token(kernel: str, cu_seqlens: Tensor | None) -> None:
    shape = {} if cu_seqlens is None else {"documents": 2}
    arguments = sample(workload(23, dtype="float32", **shape), cu_seqlens=cu_seqlens)
    before, _ = ttt_scan(**arguments, kernel=kernel)
    for name in BY_TOKEN:
        changed = arguments[name].clone()
        changed[:, 14:] = 0.3
        later, _ = ttt_scan(**arguments | {name: changed}, kernel=kernel)
        assert torch.equal(before[:, :14], later[:, :14]), name
        assert not torch.equal(before[:, 14:], later[:, 14:]), name


# --- the definition against the descent that it stands for


def descent(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One sequence, one head at a time: torch differentiates the loss of each token, and its gradients are descended.

    Source: Sun et al. 2024, equations 1, 4, 6 and 7; LN and the residual of section 2.7.
    """
    q, k, v = (arguments[name] for name in "qkv")
    b, t, h, width = q.shape
    scales, position, mlp = arguments["token_scales"], arguments["position"], arguments["inner"] == "mlp"
    c, inside = len(scales), 4 * width
    sizes = [(width, inside), (1, inside), (inside, width), (1, width)] if mlp else [(width, width), (1, width)]
    counts = [rows * columns for rows, columns in sizes]

    def model(x: Tensor, parameters: list[Tensor], head: int) -> Tensor:
        z = x @ parameters[0] + parameters[1]
        if mlp:
            z = F.gelu(z, approximate="tanh") @ parameters[2] + parameters[3]
        return F.layer_norm(z, (width,), arguments["norm_weight"][head], arguments["norm_bias"][head], eps=1e-6)

    ys: list[Any] = [[[None] * h for _ in range(t)] for _ in range(b)]
    rows: list[Any] = [[None] * h for _ in range(b)]
    for sequence in range(b):
        for head in range(h):
            state = arguments["initial_state"][sequence, :, head]
            weights, sums = (
                [part.reshape(size) for part, size in zip(numbers.split(counts), sizes)] for numbers in state
            )
            for token in range(t):
                place = (position + token) % c
                key, value = k[sequence, token, head][None], v[sequence, token, head][None]
                # The gradient is a function of W, keys and values, which the outer loss differentiates again.
                leaves = [w * 1 if w.requires_grad else w.clone().requires_grad_() for w in weights]
                loss = 0.5 * (model(key, leaves, head) - (value - key)).square().sum()
                gradient = torch.autograd.grad(loss, leaves, create_graph=True)
                sums = [a + arguments["rates"][sequence, token, head] * g for a, g in zip(sums, gradient)]
                trained = [w - scales[place] * a for w, a in zip(weights, sums)]
                query = q[sequence, token, head][None]
                ys[sequence][token][head] = (query + model(query, trained, head))[0]
                if place == c - 1:
                    weights, sums = trained, [torch.zeros_like(a) for a in sums]
            rows[sequence][head] = torch.stack([torch.cat([p.flatten() for p in part]) for part in (weights, sums)])
    outputs = torch.stack([torch.stack([torch.stack(heads) for heads in sequence]) for sequence in ys])
    finals = torch.stack([torch.stack(heads, dim=1) for heads in rows])
    return outputs, finals


@pytest.mark.parametrize("inner", declaration.INNER)
@pytest.mark.parametrize("kernel", ["reference", "dual_form"])
def test_it_is_gradient_descent_by_autograd_with_all_gradients(kernel: str, inner: str) -> None:
    arguments = sample(workload(11, inner=inner, k=3), position=2)
    wanted = [arguments[name].requires_grad_() for name in DIFFERENTIABLE]
    found, expected = ttt_scan(**arguments, kernel=kernel), descent(arguments)
    pulls = [torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1)) for y in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert close(mine, theirs)
    right = torch.autograd.grad(expected, wanted, pulls)
    for name, mine, theirs in zip(DIFFERENTIABLE, torch.autograd.grad(found, wanted, pulls), right):
        assert close(mine, theirs), name


def test_with_a_norm_that_does_nothing_one_token_a_batch_is_the_delta_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """W - r k (k W - u)^T with u the target: section 2.4's linear attention by descent, taken online."""
    monkeypatch.setattr(definition, "loss_gradient", lambda z, target, weight, bias: z - target)
    monkeypatch.setattr(definition, "layer_norm", lambda z, weight, bias: z)
    arguments = sample(workload(20, mini_batch=1))
    arguments["token_scales"] = torch.ones(1, dtype=torch.float64)
    y, state = ttt_scan(**arguments, kernel="reference")
    one = torch.ones_like(arguments["q"][..., :1])
    q, k = (torch.cat([arguments[name], one], -1) for name in ("q", "k"))
    initial = arguments["initial_state"][:, 0].unflatten(-1, (6, 5))
    read, final = delta_rule(
        q, k, arguments["v"] - arguments["k"], None, arguments["rates"], initial_state=initial.contiguous(), scale=1.0
    )
    assert close(y, arguments["q"] + read)
    assert close(state[:, 0].unflatten(-1, (6, 5)), final)


def test_a_rate_of_zero_leaves_the_model_as_it_was() -> None:
    arguments = sample(workload(9), position=0)
    arguments["rates"] = torch.zeros_like(arguments["rates"])
    assert torch.equal(ttt_scan(**arguments)[1], arguments["initial_state"])


def test_descent_lowers_the_loss_of_what_it_is_taught() -> None:
    """The same pair again and again: what is read for its key comes closer to its value."""
    arguments = sample(workload(200), position=0)
    for name in "qkv":
        arguments[name] = arguments[name][:, :1].expand(-1, 200, -1, -1).contiguous()
    arguments["q"] = arguments["k"]
    # A target that LN can give: v - k has its mean and length.
    target = F.layer_norm(arguments["v"], (5,)) * arguments["norm_weight"] + arguments["norm_bias"]
    arguments |= {"v": arguments["k"] + target, "rates": torch.full_like(arguments["rates"], 0.3)}
    errors = (ttt_scan(**arguments)[0] - arguments["v"]).square().sum((0, 2, 3))
    assert (errors[::20].diff() < 0).all()
    assert errors[-1] < errors[0] / 4


# --- numbers at the edges


@pytest.mark.parametrize("inner", declaration.INNER)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_half_precision_inputs_are_computed_in_fp32(dtype: str, inner: str) -> None:
    arguments = sample(workload(40, dtype=dtype, inner=inner, mini_batch=16, k=16))
    tolerance = OPERATOR.tolerances[dtype]
    for name, error in errors_of(arguments).items():
        assert error <= (tolerance.gradient if name.startswith("d_") else tolerance.output), name
    y, final = ttt_scan(**arguments)
    assert (y.dtype, final.dtype) == (getattr(torch, dtype), torch.float32)


def test_weights_of_zero_have_finite_gradients() -> None:
    """LN of zeros divides by the root of its eps alone."""
    arguments = sample(workload(9), position=0)
    arguments["initial_state"] = torch.zeros_like(arguments["initial_state"])
    wanted = [arguments[name].requires_grad_() for name in DIFFERENTIABLE]
    y, _ = ttt_scan(**arguments)
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), wanted))


def test_the_op_keeps_the_rules_of_torch_library_in_documents_that_go_on() -> None:
    arguments = sample(workload(23, documents=3), cu_seqlens=bounds(7, 0, 16), position=2)
    for name in DIFFERENTIABLE:
        arguments[name].requires_grad_()
    torch.library.opcheck(OP, (*arguments.values(), "dual_form"))


def test_decoding_compiles_to_one_graph_however_far_it_is() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    arguments = sample(workload(12), position=0)

    def step(state: Tensor, position: int, token: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return ttt_scan(**arguments | token | {"initial_state": state, "position": position})

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    state, counts = arguments["initial_state"], []
    for place in range(12):
        token = {name: arguments[name][:, place : place + 1] for name in BY_TOKEN}
        expected = step(state, place, token)
        y, state = compiled(state, place, token)
        assert torch.equal(y, expected[0]) and torch.equal(state, expected[1])
        counts.append(counter.frame_count)
    assert counts[2] == counts[-1], counts


def test_a_perturbed_kernel_is_caught() -> None:
    """The comparison of this file can fail: a batch committed a token early, and one gradient alone."""

    def commits_early(**arguments: Any) -> tuple[Tensor, ...]:
        return dual_form.dual_form(**arguments | {"position": arguments["position"] + 1})

    class ForgetsRates:
        forward = staticmethod(dual_form.DUAL_FORM.forward)

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            found = dual_form.DUAL_FORM.backward(*values)
            assert found["rates"] is not None
            return found | {"rates": found["rates"] * (1 + 1e-6)}

    arguments = sample(workload(9), position=0)
    assert errors_of(arguments, AutogradKernel(commits_early))["y"] > EXACT
    assert errors_of(arguments, ForgetsRates)["d_rates"] > EXACT


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda k: k[:, :-1], "k is .* not b t h k"),
        ("q", lambda q: q[:, :, 0], "q has 3 axes"),
        ("q", lambda q: q[:, :0], "t >= 1"),
        ("v", lambda v: v.float(), "must have one type"),
        ("rates", lambda r: r[..., :1], "rates is .* not b t h"),
        ("token_scales", lambda s: s[:0], "token_scales is .* not c"),
        ("norm_weight", lambda w: w[0], "norm_weight is .* not h k"),
        ("initial_state", lambda s: s[..., 1:], "initial_state is .* not states 2 h s"),
        ("inner", lambda _: "mlp", "initial_state is .* not states 2 h s"),
        ("inner", lambda _: "cnn", "inner is 'cnn', not linear or mlp"),
        ("position", lambda _: -1, "position is -1"),
        ("cu_seqlens", lambda _: bounds(20), "batch 1, not 2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, change: Any, message: str) -> None:
    arguments = sample(workload(20))
    with pytest.raises(ValueError, match=message):
        ttt_scan(**arguments | {name: change(arguments[name])})


# --- what the declaration promises


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("inner", declaration.INNER)
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_the_sizes_of_the_tensors(dtype: str, inner: str, packed: bool) -> None:
    case = workload(100, dtype=dtype, inner=inner, **({"documents": 3} if packed else {}))
    arguments = sample(case)
    assert definition.workload_of(arguments, "forward") == case
    inputs = [arguments[name] for name in OPERATOR.tensors if arguments[name] is not None]
    results = dual_form.DUAL_FORM.forward(**arguments)
    assert declaration.work(case).bytes_moved == sum(x.numel() * x.element_size() for x in (*inputs, *results))
    for promised, result in zip(definition.empty_outputs(arguments), results, strict=True):
        assert (promised.shape, promised.dtype) == (result.shape, result.dtype)


@pytest.mark.parametrize("inner", declaration.INNER)
def test_arithmetic_is_what_a_counter_sees_of_the_products(inner: str) -> None:
    """Of whole mini-batches that begin with the call, less what it asks of sums that were handed in."""
    case = workload(64, inner=inner, mini_batch=16, k=32, h=2)
    arguments = sample(case, position=0)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        dual_form.DUAL_FORM.forward(**arguments)
    seen = counter.get_total_flops()
    asked = 2 * 64 * 2 * 2 * declaration.state_size(inner, 32)
    assert declaration.work(case).matmul_flops == pytest.approx(seen - asked, rel=0.03)


def test_work_is_linear_in_tokens_and_its_steps_are_mini_batches() -> None:
    case = workload(1024, mini_batch=16, h=16, k=64)
    base, larger = declaration.work(case), declaration.work(replace(case, shape={**case.shape, "t": 4096}))
    assert larger.flops == 4 * base.flops
    assert (base.serial_steps, larger.serial_steps) == (64, 256)
