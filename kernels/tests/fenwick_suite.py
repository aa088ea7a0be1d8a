"""What an operator over the states of a Fenwick tree promises: its kernel is the definition, whatever the call.

A subclass names the operator's modules and its functions, and adds a form of the paper's as a second reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType
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
from subquad_kernels.self_check import kernel_errors
from subquad_kernels.torch_operator import AutogradKernel
from subquad_kernels.workload import Option, Workload

BY_TOKEN = ("q", "k", "v", "level_scales", "log_decay", "write_gate")
NAMES = (*BY_TOKEN, "initial_state", "cu_seqlens")
DIFFERENTIABLE = NAMES[:-1]
# Errors are maxima over entries, relative to the largest entry of the reference.
EXACT = 1e-9


def bounds(*lengths: int) -> Tensor:
    """Boundaries of documents of these lengths."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def close(found: Tensor, expected: Tensor) -> bool:
    """Asserts that they are equal but for rounding in float64."""
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    return True


def tokens(arguments: dict[str, Any], part: slice) -> dict[str, Any]:
    """The same call on a part of its tokens, unpacked."""
    return {
        name: value[:, part] if name in BY_TOKEN and value is not None and value.dim() > 1 else value
        for name, value in arguments.items()
    } | {"cu_seqlens": None}


def fenwick_level(t: int, j: int) -> int:
    """The bucket of j before t by peeling the lowest ones off t (Guo et al. 2025, section 3.1); 0 for t itself."""
    if j == t:
        return 0
    end = t
    while end:
        size = end & -end
        if end - size <= j < end:
            return size.bit_length()
        end -= size
    raise AssertionError(f"{j} is in no bucket before {t}")


class FenwickSuite:
    """The tests; the kernel that is judged is `chunked.CHUNKED`, in float64 unless told."""

    declaration: ModuleType
    definition: ModuleType
    chunked: ModuleType
    op: Any
    function: Callable[..., tuple[Tensor, Tensor]]

    def workload(
        self, t: int, *, dtype: str = "float64", full: bool = True, decay: str = "token", **shape: int
    ) -> Workload:
        """b = 2 (1 when packed), h = 4 over 2 heads of q and k, n = 3, p = 5, six scales unless told."""
        axes = {"b": 1 if "documents" in shape else 2, "t": t, "h": 4, "h_k": 2, "n": 3, "p": 5, "l": 6, "m": 0}
        options: dict[str, Option] = {"decay": decay, "write_gate": full}
        name = self.declaration.OPERATOR.name
        return Workload(operator=name, shape=axes | shape, dtype=dtype, options=options)  # type: ignore[arg-type]

    def sample(self, case: Workload, seed: int = 0, **changes: Any) -> dict[str, Any]:
        """The arguments of a call."""
        drawn: dict[str, Any] = self.definition.sample_inputs(case, seed=seed, device="cpu")
        return drawn | changes

    def after(self, position: int, case: Workload, states: int) -> dict[str, Any]:
        """The arguments of a call that goes on after so many tokens."""
        size, shape = slots(position), case.shape
        draw = torch.Generator().manual_seed(position)
        state = torch.randn(states, size, shape["h"], shape["n"], shape["p"], generator=draw, dtype=torch.float64)
        for slot in range(size):
            state[:, slot] *= position >> slot & 1
        return {"initial_state": state if position else None, "position": position}

    def errors_of(self, arguments: dict[str, Any], kernel: Any = None) -> dict[str, float]:
        """Errors of outputs and of every gradient against the float64 reference."""
        operator = self.declaration.OPERATOR
        record = replace(CATALOGUE.kernel(operator.name, "chunked"))
        record.__dict__["torch_half"] = kernel or self.chunked.CHUNKED
        found = kernel_errors(operator, record, arguments, gradients=True)
        given = [name for name in DIFFERENTIABLE if arguments[name] is not None]
        assert set(found) == {"y", "final_state", *(f"d_{name}" for name in given)}
        return found

    def worst(self, arguments: dict[str, Any], kernel: Any = None) -> float:
        """The largest of them."""
        return max(self.errors_of(arguments, kernel).values())

    def within(self, arguments: dict[str, Any], dtype: str) -> bool:
        """Whether all are within what the operator declares."""
        tolerance = self.declaration.OPERATOR.tolerances[dtype]
        allowed = {True: tolerance.gradient, False: tolerance.output}
        return all(error <= allowed[name.startswith("d_")] for name, error in self.errors_of(arguments).items())

    @pytest.mark.parametrize(
        ("t", "position"),
        [
            (1, 0), (2, 0), (63, 0), (64, 0), (65, 0), (200, 0), (1, 1), (1, 7), (1, 64), (2, 63), (70, 5), (5, 62),
            (130, 70), (64, 64), (3, 1023), (150, 1000), (130, 4033),
        ],
    )  # fmt: skip
    def test_chunked_equals_the_reference_with_all_gradients(self, t: int, position: int) -> None:
        case = self.workload(t, l=6 if t % 2 else 14)
        assert self.worst(self.sample(case, **self.after(position, case, 2))) < EXACT

    @pytest.mark.parametrize("decay", ["token", "head", "none"])
    @pytest.mark.parametrize("full", [True, False], ids=["write gate", "none"])
    def test_gates_may_be_absent(self, decay: str, full: bool) -> None:
        assert self.worst(self.sample(self.workload(90, decay=decay, full=full, m=3))) < EXACT

    @pytest.mark.parametrize("chunk", [1, 4, 128])
    def test_the_length_of_a_chunk_changes_nothing(self, chunk: int) -> None:
        kernel = AutogradKernel(partial(self.chunked.chunked, chunk=chunk))
        case = self.workload(75)
        assert self.worst(self.sample(case, **self.after(43, case, 2)), kernel) < EXACT
        assert self.worst(self.sample(self.workload(75, documents=3)), kernel) < EXACT

    @pytest.mark.parametrize(
        ("lengths", "position"),
        [((33,), 0), ((0, 70, 1, 0, 1, 20, 0), 0), ((1,) * 9, 0), ((0, 0, 1), 3), ((65, 0, 63, 1), 37)],
        ids=str,
    )
    def test_packed_chunked_equals_the_reference_with_empty_and_single_token_documents(
        self, lengths: tuple[int, ...], position: int
    ) -> None:
        case = self.workload(sum(lengths), documents=len(lengths))
        going_on = self.after(position, case, len(lengths))
        assert self.worst(self.sample(case, cu_seqlens=bounds(*lengths), **going_on)) < EXACT

    @pytest.mark.parametrize("kernel", ["reference", "chunked"])
    def test_packed_equals_each_document_by_itself(self, kernel: str) -> None:
        lengths = (0, 70, 1, 20)
        case = self.workload(sum(lengths), documents=len(lengths))
        arguments = self.sample(case, cu_seqlens=bounds(*lengths), **self.after(5, case, len(lengths)))
        y, final = self.function(**arguments, kernel=kernel)
        for document, part in enumerate(pairwise(np.cumsum((0, *lengths)))):
            state = arguments["initial_state"][document : document + 1]
            if part[0] < part[1]:
                own = tokens(arguments, slice(*part)) | {"initial_state": state}
                own_y, state = self.function(**own, kernel="reference")
                assert close(y[:, slice(*part)], own_y)
            size = state.shape[1]
            assert close(final[document : document + 1, :size], state)
            assert (final[document, size:] == 0).all()

    @pytest.mark.parametrize("m", [1, 31, 63, 64, 65, 100, 128])
    def test_splitting_and_passing_the_state_changes_nothing(self, m: int) -> None:
        arguments = self.sample(self.workload(131))
        y, final = self.function(**arguments)
        first, state = self.function(**tokens(arguments, slice(0, m)))
        rest = tokens(arguments, slice(m, None)) | {"initial_state": state, "position": m}
        second, state = self.function(**rest)
        assert close(torch.cat([first, second], dim=1), y)
        assert close(state, final)

    @pytest.mark.parametrize("kernel", ["reference", "chunked"])
    def test_token_after_token_equals_the_whole_and_keeps_as_many_states_as_the_length_has_bits(
        self, kernel: str
    ) -> None:
        arguments = self.sample(self.workload(70))
        y, final = self.function(**arguments)
        state, outputs = None, []
        for token in range(70):
            part = tokens(arguments, slice(token, token + 1)) | {"initial_state": state, "position": token}
            output, state = self.function(**part, kernel=kernel)
            outputs.append(output)
            filled = [slot for slot in range(state.shape[1]) if state[:, slot].abs().max() > 0]
            assert state.shape[1] == (token + 1).bit_length()
            assert filled == set_bits(token + 1)
        assert close(torch.cat(outputs, dim=1), y)
        assert state is not None and close(state, final)

    @pytest.mark.parametrize("kernel", ["reference", "chunked"])
    @pytest.mark.parametrize("cu_seqlens", [None, bounds(9, 91)], ids=["whole", "packed"])
    def test_no_output_depends_on_a_later_token(self, kernel: str, cu_seqlens: Tensor | None) -> None:
        shape = {} if cu_seqlens is None else {"documents": 2}
        arguments = self.sample(self.workload(100, dtype="float32", **shape), cu_seqlens=cu_seqlens)
        before, _ = self.function(**arguments, kernel=kernel)
        for name in BY_TOKEN:
            changed = arguments[name].clone()
            changed[:, 73:] = -3.0
            later, _ = self.function(**arguments | {name: changed}, kernel=kernel)
            assert torch.equal(before[:, :73], later[:, :73]), name
            assert not torch.equal(before[:, 73:], later[:, 73:]), name

    @pytest.mark.parametrize("rate", [-1e-8, -0.7, -1e6, -torch.inf], ids=str)
    def test_extreme_decays_neither_overflow_nor_lose_gradients(self, rate: float) -> None:
        arguments = self.sample(self.workload(150, dtype="float32", m=4))
        arguments["log_decay"] = torch.full_like(arguments["log_decay"], rate)
        assert self.within(arguments, "float32")

    def test_a_token_that_forgets_everything_leaves_later_states_their_precision(self) -> None:
        arguments = self.sample(self.workload(150, dtype="float32"))
        arguments["log_decay"][:, 7] = -1e6
        assert self.within(arguments, "float32")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_inputs_are_computed_in_fp32(self, dtype: str) -> None:
        arguments = self.sample(self.workload(100, dtype=dtype, m=3))
        assert self.within(arguments, dtype)
        y, final = self.function(**arguments)
        assert (y.dtype, final.dtype) == (getattr(torch, dtype), torch.float32)

    @pytest.mark.parametrize("kernel", ["reference", "chunked"])
    def test_the_op_passes_gradcheck_with_initial_and_final_states(self, kernel: str) -> None:
        case = self.workload(4, b=1, h=2, h_k=1, n=2, p=1, l=3)
        arguments = self.sample(case, **self.after(6, case, 1))

        def attend(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return self.function(**arguments | dict(zip(DIFFERENTIABLE, tensors)), kernel=kernel)

        assert torch.autograd.gradcheck(attend, [arguments[name].requires_grad_() for name in DIFFERENTIABLE])

    def test_the_op_keeps_the_rules_of_torch_library_in_documents_that_go_on(self) -> None:
        case = self.workload(5, documents=3, n=2, p=2)
        arguments = self.sample(case, cu_seqlens=bounds(2, 0, 3), **self.after(5, case, 3))
        for name in DIFFERENTIABLE:
            arguments[name].requires_grad_()
        torch.library.opcheck(self.op, (*arguments.values(), "chunked"))

    def test_decoding_compiles_to_as_many_graphs_however_many_bits_the_length_has(self) -> None:
        torch._dynamo.reset()
        counter = CompileCounter()

        def step(state: Tensor, position: int, *rows: Tensor) -> tuple[Tensor, Tensor]:
            return self.function(*rows, initial_state=state, position=position)

        compiled = torch.compile(step, backend=counter, fullgraph=True)
        arguments = self.sample(self.workload(20, b=1, full=False))
        state, counts = torch.zeros(1, 0, 4, 3, 5, dtype=torch.float64), []
        for token in range(20):
            rows = [arguments[name][:, token : token + 1] for name in ("q", "k", "v", "level_scales", "log_decay")]
            expected = step(state, token, *rows)
            y, state = compiled(state, token, *rows)
            assert torch.equal(y, expected[0]) and torch.equal(state, expected[1])
            counts.append(counter.frame_count)
        assert counts[2] == counts[-1], counts  # the first state is empty, the second call's integers are constants

    def test_a_perturbed_kernel_is_caught(self) -> None:
        """The comparison of this suite can fail: a level taken one too high, and one gradient alone."""

        def one_level_up(**arguments: Any) -> tuple[Tensor, ...]:
            scales = arguments["level_scales"]
            shifted = torch.cat([scales[..., :1], scales[..., :-1]], -1)
            found: tuple[Tensor, ...] = self.chunked.chunked(**arguments | {"level_scales": shifted})
            return found

        kernel = self.chunked.CHUNKED

        class ForgetsDecays:
            forward = staticmethod(kernel.forward)

            @staticmethod
            def backward(*values: Any) -> dict[str, Tensor | None]:
                found: dict[str, Tensor | None] = kernel.backward(*values)
                assert found["log_decay"] is not None
                return found | {"log_decay": found["log_decay"] * (1 + 1e-6)}

        arguments = self.sample(self.workload(20))
        assert self.errors_of(arguments, AutogradKernel(one_level_up))["y"] > EXACT
        assert self.errors_of(arguments, ForgetsDecays)["d_log_decay"] > EXACT

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
    def test_shapes_that_do_not_fit_are_named(self, name: str, change: Any, message: str) -> None:
        case = self.workload(20)
        arguments = self.sample(case, **self.after(5, case, 2))
        with pytest.raises(ValueError, match=message):
            self.function(**arguments | {name: change(arguments[name])})

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("decay", ["token", "head", "none"])
    @pytest.mark.parametrize("packed", [True, False])
    def test_bytes_are_the_sizes_of_the_tensors(self, dtype: str, decay: str, packed: bool) -> None:
        case = self.workload(100, dtype=dtype, decay=decay, full=packed, **({"documents": 3} if packed else {"m": 4}))
        arguments = self.sample(case, seed=4)  # 12 tokens before where there are any
        assert self.definition.workload_of(arguments, "forward") == case
        inputs = [arguments[name] for name in NAMES if arguments[name] is not None]
        moved = sum(x.numel() * x.element_size() for x in (*inputs, *self.chunked.CHUNKED.forward(**arguments)))
        assert self.declaration.work(case).bytes_moved == moved

    def test_the_fake_promises_what_every_kernel_returns(self) -> None:
        going_on, packed = self.workload(1, m=5), self.workload(70, documents=4)
        for case in (self.workload(100), self.workload(16, full=False), going_on, packed):
            arguments = self.sample(case)
            for kernel in (self.definition.REFERENCE, self.chunked.CHUNKED):
                results = kernel.forward(**arguments)
                for promised, result in zip(self.definition.empty_outputs(arguments), results, strict=True):
                    assert (promised.shape, promised.dtype) == (result.shape, result.dtype)
