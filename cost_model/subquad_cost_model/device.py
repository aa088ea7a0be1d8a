"""A device as plain data: what it was measured, or is specified, to reach."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

FORMAT_VERSION = 1
# By NVIDIA's compute capability. B200 and B300 are one design; the workstation cards called Blackwell are another.
FAMILIES: Mapping[tuple[int, int], str] = {
    (7, 0): "Volta",
    (7, 5): "Turing",
    (8, 0): "Ampere",
    (8, 6): "Ampere GA10x",
    (8, 9): "Ada",
    (9, 0): "Hopper",
    (10, 0): "Blackwell",
    (10, 3): "Blackwell",
    (12, 0): "Blackwell GB20x",
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """Ceilings of a device, measured by a probe or taken from its data sheet.

    `matmul_flops_per_s` is per dtype; `vector_flops_per_s` is fp32 arithmetic outside matrix units;
    `transcendental_per_s` exponentials; `bytes_per_s` main memory, read and write counted; `launch_s` the cost of one
    kernel launch or operator call; `serial_step_s` of one dependent step; `memory_bytes` the main memory.
    `cache_bytes` is the last-level cache that may hold a kernel's inputs before it starts, `cache_bytes_per_s` its
    speed (0: unknown, its traffic then counts as free). `host_s` is what the host needs to start a small torch
    operation (`host_pace`; None: unknown, then that of a typical host; 0: calls are captured in a
    graph, and wait for none). `notes` say where the figures come from.

    Raises: ValueError when a figure cannot be one.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    origin: Literal["probed", "data sheet"]
    matmul_flops_per_s: Mapping[str, float]
    vector_flops_per_s: float
    transcendental_per_s: float
    bytes_per_s: float
    launch_s: float
    serial_step_s: float
    memory_bytes: int
    capability: tuple[int, int] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    cache_bytes: int = 0
    cache_bytes_per_s: float = 0.0
    host_s: float | None = None
    notes: str = ""

    def __post_init__(self) -> None:
        ceilings = {
            **{f"matmul_flops_per_s[{dtype}]": rate for dtype, rate in self.matmul_flops_per_s.items()},
            "vector_flops_per_s": self.vector_flops_per_s,
            "transcendental_per_s": self.transcendental_per_s,
            "bytes_per_s": self.bytes_per_s,
        }
        costs = {
            "launch_s": self.launch_s,
            "serial_step_s": self.serial_step_s,
            "memory_bytes": self.memory_bytes,
            "cache_bytes": self.cache_bytes,
            "cache_bytes_per_s": self.cache_bytes_per_s,
        }
        if self.host_s is not None:
            costs["host_s"] = self.host_s
        wrong = [f"{name} = {value}" for name, value in ceilings.items() if not 0 < value < math.inf]
        wrong += [f"{name} = {value}" for name, value in costs.items() if not 0 <= value < math.inf]
        if not self.matmul_flops_per_s:
            wrong.append("matmul_flops_per_s is empty")
        if wrong:
            raise ValueError(f"device {self.name!r} has impossible figures: {', '.join(wrong)}")

    @property
    def family(self) -> str:
        """What devices of one design share: a figure about one of them says little about those of another family."""
        return FAMILIES.get(self.capability, self.name) if self.capability else self.name

    def to_json(self) -> str:
        """The text of the device file."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Device:
        """The device of this text. Raises ValueError when it is none of this format."""
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or content.pop("format_version", None) != FORMAT_VERSION:
                raise ValueError(f"format_version is not {FORMAT_VERSION}")
            if content.get("capability") is not None:
                content["capability"] = tuple(content["capability"])
            return cls(**content)
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from None

    def save(self, path: Path) -> None:
        """Write the device file (JSON)."""
        path.write_text(self.to_json())

    @classmethod
    def load(cls, path: Path) -> Device:
        """Read a device file. Raises ValueError when it is not one of this format."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a device file: {error}") from None
