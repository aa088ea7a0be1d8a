"""Count the work of recorded rows anew, as the declarations of today count it:
recount_rows.py [--without OPERATOR/KERNEL,...] [--as-timed OPERATOR/KERNEL,...] [--without-stale] ROWS.parquet ...

Seconds, bytes and versions stay as they were measured. Rows of kernels that are no longer declared stay whole, and
those of the kernels named by `--without` are left out: what was timed of code that computes otherwise today. Those
named by `--as-timed` stay whole as well: their code has since come to walk fewer steps, and what was timed is theirs.
`--without-stale` leaves out what `STALE` says was timed of other code, by kernel, date and workload alone.
Tables of versions that did not keep the lengths of packed documents are given them: `measure` draws them from seed 0.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import subquad_kernels.operators  # noqa: F401  (registers what is declared)
from subquad.compiler.workload import cost_row
from subquad_cost_model import CostRow, TimedRow, read_timed_rows, write_timed_rows
from subquad_kernels.catalogue import CATALOGUE, CatalogueError
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.workload import Workload


def other_heads(row: CostRow) -> bool:
    """Half precision whose heads share keys, or are wider than 64 columns in keys and in values."""
    shape = row.shape
    wide = min(shape["n"], shape["p"]) > 64
    return row.dtype in ("bfloat16", "float16") and (shape["h_k"] < shape["h"] or wide)


def tiled_heads(row: CostRow) -> bool:
    """Heads of half precision that have more than 64 columns in keys and in values, and more than 128 in either."""
    shape = row.shape
    wide = row.phase != "decode" and min(shape["n"], shape["p"]) > 64 and max(shape["n"], shape["p"]) > 128
    return row.dtype in ("bfloat16", "float16") and wide


def half_backward(row: CostRow) -> bool:
    """Gradients in half precision."""
    return row.phase == "backward" and row.dtype in ("bfloat16", "float16")


STALE: Mapping[str, tuple[tuple[str, Callable[[CostRow], bool]], ...]] = {
    "gated_linear_attention/fused": (("2026-11-29T10", lambda row: True),),
    "delta_rule/fused": (("2026-11-30", lambda row: True),),
    "delta_rule/fused_diagonal": (("2026-11-30", lambda row: True),),
    "segment_attention/tiled": (("2026-11-30", lambda row: True),),
    "segment_attention/compacted": (("2026-11-30T07:16", lambda row: row.phase == "backward"),),
    "segment_attention/sdpa_merge": (("2026-11-30T14", half_backward),),
    "causal_conv/fused": (("2026-11-30", lambda row: row.phase == "decode"),),
    "selective_scan/fused": (("2026-11-30", lambda row: row.phase != "decode"),),
    "linear_attention/fused": (("2026-11-30", other_heads), ("2026-11-30T06", tiled_heads)),
}
"""Kernels that compute otherwise since a date, and in which workloads: what was timed before is of other code."""


def is_stale(timed: TimedRow) -> bool:
    """Whether the row is of code that has changed, by its kernel, date and workload alone, never by a model's error."""
    rules = STALE.get(f"{timed.row.operator}/{timed.row.kernel}", ())
    return any(timed.date < since and changed(timed.row) for since, changed in rules)


def recounted(row: CostRow) -> CostRow:
    """The row with its work counted by the operator and kernel of its names."""
    try:
        operator, kernel = CATALOGUE.operator(row.operator), CATALOGUE.kernel(row.operator, row.kernel)
    except CatalogueError:
        return row
    lengths = row.document_lengths
    if "documents" in row.shape and not lengths:
        boundaries = draw_boundaries(row.shape, 0, "cpu")
        assert boundaries is not None
        lengths = tuple(boundaries.diff().tolist())
    workload = Workload(
        operator=row.operator,
        shape=row.shape,
        dtype=row.dtype,  # type: ignore[arg-type]
        phase=row.phase,  # type: ignore[arg-type]
        options=row.options,
        document_lengths=lengths,
    )
    return replace(cost_row(operator, kernel, workload), kernel_version=row.kernel_version)


def main() -> None:
    """Write each table anew and say what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--without", default="", help="kernels whose rows are left out, with commas between")
    parser.add_argument("--as-timed", default="", help="kernels whose rows stay as they are")
    parser.add_argument("--without-stale", action="store_true", help="leave out rows of code that has changed since")
    given = parser.parse_args()
    for path in given.tables:
        held = read_timed_rows(path)
        rows = [row for row in held if f"{row.row.operator}/{row.row.kernel}" not in given.without.split(",")]
        if given.without_stale:
            rows = [row for row in rows if not is_stale(row)]
        kept = given.as_timed.split(",")
        counted = [
            row if f"{row.row.operator}/{row.row.kernel}" in kept else replace(row, row=recounted(row.row))
            for row in rows
        ]
        names = ("matmul_flops", "vector_flops", "transcendental_ops", "bytes_moved", "serial_steps", "saved_bytes",
                 "launches", "padding")  # fmt: skip
        changed = Counter(
            f"{before.row.operator} {name}"
            for before, after in zip(rows, counted, strict=True)
            for name in names
            if getattr(before.row, name) != getattr(after.row, name)
        )
        write_timed_rows(path, counted)
        print(f"{path}: {len(rows)} of {len(held)} rows; changed {dict(changed) or 'nothing'}")


if __name__ == "__main__":
    main()
