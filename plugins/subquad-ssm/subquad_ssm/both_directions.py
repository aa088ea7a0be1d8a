"""State-space models to both sides: one block from the first token to the last, another one back."""

from __future__ import annotations

from subquad import BothDirections, MixerContext
from subquad_ssm.config import Mamba2Config, MambaConfig
from subquad_ssm.mamba import Mamba
from subquad_ssm.mamba2 import Mamba2


class BidirectionalMamba(BothDirections, Mamba):
    """Two blocks of Mamba that share nothing.  Shapes:  x: b t d  ->  b t d

    Source: Wang et al. 2024 (S-Mamba), section 3.2 and released code.
    """

    one_direction = Mamba


class BidirectionalMamba2(BothDirections, Mamba2):
    """Two blocks of Mamba-2 that share nothing.  Shapes:  x: b t d  ->  b t d

    Source: Wang et al. 2024 (S-Mamba), with Mamba-2 in the place of Mamba.
    """

    one_direction = Mamba2


def build_mamba(config: MambaConfig, context: MixerContext) -> Mamba:
    """Mamba, or its form to both sides."""
    return (BidirectionalMamba if config.bidirectional else Mamba)(config, context)


def build_mamba2(config: Mamba2Config, context: MixerContext) -> Mamba2:
    """Mamba-2, or its form to both sides."""
    return (BidirectionalMamba2 if config.bidirectional else Mamba2)(config, context)
