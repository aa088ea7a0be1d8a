"""The operators as functions of tensors: what a mixer calls."""

from subquad_kernels import builtin as _builtin  # noqa: F401 - fills the catalogue that calls look their kernel up in
from subquad_kernels.cached_attention.operator import cached_attention
from subquad_kernels.causal_conv.operator import causal_conv
from subquad_kernels.delta_rule.operator import delta_rule
from subquad_kernels.gated_linear_attention.operator import gated_linear_attention
from subquad_kernels.gated_norm.operator import gated_norm
from subquad_kernels.linear_attention.operator import linear_attention, linear_attention_normalizer
from subquad_kernels.log_linear_attention.operator import log_linear_attention
from subquad_kernels.log_linear_delta_rule.operator import log_linear_delta_rule
from subquad_kernels.rotary.operator import rotary
from subquad_kernels.segment_attention.operator import segment_attention
from subquad_kernels.selective_scan.operator import selective_scan
from subquad_kernels.slstm_scan.operator import slstm_scan
from subquad_kernels.softmax_attention.operator import softmax_attention
from subquad_kernels.ttt_scan.operator import ttt_scan

__all__ = [
    "cached_attention",
    "causal_conv",
    "delta_rule",
    "gated_linear_attention",
    "gated_norm",
    "linear_attention",
    "linear_attention_normalizer",
    "log_linear_attention",
    "log_linear_delta_rule",
    "rotary",
    "segment_attention",
    "selective_scan",
    "slstm_scan",
    "softmax_attention",
    "ttt_scan",
]
