"""Which products of fp32 tiles a vendor's devices have."""

from __future__ import annotations

import pytest
import torch

from subquad_kernels.triton_precision import fp32_products


def test_products_in_tf32_are_nvidias_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton refuses `tf32x3` on every AMD device, `tf32` on all but one."""
    monkeypatch.setattr(torch.version, "hip", None)
    assert (fp32_products(), fp32_products(exact=False)) == ("tf32x3", "tf32")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert (fp32_products(), fp32_products(exact=False)) == ("ieee", "ieee")
