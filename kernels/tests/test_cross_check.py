"""The definitions of our operators against the reference functions that their authors publish.

The packages are not ours to depend on: where one is absent, its cases are skipped.
    pip install --no-deps fla-core einops          # its `naive` functions need no GPU
    MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm
and, since mamba-ssm imports its compiled part at once, an empty module `selective_scan_cuda` beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from subquad_kernels.operators import delta_rule, gated_linear_attention, linear_attention, selective_scan

B, T, H, N, P = 2, 32, 4, 5, 3
"""Batch, tokens, heads, width of keys and of values; T is a multiple of the blocks of ssd_minimal_discrete."""
TOLERANCE = 2e-5
"""Relative to the largest value: theirs compute in float32, some hundred roundings of 6e-8 a value."""

Outputs = tuple[Tensor, Tensor | None]


def theirs(path: str) -> Callable[..., Any]:
    """A function of another package, `package.module:name`; skips the test where it cannot be had."""
    module, _, name = path.partition(":")
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about machines without a GPU, and of dependencies
        try:
            return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
        except ImportError as error:  # parts that are built for CUDA only
            pytest.skip(f"{module} cannot be imported here: {error}")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def log_decays(*shape: int) -> Tensor:
    """Logarithms of decays from almost 1 to almost 0."""
    return F.logsigmoid(3 * torch.randn(shape))


def memory(heads: int = H) -> dict[str, Tensor]:
    """What every linear memory reads: queries, keys, values and a first state."""
    return {
        "q": draw(B, T, heads, N), "k": draw(B, T, heads, N), "v": draw(B, T, H, P), "state": draw(B, H, N, P)
    }  # fmt: skip


def delta_inputs(heads: int = H) -> dict[str, Tensor]:
    found = memory(heads)
    return found | {"k": F.normalize(found["k"], dim=-1), "beta": torch.rand(B, T, H)}


def heads_first(**tensors: Tensor) -> dict[str, Tensor]:
    """From b t h ... to b h t ..."""
    return {name: tensor.transpose(1, 2) for name, tensor in tensors.items()}


def linear(naive: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Outputs:
    return naive(q, k, v, initial_state=state, output_final_state=True)  # type: ignore[no-any-return]


def linear_ours(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Outputs:
    return linear_attention(q, k, v, initial_state=state, kernel="reference")


def decayed(naive: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Outputs:
    return naive(q, k, v, g, initial_state=state, output_final_state=True)  # type: ignore[no-any-return]


def decayed_ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Outputs:
    return linear_attention(q, k, v, g, initial_state=state, kernel="reference")


def gated_ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Outputs:
    return gated_linear_attention(q, k, v, g, initial_state=state, kernel="reference")


def retention(naive: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return naive(**heads_first(q=q, k=k, v=v)).transpose(1, 2), None


def retention_ours(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    rates = torch.log1p(-(2.0 ** (-5 - torch.arange(H, dtype=q.dtype))))
    return linear_attention(q, k, v, rates, kernel="reference")[0], None


def rwkv6(
    naive: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor, state: Tensor
) -> Outputs:
    y, last = naive(**heads_first(q=q, k=k, v=v, w=g), u=bonus, initial_state=state, output_final_state=True)
    return y.transpose(1, 2), last


def rwkv6_ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor, state: Tensor) -> Outputs:
    return gated_linear_attention(q, k, v, g, bonus, initial_state=state, read="before", kernel="reference")


def delta(naive: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Outputs:
    y, last = naive(**heads_first(q=q, k=k, v=v, beta=beta), initial_state=state)
    return y.transpose(1, 2), last


def delta_ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, g: Tensor | None = None) -> Outputs:
    return delta_rule(q, k, v, g, beta, initial_state=state, kernel="reference")


def gated_delta(
    naive: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, g: Tensor
) -> Outputs:
    return naive(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)  # type: ignore[no-any-return]


def low_rank(
    naive: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, remove: Tensor, insert: Tensor
) -> Outputs:
    y, last = naive(**heads_first(q=q, k=k, v=v, alpha=remove, beta=insert, gk=g), initial_state=state)
    return y.transpose(1, 2), last


def low_rank_ours(q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, remove: Tensor, insert: Tensor) -> Outputs:
    return delta_rule(q, k, v, g, None, remove, insert, initial_state=state, kernel="reference")


def scan_inputs() -> dict[str, Tensor]:
    return {
        "x": draw(B, T, P), "dt": draw(B, T, P), "A": -torch.rand(P, N) - 0.1, "B": draw(B, T, N), "C": draw(B, T, N),
        "D": draw(P), "z": draw(B, T, P), "bias": draw(P),
    }  # fmt: skip


def scan(naive: Callable[..., Any], **inputs: Tensor) -> Outputs:
    moved = {name: inputs[name].transpose(1, 2) for name in ("x", "dt", "B", "C", "z")}
    y, last = naive(
        moved["x"], moved["dt"], inputs["A"], moved["B"], moved["C"], inputs["D"], moved["z"], inputs["bias"],
        delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    return y.transpose(1, 2), last


def scan_ours(**inputs: Tensor) -> Outputs:
    names = ("x", "dt", "A", "B", "C", "D", "z", "bias")
    return selective_scan(*(inputs[name] for name in names), kernel="reference")


def dual(naive: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Outputs:
    y, last = naive(v, g, k, q, block_len=8)
    return y, last.transpose(-1, -2)


def dual_ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Outputs:
    return linear_attention(q, k, v, g, scale=1.0, kernel="reference")


CASES: dict[str, tuple[Callable[..., Outputs], Callable[..., Outputs], Callable[[], dict[str, Tensor]]]] = {
    "fla.ops.linear_attn.naive:naive_recurrent_linear_attn": (linear, linear_ours, memory),
    "fla.ops.simple_gla.naive:naive_recurrent_simple_gla": (
        decayed, decayed_ours, lambda: memory() | {"g": log_decays(B, T, H)}
    ),
    "fla.ops.retention.naive:naive_retention": (
        retention, retention_ours, lambda: {name: memory()[name] for name in "qkv"}
    ),
    "fla.ops.gla.naive:naive_recurrent_gla": (
        decayed, gated_ours, lambda: memory() | {"g": log_decays(B, T, H, N)}
    ),
    "fla.ops.rwkv6.recurrent_naive:naive_recurrent_rwkv6": (
        rwkv6, rwkv6_ours, lambda: memory() | {"g": log_decays(B, T, H, N), "bonus": draw(H, N)}
    ),
    "fla.ops.delta_rule.naive:delta_rule_recurrence": (delta, delta_ours, delta_inputs),
    "fla.ops.gated_delta_rule.naive:naive_recurrent_gated_delta_rule": (
        gated_delta, delta_ours, lambda: delta_inputs() | {"g": log_decays(B, T, H)}
    ),
    "fla.ops.kda.naive:naive_recurrent_kda": (
        gated_delta, delta_ours, lambda: delta_inputs(heads=2) | {"g": log_decays(B, T, H, N)}
    ),
    "fla.ops.generalized_delta_rule.dplr.naive:dplr_recurrence": (
        low_rank,
        low_rank_ours,
        lambda: memory() | {
            "g": log_decays(B, T, H, N), "remove": draw(B, T, H, N) / N, "insert": draw(B, T, H, N) / N
        },
    ),
    "mamba_ssm.ops.selective_scan_interface:selective_scan_ref": (scan, scan_ours, scan_inputs),
    "mamba_ssm.modules.ssd_minimal:ssd_minimal_discrete": (
        dual, dual_ours, lambda: {name: memory()[name] for name in "qkv"} | {"g": log_decays(B, T, H)}
    ),
}  # fmt: skip


@pytest.mark.cross_check
@pytest.mark.parametrize("path", CASES)
def test_our_definition_is_their_reference(path: str) -> None:
    """Outputs, final states and every gradient, for one sum of all outputs with weights from -1 to 1."""
    naive = theirs(path)
    call, ours, inputs = CASES[path]
    torch.manual_seed(0)
    given = inputs()
    found = results(ours, given, torch.float64)
    expected = results(lambda **tensors: call(naive, **tensors), given, torch.float32)
    assert_same(path, found, expected)


def test_a_definition_that_decays_too_late_would_be_noticed() -> None:
    torch.manual_seed(0)
    given = memory() | {"g": log_decays(B, T, H)}
    right = results(decayed_ours, given, torch.float64)
    late = results(lambda g, **others: decayed_ours(g=g.roll(1, dims=1), **others), given, torch.float64)
    with pytest.raises(AssertionError, match="y differs by"):
        assert_same("late", late, right)
    assert_same("right", right, {name: tensor.float() for name, tensor in right.items()})


def assert_same(path: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        error = (tensor - expected[name].double()).abs().max() / tensor.abs().max()
        assert error < TOLERANCE, f"{path}: {name} differs by {error:.1e} of its largest value"


def results(function: Callable[..., Outputs], given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, the final state where there is one, and the gradient of both in every input."""
    inputs = {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}
    y, last = function(**inputs)
    outputs = {"y": y} if last is None else {"y": y, "final state": last}
    loss = sum((output * weights(output)).sum() for output in outputs.values())
    gradients = torch.autograd.grad(loss, list(inputs.values()))  # type: ignore[arg-type]
    return {name: output.detach() for name, output in outputs.items()} | {
        f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients)
    }


def weights(output: Tensor) -> Tensor:
    """From -1 to 1, in an order that no axis repeats."""
    return torch.linspace(-1, 1, output.numel(), dtype=torch.float64).roll(7).to(output.dtype).view_as(output)
