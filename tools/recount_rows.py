"""Count the work of recorded rows anew, as the declarations of today count it:  recount_rows.py ROWS.parquet ...

Seconds, bytes and versions stay as they were measured. Rows of kernels that are no longer declared stay whole.
Tables of versions that did not keep the lengths of packed documents are given them: `measure` draws them from seed 0.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import subquad_kernels.operators  # noqa: F401  (registers what is declared)
from subquad.compiler.workload import cost_row
from subquad_cost_model import CostRow, read_timed_rows, write_timed_rows
from subquad_kernels.catalogue import CATALOGUE, CatalogueError
from subquad_kernels.samples import draw_boundaries
from subquad_kernels.workload import Workload


def recounted(row: CostRow) -> CostRow:
    """The row with its work counted by the operator and kernel of its names."""
    try:
        operator, kernel = CATALOGUE.operator(row.operator), CATALOGUE.kernel(row.operator, row.kernel)
    except CatalogueError:
        return row
    workload = Workload(
        operator=row.operator,
        shape=row.shape,
        dtype=row.dtype,  # type: ignore[arg-type]
        phase=row.phase,  # type: ignore[arg-type]
        options=row.options,
    )
    lengths = row.document_lengths
    if "documents" in row.shape and not lengths:
        boundaries = draw_boundaries(row.shape, 0, "cpu")
        assert boundaries is not None
        lengths = tuple(boundaries.diff().tolist())
    return replace(cost_row(operator, kernel, workload, lengths), kernel_version=row.kernel_version)


def main(paths: list[str]) -> None:
    """Write each table anew and say what changed."""
    for path in map(Path, paths):
        rows = read_timed_rows(path)
        counted = [replace(timed_row, row=recounted(timed_row.row)) for timed_row in rows]
        names = ("matmul_flops", "vector_flops", "transcendental_ops", "bytes_moved", "serial_steps", "saved_bytes",
                 "launches")  # fmt: skip
        changed = Counter(
            f"{before.row.operator} {name}"
            for before, after in zip(rows, counted, strict=True)
            for name in names
            if getattr(before.row, name) != getattr(after.row, name)
        )
        write_timed_rows(path, counted)
        print(f"{path}: {len(rows)} rows; changed {dict(changed) or 'nothing'}")


if __name__ == "__main__":
    main(sys.argv[1:])
