"""Which keys are summaries: the compact copy that fast kernels attend to, and the way back for gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summaries:
    """Summaries known before the call, then those that end a segment inside it; n together.

    `first` is the index in the call of its first segment-last token.
    """

    known: int
    first: int
    segment_len: int

    @classmethod
    def of_call(cls, start: int, segment_len: int) -> Summaries:
        """The summaries of a call whose first token stands at `start`."""
        return cls(start // segment_len, segment_len - 1 - start % segment_len, segment_len)

    def visible(self, index: int) -> int:
        """How many of them the token at this index of the call sees."""
        return self.known + max(0, (index - self.first + self.segment_len - 1) // self.segment_len)

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Index in the call where each of the first `count` stands; negative for the known ones.  Shape: count"""
        return (torch.arange(count, device=device) - self.known) * self.segment_len + self.first

    def compact(self, known: Tensor | None, new: Tensor) -> Tensor:
        """Copy the summaries out of the call.  Shapes:  known: b m h k    new: b t h k  ->  b h n k"""
        inside = new[:, self.first :: self.segment_len]
        return (inside if known is None else torch.cat([known, inside], dim=1)).transpose(1, 2).contiguous()

    def scatter(self, gradient: Tensor, new: Tensor) -> Tensor | None:
        """Add the gradient of the compact copy to that of the tokens; return the known summaries' own.

        Shapes:  gradient: b h n k    new: b t h k (changed in place)  ->  b m h k, None if m = 0
        """
        by_token = gradient.transpose(1, 2)
        new[:, self.first :: self.segment_len] += by_token[:, self.known :].to(new.dtype)
        return by_token[:, : self.known] if self.known else None
