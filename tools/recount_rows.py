"""Count the work of recorded rows anew, as the declarations of today count it:
recount_rows.py [--without OPERATOR/KERNEL,...] [--as-timed OPERATOR/KERNEL,...] [--without-stale] ROWS.parquet ...

Seconds, bytes and versions stay as they were measured. Rows of kernels that are no longer declared stay whole, and
those of the kernels named by `--without` are left out: what was timed of code that computes otherwise today. Those
named by `--as-timed` stay whole as well: their code has since come to walk fewer steps, and what was timed is theirs.
`--without-stale` leaves out what `STALE` says was timed of other code, by kernel, date and workload alone, what was
disturbed while it was timed, by its own repeats alone (`APART`), what waited for the host where the kernel has been
captured since, and phases of kernels of which all tables together
then hold too few rows to learn from (`LEAST_ROWS`): they are left to the roofline, and measured.
Tables of versions that did not keep the lengths of packed documents are given them: `measure` draws them from seed 0.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import subquad_kernels.operators  # noqa: F401  (registers what is declared)
from subquad.compiler.workload import cost_row
from subquad_cost_model import CostRow, TimedRow, read_timed_rows, write_timed_rows
from subquad_cost_model.terms import head_start_s
from subquad_kernels.catalogue import CATALOGUE, CatalogueError
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.segment_attention.tilings import step_launch
from subquad_kernels.workload import ELEMENT_BYTES, Workload


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


def packed(row: CostRow) -> bool:
    """Packed documents: their layouts are worked out once for all calls that share the boundaries now."""
    return "documents" in row.shape


def by_tiles(row: CostRow) -> bool:
    """One token whose query heads share keys, or that sees more than one tile of summaries."""
    if row.phase != "decode":
        return False
    b, h, h_kv, k, v, m = (row.shape[axis] for axis in ("b", "h", "h_kv", "k", "v", "m"))
    return step_launch(b, h, h_kv, k, v, m, element_bytes=ELEMENT_BYTES[row.dtype]).rows > 1


ALONG_DOCUMENTS = ("2026-12-01T15", packed)
"""Until then kernels composed of torch's own asked the device for the documents' lengths in every call."""
STALE: Mapping[str, tuple[tuple[str, Callable[[CostRow], bool]], ...]] = {
    "gated_linear_attention/fused": (("2026-11-29T10", lambda row: True),),
    "delta_rule/fused": (("2026-11-30", lambda row: True),),
    "delta_rule/fused_diagonal": (("2026-11-30", lambda row: True),),
    "segment_attention/tiled": (("2026-11-30", lambda row: True), ("2026-11-30T19:30", by_tiles)),
    "segment_attention/compacted": (("2026-11-30T07:16", lambda row: row.phase == "backward"), ALONG_DOCUMENTS),
    "segment_attention/sdpa_merge": (("2026-11-30T14", half_backward), ALONG_DOCUMENTS),
    "causal_conv/fused": (("2026-11-30", lambda row: row.phase == "decode"),),
    "selective_scan/fused": (("2026-11-30", lambda row: row.phase != "decode"),),
    "linear_attention/fused": (("2026-11-30", other_heads), ("2026-11-30T06", tiled_heads)),
    "log_linear_attention/chunked": (("2026-12-01", lambda row: row.phase != "decode"), ALONG_DOCUMENTS),
    "log_linear_delta_rule/chunked": (ALONG_DOCUMENTS,),
    "linear_attention/chunked": (ALONG_DOCUMENTS,),
    "gated_linear_attention/chunked": (ALONG_DOCUMENTS,),
    "delta_rule/chunked": (ALONG_DOCUMENTS,),
    "selective_scan/chunked": (ALONG_DOCUMENTS,),
    "slstm_scan/stepwise": (ALONG_DOCUMENTS,),
    "ttt_scan/dual_form": (ALONG_DOCUMENTS,),
}
"""Kernels that compute otherwise since a date, and in which workloads: what was timed before is of other code."""


def is_stale(timed: TimedRow) -> bool:
    """Whether the row is of code that has changed, by its kernel, date and workload alone, never by a model's error."""
    rules = STALE.get(f"{timed.row.operator}/{timed.row.kernel}", ())
    return any(timed.date < since and changed(timed.row) for since, changed in rules)


APART = (("2026-11-30", 0.03), ("9999", 0.5))
"""Repeats further apart than this share of their median are no figure of a kernel: until the first date those that
`measure` times again since, and after it the few that were no steadier then, whose host fell behind the device."""
ENOUGH_REPEATS = 3
"""Of fewer the range was widened, and says nothing."""


def is_disturbed(timed: TimedRow) -> bool:
    """Whether the row's repeats disagree, whatever a model says of it."""
    if timed.median_s is None or timed.low_s is None or timed.high_s is None:
        return False
    most = next(share for before, share in APART if timed.date < before)
    return (timed.repeats or 0) >= ENOUGH_REPEATS and timed.high_s - timed.low_s > most * timed.median_s


def has_waited(timed: TimedRow) -> bool:
    """Whether the call took less long than the host needed to queue it, beyond the head start that the clock gave."""
    if timed.queued_s is None or timed.median_s is None:
        return False
    return head_start_s(timed.device) < timed.queued_s and timed.median_s < timed.queued_s


LEAST_ROWS = 6
"""Of fewer a physics head learns a level alone, and was off by a factor of ten on the next."""


def _of_phase(timed: TimedRow) -> tuple[str, str]:
    return f"{timed.row.operator}/{timed.row.kernel}", timed.row.phase


def kept(tables: Sequence[Sequence[TimedRow]]) -> list[list[TimedRow]]:
    """Of each table the rows that are neither stale nor disturbed, nor too few; failures stay.

    Nor those that waited for the host, of phases of kernels that have been captured since.
    """
    captured = {_of_phase(row) for table in tables for row in table if row.cuda_graph}
    left = [
        [
            row
            for row in table
            if not (is_stale(row) or is_disturbed(row) or (has_waited(row) and _of_phase(row) in captured))
        ]
        for table in tables
    ]
    counts = Counter(_of_phase(row) for table in left for row in table if row.status == "ok")
    return [[row for row in table if row.status != "ok" or counts[_of_phase(row)] >= LEAST_ROWS] for table in left]


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
    parser.add_argument(
        "--without-stale",
        action="store_true",
        help="leave out rows of changed code, disturbed ones, and phases with few",
    )
    given = parser.parse_args()
    tables = [read_timed_rows(path) for path in given.tables]
    as_timed, without = given.as_timed.split(","), given.without.split(",")
    for path, held, of_today in zip(given.tables, tables, kept(tables) if given.without_stale else tables, strict=True):
        rows = [row for row in of_today if _of_phase(row)[0] not in without]
        counted = [row if _of_phase(row)[0] in as_timed else replace(row, row=recounted(row.row)) for row in rows]
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
