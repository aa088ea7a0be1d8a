"""Latencies that NVIDIA measured and published, as timed rows: the tables of aiconfigurator-core (Apache-2.0).

They time kernels of three serving frameworks (inference: forward and decode, no backward, no memory) on eight NVIDIA
GPUs of five families. Get them with `pip download --no-deps aiconfigurator-core==0.12.0`, and unpack or install it.
Rows in bfloat16 are read of: causal and windowed attention over a prompt (`softmax_attention`), and the gated delta
rule over a prompt and one token at a time (`delta_rule`). The short convolutions beside it are left out: they would
move their bytes up to 17 times as fast as the device can, so they do not time what their columns say.

The work of a row is counted as `subquad_kernels` counts it, but that inference saves nothing for a backward.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from subquad_cost_model.device import Device
from subquad_cost_model.devices import load_device
from subquad_cost_model.rows import CostRow
from subquad_cost_model.shape_groups import fold, shape_group
from subquad_cost_model.timed_rows import TimedRow

SOURCE = "aiconfigurator-core"
CHUNK = 64
BYTES = 2  # of a bfloat16 element
SHIPPED = {"a100_sxm": "a100", "h100_sxm": "h100", "h200_sxm": "h200", "l40s": "l40s"}
# Name as the driver gives it, multiprocessors, highest clock in MHz, bytes of L2. Their systems/*.yaml have the rates
# but not these. Those of the RTX PRO 6000 are its data sheet's, at the clock that its yaml reports; Blackwell's are as
# third parties list them.
UNSTATED = {
    "b200_sxm": ("NVIDIA B200", 148, 1980, 126 * 2**20),
    "b300_sxm": ("NVIDIA B300 SXM6 AC", 148, 1980, 126 * 2**20),
    "gb200": ("NVIDIA GB200", 148, 2112, 126 * 2**20),
    "gb300": ("NVIDIA GB300", 148, 2112, 126 * 2**20),
    "rtx_pro_6000_server": ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 188, 2430, 128 * 2**20),
}
TABLES = ("attention/*/*/context_attention_perf.parquet", "linear_attention/*/*/gdn_perf.parquet")


class PublicTablesError(ValueError):
    """The folder does not hold the package's tables."""


def read_public_tables(folder: Path, *, most_rows: int | None = None) -> list[TimedRow]:
    """The tables below the package's folder (installed or unpacked), one row per kernel, shape and device.

    Shapes listed more than once (for several models, or versions of a framework) count once, by their median.
    `most_rows` per operator: whole shapes are kept, in the order of their hashes, until there are so many.

    Raises: PublicTablesError when the tables are not there; ModuleNotFoundError without the extra `data`.
    """
    systems = _systems(folder)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    rows: dict[tuple[str, str], CostRow] = {}
    devices = {name: _device(name, systems) for name in (*SHIPPED, *UNSTATED)}
    for name in devices:
        for pattern in TABLES:
            for path in sorted((systems / "data" / name).glob(pattern)):
                for row, latency_s in _rows(path):
                    rows[name, row.key] = row
                    seconds[name, row.key].append(latency_s)
    if not rows:
        raise PublicTablesError(f"{systems / 'data'} holds none of {', '.join(TABLES)}")
    kept = _kept(rows.values(), most_rows)
    return [
        _timed(row, devices[name], seconds[name, key]) for (name, key), row in rows.items() if shape_group(row) in kept
    ]


def _systems(folder: Path) -> Path:
    for candidate in (folder, folder / "systems", folder / "aiconfigurator_core" / "systems"):
        if (candidate / "data").is_dir():
            return candidate
    raise PublicTablesError(
        f"{folder} holds no tables of aiconfigurator-core: it should be the unpacked package "
        "(pip download --no-deps aiconfigurator-core==0.12.0, then unzip the wheel)"
    )


def _kept(rows: Any, most_rows: int | None) -> set[str]:
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        sizes[row.operator][shape_group(row)] += 1
    kept: set[str] = set()
    for groups in sizes.values():
        room = sum(groups.values()) if most_rows is None else most_rows
        for group in sorted(groups, key=lambda group: (fold(group, 2**60, "sample"), group)):
            if groups[group] > room:
                break
            room -= groups[group]
            kept.add(group)
    return kept


def _timed(row: CostRow, device: Device, seconds: list[float]) -> TimedRow:
    return TimedRow(
        row=row,
        device=device,
        status="ok",
        low_s=min(seconds),
        median_s=statistics.median(seconds),
        high_s=max(seconds),
        repeats=len(seconds),
        source=SOURCE,
    )


def _device(name: str, systems: Path) -> Device:
    if name in SHIPPED:
        return load_device(SHIPPED[name])
    import yaml

    gpu: Mapping[str, Any] = yaml.safe_load((systems / f"{name}.yaml").read_text(encoding="utf-8"))["gpu"]
    full_name, sms, clock_mhz, cache_bytes = UNSTATED[name]
    clock_hz = clock_mhz * 1e6
    fp32 = 2 * 128 * sms * clock_hz
    version = int(gpu["sm_version"])
    return Device(
        name=full_name,
        kind="cuda",
        origin="data sheet",
        matmul_flops_per_s={"bfloat16": float(gpu["bfloat16_tc_flops"]), "float32": fp32},
        vector_flops_per_s=fp32,
        transcendental_per_s=16 * sms * clock_hz,
        bytes_per_s=float(gpu["mem_bw"]),
        launch_s=5e-7,
        serial_step_s=4 / clock_hz,
        memory_bytes=int(gpu["mem_capacity"]),
        capability=(version // 10, version % 10),
        cache_bytes=cache_bytes,
        cache_bytes_per_s=64 * sms * clock_hz,
        notes=f"rates of aiconfigurator-core's {name}.yaml; {sms} SMs at {clock_mhz} MHz, as public_tables says",
    )


def _rows(path: Path) -> Iterator[tuple[CostRow, float]]:
    try:
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the tables are parquet: pip install 'subquad-cost-model[data]'") from None
    parse: Callable[[Mapping[str, Any]], CostRow | None] = _attention if "context" in path.name else _gated_delta
    columns = parquet.read_table(path, partitioning=None).to_pydict()
    for values in zip(*columns.values(), strict=True):
        record = dict(zip(columns, values, strict=True))
        row = parse(record)
        # A latency of 0 is a table's way of saying that it was not measured.
        if row is not None and record["latency"] > 0:
            yield row, record["latency"] * 1e-3


def _attention(record: Mapping[str, Any]) -> CostRow | None:
    if record["attn_dtype"] != "bfloat16" or record["kv_cache_dtype"] != "bfloat16" or record["step"]:
        return None
    b, t, h, h_kv = (record[name] for name in ("batch_size", "isl", "num_heads", "num_key_value_heads"))
    width, window = record["head_dim"], record.get("window_size", 0)  # older tables have no windows
    pairs = (
        b * h * (t * (t + 1) // 2 if not window or t <= window else window * (window + 1) // 2 + (t - window) * window)
    )
    return CostRow(
        operator="softmax_attention",
        kernel=_kernel(record),
        phase="forward",
        dtype="bfloat16",
        shape={"b": b, "t": t, "s": t, "h": h, "h_kv": h_kv, "k": width, "v": width},
        options={"causal": True, "window": window},
        matmul_flops=4 * pairs * width,
        vector_flops=4 * pairs,
        transcendental_ops=pairs + b * h * t,
        bytes_moved=2 * b * t * (h + h_kv) * width * BYTES,
    )


def _gated_delta(record: Mapping[str, Any]) -> CostRow | None:
    b, t = record["batch_size"], record["seq_len"]
    h_k, n, h, p = (record[name] for name in ("num_k_heads", "head_k_dim", "num_v_heads", "head_v_dim"))
    phase = {"context": "forward", "generation": "decode"}.get(record["phase"])
    if phase is None:
        return None
    if "gated_delta_rule" not in record["kernel_source"]:
        return None
    tokens, states = b * t * h, b * h * n * p
    moved = (
        2 * b * t * h_k * n * BYTES + tokens * (2 * p * BYTES + 2 * 4) + states * 4 * (2 if phase == "decode" else 1)
    )
    serial = {"vector_flops": 7 * tokens * n * p, "transcendental_ops": tokens}
    chunked = {
        "matmul_flops": tokens * (2 * CHUNK * (3 * n + 2 * p) + 6 * n * p),
        "transcendental_ops": tokens * CHUNK,
        "serial_steps": -(-t // CHUNK),
    }
    return CostRow(
        operator="delta_rule",
        kernel=_kernel(record),
        phase=phase,
        dtype="bfloat16",
        shape={"b": b, "t": t, "h": h, "h_k": h_k, "n": n, "p": p},
        options={"decay": "scalar", "write_gate": True, "low_rank": False, "initial_state": phase == "decode"},
        bytes_moved=moved,
        **(serial if t == 1 else chunked),
    )


def _kernel(record: Mapping[str, Any]) -> str:
    return f"{record['framework'].lower()}:{record['kernel_source']}"
