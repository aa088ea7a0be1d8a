"""What a foreign model's attention is: its owners, the workload of each, and why one must stay as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from subquad.compiler.foreign.capture import Call, capture_program
from subquad.compiler.foreign.find_attention import Attention, find_attention
from subquad.compiler.foreign.rewrite import adapters_for
from subquad.registry import Registry
from subquad_kernels.workload import ELEMENT_BYTES, DType, Workload

OPERATOR = "softmax_attention"


@dataclass(frozen=True)
class Owner:
    """A module that computes attention: its path and class, what was found in it, and why it is left alone."""

    path: str
    class_name: str
    attentions: tuple[Attention, ...]
    workloads: tuple[Workload, ...]
    declined: str | None

    @property
    def first(self) -> Attention:
        """The first attention it computes; most owners compute one."""
        return self.attentions[0]


def analyse(model: nn.Module, call: Call, registry: Registry) -> list[Owner]:
    """The owners of softmax attention, in the order in which they run.

    Raises: ConfigError when the model cannot be captured.
    """
    by_path: dict[str, list[Attention]] = {}
    for attention in find_attention(capture_program(model, call)):
        by_path.setdefault(attention.owner, []).append(attention)
    autocast = _autocast_dtype(call)
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = []
    for path, attentions in by_path.items():
        found = tuple(attentions)
        if path not in modules:
            owners.append(Owner(path, "unknown", found, (), f"no module of the model is called '{path}'"))
            continue
        declined = next((reason for reason in map(_why_not, found) if reason is not None), None)
        distinct = next((spec.distinct_heads for _, spec in adapters_for(model, path, registry)), False)
        workloads = () if declined else tuple(_workload(attention, distinct, autocast) for attention in found)
        owners.append(Owner(path, type(modules[path]).__name__, found, workloads, declined))
    return owners


def _why_not(attention: Attention) -> str | None:
    if attention.mask.other:
        return f"its mask {attention.mask.other}"
    if attention.dtype not in ELEMENT_BYTES:
        return f"computes in {attention.dtype}"
    if attention.t > attention.s:
        return f"has {attention.t} queries for {attention.s} keys"
    if attention.t == 1:
        return "has one query: decoding is left as it is written"
    return None


def _workload(attention: Attention, distinct_heads: bool, autocast: str | None) -> Workload:
    dtype = attention.dtype if autocast is None or attention.dtype == "float64" else autocast
    shape: Mapping[str, int] = {
        "b": attention.b, "t": attention.t, "s": attention.s, "h": attention.h,
        "h_kv": attention.h_kv_distinct if distinct_heads else attention.h_kv, "k": attention.k, "v": attention.v,
    }  # fmt: skip
    return Workload(
        operator=OPERATOR,
        shape=shape,
        dtype=cast(DType, dtype),
        options={"causal": attention.mask.causal, "window": attention.mask.window},
    )


def _autocast_dtype(call: Call) -> str | None:
    """What autocast computes in here, None where it is off."""
    tensors = [leaf for leaf in tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    if not torch.is_autocast_enabled(device):
        return None
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
