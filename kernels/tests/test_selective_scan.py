"""The selective scan: kernels against the definition, the definition against independent oracles, and its promises."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.operators import selective_scan
from subquad_kernels.selective_scan import chunked, declaration, definition
from subquad_kernels.selective_scan.lanes import Lanes
from subquad_kernels.selective_scan.operator import OP
from subquad_kernels.workload import Option, Workload

LENGTHS = [1, 2, 7, 33, 100]
NAMES = declaration.OPERATOR.tensors
# b c n are small; the errors below are maxima over entries, relative to the largest entry of the reference.
EXACT = 1e-9
SINGLE = declaration.OPERATOR.tolerances["float32"]


def workload(t: int, *, dtype: str = "float64", full: bool = True, softplus: bool = True, **shape: int) -> Workload:
    """b = 2 (1 when packed), c = 5, n = 3 unless told; `full` gives every optional tensor."""
    axes = {"b": 1 if "documents" in shape else 2, "t": t, "c": 5, "n": 3} | shape
    options: dict[str, Option] = dict.fromkeys(("skip", "gate", "dt_bias", "initial_state"), full)
    return Workload(
        operator="selective_scan", shape=axes, dtype=dtype, options={"softplus": softplus} | options  # type: ignore[arg-type]
    )  # fmt: skip


def sample(case: Workload, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return definition.sample_inputs(case, seed=seed, device="cpu") | changes


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def distance(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max( max |expected|, 1e-6 )"""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max() / max(float(expected.abs().max()), 1e-6))


def differences(arguments: dict[str, Any], kernel: Any = chunked) -> tuple[float, float]:
    """The largest error of outputs and residuals, and of gradients, against the reference in float64."""
    exact = in_double(arguments)
    expected, found = definition.REFERENCE.forward(**exact), kernel.forward(**arguments)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in expected[:2]]
    pulls[0] = pulls[0].to(found[0].dtype).double()  # y's gradient arrives in y's type
    wanted = definition.REFERENCE.backward(exact, expected, tuple(pulls))
    got = kernel.backward(arguments, found, tuple(p.to(out.dtype) for p, out in zip(pulls, found)))
    errors = [distance(got[name], grad) for name, grad in wanted.items() if grad is not None]
    assert len(errors) == sum(isinstance(arguments[name], Tensor) for name in NAMES if name != "cu_seqlens")
    return max(distance(a, b) for a, b in zip(found, expected)), max(errors)


def loop_in_numpy(arguments: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """y and final state of one unpacked sequence, one scalar at a time, from the equations of the operator's page."""
    a = {name: value.double().numpy() for name, value in arguments.items() if isinstance(value, Tensor)}
    batch, length, channels = a["x"].shape
    y = np.zeros((batch, length, channels))
    h = a["initial_state"].copy()
    for i in range(batch):
        for t in range(length):
            for c in range(channels):
                step = np.log1p(np.exp(a["dt"][i, t, c] + a["dt_bias"][c]))
                total = a["D"][c] * a["x"][i, t, c]
                for n in range(h.shape[2]):
                    h[i, c, n] = np.exp(step * a["A"][c, n]) * h[i, c, n] + step * a["B"][i, t, n] * a["x"][i, t, c]
                    total += a["C"][i, t, n] * h[i, c, n]
                gate = a["z"][i, t, c]
                y[i, t, c] = total * gate / (1 + np.exp(-gate))
    return y, h


@pytest.mark.parametrize("kernel", [definition.REFERENCE, chunked], ids=["reference", "chunked"])
def test_every_kernel_equals_a_scalar_loop_in_numpy(kernel: Any) -> None:
    arguments = sample(workload(21))
    y, final, *_ = kernel.forward(**arguments)
    expected_y, expected_final = loop_in_numpy(arguments)
    assert distance(y, torch.from_numpy(expected_y)) < 1e-12
    assert distance(final, torch.from_numpy(expected_final)) < 1e-12


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_constant_step_and_maps_are_a_convolution_as_in_s4(kernel: str) -> None:
    """y = x * K,  K_j[c] = sum_n C_n exp(j dt_c A[c,n]) dt_c B_n."""
    t, c, n = 40, 4, 3
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, t, c, generator=draw, dtype=torch.float64)
    step = torch.rand(c, generator=draw, dtype=torch.float64) * 0.2
    A = -torch.rand(c, n, generator=draw, dtype=torch.float64) * 3
    B, C = torch.randn(2, n, generator=draw, dtype=torch.float64)
    age = torch.arange(t, dtype=torch.float64)[:, None, None]
    filters = torch.einsum("n,jcn,c,n->jc", C, (age * step[:, None] * A).exp(), step, B)
    expected = torch.stack([(x[:, : i + 1] * filters[: i + 1].flip(0)).sum(1) for i in range(t)], dim=1)
    y, _ = selective_scan(
        x, step.expand(2, t, c), A, B.expand(2, t, n), C.expand(2, t, n), softplus=False, kernel=kernel
    )
    assert distance(y, expected) < 1e-12


@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize("t", LENGTHS)
def test_chunked_equals_the_reference_with_every_gradient(t: int, full: bool) -> None:
    assert max(differences(sample(workload(t, full=full)))) < EXACT
    output, gradient = differences(sample(workload(t, full=full, dtype="float32")))
    assert output < SINGLE.output
    assert gradient < SINGLE.gradient


@pytest.mark.parametrize("softplus", [True, False])
def test_step_sizes_may_come_with_or_without_softplus(softplus: bool) -> None:
    assert max(differences(sample(workload(19, softplus=softplus)))) < EXACT


def test_one_state_per_channel_is_enough() -> None:
    assert max(differences(sample(workload(33, n=1)))) < EXACT


@pytest.mark.parametrize(
    "lengths",
    [(33,), (0, 5, 1, 0, 1, 20, 6, 0), (16, 16, 1), (48, 48), (1,) * 20, (20, 12, 0, 32, 15, 1, 16), (0, 0, 1)],
    ids=str,
)
@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
def test_packed_chunked_equals_the_reference_with_empty_and_single_token_documents(
    lengths: tuple[int, ...], full: bool
) -> None:
    case = workload(sum(lengths), full=full, documents=len(lengths))
    assert max(differences(sample(case, cu_seqlens=bounds(*lengths)))) < EXACT


@pytest.mark.parametrize("lengths", [(0, 5, 1, 20, 6), (32, 32), (16, 16, 5, 11)], ids=str)
def test_packed_equals_each_document_by_itself(lengths: tuple[int, ...]) -> None:
    arguments = sample(workload(sum(lengths), documents=len(lengths)), cu_seqlens=bounds(*lengths))
    y, final = selective_scan(**arguments)
    for document, (start, stop) in enumerate(zip(np.cumsum((0, *lengths)), np.cumsum(lengths))):
        state = arguments["initial_state"][document : document + 1]
        if start < stop:
            alone = {
                name: value[:, start:stop] if name in ("x", "dt", "B", "C", "z") else value
                for name, value in arguments.items()
            }
            own_y, state = selective_scan(**alone | {"initial_state": state, "cu_seqlens": None}, kernel="reference")
            assert distance(y[:, start:stop], own_y) < EXACT
        assert distance(final[document : document + 1], state) < EXACT


def test_rows_laid_end_to_end_are_scanned_side_by_side() -> None:
    """What makes packed training as fast as unpacked; a cut inside a document would be wrong, not slow."""
    assert Lanes.of(1, 96, bounds(32, 32, 32)).count == 3
    assert Lanes.of(1, 96, bounds(16, 16, 32, 0, 32)).count == 3
    assert Lanes.of(1, 96, bounds(33, 31, 32)).count == 1
    assert Lanes.of(1, 90, bounds(30, 30, 30)).count == 1


def by_hand(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y and final state of a reversed scan, each document turned, scanned forward by the definition, turned back."""
    t, cu_seqlens = arguments["x"].shape[1], arguments["cu_seqlens"]
    edges = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for document, (start, stop) in enumerate(itertools.pairwise(edges)):
        state = arguments["initial_state"]
        if state is None:
            state = arguments["x"].new_zeros(arguments["x"].shape[0], *arguments["A"].shape)
        elif cu_seqlens is not None:
            state = state[document : document + 1]
        if start < stop:
            alone = {
                name: value[:, start:stop].flip(1)
                if value is not None and name in ("x", "dt", "B", "C", "z")
                else value
                for name, value in arguments.items()
            }
            alone |= {"initial_state": state, "cu_seqlens": None, "reversed": False}
            y, state, *_ = definition.reference(**alone)
            outputs.append(y.flip(1))
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states)


REVERSALS = [None, (0, 5, 1, 0, 1, 20, 6, 0), (16, 16, 1), (48, 48), (0, 0, 3)]


@pytest.mark.parametrize("lengths", REVERSALS, ids=str)
@pytest.mark.parametrize("full", [True, False], ids=["all tensors", "required tensors"])
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_reversed_equals_turning_every_document_by_hand_with_every_gradient(
    kernel: str, full: bool, lengths: tuple[int, ...] | None
) -> None:
    case = workload(37, full=full) if lengths is None else workload(sum(lengths), full=full, documents=len(lengths))
    changes = {"reversed": True} | ({} if lengths is None else {"cu_seqlens": bounds(*lengths)})
    arguments = sample(case, **changes)
    given = [name for name in NAMES if name != "cu_seqlens" and arguments[name] is not None]
    for name in given:
        arguments[name].requires_grad_()
    wanted = by_hand(arguments)
    found = selective_scan(**arguments, kernel=kernel)
    generator = torch.Generator().manual_seed(3)
    pulls = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in wanted]
    leaves = [arguments[name] for name in given]
    wanted_gradients = torch.autograd.grad(wanted, leaves, pulls)
    found_gradients = torch.autograd.grad(found, leaves, pulls)
    for mine, theirs in zip((*found, *found_gradients), (*wanted, *wanted_gradients), strict=True):
        assert distance(mine.detach(), theirs.detach()) < EXACT


@pytest.mark.parametrize("lengths", REVERSALS[:3], ids=str)
def test_a_reversed_chunked_scan_keeps_what_the_reference_keeps(lengths: tuple[int, ...] | None) -> None:
    """Residuals too: another kernel may run the backward."""
    case = workload(37) if lengths is None else workload(sum(lengths), documents=len(lengths))
    changes = {"reversed": True} | ({} if lengths is None else {"cu_seqlens": bounds(*lengths)})
    assert max(differences(sample(case, **changes))) < EXACT


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_no_output_of_a_reversed_scan_depends_on_an_earlier_token(kernel: str) -> None:
    arguments = sample(workload(20, dtype="float32"), reversed=True)
    before, _ = selective_scan(**arguments, kernel=kernel)
    for name in ("x", "dt", "B", "C", "z"):
        changed = arguments[name].clone()
        changed[:, :13] = 7.0
        after, _ = selective_scan(**arguments | {name: changed}, kernel=kernel)
        assert torch.equal(before[:, 13:], after[:, 13:]), name
        assert not torch.equal(before[:, :13], after[:, :13]), name


def test_a_reversed_scan_names_itself_in_its_workload() -> None:
    case = workload(9)
    turned = replace(case, options=case.options | {"reversed": True})
    assert definition.workload_of(sample(turned), "forward") == turned
    assert "reversed" not in definition.workload_of(sample(case), "forward").options


@pytest.mark.parametrize("m", range(1, 40))
def test_splitting_anywhere_and_passing_the_state_changes_nothing(m: int) -> None:
    arguments = sample(workload(40))
    y, final = selective_scan(**arguments)

    def part(tokens: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        inputs = {name: arguments[name][:, tokens] for name in ("x", "dt", "B", "C", "z")}
        return selective_scan(**arguments | inputs | {"initial_state": state})

    first, state = part(slice(0, m), arguments["initial_state"])
    second, state = part(slice(m, 40), state)
    assert distance(torch.cat([first, second], dim=1), y) < EXACT
    assert distance(state, final) < EXACT


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("cu_seqlens", [None, bounds(9, 11)], ids=["whole", "packed"])
def test_no_output_depends_on_a_later_token(kernel: str, cu_seqlens: Tensor | None) -> None:
    shape = {} if cu_seqlens is None else {"documents": 2}
    arguments = sample(workload(20, dtype="float32", **shape), cu_seqlens=cu_seqlens)
    before, _ = selective_scan(**arguments, kernel=kernel)
    for name in ("x", "dt", "B", "C", "z"):
        changed = arguments[name].clone()
        changed[:, 13:] = 7.0
        after, _ = selective_scan(**arguments | {name: changed}, kernel=kernel)
        assert torch.equal(before[:, :13], after[:, :13]), name
        assert not torch.equal(before[:, 13:], after[:, 13:]), name


def test_without_writes_only_the_skip_remains() -> None:
    arguments = sample(workload(20), initial_state=None, z=None)
    arguments["B"] = torch.zeros_like(arguments["B"])
    y, final = selective_scan(**arguments)
    assert torch.equal(y, arguments["D"] * arguments["x"])
    assert not final.any()


def with_small_steps(arguments: dict[str, Any]) -> dict[str, Any]:
    """Steps of a third at most: samples have decays that are 0 even in float64, and forget what is asked for here."""
    return arguments | {"dt_bias": arguments["dt_bias"].clamp(max=-1.0)}


def test_a_state_that_is_not_written_only_decays() -> None:
    arguments = with_small_steps(sample(workload(30)))
    arguments["B"] = torch.zeros_like(arguments["B"])
    sizes = [arguments["initial_state"].abs()]
    for t in range(30):
        inputs = {name: arguments[name][:, t : t + 1] for name in ("x", "dt", "B", "C", "z")}
        _, arguments["initial_state"] = selective_scan(**arguments | inputs)
        sizes.append(arguments["initial_state"].abs())
    assert all((later < earlier).all() for earlier, later in itertools.pairwise(sizes))


@pytest.mark.parametrize("step", [1e-8, 1.0, 60.0], ids=["decay near 1", "decay 0.4 and less", "decay underflows"])
def test_extreme_decays_neither_overflow_nor_lose_gradients(step: float) -> None:
    arguments = sample(workload(40, dtype="float32", softplus=False), dt_bias=None)
    arguments["dt"] = torch.full_like(arguments["dt"], step)
    output, gradient = differences(arguments)
    assert output < SINGLE.output
    assert gradient < SINGLE.gradient


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype: str) -> None:
    """Everything inside is fp32, so the error is that of rounding y and the gradients: half a unit in the last place,
    2^-9 and 2^-12 of the value, within the declared tolerance."""
    tolerance = declaration.OPERATOR.tolerances[dtype]
    arguments = sample(workload(33, dtype=dtype))
    output, gradient = differences(arguments)
    assert output < tolerance.output
    assert gradient < tolerance.gradient
    y, final = selective_scan(**arguments)
    assert (y.dtype, final.dtype) == (getattr(torch, dtype), torch.float32)


def test_the_reference_passes_gradcheck_with_initial_and_final_states() -> None:
    arguments = sample(workload(5, c=2, n=2))
    names = [name for name in NAMES if name != "cu_seqlens"]

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(names, tensors)), kernel="reference")

    assert torch.autograd.gradcheck(scan, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("cu_seqlens", [None, bounds(3, 0, 1, 15)], ids=["whole", "packed"])
def test_the_chunked_op_passes_gradcheck_across_a_chunk_boundary(cu_seqlens: Tensor | None) -> None:
    shape = {"b": 1} if cu_seqlens is None else {"documents": 4}
    arguments = sample(workload(19, c=2, n=2, **shape), cu_seqlens=cu_seqlens)
    names = [name for name in NAMES if name != "cu_seqlens"]

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(names, tensors)), cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(scan, [arguments[name].requires_grad_() for name in names])


def test_a_loss_on_the_final_state_alone_reaches_the_inputs() -> None:
    arguments = with_small_steps(sample(workload(20)))
    for name in ("x", "initial_state"):
        arguments[name].requires_grad_()
    selective_scan(**arguments)[1].sum().backward()
    assert (arguments["x"].grad != 0).all()
    assert (arguments["initial_state"].grad != 0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_the_op_keeps_the_rules_of_torch_library(packed: bool) -> None:
    case = workload(20, documents=3) if packed else workload(20)
    arguments = sample(case, cu_seqlens=bounds(7, 0, 13) if packed else None)
    for name in NAMES:
        if name != "cu_seqlens":
            arguments[name].requires_grad_()
    torch.library.opcheck(OP, (*arguments.values(), "chunked"))


def test_a_perturbed_kernel_is_caught() -> None:
    """The comparison of this file can fail, for outputs and for one gradient alone."""

    class LosesHistory:
        backward = staticmethod(chunked.backward)

        @staticmethod
        def forward(**arguments: Any) -> tuple[Tensor, ...]:
            y, *rest = chunked.forward(**arguments)
            return y + 1e-6, *rest

    class ForgetsRates:
        forward = staticmethod(chunked.forward)

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            found = chunked.backward(*values)
            assert found["A"] is not None
            return found | {"A": found["A"] * (1 + 1e-6)}

    arguments = sample(workload(20))
    assert differences(arguments, LosesHistory)[0] > EXACT
    assert differences(arguments, ForgetsRates)[1] > EXACT


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dt", lambda dt: dt[:, :-1], "dt is .* not b t c"),
        ("A", lambda A: A[:-1], "A is .* not c n"),
        ("B", lambda B: B[..., :-1], "B is .* not b t n"),
        ("initial_state", lambda h: h.transpose(1, 2), "initial_state is .* not q c n"),
        ("x", lambda x: x[:, :0], "t >= 1"),
        ("cu_seqlens", lambda _: bounds(20), "batch 1, not 2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, change: Any, message: str) -> None:
    arguments = sample(workload(20))
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments | {name: change(arguments[name])})


def moved_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_the_sizes_of_the_tensors(dtype: str, full: bool, packed: bool) -> None:
    case = workload(40, dtype=dtype, full=full, **({"documents": 3} if packed else {}))
    arguments = sample(case)
    assert definition.workload_of(arguments, "forward") == case
    results = chunked.forward(**arguments)
    inputs = [arguments[name] for name in NAMES]
    found = declaration.work(case)
    assert found.bytes_moved == found.saved_bytes == moved_bytes(*inputs, *results)
    # Backward: inputs, residuals and gradients of outputs in; gradients of floating inputs out.
    grads = [tensor for tensor in inputs if tensor is not None and tensor.is_floating_point()]
    assert declaration.work(replace(case, phase="backward")).bytes_moved == moved_bytes(*inputs, *results, *grads)
    assert declaration.work(replace(case, phase="decode")).saved_bytes == 0


def test_the_fake_promises_what_every_kernel_returns() -> None:
    for case in (workload(33), workload(16, full=False), workload(1), workload(33, documents=4)):
        arguments = sample(case)
        for kernel in (definition.REFERENCE, chunked):
            results = kernel.forward(**arguments)
            for promised, result in zip(definition.empty_outputs(arguments), results, strict=True):
                assert (promised.shape, promised.dtype) == (result.shape, result.dtype)


def test_arithmetic_is_linear_in_tokens_channels_and_states() -> None:
    """6 b t c n is what the loop does: two for the decay and its exponent's product, two to write, two to read."""
    base = declaration.work(workload(64, full=False, softplus=False, c=8, n=4))
    assert base.vector_flops == 2 * 64 * 8 * (6 * 4 + 1)
    assert base.transcendental_ops == 2 * 64 * 8 * 4
    assert base.serial_steps == 64
    for axis, before, after in (("t", 64, 128), ("c", 8, 16)):
        larger = declaration.work(workload(**{"t": 64, "c": 8, "n": 4} | {axis: after}, full=False, softplus=False))
        assert larger.flops * before == base.flops * after, axis
    assert declaration.work(workload(64, documents=4)).serial_steps == 16
