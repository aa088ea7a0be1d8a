"""Published tables become timed rows whose work can be told by hand; what does not belong is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from subquad_cost_model import lower_bound_s
from subquad_cost_model.public_tables import PublicTablesError, read_public_tables

YAML = """
gpu:
  mem_bw: 7700000000000
  mem_capacity: 193273528320
  bfloat16_tc_flops: 2250000000000000
  sm_version: 100
"""
ATTENTION = {
    "framework": "VLLM", "version": "1", "kernel_source": "fa", "batch_size": 2, "isl": 1024, "num_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "step": 0,
    "window_size": 0, "latency": 0.5,
}  # fmt: skip
DELTA = {
    "framework": "SGLang", "version": "1", "kernel_source": "chunk_gated_delta_rule", "phase": "context",
    "batch_size": 2, "seq_len": 1000, "d_conv": 4, "num_k_heads": 2, "head_k_dim": 128, "num_v_heads": 4,
    "head_v_dim": 128, "latency": 2.0,
}  # fmt: skip


def write(folder: Path, system: str, table: str, records: list[dict[str, Any]]) -> None:
    kind = "attention" if "attention" in table else "linear_attention"
    path = folder / "systems" / "data" / system / kind / "vllm" / "1" / f"{table}_perf.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [record.get(name) for record in records] for name in records[0]}
    parquet.write_table(pa.table(columns), path)
    for name in ("b200_sxm", "b300_sxm", "gb200", "gb300", "rtx_pro_6000_server"):
        (folder / "systems" / f"{name}.yaml").write_text(YAML)


def test_attention_counts_the_pairs_that_the_mask_leaves(tmp_path: Path) -> None:
    windowed = ATTENTION | {"window_size": 100, "isl": 300, "latency": 0.25}
    write(tmp_path, "h100_sxm", "context_attention", [ATTENTION, windowed])
    full, window = read_public_tables(tmp_path)
    assert full.row.shape == {"b": 2, "t": 1024, "s": 1024, "h": 8, "h_kv": 2, "k": 64, "v": 64}
    assert (full.row.kernel, full.row.phase, full.seconds) == ("vllm:fa", "forward", 0.5e-3)
    assert full.device.name == "NVIDIA H100 80GB HBM3"
    pairs = sum(1 for query in range(1024) for key in range(1024) if key <= query)
    assert full.row.matmul_flops == 2 * 8 * pairs * 64 * 4
    assert full.row.bytes_moved == 2 * 2 * 1024 * 64 * (8 + 2 + 2 + 8)
    seen = sum(1 for query in range(300) for key in range(300) if query - 100 < key <= query)
    assert window.row.matmul_flops == 2 * 8 * seen * 64 * 4
    assert window.row.options == {"causal": True, "window": 100}


def test_the_delta_rule_has_a_prompt_and_a_token_and_convolutions_are_left_out(tmp_path: Path) -> None:
    decode = DELTA | {"phase": "generation", "seq_len": 1, "kernel_source": "fused_recurrent_gated_delta_rule"}
    conv = DELTA | {"kernel_source": "causal_conv1d_fn"}
    write(tmp_path, "b200_sxm", "gdn", [DELTA, decode, conv, DELTA | {"phase": "verify"}])
    prompt, token = read_public_tables(tmp_path)
    assert (prompt.row.operator, prompt.row.phase, token.row.phase) == ("delta_rule", "forward", "decode")
    # Keys with keys, the inverse with keys and values, scores, their product with writes; three with the state.
    per_token = 2 * 64 * (3 * 128 + 2 * 128) + 6 * 128 * 128
    assert prompt.row.matmul_flops == 2 * 1000 * 4 * per_token
    assert prompt.row.serial_steps == 16
    assert token.row.matmul_flops == 0
    assert token.row.vector_flops == 7 * 2 * 4 * 128 * 128
    assert (prompt.device.name, prompt.device.capability) == ("NVIDIA B200", (10, 0))
    assert prompt.device.bytes_per_s == 7.7e12
    assert prompt.seconds > lower_bound_s(prompt.row, prompt.device)


def test_other_dtypes_and_what_was_not_measured_are_left_out(tmp_path: Path) -> None:
    others = [
        {"attn_dtype": "fp8"}, {"kv_cache_dtype": "fp8"}, {"step": 128}, {"latency": 0.0}, {"batch_size": 3},
    ]  # fmt: skip
    write(tmp_path, "l40s", "context_attention", [ATTENTION | other for other in others])
    (left,) = read_public_tables(tmp_path)
    assert left.row.shape["b"] == 3


def test_a_shape_listed_twice_counts_once_by_its_median(tmp_path: Path) -> None:
    latencies = [0.5, 0.7, 0.6]
    write(tmp_path, "a100_sxm", "context_attention", [ATTENTION | {"latency": latency} for latency in latencies])
    (row,) = read_public_tables(tmp_path)
    assert (row.low_s, row.median_s, row.high_s, row.repeats) == pytest.approx((0.5e-3, 0.6e-3, 0.7e-3, 3))


def test_a_sample_keeps_whole_shapes_and_is_part_of_any_larger_one(tmp_path: Path) -> None:
    records = [ATTENTION | {"batch_size": b, "framework": f} for b in range(1, 21) for f in ("VLLM", "TRTLLM")]
    for system in ("h100_sxm", "l40s"):
        write(tmp_path, system, "context_attention", records)
    small, large = (read_public_tables(tmp_path, most_rows=most) for most in (14, 41))
    assert (len(small), len(large)) == (12, 40)  # whole shapes of four rows each
    assert {row.row.key for row in small} < {row.row.key for row in large}


def test_a_folder_without_the_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublicTablesError, match="pip download --no-deps aiconfigurator-core"):
        read_public_tables(tmp_path)
    (tmp_path / "systems" / "data").mkdir(parents=True)
    for name in ("b200_sxm", "b300_sxm", "gb200", "gb300", "rtx_pro_6000_server"):
        (tmp_path / "systems" / f"{name}.yaml").write_text(YAML)
    with pytest.raises(PublicTablesError, match="holds none of"):
        read_public_tables(tmp_path)
