"""The delta rule: kernels against the definition, the definition against independent oracles, and its promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import subquad_kernels.builtin  # noqa: F401  (fills the catalogue)
from subquad_kernels.delta_rule import chunked, declaration, definition
from subquad_kernels.delta_rule.operator import OP
from subquad_kernels.operators import delta_rule
from subquad_kernels.workload import Workload

CHUNK = declaration.CHUNK
NAMES = declaration.OPERATOR.tensors
EXACT = 1e-10
MODES = [
    pytest.param(dict(decay=decay, low_rank=free), id=f"{decay} decay{', remove and insert' if free else ''}")
    for free in (False, True)
    for decay in ("none", "scalar", "vector")
]


def workload(
    t: int, *, dtype: str = "float64", decay: str = "scalar", low_rank: bool = False, full: bool = True, **shape: int
) -> Workload:
    """b = 2 (1 when packed), h = 2, h_k = 1, n = 5, p = 3 unless told; `full` gives gate and initial state."""
    axes = {"b": 1 if "documents" in shape else 2, "t": t, "h": 2, "h_k": 1, "n": 5, "p": 3} | shape
    options = {"decay": decay, "write_gate": full, "low_rank": low_rank, "initial_state": full}
    return Workload(operator="delta_rule", shape=axes, dtype=dtype, options=options)  # type: ignore[arg-type]


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
    """max |found - expected| / max( max |expected|, 1e-2 )"""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found.detach().double() - expected.detach().double()).abs().max()) / max(
        float(expected.detach().abs().max()), 1e-2
    )


def differences(arguments: dict[str, Any], kernel: Any = chunked) -> tuple[float, float]:
    """The largest error of outputs and residuals, and of gradients, against the reference in float64."""
    exact = in_double(arguments)
    expected, found = definition.REFERENCE.forward(**exact), kernel.forward(**arguments)
    generator = torch.Generator().manual_seed(1)
    pulls = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in expected[:2]]
    pulls[0] = pulls[0].to(found[0].dtype).double()  # y's gradient arrives in y's type
    wanted = definition.REFERENCE.backward(exact, expected, tuple(pulls))
    got = kernel.backward(arguments, found, tuple(pull.to(out.dtype) for pull, out in zip(pulls, found)))
    errors = [distance(got[name], gradient) for name, gradient in wanted.items() if gradient is not None]
    assert len(errors) == sum(isinstance(arguments[name], Tensor) for name in NAMES if name != "cu_seqlens")
    return max(distance(a, b) for a, b in zip(found, expected)), max(errors)


def loop_in_numpy(a: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """y and final state by matrices:  S_t = M_t S_{t-1} + beta_t k_t v_t^T,  y_t = scale S_t^T q_t.

    M_t = (I - beta_t k_t k_t^T) Diag(exp g_t), or Diag(exp g_t) + insert_t remove_t^T.
    """
    given = {name: value.double().numpy() for name, value in a.items() if isinstance(value, Tensor)}
    b, t, h, p = given["v"].shape
    n = given["k"].shape[3]
    y, final = np.zeros((b, t, h, p)), np.zeros((b, h, n, p))
    for i in range(b):
        for head in range(h):
            state = given["initial_state"][i, head]
            for j in range(t):
                key, value = given["k"][i, j, head // (h // given["k"].shape[2])], given["v"][i, j, head]
                beta = given["write_gate"][i, j, head]
                decay = np.exp(given["log_decay"][i, j, head]) * np.ones(n) if "log_decay" in given else np.ones(n)
                if "remove" in given:
                    transition = np.diag(decay) + np.outer(given["insert"][i, j, head], given["remove"][i, j, head])
                else:
                    transition = (np.eye(n) - beta * np.outer(key, key)) @ np.diag(decay)
                state = transition @ state + beta * np.outer(key, value)
                y[i, j, head] = a["scale"] * state.T @ given["q"][i, j, head // (h // given["q"].shape[2])]
            final[i, head] = state
    return y, final


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [definition.REFERENCE, chunked], ids=["reference", "chunked"])
def test_every_kernel_equals_products_of_transition_matrices_in_numpy(kernel: Any, mode: dict[str, Any]) -> None:
    arguments = sample(workload(70, h_k=2, **mode))
    y, final, *_ = kernel.forward(**arguments)
    expected_y, expected_final = loop_in_numpy(arguments)
    assert distance(y, torch.from_numpy(expected_y)) < 1e-12
    assert distance(final, torch.from_numpy(expected_final)) < 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("t", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 131])
def test_chunked_equals_the_reference_with_every_gradient(t: int, mode: dict[str, Any]) -> None:
    for full in (True, False):
        assert max(differences(sample(workload(t, full=full, **mode)))) < EXACT
    tolerance = declaration.OPERATOR.tolerances["float32"]
    output, gradient = differences(sample(workload(t, dtype="float32", **mode)))
    assert output < tolerance.output
    assert gradient < tolerance.gradient


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [(67,), (0, 5, 1, 0, 1, 66, 6, 0), (64, 64, 1), (1,) * 5, (0, 0, 130)], ids=str)
def test_packed_chunked_equals_the_reference_with_empty_and_single_token_documents(
    lengths: tuple[int, ...], mode: dict[str, Any]
) -> None:
    arguments = sample(workload(sum(lengths), documents=len(lengths), **mode), cu_seqlens=bounds(*lengths))
    assert max(differences(arguments)) < EXACT


@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_each_document_by_itself(mode: dict[str, Any]) -> None:
    lengths = (0, 5, 1, 80, 6)
    arguments = sample(workload(sum(lengths), documents=len(lengths), **mode), cu_seqlens=bounds(*lengths))
    y, final = delta_rule(**arguments)
    for document, (start, stop) in enumerate(zip(np.cumsum((0, *lengths)), np.cumsum(lengths))):
        state = arguments["initial_state"][document : document + 1]
        if start < stop:
            alone = {
                name: value[:, start:stop] if isinstance(value, Tensor) else value
                for name, value in (arguments | {"initial_state": None, "cu_seqlens": None}).items()
            }
            own_y, state = delta_rule(**alone | {"initial_state": state}, kernel="reference")
            assert distance(y[:, start:stop], own_y) < EXACT
        assert distance(final[document : document + 1], state) < EXACT


@pytest.mark.parametrize("m", [1, CHUNK - 1, CHUNK, CHUNK + 1, 97])
def test_splitting_anywhere_and_passing_the_state_changes_nothing(m: int) -> None:
    arguments = sample(workload(140))
    y, final = delta_rule(**arguments)

    def part(tokens: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        inputs = {name: arguments[name][:, tokens] for name in ("q", "k", "v", "log_decay", "write_gate")}
        return delta_rule(**arguments | inputs | {"initial_state": state})

    first, state = part(slice(0, m), arguments["initial_state"])
    second, state = part(slice(m, 140), state)
    assert distance(torch.cat([first, second], dim=1), y) < EXACT
    assert distance(state, final) < EXACT


def test_token_by_token_equals_the_whole() -> None:
    arguments = sample(workload(70))
    y, final = delta_rule(**arguments)
    state, found = arguments["initial_state"], []
    for token in range(70):
        inputs = {name: arguments[name][:, token : token + 1] for name in ("q", "k", "v", "log_decay", "write_gate")}
        out, state = delta_rule(**arguments | inputs | {"initial_state": state})
        found.append(out)
    assert distance(torch.cat(found, dim=1), y) < EXACT
    assert distance(state, final) < EXACT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_no_output_depends_on_a_later_token(kernel: str, mode: dict[str, Any]) -> None:
    arguments = sample(workload(40, dtype="float32", **mode))
    before, _ = delta_rule(**arguments, kernel=kernel)
    for name in ("q", "k", "v", "log_decay", "write_gate", "remove", "insert"):
        if arguments[name] is None:
            continue
        changed = arguments[name].clone()
        changed[:, 23:] = -0.3
        after, _ = delta_rule(**arguments | {name: changed}, kernel=kernel)
        assert torch.equal(before[:, :23], after[:, :23]), name
        assert not torch.equal(before[:, 23:], after[:, 23:]), name


@pytest.mark.parametrize("size", [1, 16, 31, 128])
@pytest.mark.parametrize("mode", MODES)
def test_the_chunk_length_changes_nothing(size: int, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = sample(workload(140, **mode))
    expected = chunked.forward(**arguments)
    monkeypatch.setattr(chunked, "_step", lambda values: size)
    found = chunked.forward(**arguments)
    assert max(distance(a, b) for a, b in zip(found, expected)) < EXACT


def orthonormal(*, b: int = 1, t: int = 4, p: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    keys, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    return keys[:t].expand(b, t, 8).unsqueeze(2), torch.randn(b, t, 1, p, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_orthonormal_keys_recall_exactly_and_a_second_write_replaces_the_first(kernel: str) -> None:
    k, v = orthonormal()
    _, state = delta_rule(k, k, v, kernel=kernel)
    recalled = torch.einsum("bhnp,bthn->bthp", state, k)
    assert distance(recalled, v) < 1e-12
    y, after = delta_rule(k, k, 2 * v, initial_state=state, scale=1.0, kernel=kernel)
    assert distance(y, 2 * v) < 1e-12
    assert distance(after, 2 * state) < 1e-12


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_a_gate_of_two_mirrors_the_state_and_two_mirrors_are_none(kernel: str) -> None:
    """beta = 2 and v = 0: I - 2 k k^T, whose eigenvalue along k is -1."""
    k, _ = orthonormal(t=1)
    state = k[0, 0, 0].outer(torch.ones(3, dtype=torch.float64))[None, None]
    v, gate = torch.zeros(1, 1, 1, 3, dtype=torch.float64), torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    _, once = delta_rule(k, k, v, write_gate=gate, initial_state=state, kernel=kernel)
    assert distance(once, -state) < 1e-12
    twice = [tensor.repeat_interleave(2, dim=1) for tensor in (k, k, v)]
    _, final = delta_rule(*twice, write_gate=gate.repeat(1, 2, 1), initial_state=state, kernel=kernel)
    assert distance(final, state) < 1e-12


def test_a_closed_gate_only_decays() -> None:
    arguments = sample(workload(100))
    arguments["write_gate"] = torch.zeros_like(arguments["write_gate"])
    _, final = delta_rule(**arguments)
    kept = arguments["log_decay"].sum(1).exp()[..., None, None]
    assert distance(final, kept * arguments["initial_state"]) < EXACT


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_the_delta_rule_is_a_case_of_remove_and_insert(kernel: str, decay: str) -> None:
    """remove = -exp(g) k, insert = beta k."""
    arguments = sample(workload(100, h_k=2, decay=decay))
    g = arguments["log_decay"]
    kept = 1.0 if g is None else (g.unsqueeze(-1) if g.dim() == 3 else g).exp()
    free = {"remove": -kept * arguments["k"], "insert": arguments["write_gate"][..., None] * arguments["k"]}
    for a, b in zip(delta_rule(**arguments | free, kernel=kernel), delta_rule(**arguments, kernel=kernel)):
        assert distance(a, b) < EXACT


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_without_removal_it_is_gated_linear_attention(kernel: str) -> None:
    """y_t = scale sum_{s <= t} (sum_n q_tn exp(g_{s+1} + .. + g_t)_n k_sn) v_s."""
    arguments = sample(workload(50, h_k=2, decay="vector", low_rank=True, full=False))
    arguments["remove"] = torch.zeros_like(arguments["remove"])
    sums = arguments["log_decay"].cumsum(1)
    past = torch.ones(50, 50, dtype=torch.bool).tril()
    decays = (sums[:, :, None] - sums[:, None]).masked_fill(~past[None, :, :, None, None], -torch.inf).exp()
    scores = torch.einsum("bthn,bshn,btshn->bths", arguments["q"], arguments["k"], decays)
    expected = arguments["scale"] * torch.einsum("bths,bshp->bthp", scores, arguments["v"])
    assert distance(delta_rule(**arguments, kernel=kernel)[0], expected) < EXACT


@pytest.mark.parametrize("low_rank", [False, True])
def test_equal_decays_per_channel_are_a_decay_per_head(low_rank: bool) -> None:
    arguments = sample(workload(90, low_rank=low_rank))
    wide = arguments["log_decay"][..., None].expand(-1, -1, -1, 5)
    for a, b in zip(delta_rule(**arguments | {"log_decay": wide}), delta_rule(**arguments)):
        assert distance(a, b) < EXACT


def adversarial(arguments: dict[str, Any]) -> dict[str, Any]:
    """Gates of 0, 1 and 2, decays of 1 and exp(-50.3) side by side, and keys that all but repeat."""
    draw = torch.Generator().manual_seed(5)
    near = arguments["k"][:, :1] + 0.1 * arguments["k"]
    arguments["k"] = F.normalize(near.float(), dim=-1).to(near.dtype)
    pick = torch.randint(0, 3, arguments["write_gate"].shape, generator=draw)
    arguments["write_gate"] = pick.to(arguments["write_gate"].dtype)
    if arguments["log_decay"] is not None:
        cut = torch.randint(0, 4, arguments["log_decay"].shape, generator=draw) == 0
        arguments["log_decay"] = torch.where(cut, -50.3, 0.0).to(arguments["log_decay"].dtype)
    return arguments


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mixed_decays_gates_up_to_two_and_repeating_keys_stay_exact(decay: str, dtype: str) -> None:
    arguments = adversarial(sample(workload(150, decay=decay, dtype=dtype)))
    output, gradient = differences(arguments)
    tolerance = declaration.OPERATOR.tolerances[dtype]
    assert output < tolerance.output
    assert gradient < tolerance.gradient


@pytest.mark.parametrize("log_decay", [-1e-9, -1e4], ids=["decay near 1", "decay underflows"])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_extreme_decays_neither_overflow_nor_lose_gradients(decay: str, log_decay: float) -> None:
    arguments = sample(workload(100, decay=decay, dtype="float32"))
    arguments["log_decay"] = torch.full_like(arguments["log_decay"], log_decay)
    tolerance = declaration.OPERATOR.tolerances["float32"]
    output, gradient = differences(arguments)
    assert output < tolerance.output
    assert gradient < tolerance.gradient


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_within_the_declared_tolerance(dtype: str, mode: dict[str, Any]) -> None:
    tolerance = declaration.OPERATOR.tolerances[dtype]
    arguments = sample(workload(100, dtype=dtype, **mode))
    output, gradient = differences(arguments)
    assert output < tolerance.output
    assert gradient < tolerance.gradient
    y, final = delta_rule(**arguments)
    assert (y.dtype, final.dtype) == (getattr(torch, dtype), torch.float32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_gradients_pass_gradcheck_with_initial_and_final_states(
    kernel: str, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_step", lambda values: 3)
    arguments = sample(workload(7, b=1, n=2, p=2, **mode))
    names = [name for name in NAMES if arguments[name] is not None]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule(**arguments | dict(zip(names, tensors)), kernel=kernel)

    assert torch.autograd.gradcheck(run, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("packed", [False, True])
def test_the_op_keeps_the_rules_of_torch_library(packed: bool) -> None:
    arguments = sample(workload(20, documents=3) if packed else workload(20))
    if packed:
        arguments["cu_seqlens"] = bounds(7, 0, 13)
    for name in NAMES:
        if name != "cu_seqlens" and arguments[name] is not None:
            arguments[name].requires_grad_()
    torch.library.opcheck(OP, (*arguments.values(), "chunked"))


def test_a_perturbed_kernel_is_caught() -> None:
    """The comparison of this file can fail, for outputs and for one gradient alone."""

    class Shifts:
        backward = staticmethod(chunked.backward)

        @staticmethod
        def forward(**arguments: Any) -> tuple[Tensor, ...]:
            y, *rest = chunked.forward(**arguments)
            return y + 1e-8, *rest

    class Scales:
        forward = staticmethod(chunked.forward)

        @staticmethod
        def backward(*values: Any) -> dict[str, Tensor | None]:
            found = chunked.backward(*values)
            assert found["log_decay"] is not None
            return found | {"log_decay": found["log_decay"] * (1 + 1e-8)}

    arguments = sample(workload(70))
    assert differences(arguments, Shifts)[0] > EXACT
    assert differences(arguments, Scales)[1] > EXACT


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q[..., :-1], "q is .* not b t h_k n"),
        ("k", lambda k: k.expand(-1, -1, 3, -1), "3 key heads do not divide h = 2"),
        ("v", lambda v: v[:, :0], "t >= 1"),
        ("v", lambda v: v.float(), "one type is needed"),
        ("log_decay", lambda g: g[..., :-1], "log_decay is .* not b t h"),
        ("write_gate", lambda w: w[:, :-1], "write_gate is .* not b t h"),
        ("remove", lambda _: torch.zeros(2, 20, 2, 5), "one of them is missing"),
        ("initial_state", lambda s: s.transpose(2, 3), "initial_state is .* not states h n p"),
        ("cu_seqlens", lambda _: bounds(20), "batch 1, not 2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, change: Any, message: str) -> None:
    arguments = sample(workload(20))
    with pytest.raises(ValueError, match=message):
        delta_rule(**arguments | {name: change(arguments[name])})


def moved_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_are_the_sizes_of_the_tensors(dtype: str, mode: dict[str, Any], packed: bool) -> None:
    case = workload(140, dtype=dtype, **mode, **({"documents": 3} if packed else {}))
    arguments = sample(case)
    assert definition.workload_of(arguments, "forward") == case
    results = chunked.forward(**arguments)
    inputs = [arguments[name] for name in NAMES]
    found = declaration.work(case)
    assert found.bytes_moved == found.saved_bytes == moved_bytes(*inputs, *results)
    grads = [tensor for tensor in inputs if tensor is not None and tensor.is_floating_point()]
    assert declaration.work(replace(case, phase="backward")).bytes_moved == moved_bytes(*inputs, *results, *grads)


def test_work_grows_with_tokens_and_one_token_needs_no_chunk() -> None:
    once, twice = (declaration.work(workload(t)) for t in (128, 256))
    assert twice.matmul_flops == 2 * once.matmul_flops
    assert twice.serial_steps == 2 * once.serial_steps == 4
    token = declaration.work(replace(workload(1), phase="decode"))
    assert token.matmul_flops == token.saved_bytes == 0
    assert token.vector_flops == 2 * 2 * 7 * 5 * 3


def test_the_fake_promises_what_every_kernel_returns() -> None:
    for case in (workload(70), workload(64, full=False), workload(1), workload(70, documents=4)):
        arguments = sample(case)
        for kernel in (definition.REFERENCE, chunked):
            results = kernel.forward(**arguments)
            for promised, result in zip(definition.empty_outputs(arguments), results, strict=True):
                assert (promised.shape, promised.dtype) == (result.shape, result.dtype)
