"""What is asked, what it costs at least, and where it runs: plain data, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["forward", "backward", "decode"]
DType = Literal["float64", "float32", "bfloat16", "float16"]
Option = bool | int | float | str

ELEMENT_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One call of an operator that has a latency: shapes, element type, phase and options.

    `shape` maps axis names to lengths (`b` batch, `t` query tokens, `s` key tokens or summaries, `h` heads, `k` key
    width, `v` value width, `c` channels, `n` state size, `w` taps, `documents` when packed); which axes an operator
    uses is stated by its declaration. `options` are the operator's non-tensor arguments (causal, window,
    segment_len, ...). `phase` is `forward`, `backward` (the gradient alone) or `decode` (one token with a carry).
    `document_lengths` are the tokens of each packed document where they are known: work and launches are then those of
    these documents. They are no part of what identifies a workload.
    """

    operator: str
    shape: Mapping[str, int]
    dtype: DType
    phase: Phase = "forward"
    options: Mapping[str, Option] = field(default_factory=dict)
    document_lengths: tuple[int, ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        """Canonical JSON: equal workloads, and only they, have equal keys."""
        return json.dumps(
            {
                "operator": self.operator,
                "shape": dict(self.shape),
                "dtype": self.dtype,
                "phase": self.phase,
                "options": dict(self.options),
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of the workload's dtype."""
        return ELEMENT_BYTES[self.dtype]

    def __hash__(self) -> int:
        return hash(self.key)


def counted_documents(workload: Workload) -> tuple[int, ...]:
    """Tokens of each document whose pairs are counted: t where nothing is packed, else those that are known.

    Where they are not, equal parts of t: no others have fewer pairs.
    """
    t, documents = workload.shape["t"], workload.shape.get("documents", 0) or 1
    return workload.document_lengths or (-(-t // documents),) * documents


def longest_document(workload: Workload) -> int:
    """Tokens of the longest document: t where nothing is packed.

    Where lengths are not known, what is to be expected where ends are drawn evenly:
        t / D (1 + 1/2 + ... + 1/D)      (the longest of D parts of a broken stick, Holst 1980)
    """
    if workload.document_lengths:
        return max(workload.document_lengths)
    t, documents = workload.shape.get("t", 1), workload.shape.get("documents", 0)
    return round(t / documents * sum(1 / place for place in range(1, documents + 1))) if documents else t


def token_steps(workload: Workload) -> int:
    """Steps of a kernel that goes from token to token: as many as the longest document has, and back in a backward."""
    if workload.phase == "decode":
        return 1
    return longest_document(workload) * (2 if workload.phase == "backward" else 1)


def document_sizes(workload: Workload) -> int:
    """Into how many powers of two the lengths of packed documents fall, 1 where nothing is packed.

    Where lengths are not known, what is to be expected.
    """
    if workload.document_lengths:
        return max(1, len({(length - 1).bit_length() for length in workload.document_lengths if length}))
    documents = workload.shape.get("documents", 0)
    return min(documents, 3 * documents.bit_length() // 2) if documents else 1


def longest_of_sizes(workload: Workload) -> tuple[int, ...]:
    """Tokens of the longest document of each size (`document_sizes`): those of a size are laid side by side.

    t where nothing is packed. Where lengths are not known, the longest to be expected, half of it, and so on.
    """
    longest: dict[int, int] = {}
    for length in filter(None, workload.document_lengths):
        size = (length - 1).bit_length()
        longest[size] = max(length, longest.get(size, 0))
    expected = longest_document(workload)
    return tuple(longest.values()) or tuple(max(1, expected >> halved) for halved in range(document_sizes(workload)))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a workload costs on any device: counted from its shape, never measured.

    A multiply-add is 2 FLOPs. `matmul_flops` can run on tensor cores, `vector_flops` cannot; `transcendental_ops` are
    exponentials and the like; `bytes_moved` is each input read once and each output written once; `serial_steps` is
    the longest chain of dependent steps; `saved_bytes` is what the forward keeps for the backward.
    """

    matmul_flops: int = 0
    vector_flops: int = 0
    transcendental_ops: int = 0
    bytes_moved: int = 0
    serial_steps: int = 1
    saved_bytes: int = 0

    @property
    def flops(self) -> int:
        """All arithmetic, matrix products and elementwise together."""
        return self.matmul_flops + self.vector_flops


@dataclass(frozen=True, kw_only=True)
class DeviceLimits:
    """What a kernel may need to know before it says that it supports a workload here.

    `kind` is `cpu` or `cuda`; `capability` is CUDA's compute capability, None elsewhere.
    """

    kind: Literal["cpu", "cuda"]
    name: str
    capability: tuple[int, int] | None = None
    memory_bytes: int = 0
    shared_memory_bytes: int = 0
    dtypes: frozenset[str] = frozenset({"float64", "float32", "bfloat16", "float16"})
