"""The log-linear delta rule: its kernel against the definition, that against products of transitions, promises."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.log_linear_attention.declaration import slots
from subquad_kernels.log_linear_attention.definition import set_bits
from subquad_kernels.log_linear_delta_rule import chunked, declaration, definition
from subquad_kernels.log_linear_delta_rule.operator import OP
from subquad_kernels.operators import delta_rule, log_linear_attention, log_linear_delta_rule
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Option, Workload

OPERATOR = declaration.OPERATOR
NAMES = OPERATOR.tensors
BY_TOKEN = ("q", "k", "v", "level_scales", "log_decay", "write_gate")
DIFFERENTIABLE = tuple(name for name in NAMES if name != "cu_seqlens")
# Errors are maxima over entries, relative to the largest entry of the reference.
EXACT = 1e-9


def workload(t: int, *, dtype: str = "float64", full: bool = True, decay: str = "token", **shape: int) -> Workload:
    """b = 2 (1 when packed), h = 4 over 2 heads of q and k, n = 3, p = 5, six scales unless told."""
    axes = {"b": 1 if "documents" in shape else 2, "t": t, "h": 4, "h_k": 2, "n": 3, "p": 5, "l": 6, "m": 0} | shape
    options: dict[str, Option] = {"decay": decay, "write_gate": full}
    return Workload(operator="log_linear_delta_rule", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


def sample(case: Workload, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=seed, device="cpu") | changes


def after(position: int, case: Workload, states: int) -> dict[str, Any]:
    """The arguments of a call that goes on after so many tokens."""
    size, shape = slots(position), case.shape
    draw = torch.Generator().manual_seed(position)
    state = torch.randn(states, size, shape["h"], shape["n"], shape["p"], generator=draw, dtype=torch.float64)
    for slot in range(size):
        state[:, slot] *= position >> slot & 1
    return {"initial_state": state if position else None, "position": position}


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def errors_of(arguments: dict[str, Any], kernel: Any = chunked.CHUNKED) -> dict[str, float]:
    """Errors of outputs and of every gradient against the float64 reference."""
    record = replace(CATALOGUE.kernel("log_linear_delta_rule", "chunked"))
    record.__dict__["torch_half"] = kernel
    found = kernel_errors(OPERATOR, record, arguments, gradients=True)
    given = [name for name in DIFFERENTIABLE if arguments[name] is not None]
    assert set(found) == {"y", "final_state", *(f"d_{name}" for name in given)}
    return found


def worst(arguments: dict[str, Any], kernel: Any = chunked.CHUNKED) -> float:
    return max(errors_of(arguments, kernel).values())


def within(arguments: dict[str, Any], dtype: str) -> bool:
    tolerance = OPERATOR.tolerances[dtype]
    errors = errors_of(arguments)
    return all(e <= (tolerance.gradient if name.startswith("d_") else tolerance.output) for name, e in errors.items())


def close(found: Tensor, expected: Tensor) -> bool:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    return True


def tokens(arguments: dict[str, Any], part: slice) -> dict[str, Any]:
    """The same call on a part of its tokens, unpacked."""
    return {
        name: value[:, part] if name in BY_TOKEN and value is not None and value.dim() > 1 else value
        for name, value in arguments.items()
    } | {"cu_seqlens": None}


# --- the kernel against the definition


@pytest.mark.parametrize(
    ("t", "position"),
    [
        (1, 0), (2, 0), (63, 0), (64, 0), (65, 0), (1, 1), (1, 7), (1, 64), (2, 63), (70, 5), (5, 62), (64, 64),
        (3, 1023),
    ],
)  # fmt: skip
def test_chunked_equals_the_reference_with_all_gradients(t: int, position: int) -> None:
    """Longer calls, of many chunks, are the next test's."""
    case = workload(t, l=6 if t % 2 else 14)
    assert worst(sample(case, **after(position, case, 2))) < EXACT


@pytest.mark.parametrize("decay", ["token", "head", "none"])
@pytest.mark.parametrize("full", [True, False], ids=["write gate", "none"])
def test_gates_may_be_absent(decay: str, full: bool) -> None:
    assert worst(sample(workload(90, decay=decay, full=full, m=3))) < EXACT


@pytest.mark.parametrize("position", [0, 43])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_the_length_of_a_chunk_changes_nothing(chunk: int, position: int) -> None:
    """Up to 35 chunks, which stand in one block or in two, wherever the call begins."""
    kernel = AutogradKernel(partial(chunked.chunked, chunk=chunk))
    case = workload(35, b=1)
    assert worst(sample(case, **after(position, case, 1)), kernel) < EXACT


@pytest.mark.parametrize(
    ("lengths", "position"),
    [((33,), 0), ((0, 70, 1, 0, 1, 20, 0), 0), ((1,) * 9, 0), ((0, 0, 1), 3), ((65, 0, 63, 1), 37)],
    ids=str,
)
def test_packed_chunked_equals_the_reference_with_empty_and_single_token_documents(
    lengths: tuple[int, ...], position: int
) -> None:
    case = workload(sum(lengths), documents=len(lengths))
    assert worst(sample(case, cu_seqlens=bounds(*lengths), **after(position, case, len(lengths)))) < EXACT


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_packed_equals_each_document_by_itself(kernel: str) -> None:
    lengths = (0, 70, 1, 20)
    case = workload(sum(lengths), documents=len(lengths))
    arguments = sample(case, cu_seqlens=bounds(*lengths), **after(5, case, len(lengths)))
    y, final = log_linear_delta_rule(**arguments, kernel=kernel)
    for document, part in enumerate(pairwise(np.cumsum((0, *lengths)))):
        state = arguments["initial_state"][document : document + 1]
        if part[0] < part[1]:
            own = tokens(arguments, slice(*part)) | {"initial_state": state}
            own_y, state = log_linear_delta_rule(**own, kernel="reference")
            assert close(y[:, slice(*part)], own_y)
        size = state.shape[1]
        assert close(final[document : document + 1, :size], state)
        assert (final[document, size:] == 0).all()


@pytest.mark.parametrize("m", [1, 63, 64, 100])
def test_splitting_and_passing_the_state_changes_nothing(m: int) -> None:
    arguments = sample(workload(131))
    y, final = log_linear_delta_rule(**arguments)
    first, state = log_linear_delta_rule(**tokens(arguments, slice(0, m)))
    rest = tokens(arguments, slice(m, None)) | {"initial_state": state, "position": m}
    second, state = log_linear_delta_rule(**rest)
    assert close(torch.cat([first, second], dim=1), y)
    assert close(state, final)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_token_after_token_equals_the_whole_and_keeps_as_many_states_as_the_length_has_bits(kernel: str) -> None:
    arguments = sample(workload(70))
    y, final = log_linear_delta_rule(**arguments)
    state, outputs = None, []
    for token in range(70):
        part = tokens(arguments, slice(token, token + 1)) | {"initial_state": state, "position": token}
        output, state = log_linear_delta_rule(**part, kernel=kernel)
        outputs.append(output)
        filled = [slot for slot in range(state.shape[1]) if state[:, slot].abs().max() > 0]
        assert state.shape[1] == (token + 1).bit_length()
        assert filled == set_bits(token + 1)
    assert close(torch.cat(outputs, dim=1), y)
    assert state is not None and close(state, final)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("cu_seqlens", [None, bounds(9, 91)], ids=["whole", "packed"])
def test_no_output_depends_on_a_later_token(kernel: str, cu_seqlens: Tensor | None) -> None:
    shape = {} if cu_seqlens is None else {"documents": 2}
    arguments = sample(workload(100, dtype="float32", **shape), cu_seqlens=cu_seqlens)
    before, _ = log_linear_delta_rule(**arguments, kernel=kernel)
    for name in BY_TOKEN:
        changed = arguments[name].clone()
        changed[:, 73:] = -3.0
        later, _ = log_linear_delta_rule(**arguments | {name: changed}, kernel=kernel)
        assert torch.equal(before[:, :73], later[:, :73]), name
        assert not torch.equal(before[:, 73:], later[:, 73:]), name


# --- the definition against the forms of the paper


def fenwick_level(t: int, j: int) -> int:
    """The bucket of j before t by peeling the lowest ones off t, as section 3.1 does; 0 for t itself."""
    if j == t:
        return 0
    end = t
    while end:
        size = end & -end
        if end - size <= j < end:
            return size.bit_length()
        end -= size
    raise AssertionError(f"{j} is in no bucket before {t}")


def products_of_transitions(arguments: dict[str, Any]) -> Tensor:
    """Guo et al. 2025, section 3.4: every pair by itself, through the matrices between, a distance at a time."""
    q, k, v = (arguments[name].transpose(1, 2) for name in "qkv")
    b, h, t, _ = v.shape
    q, k = (rows.repeat_interleave(h // rows.shape[1], dim=1) for rows in (q, k))
    g, beta, scales = (arguments[name].transpose(1, 2) for name in ("log_decay", "write_gate", "level_scales"))
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    M = g.exp()[..., None, None] * (eye - beta[..., None, None] * k[..., :, None] * k[..., None, :])
    y = torch.zeros_like(v)
    reading = q  # (M_i M_{i-1} .. M_{j+1})^T q_i of every i > distance
    for distance in range(t):
        later, earlier = slice(distance, t), slice(0, t - distance)
        level = torch.tensor([min(fenwick_level(i, i - distance), 5) for i in range(distance, t)])
        scale = scales[:, :, later].gather(-1, level[:, None].expand(b, h, -1, 1)).squeeze(-1)
        weight = scale * beta[:, :, earlier] * (reading * k[:, :, earlier]).sum(-1)
        y = y + torch.nn.functional.pad(weight[..., None] * v[:, :, earlier], (0, 0, distance, 0))
        reading = torch.einsum("bhtnm,bhtn->bhtm", M[:, :, earlier], reading)[:, :, 1:]
    return y.transpose(1, 2)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_it_is_every_pair_through_the_product_of_its_transitions_with_all_gradients(kernel: str) -> None:
    arguments = sample(workload(75), scale=1.0)
    wanted = [arguments[name].requires_grad_() for name in BY_TOKEN]
    found, expected = log_linear_delta_rule(**arguments, kernel=kernel)[0], products_of_transitions(arguments)
    pull = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, wanted, pull), torch.autograd.grad(expected, wanted, pull)):
        assert close(mine, theirs)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_with_equal_scales_it_is_the_delta_rule(kernel: str) -> None:
    case = workload(150)
    arguments = sample(case, **after(75, case, 2))
    arguments["level_scales"] = torch.ones_like(arguments["level_scales"])
    y, state = log_linear_delta_rule(**arguments, kernel=kernel)
    plain = {name: arguments[name] for name in ("q", "k", "v", "log_decay", "write_gate", "scale")}
    expected, expected_state = delta_rule(**plain, initial_state=arguments["initial_state"].sum(1))
    assert close(y, expected)
    assert close(state.sum(1), expected_state)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_with_orthogonal_keys_nothing_is_replaced_and_it_is_log_linear_attention(kernel: str) -> None:
    arguments = sample(workload(70, n=70))
    arguments["k"] = torch.eye(70, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    y, state = log_linear_delta_rule(**arguments, kernel=kernel)
    expected, expected_state = log_linear_attention(**arguments)
    assert close(y, expected)
    assert close(state, expected_state)


# --- numbers at the edges


@pytest.mark.parametrize("rate", [-1e-8, -0.7, -1e6, -torch.inf], ids=str)
def test_extreme_decays_neither_overflow_nor_lose_gradients(rate: float) -> None:
    arguments = sample(workload(80, dtype="float32", m=4))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    assert within(arguments, "float32")


def test_a_token_that_forgets_everything_leaves_later_states_their_precision() -> None:
    arguments = sample(workload(80, dtype="float32"))
    arguments["log_decay"][:, 7] = -1e6
    assert within(arguments, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_inputs_are_computed_in_fp32(dtype: str) -> None:
    arguments = sample(workload(100, dtype=dtype, m=3))
    assert within(arguments, dtype)
    y, final = log_linear_delta_rule(**arguments)
    assert (y.dtype, final.dtype) == (getattr(torch, dtype), torch.float32)


def test_the_op_passes_gradcheck_with_initial_and_final_states() -> None:
    case = workload(3, b=1, h=2, h_k=1, n=2, p=1, l=3)
    arguments = sample(case, **after(6, case, 1))

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return log_linear_delta_rule(**arguments | dict(zip(DIFFERENTIABLE, tensors)))

    assert torch.autograd.gradcheck(attend, [arguments[name].requires_grad_() for name in DIFFERENTIABLE])


@pytest.mark.slow
def test_the_op_keeps_the_rules_of_torch_library_in_documents_that_go_on() -> None:
    case = workload(5, documents=3, n=2, p=2)
    arguments = sample(case, cu_seqlens=bounds(2, 0, 3), **after(5, case, 3))
    for name in DIFFERENTIABLE:
        arguments[name].requires_grad_()
    torch.library.opcheck(OP, (*arguments.values(), "chunked"))


@pytest.mark.slow  # the op's shapes are log_linear_attention's, which is tested so every time
def test_decoding_compiles_to_as_many_graphs_however_many_bits_the_length_has() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def step(state: Tensor, position: int, *rows: Tensor) -> tuple[Tensor, Tensor]:
        return log_linear_delta_rule(*rows, initial_state=state, position=position)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    arguments = sample(workload(20, b=1, full=False))
    state, counts = torch.zeros(1, 0, 4, 3, 5, dtype=torch.float64), []
    for token in range(20):
        rows = [arguments[name][:, token : token + 1] for name in ("q", "k", "v", "level_scales", "log_decay")]
        expected = step(state, token, *rows)
        y, state = compiled(state, token, *rows)
        assert torch.equal(y, expected[0]) and torch.equal(state, expected[1])
        counts.append(counter.frame_count)
    assert counts[2] == counts[-1], counts  # the first state is empty, the second call's integers are constants


def test_a_perturbed_kernel_is_caught() -> None:
    """The comparison of this file can fail: a level taken one too high, and one gradient alone."""

    def one_level_up(**arguments: Any) -> tuple[Tensor, ...]:
        scales = arguments["level_scales"]
        return chunked.chunked(**arguments | {"level_scales": torch.cat([scales[..., :1], scales[..., :-1]], -1)})

    class ForgetsDecays:
        forward = staticmethod(chunked.CHUNKED.forward)

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            found = chunked.CHUNKED.backward(*values)
            assert found["log_decay"] is not None
            return found | {"log_decay": found["log_decay"] * (1 + 1e-6)}

    arguments = sample(workload(20))
    assert errors_of(arguments, AutogradKernel(one_level_up))["y"] > EXACT
    assert errors_of(arguments, ForgetsDecays)["d_log_decay"] > EXACT


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda k: k[:, :-1], "k is .* not b t h_k n"),
        ("q", lambda q: q[:, :, :1].expand(-1, -1, 3, -1), "4 heads, not a multiple of the 3"),
        ("v", lambda v: v[:, :0], "t >= 1"),
        ("v", lambda v: v.float(), "must have one type"),
        ("level_scales", lambda s: s[..., :0], "l >= 1"),
        ("level_scales", lambda s: s[:, :, 0], "level_scales have 4, 4, 3 axes"),
        ("log_decay", lambda g: g[0, 0, :3], "log_decay is .* not h"),
        ("initial_state", lambda s: s[:, 1:], "initial_state is .* not states m h n p = .* 5 tokens before"),
        ("initial_state", lambda _: None, "5 tokens came before, and no initial_state"),
        ("position", lambda _: -1, "position is -1"),
        ("cu_seqlens", lambda _: bounds(20), "batch 1, not 2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, change: Any, message: str) -> None:
    case = workload(20)
    arguments = sample(case, **after(5, case, 2))
    with pytest.raises(ValueError, match=message):
        log_linear_delta_rule(**arguments | {name: change(arguments[name])})


# --- what the declaration promises


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", ["token", "head", "none"])
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_the_sizes_of_the_tensors(dtype: str, decay: str, packed: bool) -> None:
    case = workload(100, dtype=dtype, decay=decay, full=packed, **({"documents": 3} if packed else {"m": 4}))
    arguments = sample(case, seed=4)  # 12 tokens before where there are any
    assert definition.workload_of(arguments, "forward") == case
    inputs = [arguments[name] for name in NAMES if arguments[name] is not None]
    moved = sum(x.numel() * x.element_size() for x in (*inputs, *chunked.CHUNKED.forward(**arguments)))
    assert declaration.work(case).bytes_moved == moved


def test_the_fake_promises_what_every_kernel_returns() -> None:
    for case in (workload(100), workload(16, full=False), workload(1, m=5), workload(70, documents=4)):
        arguments = sample(case)
        for kernel in (definition.REFERENCE, chunked.CHUNKED):
            results = kernel.forward(**arguments)
            for promised, result in zip(definition.empty_outputs(arguments), results, strict=True):
                assert (promised.shape, promised.dtype) == (result.shape, result.dtype)


def test_arithmetic_grows_by_a_level_when_the_tokens_double() -> None:
    """A level costs a token and head n (n + p): half of the tokens read a state and go through a transition."""
    case = workload(1024, dtype="bfloat16", full=False, h=8, n=64, p=64)
    flops = {}
    for t in (1024, 2048, 4096):
        work = declaration.work(replace(case, shape={**case.shape, "t": t}))
        flops[t] = work.matmul_flops / (2 * t * 8)
        assert work.serial_steps == slots(t // 64 - 1) + 1
    joined = 2 * 64 * 64 * 128  # two halves become one
    for t in (2048, 4096):
        assert flops[t] - flops[t // 2] == 64 * 128 + joined * (1 / (t // 2) - 1 / t)
