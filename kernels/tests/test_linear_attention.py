"""Linear attention: kernels against the definition, the definition against its family's own forms, and its promises."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, einsum

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.linear_attention import chunked, declaration, definition
from subquad_kernels.linear_attention.operator import OP
from subquad_kernels.operators import linear_attention, linear_attention_normalizer
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.workload import Option, Workload

OPERATOR = declaration.OPERATOR
NAMES = OPERATOR.tensors
BY_TOKEN = ("q", "k", "v", "log_decay", "write_gate", "diagonal")
# Errors are maxima over entries, relative to the largest entry of the reference.
EXACT = 1e-9


def workload(
    t: int, *, dtype: str = "float64", full: bool = True, decay: str = "token", **shape: int
) -> Workload:  # fmt: skip
    """b = 2 (1 when packed), h = 4 over 2 heads of q and k, n = 3, p = 5 unless told; `full` gives every tensor."""
    axes = {"b": 1 if "documents" in shape else 2, "t": t, "h": 4, "h_k": 2, "n": 3, "p": 5} | shape
    options: dict[str, Option] = {"decay": decay} | dict.fromkeys(("write_gate", "diagonal", "initial_state"), full)
    return Workload(operator="linear_attention", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


def sample(case: Workload, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=0, device="cpu") | changes


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def errors_of(arguments: dict[str, Any], kernel: Any = chunked) -> dict[str, float]:
    """Errors of outputs and of every gradient against the float64 reference."""

    class WithoutAutograd:  # as the torch op calls it
        forward = staticmethod(torch.no_grad()(kernel.forward))
        backward = staticmethod(torch.no_grad()(kernel.backward))

    record = replace(CATALOGUE.kernel("linear_attention", "chunked"))
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
    return {
        name: value[:, part] if name in BY_TOKEN and value is not None and value.dim() > 1 else value
        for name, value in arguments.items()
    } | {"cu_seqlens": None}


# --- kernels against the definition


@pytest.mark.parametrize("t", [1, 63, 64, 65, 131])
@pytest.mark.parametrize("decay", ["token", "head", "none"])
@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
def test_chunked_equals_the_reference_with_all_gradients(t: int, decay: str, full: bool) -> None:
    assert worst(sample(workload(t, decay=decay, full=full))) < EXACT


@pytest.mark.parametrize("gate", ["write_gate", "diagonal", "initial_state"])
def test_each_optional_tensor_may_be_absent(gate: str) -> None:
    assert worst(sample(workload(70), **{gate: None})) < EXACT


@pytest.mark.parametrize("chunk", [16, 32, 128])
def test_the_length_of_a_chunk_changes_nothing(chunk: int) -> None:
    class Chunked:
        forward = staticmethod(partial(chunked.forward, chunk))

        @staticmethod
        def backward(*values: Any) -> Any:
            return chunked.backward(*values, chunk=chunk)

    assert worst(sample(workload(131)), Chunked) < EXACT
    assert worst(sample(workload(131, documents=3)), Chunked) < EXACT


@pytest.mark.parametrize(
    "lengths", [(33,), (0, 70, 1, 0, 1, 20, 0), (64, 64, 1), (1,) * 9, (0, 0, 1), (65, 63)], ids=str
)
@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
def test_packed_chunked_equals_the_reference_with_empty_and_single_token_documents(
    lengths: tuple[int, ...], full: bool
) -> None:
    case = workload(sum(lengths), full=full, documents=len(lengths))
    assert worst(sample(case, cu_seqlens=bounds(*lengths))) < EXACT


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_packed_equals_each_document_by_itself(kernel: str) -> None:
    lengths = (0, 70, 1, 20)
    arguments = sample(workload(sum(lengths), documents=len(lengths)), cu_seqlens=bounds(*lengths))
    y, final = linear_attention(**arguments, kernel=kernel)
    for document, part in enumerate(pairwise(np.cumsum((0, *lengths)))):
        state = arguments["initial_state"][document : document + 1]
        if part[0] < part[1]:
            own = tokens(arguments, slice(*part)) | {"initial_state": state}
            own_y, state = linear_attention(**own, kernel="reference")
            assert close(y[:, slice(*part)], own_y)
        assert close(final[document : document + 1], state)


@pytest.mark.parametrize("m", [1, 63, 64, 65, 100])
def test_splitting_and_passing_the_state_changes_nothing(m: int) -> None:
    arguments = sample(workload(131))
    y, final = linear_attention(**arguments)
    first, state = linear_attention(**tokens(arguments, slice(0, m)))
    second, state = linear_attention(**tokens(arguments, slice(m, None)) | {"initial_state": state})
    assert close(torch.cat([first, second], dim=1), y)
    assert close(state, final)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_token_after_token_equals_the_whole(kernel: str) -> None:
    arguments = sample(workload(20))
    y, final = linear_attention(**arguments)
    state, outputs = arguments["initial_state"], []
    for token in range(20):
        part = tokens(arguments, slice(token, token + 1)) | {"initial_state": state}
        output, state = linear_attention(**part, kernel=kernel)
        outputs.append(output)
    assert close(torch.cat(outputs, dim=1), y)
    assert close(state, final)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("cu_seqlens", [None, bounds(9, 91)], ids=["whole", "packed"])
def test_no_output_depends_on_a_later_token(kernel: str, cu_seqlens: Tensor | None) -> None:
    shape = {} if cu_seqlens is None else {"documents": 2}
    arguments = sample(workload(100, dtype="float32", **shape), cu_seqlens=cu_seqlens)
    before, _ = linear_attention(**arguments, kernel=kernel)
    for name in BY_TOKEN:
        changed = arguments[name].clone()
        changed[:, 73:] = -3.0
        after, _ = linear_attention(**arguments | {name: changed}, kernel=kernel)
        assert torch.equal(before[:, :73], after[:, :73]), name
        assert not torch.equal(before[:, 73:], after[:, 73:]), name


# --- the definition against the forms its users write


def plain(t: int, **options: Any) -> dict[str, Any]:
    """q, k, v (and what else is asked for) of b = 2, h = h_k = 4; no initial state, scale 1."""
    return sample(workload(t, h_k=4, **options), initial_state=None, scale=1.0)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_without_decay_it_is_the_masked_product(kernel: str) -> None:
    """Katharopoulos et al. 2020: Y = tril(Q K^T) V."""
    arguments = plain(70, decay="none", full=False)
    q, k, v = (arguments[name].transpose(1, 2) for name in "qkv")
    assert close(linear_attention(**arguments, kernel=kernel)[0].transpose(1, 2), (q @ k.mT).tril() @ v)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_a_decay_per_head_is_retention(kernel: str) -> None:
    """RetNet, equation 5: Y = (Q K^T o D) V with D_nm = gamma^(n-m), gamma_h = 1 - 2^(-5-h)."""
    arguments = plain(70, decay="head", full=False)
    q, k, v = (arguments[name].transpose(1, 2) for name in "qkv")
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    distance = torch.arange(70)[:, None] - torch.arange(70)
    retained = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0)
    expected = ((q @ k.mT) * retained) @ v
    assert close(linear_attention(**arguments, kernel=kernel)[0].transpose(1, 2), expected)


def segment_sums(a: Tensor) -> Tensor:
    """Sums a_(j+1) + .. + a_i for j <= i, -inf above.  Shapes:  ... t  ->  ... t t"""
    t = a.shape[-1]
    spread = a[..., None].expand(*a.shape, t).masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(-1), 0)
    return spread.cumsum(-2).masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_a_decay_per_token_is_structured_state_space_duality(kernel: str) -> None:
    """Dao and Gu 2024, section 6, all gradients: Y = (exp(segsum(A dt)) o C B^T) (dt X), B and C shared by groups."""
    arguments = sample(workload(70), initial_state=None, diagonal=None, scale=1.0)
    wanted = [arguments[name].requires_grad_() for name in ("q", "k", "v", "log_decay", "write_gate")]
    c, b = (arguments[name].repeat_interleave(2, dim=2).transpose(1, 2) for name in "qk")
    x = (arguments["write_gate"][..., None] * arguments["v"]).transpose(1, 2)
    expected = ((segment_sums(arguments["log_decay"].mT).exp() * (c @ b.mT)) @ x).transpose(1, 2)
    pull = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = linear_attention(**arguments, kernel=kernel)[0]
    assert close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, wanted, pull), torch.autograd.grad(expected, wanted, pull)):
        assert close(mine, theirs)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_the_diagonal_makes_mamba_3_one_call(kernel: str) -> None:
    """Mamba-3's trapezoid  h_t = a_t h_{t-1} + beta_t x_{t-1} k_{t-1}^T + gamma_t x_t k_t^T,  y_t = h_t q_t:

    a key is written with s_t = gamma_t + beta_{t+1} / a_{t+1}, and read at its own token with gamma_t alone.
    """
    arguments = plain(70, full=False)
    generator = torch.Generator().manual_seed(2)
    step, share = (torch.rand(2, 70, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    decay = arguments["log_decay"].exp()
    beta, gamma = (1 - share) * step * decay, share * step
    q, k, v = (arguments[name] for name in "qkv")
    state, outputs = q.new_zeros(2, 4, 3, 5), []
    for t in range(70):
        state = decay[:, t, :, None, None] * state
        if t:
            state = state + einsum("bh,bhn,bhp->bhnp", beta[:, t], k[:, t - 1], v[:, t - 1])
        state = state + einsum("bh,bhn,bhp->bhnp", gamma[:, t], k[:, t], v[:, t])
        outputs.append(einsum("bhn,bhnp->bhp", q[:, t], state))
    due = torch.cat([(beta / decay)[:, 1:], q.new_zeros(2, 1, 4)], dim=1)
    found, final = linear_attention(**arguments | {"write_gate": gamma + due, "diagonal": gamma}, kernel=kernel)
    assert close(found, torch.stack(outputs, dim=1))
    assert close(final, state)


def test_a_diagonal_of_zero_reads_the_state_before_the_token() -> None:
    arguments = plain(20, decay="none", full=False)
    q, k, v = (arguments[name].transpose(1, 2) for name in "qkv")
    found, _ = linear_attention(**arguments | {"diagonal": torch.zeros(2, 20, 4, dtype=torch.float64)})
    assert close(found.transpose(1, 2), (q @ k.mT).tril(-1) @ v)


def test_heads_in_a_group_share_queries_and_keys() -> None:
    arguments = sample(workload(70))
    spread = {name: arguments[name].repeat_interleave(2, dim=2) for name in ("q", "k")}
    assert close(linear_attention(**arguments)[0], linear_attention(**arguments | spread)[0])


def test_the_normalizer_is_the_sum_of_the_weights() -> None:
    """With it, equal values are returned as they are, whatever the weights (Katharopoulos et al. 2020, equation 9)."""
    arguments = sample(workload(70), initial_state=None)
    arguments |= {"q": arguments["q"].exp(), "k": arguments["k"].exp(), "v": torch.full_like(arguments["v"], 7.0)}
    shared = {name: value for name, value in arguments.items() if name != "v"}
    denominator, final = linear_attention_normalizer(**shared)
    assert close(linear_attention(**arguments)[0] / denominator[..., None], arguments["v"])
    assert final.shape == (2, 4, 3, 1)
    resumed = {name: value for name, value in tokens(arguments, slice(40, None)).items() if name != "v"}
    start = {name: value for name, value in tokens(arguments, slice(0, 40)).items() if name != "v"}
    state = linear_attention_normalizer(**start)[1]
    assert close(linear_attention_normalizer(**resumed | {"initial_state": state})[0], denominator[:, 40:])


def test_the_normalizer_has_the_heads_of_the_gates_or_of_the_keys() -> None:
    arguments = sample(workload(9))
    q, k = arguments["q"], arguments["k"]
    assert linear_attention_normalizer(q, k)[0].shape == (2, 9, 2)
    assert linear_attention_normalizer(q, k, write_gate=arguments["write_gate"])[0].shape == (2, 9, 4)


# --- numbers at the edges


@pytest.mark.parametrize("rate", [-1e-8, -0.7, -40.0, -1e6, -torch.inf], ids=str)
def test_extreme_decays_neither_overflow_nor_lose_gradients(rate: float) -> None:
    arguments = sample(workload(100, dtype="float32"))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
    assert within(arguments, "float32")


def test_a_token_that_forgets_everything_leaves_its_neighbours_their_precision() -> None:
    """The sum of log decays over a chunk must not carry the digits of one huge decay into the tokens after it."""
    arguments = sample(workload(64, dtype="float32", full=False))
    arguments["log_decay"][:, 7] = -1e6
    assert within(arguments, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_inputs_are_computed_in_fp32(dtype: str) -> None:
    arguments = sample(workload(100, dtype=dtype))
    assert within(arguments, dtype)
    y, final = linear_attention(**arguments)
    assert (y.dtype, final.dtype) == (getattr(torch, dtype), torch.float32)


def test_the_reference_passes_gradcheck_with_initial_and_final_states() -> None:
    arguments = sample(workload(4, b=1, h=2, h_k=1, n=2, p=2))
    names = [name for name in NAMES if name != "cu_seqlens"]

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(**dict(zip(names, tensors)), kernel="reference")

    assert torch.autograd.gradcheck(attend, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("cu_seqlens", [None, bounds(3, 0, 1, 64)], ids=["whole", "packed"])
def test_the_chunked_op_passes_gradcheck_across_a_chunk_boundary(cu_seqlens: Tensor | None) -> None:
    shape = {"b": 1} if cu_seqlens is None else {"documents": 4}
    arguments = sample(workload(68, h=2, h_k=1, n=2, p=1, **shape), cu_seqlens=cu_seqlens)
    names = [name for name in NAMES if name != "cu_seqlens"]

    def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(**dict(zip(names, tensors)), cu_seqlens=cu_seqlens)

    inputs = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_a_loss_on_the_final_state_alone_reaches_the_inputs() -> None:
    arguments = sample(workload(70))
    for name in ("k", "log_decay", "initial_state"):
        arguments[name].requires_grad_()
    linear_attention(**arguments)[1].sum().backward()
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
        ("k", lambda k: k[:, :-1], "k is .* not b t h_k n"),
        ("q", lambda q: q[:, :, :1].expand(-1, -1, 3, -1), "4 heads, not a multiple of the 3"),
        ("v", lambda v: v[:, :, :3], "3 heads, not a multiple of the 2"),
        ("v", lambda v: v[..., 0], "v 3, not 4"),
        ("v", lambda v: v[:, :0], "t >= 1"),
        ("v", lambda v: v.float(), "must have one type"),
        ("log_decay", lambda g: g[0], "log_decay is .* not b t h"),
        ("log_decay", lambda g: g[0, 0, :3], "log_decay is .* not h"),
        ("diagonal", lambda d: d[..., :1], "diagonal is .* not b t h"),
        ("initial_state", lambda s: s.transpose(2, 3), "initial_state is .* not states h n p"),
        ("cu_seqlens", lambda _: bounds(20), "batch 1, not 2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, change: Any, message: str) -> None:
    arguments = sample(workload(20))
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments | {name: change(arguments[name])})


# --- what the declaration promises


def moved_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("decay", ["token", "head", "none"])
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_the_sizes_of_the_tensors(dtype: str, decay: str, packed: bool) -> None:
    case = workload(600, dtype=dtype, decay=decay, full=packed, **({"documents": 3} if packed else {}))
    arguments = sample(case)
    assert definition.workload_of(arguments, "forward") == case
    results = chunked.forward(**arguments)
    assert results[2].shape[0] > 0
    inputs = [arguments[name] for name in NAMES]
    found = declaration.work(case)
    assert found.bytes_moved == moved_bytes(*inputs, *results)
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


def test_arithmetic_is_linear_in_tokens_and_the_state_does_not_grow() -> None:
    """64 (n + p) within a chunk and 4 n p between, per token and head; the backward takes 3 and 2.5 times that."""
    case = workload(1024, dtype="bfloat16", full=False, h=8, n=64, p=64)
    base, larger = declaration.work(case), declaration.work(replace(case, shape={**case.shape, "t": 4096}))
    assert base.matmul_flops == 2 * 1024 * 8 * (64 * 128 + 4 * 64 * 64)
    assert larger.flops == 4 * base.flops
    assert (base.serial_steps, larger.serial_steps) == (16, 64)
    backward = declaration.work(replace(case, phase="backward"))
    assert backward.matmul_flops == 2 * 1024 * 8 * (3 * 64 * 128 + 10 * 64 * 64)


def test_segments_are_long_where_programs_are_many() -> None:
    assert declaration.segment_len(4, 8192, 16, 128, 128) == 1024
    assert declaration.segment_len(1, 2048, 16, 64, 64) == 256
    assert declaration.segments(1, 2048, 16, 0, 64, 64) == 8
    assert declaration.segments(1, 1, 16, 0, 64, 64) == 1
    assert declaration.segments(1, 100, 2, 5, 64, 64) == 2  # at most 1 + 5 chunks, four a segment


def test_segments_of_states_of_several_tiles_are_longer() -> None:
    """Each tile has programs of its own, and a state between segments is as much larger."""
    assert declaration.segment_len(4, 8192, 4, 256, 512) == 2048
    assert declaration.segment_len(1, 8192, 4, 256, 512) == 512
