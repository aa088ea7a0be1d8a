"""Sequence-mixing operators: mathematics, references, kernels, and what they cost.

`subquad_kernels.operators` holds the functions that mixers call (it imports torch; this page does not).
Importing this package names the folder of Triton's cache in the environment (`triton_cache.py`).
"""

from subquad_kernels.catalogue import CATALOGUE, Catalogue, CatalogueError, Kernel, Operator, Tolerance
from subquad_kernels.triton_cache import keep_triton_cache
from subquad_kernels.workload import DeviceLimits, Work, Workload

__all__ = [
    "CATALOGUE", "Catalogue", "CatalogueError", "DeviceLimits", "Kernel", "Operator", "Tolerance", "Work", "Workload",
]

keep_triton_cache()
