"""What a rewritten module calls: a kernel where its exactness is certain for this very call, else nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from subquad.compiler.foreign.capture import is_capturing
from subquad.compiler.foreign.find_attention import Written
from subquad.compiler.foreign.masks import MaskKind, kind_of_mask
from subquad.compiler.foreign.torch_private import is_inside_transform
from subquad_kernels.catalogue import CATALOGUE
from subquad_kernels.device_limits import device_limits
from subquad_kernels.kernel_table import DEFAULT, look_up
from subquad_kernels.operators import softmax_attention
from subquad_kernels.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A kernel, or a table of kernels, and the workload that it was chosen and checked for."""

    kernel: str
    workload: Workload
    device_kind: str

    def fits(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether a call is of the checked kind: device, type, widths, queries per key head."""
        shape = self.workload.shape
        return (
            q.device.type == self.device_kind
            and q.dtype == k.dtype == v.dtype == getattr(torch, self.workload.dtype)
            and q.shape[3] == shape["k"]
            and v.shape[3] == shape["v"]
            and q.shape[1] * shape["h_kv"] == k.shape[1] * shape["h"]
        )


@dataclass(kw_only=True)
class AttentionCall:
    """Softmax attention of one module, by mask: `chosen` maps (causal, window) to a kernel.

    `__call__` answers None, and the module goes on as it was written, for everything else: dropout, padding and other
    masks, types and widths that no kernel was checked for, sharded or transformed tensors, and when not `enabled`.
    A mask's values are read when it is first seen, which waits for the device; under torch.compile they cannot be.
    """

    written: Written
    chosen: Mapping[tuple[bool, int], Chosen] = field(default_factory=dict)
    enabled: bool = True

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor | None:
        """Attention as scaled_dot_product_attention defines it, or None.

        Shapes:  q: b h t k    k: b h_kv s k    v: b h_kv s v    mask: broadcasts to b h t s  ->  b h t v
        """
        if not self.enabled or is_capturing() or dropout_p > 0 or q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling and not all(_is_plain(tensor) for tensor in (q, k, v)):
            return None
        q, k, v = _as_autocast(q, k, v)
        t, s = q.shape[2], k.shape[2]
        if mask is not None:
            if compiling or t == 1 or causal:  # one query's mask is new with every token
                return None
            kind = kind_of_mask(mask, t, s)
        else:
            kind = MaskKind(causal=causal)
        chosen = self.chosen.get((kind.causal, kind.window)) if kind.exact else None
        # The operator's queries are the last t of s positions; a causal flag counts from the first key.
        if chosen is None or t > s or (mask is None and causal and t != s) or not chosen.fits(q, k, v):
            return None
        if compiling:
            shape = chosen.workload.shape
            if (q.shape[0], t, s) != (shape["b"], shape["t"], shape["s"]):
                return None
        elif not _supported(
            chosen.kernel, (q.shape[0], t, s, q.shape[1], k.shape[1], q.shape[3], v.shape[3]), chosen.workload.dtype,
            kind.causal, kind.window, str(q.device),
        ):  # fmt: skip
            return None
        out = softmax_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            causal=kind.causal, window=kind.window, scale=scale, kernel=chosen.kernel,
        )  # fmt: skip
        return out.transpose(1, 2)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is no nested, sharded, fake or transformed tensor: kernels were checked for none of them."""
    return type(tensor) is Tensor and not tensor.is_nested and not is_inside_transform(tensor)


def _as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast hands to scaled_dot_product_attention and to matrix products: its own type, unless float64."""
    device = q.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (q.dtype, k.dtype, v.dtype):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@lru_cache(maxsize=4096)
def _supported(
    text: str, shape: tuple[int, ...], dtype: str, causal: bool, window: int, device: str
) -> bool:
    """Whether the kernel that a call would run says that it can."""
    axes = dict(zip(("b", "t", "s", "h", "h_kv", "k", "v"), shape))
    workload = Workload(
        operator="softmax_attention",
        shape=axes,
        dtype=dtype,  # type: ignore[arg-type]
        options={"causal": causal, "window": window},
    )
    name = look_up(text, axes["b"], axes["t"])
    return name == DEFAULT or CATALOGUE.kernel(workload.operator, name).refusal(workload, device_limits(device)) is None
