"""Rows and devices for the tests, made of round figures whose bounds can be told by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from subquad_cost_model import CostRow, Device


@pytest.fixture
def make_row() -> Callable[..., CostRow]:
    """A row of `softmax_attention` with the given work; nothing else is set."""

    def row(**given: Any) -> CostRow:
        return CostRow(
            **{
                "operator": "softmax_attention",
                "kernel": "sdpa",
                "phase": "forward",
                "dtype": "bfloat16",
                "shape": {"b": 1, "t": 128},
                "serial_steps": 0,
                **given,
            }
        )

    return row


@pytest.fixture
def make_device() -> Callable[..., Device]:
    """A device where a unit of each kind of work takes 1e-12 to 1e-9 s, and launches 1e-6 s."""

    def device(**given: Any) -> Device:
        return Device(
            **{
                "name": "planted",
                "kind": "cuda",
                "origin": "probed",
                "matmul_flops_per_s": {"bfloat16": 1e12, "float32": 1e11, "float64": 1e10},
                "vector_flops_per_s": 1e10,
                "transcendental_per_s": 1e9,
                "bytes_per_s": 1e11,
                "launch_s": 1e-6,
                "serial_step_s": 1e-9,
                "memory_bytes": 10**10,
                "versions": {"torch": "2.13.0"},
                **given,
            }
        )

    return device
