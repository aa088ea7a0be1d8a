"""The operators as functions of tensors: what a mixer calls."""

from subquad_kernels import builtin as _builtin  # noqa: F401 - fills the catalogue that calls look their kernel up in
from subquad_kernels.causal_conv.operator import causal_conv
from subquad_kernels.gated_linear_attention.operator import gated_linear_attention
from subquad_kernels.segment_attention.operator import segment_attention
from subquad_kernels.selective_scan.operator import selective_scan
from subquad_kernels.softmax_attention.operator import softmax_attention

__all__ = ["causal_conv", "gated_linear_attention", "segment_attention", "selective_scan", "softmax_attention"]
