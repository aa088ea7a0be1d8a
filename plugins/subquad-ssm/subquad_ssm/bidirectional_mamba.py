"""Mamba to both sides: one block from the first token to the last, another one back."""

from __future__ import annotations

from torch import Tensor

from subquad import Bidirectional, MixerContext, ReversedDocuments
from subquad_ssm.config import MambaConfig
from subquad_ssm.mamba import Mamba


class BidirectionalMamba(Bidirectional, Mamba):
    """y = Mamba(x) + reversed( Mamba'(reversed x) ),  two blocks that share nothing; the second one lies below `back`.

    Shapes:  x: b t d  ->  b t d
    Source: Wang et al. 2024 (S-Mamba), section 3.2 and released code.
    """

    def __init__(self, config: MambaConfig, context: MixerContext) -> None:
        super().__init__(config, context)
        self.back = Mamba(config, context)
        self.backwards = ReversedDocuments()

    def init_parameters(self, std: float) -> None:
        """Both as Mamba's."""
        super().init_parameters(std)
        self.back.init_parameters(std)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mix whole sequences.  Shapes:  x: b t d  ->  b t d"""
        ahead, _, _ = self._mix(x, None, None, cu_seqlens)
        back, _, _ = self.back._mix(self.backwards(x, cu_seqlens), None, None, cu_seqlens)
        return ahead + self.backwards(back, cu_seqlens)  # type: ignore[no-any-return]


def build_mamba(config: MambaConfig, context: MixerContext) -> Mamba:
    """Mamba, or its form to both sides."""
    return (BidirectionalMamba if config.bidirectional else Mamba)(config, context)
