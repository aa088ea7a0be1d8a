"""How Triton multiplies tiles of fp32: NVIDIA's tensor cores round factors to TF32, AMD's units take them whole."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["tf32", "tf32x3", "ieee"]


def fp32_products(*, exact: bool = True) -> Precision:
    """`input_precision` for tiles of fp32; where `exact`, as accurate as fp32: three products of TF32 on NVIDIA's.

    AMD has "ieee" on every device, "tf32" on some and "tf32x3" on none. Tiles of half precision do not care.
    """
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if exact else "tf32"
