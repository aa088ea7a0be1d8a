"""What a layer moves beside its matrix products: torch operations and bytes, counted on meta tensors, without a device.

    python plugins/benchmarks/layer_bytes.py [--tokens 32768] [--verbose] MIXER ...

Layers as `mixers.py` has them, sequences of 8,192 tokens, forward and backward, float32 parameters and the casts of
CUDA's autocast to bfloat16. An operation reads its inputs and writes its outputs once (what is broadcast, once), views
and allocations are free; an operator of ours is one operation, whatever it launches. Bytes over 3.9 TB/s are what an
H200 takes at least.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mixers import RECIPES, layer_of
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

H200_BYTES_PER_S = 3.9e12
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
FREE = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
}
NARROWED = {"linear", "matmul", "einsum", "bmm", "mm", "baddbmm"}
WIDENED = {"exp", "softplus", "cumsum", "layer_norm", "rms_norm", "pow", "rsqrt", "log", "sum", "prod", "softmax"}
"""What CUDA's autocast computes in the narrow type, and in float32; torch's CPU and meta devices have other lists."""


@dataclass(frozen=True)
class Operation:
    """One operation: in the forward or the backward, by its name, and the bytes that it moves at least."""

    phase: str
    name: str
    moved: int
    shapes: tuple[tuple[int, ...], ...]

    @property
    def kind(self) -> str:
        """A matrix product, an operator of ours, or anything else."""
        space, _, name = self.name.partition("::")
        return "products" if name in PRODUCTS else "operators" if space == "subquad" else "elementwise"


class Counting(TorchDispatchMode):
    """Keeps what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if written and not func.is_view and name.partition("::")[2] not in FREE:
            moved = sum(_bytes(tensor) for tensor in (*{id(one): one for one in read}.values(), *written))
            self.found.append(Operation(self.phase, name, moved, tuple(tuple(one.shape) for one in written)))
        return result


class CudaCasts(TorchFunctionMode):
    """The casts that autocast to bfloat16 makes on CUDA; those of parameters once."""

    def __init__(self) -> None:
        super().__init__()
        self._parameters: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        wanted = torch.bfloat16 if name in NARROWED else torch.float32 if name in WIDENED else None
        if wanted is not None:
            args, kwargs = tree_map(lambda leaf: self._cast(leaf, wanted), (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _cast(self, leaf: Any, wanted: torch.dtype) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dtype not in (torch.float32, torch.bfloat16) or leaf.dtype == wanted:
            return leaf
        if not isinstance(leaf, nn.Parameter):
            return leaf.to(wanted)
        if id(leaf) not in self._parameters:
            self._parameters[id(leaf)] = leaf.to(wanted)
        return self._parameters[id(leaf)]


def _bytes(tensor: Tensor) -> int:
    """What is broadcast counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()


def operations(mixer: str, tokens: int) -> list[Operation]:
    """Forward and backward of a layer."""
    layer = layer_of(mixer)
    module = layer.make().to("meta")
    x = torch.empty(max(1, tokens // 8192), min(tokens, 8192), layer.d_model, device="meta", dtype=torch.bfloat16)
    wanted = [x.requires_grad_(), *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    with Counting() as counting:
        with CudaCasts():
            y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        counting.phase = "backward"
        torch.autograd.grad(y, wanted, torch.empty_like(y), allow_unused=True)
    return counting.found


def lines(mixer: str, found: list[Operation], *, verbose: bool) -> Iterator[str]:
    """A line a kind, and with `verbose` one an operation of more than 10 MB."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for operation in found:
        for total in (operation.kind, "all"):
            totals[total][0] += 1
            totals[total][1] += operation.moved
    for kind, (count, moved) in sorted(totals.items()):
        yield f"{mixer} {kind}: {count} operations, {moved / 1e9:.2f} GB, {1e3 * moved / H200_BYTES_PER_S:.2f} ms"
    if verbose:
        for operation in found:
            if operation.moved > 1e7:
                yield f"  {operation.phase} {operation.name} {operation.moved / 1e9:.3f} GB -> {operation.shapes}"


def main() -> None:
    """Count the mixers that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixers", nargs="+", choices=[*RECIPES], metavar="MIXER")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--verbose", action="store_true")
    chosen = parser.parse_args()
    for mixer in chosen.mixers:
        for line in lines(mixer, operations(mixer, chosen.tokens), verbose=chosen.verbose):
            print(line)


if __name__ == "__main__":
    main()
