"""The workloads worth measuring: drawn over the ranges that models use, from what each operator declares of itself.

A layout is what kernels are compiled and checked for: options, dtype, widths, heads, packed or not. Lengths, batches
and numbers of documents are free within one, so that hundreds of shapes share what was compiled for their layout.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from subquad_kernels.catalogue import Operator
from subquad_kernels.workload import DType, Option, Workload


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """How far lengths reach on a kind of device (smallest and largest, drawn evenly in their logarithm)."""

    t: tuple[int, int]
    b: tuple[int, int]
    decode_b: tuple[int, int]
    most_tokens: int  # b t of one call
    documents: tuple[int, int]
    widths: tuple[int, ...]  # of heads; what is listed twice is drawn twice as often
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    lengths: Mapping[str, tuple[int, ...]]  # of options that are lengths
    dtypes: tuple[DType, ...]


# Widths, heads, channels, windows: those of published models from 100 M to 70 B. Heads of one layout are all multiples
# of 16 or none is, and channels all are: Triton compiles for that. Windows and segments are few: each is a self-check.
RANGES: Mapping[str, Ranges] = {
    "cpu": Ranges(
        t=(32, 512), b=(1, 2), decode_b=(1, 4), most_tokens=512, documents=(2, 8), widths=(32, 16), heads=(2, 4),
        channels=(64, 128, 192), lengths={"window": (0, 64), "segment_len": (10, 16)}, dtypes=("float32", "bfloat16"),
    ),
    "cuda": Ranges(
        t=(128, 131_072), b=(1, 64), decode_b=(1, 256), most_tokens=1 << 18, documents=(2, 128),
        widths=(64, 128, 128, 64, 32, 256), heads=(16, 32, 48, 4, 8, 12),
        channels=(512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 8192),
        lengths={"window": (0, 0, 128, 512, 2048), "segment_len": (10, 16, 64, 256)},
        dtypes=("bfloat16", "bfloat16", "bfloat16", "bfloat16", "float16", "bfloat16", "bfloat16", "float32"),
    ),
}  # fmt: skip
KINDS = ("packed", "whole", "decode")
"""Of layouts: packed documents, whole sequences, one token after others."""
STATES = (16, 16, 64, 32, 8)
"""States of a channel; Mamba has 16."""
GROUPS = (1, 4, 1, 8)
"""Heads that share one key head."""
KEY_HEADS = {"h_kv", "h_k"}
"""Their axes."""
NORMED = (0, 64, 128, 0, 256)
"""Channels that are normed together, as those of a head; 0: all of a token."""
TAPS = (4, 4, 3, 2)
SWITCHES = {"causal": (True, True, True, False)}
"""Options by which work halves, whose other side no example need declare."""
LONG = 8192
"""Tokens of the sequence that is compiled for beside the smallest workload."""
PACKED, JITTERED = 1 / 3, 1 / 2
"""The share of layouts that are packed, and of lengths that are not made multiples of 64."""


def layouts(operator: Operator, kind: str, count: int, *, seed: int = 0) -> list[Workload]:
    """At most `count` different layouts, each by its smallest workload; one in four decodes, if not all do.

    Options are those of the operator's examples, in turn; where an example with options of the same names is packed,
    one layout in three is. Heads share keys where those of an example with these options do.
    """
    ranges, draw = RANGES[kind], random.Random(f"{operator.name} layouts {seed}")
    base = operator.benchmarks.get(kind) or next(iter(operator.examples), None)
    if base is None:
        return []
    forward = _variants([base, *(example for example in operator.examples if example.phase != "decode")])
    decoded = _variants([example for example in operator.examples if example.phase == "decode"])
    packable = {frozenset(example.options) for example in operator.examples if "documents" in example.shape}
    sharing = [
        _words(example.options)
        for example in operator.examples
        if any(example.shape[axis] < example.shape["h"] for axis in KEY_HEADS & example.shape.keys())
    ]
    dtypes = [dtype for dtype in ranges.dtypes if dtype in operator.tolerances] or [base.dtype]
    found: dict[str, Workload] = {}
    for number in range(20 * count):
        if len(found) == count:
            break
        decode = bool(decoded) and (number % 4 == 3 or base.phase == "decode")
        variants = decoded if decode else forward
        layout = replace(
            base,
            phase="decode" if decode else "forward",
            dtype=draw.choice(dtypes) if number else base.dtype,
            options=_options(variants[number % len(variants)], ranges, draw),
            shape=_widths(base.shape, ranges, draw),
        )
        if layout.options.get("shared") and layout.shape["g"] == 1:  # groups share a weight: there are some
            layout = replace(layout, shape=dict(layout.shape) | {"g": _groups(layout.shape["c"], max(NORMED))})
        if _words(layout.options) not in sharing:
            own = {axis: layout.shape["h"] for axis in KEY_HEADS & layout.shape.keys()}
            layout = replace(layout, shape=dict(layout.shape) | own)
        packed = frozenset(layout.options) in packable and not decode and draw.random() < PACKED
        size = (1, 2 * ranges.t[0], 2) if packed else (2, ranges.t[0], 0)
        smallest = _sized(layout, *size)
        # Channels are free within a layout, as lengths are; what is normed together is not.
        free = {"c": 0, **({"g": _normed(smallest.shape)} if "g" in smallest.shape else {})}
        found.setdefault(replace(smallest, shape=dict(smallest.shape) | free).key, smallest)
    return list(found.values())


def kind_of(layout: Workload) -> str:
    """Which of `KINDS` a layout is."""
    return "decode" if layout.phase == "decode" else "packed" if "documents" in layout.shape else "whole"


def shapes(layout: Workload, kind: str, count: int, *, seed: int = 0) -> list[Workload]:
    """At most `count` different workloads of a layout, the layout itself among them."""
    ranges, draw = RANGES[kind], random.Random(f"{layout.key} shapes {seed}")
    found = {layout.key: layout}
    for _ in range(4 * count):
        if len(found) >= count:
            break
        workload = _drawn(layout, ranges, draw)
        found.setdefault(workload.key, workload)
    return list(found.values())


def stretched(layout: Workload) -> Workload:
    """A layout as one long sequence, or a few: kernels that share it among programs are those of its longer shapes."""
    return _sized(layout, 1, LONG, 4 if "documents" in layout.shape else 0)


def _variants(workloads: Sequence[Workload]) -> list[Mapping[str, Option]]:
    """The different sets of options, lengths aside."""
    found: list[Mapping[str, Option]] = []
    for workload in workloads:
        if _words(workload.options) not in [_words(other) for other in found]:
            found.append(workload.options)
    return found


def _words(options: Mapping[str, Option]) -> dict[str, Option]:
    return {name: value for name, value in options.items() if isinstance(value, bool | str)}


def _options(variant: Mapping[str, Option], ranges: Ranges, draw: random.Random) -> dict[str, Option]:
    options = dict(variant)
    for name in options:
        if name in ranges.lengths:
            options[name] = draw.choice(ranges.lengths[name])
        elif name in SWITCHES:
            options[name] = draw.choice(SWITCHES[name])
    return options


def _widths(shape: Mapping[str, int], ranges: Ranges, draw: random.Random) -> dict[str, int]:
    """The shape with other widths; `t`, `b` and what follows from them are left to `_sized`."""
    found = dict(shape)
    width = draw.choice(ranges.widths)
    for axis in ("k", "v", "n", "p"):
        if axis in found:
            found[axis] = width
    if "c" in found:
        found["c"] = draw.choice(ranges.channels)
        if "n" in found:
            found["n"] = draw.choice(STATES)
    if "g" in found:
        found["g"] = _groups(found["c"], draw.choice(NORMED))
    if "w" in found:
        found["w"] = draw.choice(TAPS)
    if "h" in found:
        found["h"] = draw.choice(ranges.heads)
        group = draw.choice(GROUPS)
        for axis in KEY_HEADS & found.keys():
            found[axis] = max(1, found["h"] // group)
    return found


def _drawn(layout: Workload, ranges: Ranges, draw: random.Random) -> Workload:
    changed = dict(layout.shape)
    if "c" in changed:
        changed["c"] = draw.choice(ranges.channels)
    if "g" in changed:
        changed["g"] = _groups(changed["c"], _normed(layout.shape))
    layout = replace(layout, shape=changed)
    t = _length(ranges.t, draw)
    if "documents" in layout.shape:
        # A document has 16 tokens and more, on average.
        return _sized(layout, 1, t, min(_between(ranges.documents, draw), max(2, t // 16)))
    largest = ranges.decode_b[1] if layout.phase == "decode" else max(1, min(ranges.b[1], ranges.most_tokens // t))
    return _sized(layout, _between((1, largest), draw), t, 0)


def _sized(layout: Workload, b: int, t: int, documents: int) -> Workload:
    """The layout at a size. A decode has one token after `t` others; a forward starts without a past."""
    shape = dict(layout.shape) | {"b": b, "t": 1 if layout.phase == "decode" else t}
    if "s" in shape:
        shape["s"] = t
    if "m" in shape:
        past = t if layout.phase == "decode" else 0
        # A summary for every segment, or a state for every bit of the length.
        length = layout.options.get("segment_len")
        shape["m"] = past.bit_length() if length is None else past // int(length)
    shape.pop("documents", None)
    if documents:
        shape["documents"] = documents
    return replace(layout, shape=shape)


def _groups(channels: int, normed: int) -> int:
    """So many channels normed together make so many groups: two at least, unless all are one."""
    return max(2, channels // normed) if normed else 1


def _normed(shape: Mapping[str, int]) -> int:
    """How many channels are normed together; 0 for all."""
    return shape["c"] // shape["g"] if shape["g"] > 1 else 0


def _length(bounds: tuple[int, int], draw: random.Random) -> int:
    length = _between(bounds, draw)
    return length if draw.random() < JITTERED else max(bounds[0], 64 * round(length / 64))


def _between(bounds: tuple[int, int], draw: random.Random) -> int:
    return round(math.exp(draw.uniform(math.log(bounds[0]), math.log(bounds[1]))))
