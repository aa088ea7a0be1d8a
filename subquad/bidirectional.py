"""What mixers of whole sequences share, in which every token sees those of both sides of it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from subquad.errors import ConfigError


class Bidirectional:
    """In front of a mixer's other bases: it has no carry, because later tokens are not there yet."""

    def empty_carry(self, batch_size: int) -> Any:
        """Refused.  Raises: ConfigError."""
        self._refuse("has no carry")

    def prefill(self, x: Tensor, carry: Any, *shared: Any) -> Any:
        """Refused.  Raises: ConfigError."""
        self._refuse("cannot prefill")

    def decode(self, x_t: Tensor, carry: Any, *shared: Any) -> Any:
        """Refused.  Raises: ConfigError."""
        self._refuse("cannot decode")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            what=f"{type(self).__name__} {what}: its tokens see later ones",
            where="bidirectional",
            mend="mix whole sequences, or leave bidirectional out",
        )


class BothDirections(Bidirectional):
    """y = Mixer(x) + reversed( Mixer'(reversed x) ),  two that share nothing; the second one lies below `back`.

    In front of the mixer, which is named once more as `one_direction`:

        class BidirectionalRecurrence(BothDirections, Recurrence):
            one_direction = Recurrence

    Shapes:  x: b t d  ->  b t d
    Source: Schuster and Paliwal 1997 (bidirectional recurrent networks), their outputs added.
    """

    one_direction: type[nn.Module]

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__(config, context)  # type: ignore[call-arg]
        self.back: Any = self.one_direction(config, context)
        self.backwards = ReversedDocuments()

    def init_parameters(self, std: float) -> None:
        """Both as the mixer's."""
        super().init_parameters(std)  # type: ignore[misc]
        self.back.init_parameters(std)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        ahead: Tensor = super().forward(x, cu_seqlens)  # type: ignore[misc]
        # Not a call of the module, which a captured graph would hold as a leaf, its operators unseen.
        back: Tensor = self.back.forward(self.backwards(x, cu_seqlens), cu_seqlens)
        turned: Tensor = self.backwards(back, cu_seqlens)
        return ahead + turned


class ReversedDocuments(nn.Module):
    """Each sequence, or each document of a packed one, from its last token to its first.

    Shapes:  x: b t ...    cu_seqlens: documents + 1, or None  ->  b t ...
    """

    def forward(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Token p of a document from s to e becomes token s + e - 1 - p."""
        if cu_seqlens is None:
            return x.flip(1)
        bounds, token = cu_seqlens.long(), torch.arange(x.shape[1], device=x.device)
        document = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
        return x.index_select(1, bounds[document] + bounds[document + 1] - 1 - token)
