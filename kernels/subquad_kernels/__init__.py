"""Sequence-mixing operators: mathematics, references, kernels, and what they cost.

`subquad_kernels.operators` holds the functions that mixers call (it imports torch; this page does not).
"""

from subquad_kernels.catalogue import CATALOGUE, Catalogue, CatalogueError, Kernel, Operator, Tolerance
from subquad_kernels.workload import DeviceLimits, Work, Workload

__all__ = [
    "CATALOGUE", "Catalogue", "CatalogueError", "DeviceLimits", "Kernel", "Operator", "Tolerance", "Work", "Workload",
]
