"""Weights in a narrower type, but for those that mixers declare to need float32."""

from __future__ import annotations

import torch

from subquad.model.language_model import LanguageModel
from subquad.registry import load_registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types that weights are decoded in, by name."""


def narrow(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The same model, its floating-point weights in `dtype` where `MixerSpec.float32_parameters` does not pin them."""
    pinned = set[int]()
    for block in model.blocks:
        names = load_registry().mixer(str(block.mixer_name)).float32_parameters
        pinned |= {id(value) for name, value in block.mixer.named_parameters() if name in names}  # type: ignore[union-attr]
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point() and id(value) not in pinned:
            value.data = value.data.to(dtype)
    return model
