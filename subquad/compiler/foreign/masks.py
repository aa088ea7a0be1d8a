"""What an attention mask hides, read from its values: all, nothing, the future, a window's past, padding, or other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class MaskKind:
    """Key j is seen by the query at position p = s - t + i if  (not causal or j <= p), (window = 0 or p - j < window),

    and, when `padding`, if the key is no padding of its sequence. `other` says what else the mask does, and is empty
    if these three say all of it.
    """

    causal: bool = False
    window: int = 0
    padding: bool = False
    other: str = ""

    @property
    def exact(self) -> bool:
        """Whether `causal` and `window` are all there is to it, so that a kernel needs no mask."""
        return not self.padding and not self.other

    def __str__(self) -> str:
        if self.other:
            return f"other ({self.other})"
        base = f"window {self.window}" if self.window else "causal" if self.causal else "full"
        return f"{base}, padding" if self.padding else base


def mask_kind(mask: Tensor, t: int, s: int) -> MaskKind:
    """The kind of a mask as scaled_dot_product_attention takes it: True is seen, or what is added to the scores.

    Reads every value of the mask, and waits for the device.  Shapes:  mask: broadcasts to b h t s
    """
    if mask.requires_grad:
        return MaskKind(other="is learned")  # whatever its values are now
    seen = seen_keys(mask)
    if seen is None:
        return MaskKind(other="adds a bias to the scores")
    if seen.dim() > 4:
        return MaskKind(other=f"has {seen.dim()} axes")
    seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape))
    if seen.shape[1] > 1 and not bool((seen == seen[:, :1]).all()):
        return MaskKind(other="differs between heads")
    seen = seen[:, 0].expand(-1, t, s)
    query = torch.arange(s - t, s, device=seen.device)[:, None]
    key = torch.arange(s, device=seen.device)[None, :]
    behind = query - key
    padding = seen.any(dim=1, keepdim=True)
    window = int(torch.where(seen, behind, -1).max()) + 1
    for kind, base in (
        (MaskKind(), torch.ones_like(behind, dtype=torch.bool)),
        (MaskKind(causal=True), behind >= 0),
        (MaskKind(causal=True, window=window), (behind >= 0) & (behind < window)),
    ):
        if torch.equal(seen, base.expand_as(seen)):
            return kind
        if torch.equal(seen, base & padding):
            return MaskKind(causal=kind.causal, window=kind.window, padding=True)
    hidden = seen.numel() - int(seen.sum())
    return MaskKind(other=f"hides {hidden} of {seen.numel()} pairs, not by position or padding")


def seen_keys(mask: Tensor) -> Tensor | None:
    """Which keys a mask leaves; None if it does more than hide: a value that is neither 0 nor the lowest there is."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return None
    seen, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min
    return seen if bool((seen | hidden).all()) else None


def remembered(find: Callable[[Tensor, int, int], Found]) -> Callable[[Tensor, int, int], Found]:
    """The function, asked once for a tensor and its present values: layers share a mask, and steps may."""
    known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def ask(mask: Tensor, t: int, s: int) -> Found:
        if mask.is_inference():  # counts no changes
            return find(mask, t, s)
        signature = (mask._version, t, s)
        stored = known.get(mask)
        if stored is None or stored[0] != signature:
            stored = signature, find(mask, t, s)
            known[mask] = stored
        return stored[1]  # type: ignore[no-any-return]

    return ask


kind_of_mask = remembered(mask_kind)
"""`mask_kind`, remembered per tensor."""
