"""Whether a mixer's graph treats every token by itself between its operators, so that it may be run on a part of them.

Nobody declares it: the graph is run on the second half of some random tokens, and on all of them, with the same numbers
in place of the operators' results. Wherever the two differ - an argument of an operator, the output - there is a shift,
a sum over tokens or a position that no operator node shows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from subquad.compiler.capture import holding, operator_of
from subquad.compiler.example import Method
from subquad.parallel.part import NotSplitError
from subquad_kernels.torch_operator import named_arguments

HALF = 6
"""Tokens of the second half."""
NOISE = 0.1
"""Added to every parameter: one that starts at zero would hide what it multiplies."""
RELATIVE, ABSOLUTE = 1e-7, 1e-9
"""Of float64 numbers, which a product over more rows may round otherwise."""

Results = tuple[Tensor, ...]


def check_seams(mixer: nn.Module, graph_module: fx.GraphModule, method: Method, d_model: int) -> None:
    """Hold a mixer's graph on a part of a sequence against that part of its results on all.  Raises: NotSplitError."""
    if isinstance(next(mixer.parameters(), None), FakeTensor):
        return  # of shapes alone, which no rank will compute with
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        probe = copy.deepcopy(mixer).to(device="cpu", dtype=torch.float64).eval()
        for parameter in probe.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
        graph = holding(probe, graph_module.graph, type(graph_module).__name__)
        x = torch.randn(1, 2 * HALF, d_model, dtype=torch.float64)
        # Of the whole sequence in both runs: a part is told of documents outside of it too.
        bounds = torch.tensor([0, 2, HALF + 1, 2 * HALF], dtype=torch.int32) if method == "packed" else None
        half = _Observed(graph, {})
        try:
            found = half.run(x[:, HALF:], bounds)
        except Exception as error:  # a stranger's code, which has not been asked for a part before
            raise NotSplitError(
                f"on a part of a sequence it fails ({_line(error)}), as what reads positions or boundaries"
                " otherwise than by an operator may"
            ) from None
        whole = _Observed(graph, half.results)
        expected = whole.run(x, bounds)
    for node, arguments in whole.arguments.items():
        for name, value in arguments.items():
            if not _same(value, half.arguments[node][name]):
                raise NotSplitError(
                    f"the argument {name} of {node} depends on other tokens than its own, or on positions,"
                    " which no operator shows"
                )
    if not _same(expected, found):
        raise NotSplitError("its output depends on other tokens, or on positions, other than through an operator")


class _Observed(fx.Interpreter):
    """Runs a graph with random numbers in place of the operators' results, and notes the operators' arguments.

    `second_half` are the results of a run on the second half of the tokens, which then stand in this one's. One that
    has no tokens, such as a state, becomes NaN: a graph that reads it shows.
    """

    def __init__(self, graph_module: fx.GraphModule, second_half: Mapping[str, Results]) -> None:
        super().__init__(graph_module)
        self._second_half = second_half
        self.arguments: dict[str, dict[str, Any]] = {}
        self.results: dict[str, Results] = {}

    def run_node(self, n: fx.Node) -> Any:
        operator = operator_of(n)
        if operator is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        arguments = named_arguments(n.target, tuple(args), dict(kwargs))
        del arguments["kernel"]
        self.arguments[n.name] = arguments
        empty = operator.torch_half.empty_outputs(arguments)
        halves = self._second_half.get(n.name)
        if halves is None:
            results = tuple(torch.randn_like(tensor) for tensor in empty)
        else:
            results = tuple(_around(second, tensor) for second, tensor in zip(halves, empty))
        self.results[n.name] = results
        return results if len(results) != 1 else results[0]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _around(second: Tensor, empty: Tensor) -> Tensor:
    """Numbers of the shape of `empty` that end with the second half, or NaN where there are no halves."""
    whole = torch.cat([torch.randn_like(second), second], dim=1) if second.dim() > 1 else second
    return whole if whole.shape == empty.shape else torch.full_like(empty, torch.nan)


def _same(whole: object, half: object) -> bool:
    """Whether a value of the second half is that of the whole, or its second half."""
    if not isinstance(whole, Tensor) or not isinstance(half, Tensor):
        return whole is half or whole == half
    if whole.shape != half.shape:
        tokens = half.shape[1] if half.dim() > 1 else 0
        whole = whole[:, tokens:] if whole.dim() > 1 else whole
    return whole.shape == half.shape and torch.allclose(whole, half, RELATIVE, ABSOLUTE)
