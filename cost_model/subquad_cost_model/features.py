"""What a learned model sees of a row on a device: an ordered list of numbers, and four words.

The device's name is never among them, nor its compute capability as a number: trees would know devices by heart, and
have nothing to say about the next one. A device is its ceilings, their ratios, and what it can do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from subquad_cost_model.bound import BoundTerms, bound_terms, launches_s, matmul_ceiling
from subquad_cost_model.device import Device
from subquad_cost_model.rows import CostRow

Floats = NDArray[np.float64]

VERSION = 1
# Axes and lengths among the options that operators use; what an operator lacks is a missing value.
AXES = ("b", "t", "s", "h", "h_k", "h_kv", "k", "v", "n", "p", "g", "c", "d", "w", "m", "documents")
LENGTHS = ("window", "segment_len")
WORK = ("matmul_flops", "vector_flops", "transcendental_ops", "bytes_moved", "serial_steps", "saved_bytes")
TILE = 64
"""Tokens per program: kernels take 16 to 256, most 64 or 128."""
# Special-function units give 16 results per SM and clock, and a dependent multiply-add takes 4 clocks (`devices`).
EXP_PER_SM_AND_STEP = 64

CATEGORIES = ("operator", "kernel", "dtype", "variant")
NUMBERS = (
    *(f"log2 {name}" for name in WORK),
    *(f"log2 {name}" for name in BoundTerms._fields),
    "log2 bound_s",
    "log2 bound / launch",
    "log2 matmul / memory",
    "log2 transcendental / matmul",
    "log2 vector / memory",
    "log2 serial / bound",
    "log2 bytes / cache",
    *(f"log2 {axis}" for axis in AXES),
    *(f"log2 {length}" for length in LENGTHS),
    "log2 t / window",
    "log2 heads per sm",
    "log2 waves",
    "wave efficiency",
    "padding of t",
    "padding of width",
    "log2 sms",
    "log2 step_s",
    "log2 matmul rate per sm",
    "log2 matmul rate / bandwidth",
    "log2 matmul rate / vector rate",
    "log2 cache / sm",
    "log2 cache rate / bandwidth",
    "has fp8",
    "has tma",
    "has tensor memory",
    "probed",
)
NAMES = (*NUMBERS, *CATEGORIES)


def schema_hash() -> str:
    """Of the ordered names: a model fitted to other features must not be asked with these."""
    text = json.dumps([VERSION, NAMES], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def words(row: CostRow) -> tuple[str, str, str, str]:
    """The row's categories: operator, kernel (with its operator), dtype, and the options that are no lengths."""
    variant = tuple((name, value) for name, value in row.options.items() if isinstance(value, bool | str))
    return row.operator, f"{row.operator}/{row.kernel}", row.dtype, _as_json(variant)


@lru_cache(maxsize=4096)
def _as_json(pairs: tuple[tuple[str, bool | str], ...]) -> str:
    """Thousands of rows share a few variants."""
    return json.dumps(dict(pairs), sort_keys=True)


@dataclass(frozen=True)
class Vocabulary:
    """The words of each category that a model knows, sorted; others are missing values."""

    words: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, rows: Iterable[CostRow]) -> Vocabulary:
        """The words of these rows."""
        found = [set(column) for column in zip(*{words(row) for row in rows}, strict=True)]
        return cls({name: sorted(column) for name, column in zip(CATEGORIES, found, strict=True)})

    def codes(self, rows: Sequence[CostRow]) -> Floats:
        """One column of numbers per category."""
        tables = [{word: float(code) for code, word in enumerate(self.words[name])} for name in CATEGORIES]
        coded = [[table.get(word, np.nan) for table, word in zip(tables, words(row), strict=True)] for row in rows]
        return np.asarray(coded, dtype=np.float64).reshape(len(rows), len(CATEGORIES))


def feature_matrix(rows: Sequence[CostRow], devices: Sequence[Device], vocabulary: Vocabulary) -> Floats:
    """One line per row on its device, one column per name of `NAMES`; NaN is a missing value."""
    work = np.array([[getattr(row, name) for name in WORK] for row in rows], dtype=np.float64).reshape(-1, len(WORK))
    pairs = list(zip(rows, devices, strict=True))
    terms = np.array([bound_terms(row, device) for row, device in pairs]).reshape(-1, len(BoundTerms._fields))
    axes = np.array([[row.shape.get(axis, np.nan) for axis in AXES] for row in rows]).reshape(-1, len(AXES))
    lengths = np.array([[_length(row, name) for name in LENGTHS] for row in rows]).reshape(-1, len(LENGTHS))
    hardware = {id(device): _hardware(device) for device in devices}
    of_device = np.array([hardware[id(device)] for device in devices]).reshape(len(devices), -1)
    rate = np.array([matmul_ceiling(row.dtype, device) for row, device in pairs])
    sms, step_s, bandwidth, vector_rate, cache, cache_rate, launch_s = of_device[:, :7].T
    later_s = np.array([launches_s(row, device) for row, device in pairs])
    bound_s = launch_s + np.maximum(terms.max(axis=1, initial=0.0), later_s)
    matmul_s, vector_s, transcendental_s, memory_s, serial_s = terms.T
    axis = dict(zip(AXES, axes.T, strict=True))
    t = axis["t"]
    # Channels stand in for heads where an operator has none, in groups of 64.
    heads = axis["b"] * np.where(np.isnan(axis["h"]), np.ceil(axis["c"] / 64), axis["h"])
    waves = heads * np.ceil(t / TILE) / sms
    columns = [
        *_log2(work + 1).T,
        *_log2(terms).T,
        _log2(bound_s),
        _log2(bound_s / _positive(launch_s)),
        _log2(matmul_s / _positive(memory_s)),
        _log2(transcendental_s / _positive(matmul_s)),
        _log2(vector_s / _positive(memory_s)),
        _log2(serial_s / bound_s),
        _log2(work[:, WORK.index("bytes_moved")] / _positive(cache)),
        *_log2(axes).T,
        *_log2(lengths).T,
        _log2(t / lengths[:, 0]),
        _log2(heads / sms),
        _log2(waves),
        waves / np.ceil(waves),
        np.ceil(t / TILE) * TILE / t,
        _padding(np.where(np.isnan(axis["k"]), axis["n"], axis["k"])),
        _log2(sms),
        _log2(step_s),
        _log2(rate / sms),
        _log2(rate / bandwidth),
        _log2(rate / vector_rate),
        _log2(cache / sms),
        _log2(cache_rate / bandwidth),
        *of_device[:, 7:].T,
    ]
    return np.column_stack([*columns, vocabulary.codes(rows)])


def _hardware(device: Device) -> list[float]:
    capability = device.capability or (0, 0)
    sms = device.transcendental_per_s * device.serial_step_s / EXP_PER_SM_AND_STEP
    return [
        sms or np.nan,
        device.serial_step_s,
        device.bytes_per_s,
        device.vector_flops_per_s,
        device.cache_bytes,
        device.cache_bytes_per_s,
        device.launch_s,
        capability >= (8, 9),
        capability[0] >= 9,
        capability[0] in (10, 11),
        device.origin == "probed",
    ]


def _length(row: CostRow, name: str) -> float:
    value = row.options.get(name)
    return float(value) if isinstance(value, int | float) and value else np.nan


def _padding(width: Floats) -> Floats:
    return np.exp2(np.ceil(_log2(width))) / width


def _positive(values: Floats) -> Floats:
    return np.where(values > 0, values, np.nan)


def _log2(values: Floats) -> Floats:
    return np.log2(np.where(values > 0, values, np.nan))
