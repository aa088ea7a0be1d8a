"""What is asked, as flat numbers: one row per kernel and workload."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """One kernel on one workload.

    `shape` and `options` describe the workload; `flops` ... `saved_bytes` are its work, counted and not measured (a
    multiply-add is 2 FLOPs). `launches` are the device kernels that this kernel starts, one after the other, as it
    declares them. `kernel_version` changes when the kernel's code does, so that old measurements expire.
    `document_lengths` are the tokens of each packed document where they are known: what was timed, and no part of what
    identifies it. Where they are not, documents of drawn lengths are expected. `padding` is how many times the counted
    pairs of tokens the kernel computes, those that it masks included.
    """

    operator: str
    kernel: str
    phase: str
    dtype: str
    shape: Mapping[str, int]
    options: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    matmul_flops: int = 0
    vector_flops: int = 0
    transcendental_ops: int = 0
    bytes_moved: int = 0
    serial_steps: int = 1
    saved_bytes: int = 0
    launches: int = 1
    kernel_version: str = ""
    document_lengths: tuple[int, ...] = ()
    padding: float = 1.0

    @property
    def key(self) -> str:
        """Canonical JSON of what identifies a measurement of this row."""
        return json.dumps(
            {
                "operator": self.operator,
                "kernel": self.kernel,
                "kernel_version": self.kernel_version,
                "phase": self.phase,
                "dtype": self.dtype,
                "shape": dict(self.shape),
                "options": dict(self.options),
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    def __hash__(self) -> int:
        return hash(self.key)
