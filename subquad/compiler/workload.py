"""What every operator node will be asked: graphs run on shapes alone; a workload becomes a row of the cost model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from subquad.compiler.capture import operator_of
from subquad.compiler.example import IN_PLACE, Example, Method
from subquad.compiler.shapes_only import shapes_only
from subquad.contracts import NOTHING_SHARED, Sharing
from subquad.model.decoder import ROOM
from subquad_cost_model import CostRow
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.torch_operator import named_arguments
from subquad_kernels.workload import Phase, Workload


class _Recorder(fx.Interpreter):
    """Runs a graph on shapes and notes the arguments of each operator node."""

    def __init__(self, graph_module: fx.GraphModule, phase: str) -> None:
        super().__init__(graph_module)
        self.workloads: dict[str, Workload] = {}
        self._phase = phase

    def run_node(self, n: fx.Node) -> Any:
        operator = operator_of(n)
        if operator is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            arguments = named_arguments(n.target, tuple(args), dict(kwargs))
            del arguments["kernel"]
            self.workloads[n.name] = operator.torch_half.workload_of(arguments, self._phase)
        return super().run_node(n)


def node_workloads(
    mixer: nn.Module,
    graph_module: fx.GraphModule,
    method: Method,
    example: Example,
    d_model: int,
    sharing: Sharing = NOTHING_SHARED,
) -> dict[str, Workload]:
    """The forward (or decode) workload of every operator node, by node name; nothing is computed.

    A prefill stands after an empty carry; a decode after t tokens, whose carry a prefill on shapes leaves, and which in
    place has the room that a `Decoder` begins with. Packed documents are whole rows unless the example says how many
    there are, of lengths that nobody knows.
    """
    reference = next(mixer.parameters(), None)
    device = torch.device("cpu") if reference is None else reference.device
    b, t = example.tokens_shape
    with shapes_only(reference), torch.no_grad(), autocast(device, example.dtype):
        recorder = _Recorder(graph_module, "decode" if method in ("decode", IN_PLACE) else "forward")
        dtype = torch.float32 if reference is None else reference.dtype

        def empty(*size: int) -> torch.Tensor:
            return torch.empty(size, device=device, dtype=dtype)

        def shared(b: int, t: int, before: int = 0) -> dict[str, torch.Tensor]:
            """What is read of earlier layers, with as many tokens as came before where it is a history."""
            return {name: empty(b, tensor.length(t, before), *tensor.shape) for name, tensor in sharing.reads.items()}

        owner: Any = mixer
        if method == "forward":
            recorder.run(empty(b, t, d_model), None, *shared(b, t).values())
        elif method == "packed":
            boundaries = torch.empty((example.documents or b) + 1, dtype=torch.int32, device=device)
            recorder.run(empty(1, b * t, d_model), boundaries, *shared(1, b * t).values())
        elif method == "prefill":
            recorder.run(empty(b, t, d_model), *tree_leaves(owner.empty_carry(b)), *shared(b, t).values())
        else:
            read = (shared(b, t),) if sharing else ()
            _, carry, *_ = type(owner).prefill(owner, empty(b, t, d_model), owner.empty_carry(b), *read)
            if method == IN_PLACE:
                carry = owner.with_room(carry, ROOM)
            recorder.run(empty(b, d_model), *tree_leaves(carry), *shared(b, 1, t).values())
    if method != "packed" or example.documents:
        return recorder.workloads
    return {
        name: replace(workload, document_lengths=(t,) * b) if "documents" in workload.shape else workload
        for name, workload in recorder.workloads.items()
    }


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in a half precision that the example asks for."""
    if dtype not in ("bfloat16", "float16"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def phases(workload: Workload, training: bool) -> tuple[Workload, ...]:
    """The workloads that one use of a node runs: its forward, and the gradient when training."""
    if not training or workload.phase == "decode":
        return (workload,)
    backward: Phase = "backward"
    return (workload, replace(workload, phase=backward))


def cost_row(operator: Operator, kernel: Kernel, workload: Workload) -> CostRow:
    """The row that asks the cost model how long this kernel takes: the one place where the two rooms meet."""
    work = operator.work(workload)
    shape: Mapping[str, int] = workload.shape
    return CostRow(
        operator=operator.name,
        kernel=kernel.name,
        phase=workload.phase,
        dtype=workload.dtype,
        shape=shape,
        options=workload.options,
        matmul_flops=work.matmul_flops,
        vector_flops=work.vector_flops,
        transcendental_ops=work.transcendental_ops,
        bytes_moved=work.bytes_moved,
        serial_steps=kernel.serial_steps(workload) if kernel.serial_steps else work.serial_steps,
        saved_bytes=work.saved_bytes,
        launches=kernel.launches(workload),
        kernel_version=kernel.version,
        document_lengths=workload.document_lengths,
        padding=kernel.padding(workload),
    )


GROWING = (("b",), ("t", "s", "m"), ("h", "h_k", "h_kv"), ("c",))
"""Axes along which work grows, those in one group together: as many queries as keys, key heads that share a group."""


def halved_rows(row: CostRow) -> Sequence[CostRow]:
    """The rows with batch, tokens, heads or channels halved, where these are even, with their work counted anew.

    Lengths of 1 stay: a decoded token halves its cache alone. Packed documents stay as many.
    """
    operator, kernel = CATALOGUE.operator(row.operator), CATALOGUE.kernel(row.operator, row.kernel)
    found = []
    for group in GROWING:
        long = {axis: row.shape[axis] for axis in group if row.shape.get(axis, 0) > 1}
        if not long or any(size % 2 for size in long.values()):
            continue
        shape = {**row.shape, **{axis: size // 2 for axis, size in long.items()}}
        if "t" in long and shape["t"] < shape.get("documents", 0):
            continue
        workload: Workload = Workload(
            operator=row.operator,
            shape=shape,
            dtype=row.dtype,  # type: ignore[arg-type]
            phase=row.phase,  # type: ignore[arg-type]
            options=row.options,
            # Half of each document is half of all, but for roundings.
            document_lengths=tuple(length // 2 if "t" in long else length for length in row.document_lengths),
        )
        found.append(replace(cost_row(operator, kernel, workload), kernel_version=row.kernel_version))
    return found
