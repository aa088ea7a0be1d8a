"""Gated linear attention: kernels against the definition, the definition against other forms, and its promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, einsum

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.gated_linear_attention import chunked, declaration, definition
from subquad_kernels.gated_linear_attention.operator import OP
from subquad_kernels.operators import gated_linear_attention, linear_attention
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.workload import DType, Workload

OPERATOR = declaration.OPERATOR
NAMES = OPERATOR.tensors
BY_TOKEN = ("q", "k", "v", "log_decay")
KERNELS = pytest.mark.parametrize("kernel", ["reference", "chunked"])
READS = pytest.mark.parametrize("read", ["after", "before"])
# Errors are maxima over entries, relative to the largest entry of the reference.
EXACT = 1e-9


def workload(t: int, *, read: str = "before", dtype: DType = "float64", full: bool = True, **shape: int) -> Workload:
    """b = 2 (1 when packed), h = 2, n = 3, p = 5 unless told; `full` gives every optional tensor that `read` allows."""
    axes = {"b": 1 if "documents" in shape else 2, "t": t, "h": 2, "n": 3, "p": 5} | shape
    decay_dtype = "float64" if dtype == "float64" else "float32"
    options: dict[str, Any] = {"read": read, "bonus": full and read == "before", "initial_state": full}
    options["decay_dtype"] = decay_dtype
    return Workload(operator="gated_linear_attention", shape=axes, dtype=dtype, options=options)


def sample(case: Workload, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=0, device="cpu") | changes


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def errors_of(arguments: dict[str, Any], kernel: Any = chunked) -> dict[str, float]:
    """Errors of outputs and of every gradient against the float64 reference."""

    class WithoutAutograd:  # as the torch op calls it
        forward = staticmethod(torch.no_grad()(kernel.forward))
        backward = staticmethod(torch.no_grad()(kernel.backward))

    record = replace(CATALOGUE.kernel("gated_linear_attention", "chunked"))
    record.__dict__["torch_half"] = WithoutAutograd
    found = kernel_errors(OPERATOR, record, arguments, gradients=True)
    given = [name for name in NAMES if arguments[name] is not None and name != "cu_seqlens"]
    assert set(found) == {"y", "final_state", *(f"d_{name}" for name in given)}
    return found


def worst(arguments: dict[str, Any], kernel: Any = chunked) -> float:
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
    return {name: value[:, part] if name in BY_TOKEN else value for name, value in arguments.items()} | {
        "cu_seqlens": None
    }


# --- kernels against the definition


@READS
@pytest.mark.parametrize("t", [1, 31, 32, 33, 101, 300])
@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
def test_chunked_equals_the_reference_with_all_gradients(t: int, read: str, full: bool) -> None:
    assert worst(sample(workload(t, read=read, full=full))) < EXACT


@pytest.mark.parametrize("absent", ["bonus", "initial_state"])
def test_each_optional_tensor_may_be_absent(absent: str) -> None:
    assert worst(sample(workload(70), **{absent: None})) < EXACT


@READS
@pytest.mark.parametrize(
    "lengths", [(33,), (0, 70, 1, 0, 1, 20, 0), (32, 64, 1), (1,) * 9, (0, 0, 1), (300, 0, 290)], ids=str
)
def test_packed_chunked_equals_the_reference_with_empty_and_single_token_documents(
    lengths: tuple[int, ...], read: str
) -> None:
    for full in (True, False):
        case = workload(sum(lengths), read=read, full=full, documents=len(lengths))
        assert worst(sample(case, cu_seqlens=bounds(*lengths))) < EXACT


@KERNELS
@READS
def test_packed_equals_each_document_by_itself(kernel: str, read: str) -> None:
    lengths = (0, 70, 1, 20)
    arguments = sample(workload(sum(lengths), read=read, documents=len(lengths)), cu_seqlens=bounds(*lengths))
    y, final = gated_linear_attention(**arguments, kernel=kernel)
    for document, part in enumerate(pairwise(np.cumsum((0, *lengths)))):
        state = arguments["initial_state"][document : document + 1]
        if part[0] < part[1]:
            own = tokens(arguments, slice(*part)) | {"initial_state": state}
            own_y, state = gated_linear_attention(**own, kernel="reference")
            assert close(y[:, slice(*part)], own_y)
        assert close(final[document : document + 1], state)


@READS
@pytest.mark.parametrize("m", [1, 31, 32, 33, 100])
def test_splitting_and_passing_the_state_changes_nothing(m: int, read: str) -> None:
    arguments = sample(workload(131, read=read))
    y, final = gated_linear_attention(**arguments)
    first, state = gated_linear_attention(**tokens(arguments, slice(0, m)))
    second, state = gated_linear_attention(**tokens(arguments, slice(m, None)) | {"initial_state": state})
    assert close(torch.cat([first, second], dim=1), y)
    assert close(state, final)


@KERNELS
@READS
@pytest.mark.parametrize("state_given", [True, False])
def test_token_after_token_equals_the_whole(kernel: str, read: str, state_given: bool) -> None:
    arguments = sample(workload(20, read=read))
    state = arguments["initial_state"] = arguments["initial_state"] if state_given else None
    y, final = gated_linear_attention(**arguments)
    outputs = []
    for token in range(20):
        part = tokens(arguments, slice(token, token + 1)) | {"initial_state": state}
        output, state = gated_linear_attention(**part, kernel=kernel)
        outputs.append(output)
    assert close(torch.cat(outputs, dim=1), y)
    assert state is not None
    assert close(state, final)


@KERNELS
@READS
@pytest.mark.parametrize("cu_seqlens", [None, bounds(9, 91)], ids=["whole", "packed"])
def test_no_output_depends_on_a_later_token(kernel: str, read: str, cu_seqlens: Tensor | None) -> None:
    shape = {} if cu_seqlens is None else {"documents": 2}
    arguments = sample(workload(100, read=read, dtype="float32", **shape), cu_seqlens=cu_seqlens)
    before, _ = gated_linear_attention(**arguments, kernel=kernel)
    for name in BY_TOKEN:
        changed = arguments[name].clone()
        changed[:, 73:] = -3.0
        after, _ = gated_linear_attention(**arguments | {name: changed}, kernel=kernel)
        assert torch.equal(before[:, :73], after[:, :73]), name
        # A read before the write sees neither its own decay; the next token does.
        assert not torch.equal(before[:, 74:], after[:, 74:]), name


# --- the definition against other forms


def in_one_product(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y and the final state with every pair of tokens at once: decays of pairs, t t n numbers, and no recurrence.

    Yang et al. 2023, equation 4, with exponents taken pair by pair.
    """
    q, k, v, g = (arguments[name].transpose(1, 2) for name in BY_TOKEN)
    t, before = q.shape[2], arguments["read"] == "before"
    ends = g.cumsum(2)
    reads = ends - g if before else ends  # log decays from the start to where a token reads
    reach = torch.ones(t, t, dtype=torch.bool).tril(-1 if before else 0)
    exponents = (reads[:, :, :, None] - ends[:, :, None]).masked_fill(~reach[:, :, None], -torch.inf)
    scores = einsum("bhin,bhijn,bhjn->bhij", q, exponents.exp(), k)
    if arguments["bonus"] is not None:
        scores = scores + torch.diag_embed((q * arguments["bonus"][:, None] * k).sum(-1))
    initial = arguments["initial_state"]
    y = scores @ v + (q * reads.exp()) @ initial
    final = ends[:, :, -1, :, None].exp() * initial + (k * (ends[:, :, -1:] - ends).exp()).mT @ v
    return (arguments["scale"] * y).transpose(1, 2), final


@KERNELS
@READS
def test_it_is_a_product_over_all_pairs_of_tokens(kernel: str, read: str) -> None:
    """Outputs, final state and all gradients of an independent quadratic form."""
    arguments = sample(workload(70, read=read))
    wanted = [arguments[name].requires_grad_() for name in NAMES if arguments[name] is not None]
    expected, found = in_one_product(arguments), gated_linear_attention(**arguments, kernel=kernel)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(part.shape, dtype=torch.float64, generator=generator) for part in expected]
    assert all(close(mine, theirs) for mine, theirs in zip(found, expected))
    mine, theirs = (torch.autograd.grad(outputs, wanted, pulls) for outputs in (found, expected))
    assert all(close(a, b) for a, b in zip(mine, theirs))


@KERNELS
def test_equal_decays_of_all_channels_are_linear_attention(kernel: str) -> None:
    """Against the operator with one decay a head and token."""
    arguments = sample(workload(70, read="after"))
    decay = arguments["log_decay"][..., 0]
    arguments["log_decay"] = decay[..., None].expand_as(arguments["q"])
    found = gated_linear_attention(**arguments, kernel=kernel)
    shared = {name: arguments[name] for name in ("q", "k", "v", "initial_state", "scale")}
    expected = linear_attention(**shared, log_decay=decay, kernel="reference")
    assert all(close(mine, theirs) for mine, theirs in zip(found, expected))


@KERNELS
def test_rwkv_6_with_a_bonus_of_one_and_no_decay_is_linear_attention(kernel: str) -> None:
    arguments = sample(workload(70), initial_state=None)
    arguments |= {"bonus": torch.ones(2, 3, dtype=torch.float64), "log_decay": torch.zeros_like(arguments["q"])}
    q, k, v = (arguments[name].transpose(1, 2) for name in "qkv")
    found, _ = gated_linear_attention(**arguments, kernel=kernel)
    assert close(found.transpose(1, 2), arguments["scale"] * (q @ k.mT).tril() @ v)


@KERNELS
def test_hgrn2_and_rwkv_6_are_calls_of_it(kernel: str) -> None:
    """Qin et al. 2024: keys are 1 - decay.  Peng et al. 2024, equation 19: r (S + diag(u) k^T v)."""
    arguments = sample(workload(40, read="after"), initial_state=None, scale=1.0)
    arguments["k"] = 1 - arguments["log_decay"].exp()
    bonus = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gated, rwkv, state = [], [], torch.zeros(2, 2, 3, 5, dtype=torch.float64)
    for token in range(40):
        q, k, v, g = (arguments[name][:, token] for name in BY_TOKEN)
        write = k[..., None] * v[..., None, :]
        rwkv.append((q[..., None] * (state + bonus[..., None] * write)).sum(2))
        state = g.exp()[..., None] * state + write
        gated.append((q[..., None] * state).sum(2))
    assert close(gated_linear_attention(**arguments, kernel=kernel)[0], torch.stack(gated, dim=1))
    before = arguments | {"read": "before", "bonus": bonus}
    found, final = gated_linear_attention(**before, kernel=kernel)
    assert close(found, torch.stack(rwkv, dim=1))
    assert close(final, state)


def test_channels_of_keys_may_be_permuted_and_values_rotated() -> None:
    arguments = sample(workload(70))
    order = torch.tensor([2, 0, 1])
    permuted = {name: arguments[name][..., order] for name in ("q", "k", "log_decay", "bonus")}
    permuted["initial_state"] = arguments["initial_state"][:, :, order]
    y, final = gated_linear_attention(**arguments)
    mixed_y, mixed_final = gated_linear_attention(**arguments | permuted)
    assert close(mixed_y, y)
    assert close(mixed_final, final[:, :, order])
    mix = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    mixed = {"v": arguments["v"] @ mix, "initial_state": arguments["initial_state"] @ mix}
    assert close(gated_linear_attention(**arguments | mixed)[0], y @ mix)


# --- numbers at the edges


@READS
@pytest.mark.parametrize("rate", [0.0, -1e-8, -0.7, -50.0, -1e4], ids=str)
def test_extreme_decays_neither_overflow_nor_lose_gradients(rate: float, read: str) -> None:
    arguments = sample(workload(100, read=read, dtype="float32"))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    assert within(arguments, "float32")


@READS
@pytest.mark.parametrize("rate", [-50.0, -1e4])
def test_one_channel_and_one_token_that_forget_leave_the_others_their_precision(rate: float, read: str) -> None:
    arguments = sample(workload(100, read=read, dtype="float32"))
    arguments["log_decay"][..., 1] = rate
    arguments["log_decay"][:, 7] = rate
    assert within(arguments, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_inputs_are_computed_in_fp32(dtype: DType) -> None:
    arguments = sample(workload(100, dtype=dtype))
    assert arguments["log_decay"].dtype == torch.float32
    assert within(arguments, dtype)
    y, final = gated_linear_attention(**arguments)
    assert (y.dtype, final.dtype) == (getattr(torch, dtype), torch.float32)


@READS
def test_the_reference_passes_gradcheck_with_initial_and_final_states(read: str) -> None:
    arguments = sample(workload(4, read=read, b=1, h=1, n=2, p=2))
    names = [name for name in NAMES if arguments[name] is not None]

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return gated_linear_attention(**dict(zip(names, tensors)), read=read, kernel="reference")  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(attend, [arguments[name].requires_grad_() for name in names])


@READS
@pytest.mark.parametrize("cu_seqlens", [None, bounds(3, 0, 1, 33)], ids=["whole", "packed"])
def test_the_chunked_op_passes_gradcheck_across_a_chunk_boundary(cu_seqlens: Tensor | None, read: str) -> None:
    shape = {"b": 1} if cu_seqlens is None else {"documents": 4}
    arguments = sample(workload(37, read=read, h=2, n=2, p=1, **shape), cu_seqlens=cu_seqlens)
    names = [name for name in NAMES if arguments[name] is not None and name != "cu_seqlens"]

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return gated_linear_attention(**dict(zip(names, tensors)), cu_seqlens=cu_seqlens, read=read)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(attend, [arguments[name].requires_grad_() for name in names], fast_mode=True)


def test_a_loss_on_the_final_state_alone_reaches_the_inputs() -> None:
    arguments = sample(workload(70))
    for name in ("k", "log_decay", "initial_state"):
        arguments[name].requires_grad_()
    gated_linear_attention(**arguments)[1].sum().backward()
    for name in ("k", "log_decay", "initial_state"):
        assert (arguments[name].grad != 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_the_op_keeps_the_rules_of_torch_library(packed: bool) -> None:
    case = workload(300, documents=3, n=2, p=2) if packed else workload(300, n=2, p=2)
    arguments = sample(case, cu_seqlens=bounds(7, 0, 293) if packed else None)
    for name in NAMES:
        if name != "cu_seqlens":
            arguments[name].requires_grad_()
    torch.library.opcheck(OP, (*arguments.values(), "chunked"))


def test_a_perturbed_kernel_is_caught() -> None:
    """The comparison of this file can fail, for outputs and for one gradient alone."""

    class AddsALittle:
        backward = staticmethod(chunked.backward)

        @staticmethod
        def forward(**arguments: Any) -> tuple[Tensor, ...]:
            y, *rest = chunked.forward(**arguments)
            return y + 1e-6, *rest

    class ForgetsDecays:
        forward = staticmethod(chunked.forward)

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            found = chunked.backward(*values)
            assert found["log_decay"] is not None
            return found | {"log_decay": found["log_decay"] * (1 + 1e-6)}

    arguments = sample(workload(20))
    assert errors_of(arguments, AddsALittle)["y"] > EXACT
    assert errors_of(arguments, ForgetsDecays)["d_log_decay"] > EXACT


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda k: k[:, :-1], "k is .* not b t h n"),
        ("v", lambda v: v[:, :, :1], "v is .* not b t h p"),
        ("v", lambda v: v[..., 0], "v 3, not 4"),
        ("q", lambda q: q[:, :0], "t >= 1"),
        ("log_decay", lambda g: g[..., 0], "log_decay is .* not b t h n"),
        ("bonus", lambda u: u[0], "bonus is .* not h n"),
        ("initial_state", lambda s: s.transpose(2, 3), "initial_state is .* not states h n p"),
        ("cu_seqlens", lambda _: bounds(20), "batch 1, not 2"),
        ("read", lambda _: "between", "read is 'between'"),
        ("read", lambda _: "after", "bonus"),
    ],
)
def test_arguments_that_do_not_fit_are_named(name: str, change: Any, message: str) -> None:
    arguments = sample(workload(20))
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**arguments | {name: change(arguments[name])})


# --- what the declaration promises


def moved_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_the_sizes_of_the_tensors(dtype: DType, packed: bool) -> None:
    case = workload(600, dtype=dtype, full=packed, **({"documents": 3} if packed else {}))
    arguments = sample(case)
    assert definition.workload_of(arguments, "forward") == case
    results = chunked.forward(**arguments)
    assert results[2].shape[0] > 0
    inputs = [arguments[name] for name in NAMES]
    assert declaration.work(case).bytes_moved == moved_bytes(*inputs, *results)
    # Backward: inputs, residuals and gradients of outputs in; gradients of floating inputs out.
    grads = [tensor for tensor in inputs if tensor is not None and tensor.is_floating_point()]
    assert declaration.work(replace(case, phase="backward")).bytes_moved == moved_bytes(*inputs, *results, *grads)
    assert declaration.work(replace(case, phase="decode")).saved_bytes == 0


def test_the_fake_promises_what_every_kernel_returns() -> None:
    for case in (workload(300), workload(16, full=False), workload(1), workload(700, documents=4)):
        arguments = sample(case)
        for kernel in (definition.REFERENCE, chunked):
            results = kernel.forward(**arguments)
            for promised, result in zip(definition.empty_outputs(arguments), results, strict=True):
                assert (promised.shape, promised.dtype) == (result.shape, result.dtype)


def test_every_kernel_saves_the_same_states() -> None:
    """The residual of one is what another would have saved, also behind empty documents."""
    for case, cuts in ((workload(600), None), (workload(600, documents=4), bounds(0, 300, 0, 300))):
        arguments = sample(case, cu_seqlens=cuts)
        expected, found = (kernel.forward(**arguments)[2] for kernel in (definition.REFERENCE, chunked))
        assert close(found, expected)


def test_arithmetic_is_linear_in_tokens_and_the_state_does_not_grow() -> None:
    """64 (n + p) within a chunk and 4 n p between, per token and head; the backward takes 3 and 2.5 times that."""
    case = workload(1024, dtype="bfloat16", full=False, h=8, n=64, p=64)
    base, larger = declaration.work(case), declaration.work(replace(case, shape={**case.shape, "t": 4096}))
    assert base.matmul_flops == 2 * 1024 * 8 * (64 * 128 + 4 * 64 * 64)
    assert larger.flops == 4 * base.flops
    assert (base.serial_steps, larger.serial_steps) == (16, 64)
    backward = declaration.work(replace(case, phase="backward"))
    assert backward.matmul_flops == 2 * 1024 * 8 * (3 * 64 * 128 + 10 * 64 * 64)
