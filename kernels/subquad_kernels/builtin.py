"""The operators and kernels of this package, in one list each; importing it fills the catalogue."""

from __future__ import annotations

from subquad_kernels.cached_attention import declaration as cached_attention
from subquad_kernels.catalogue import CATALOGUE, Kernel, Operator
from subquad_kernels.causal_conv import declaration as causal_conv
from subquad_kernels.delta_rule import declaration as delta_rule
from subquad_kernels.gated_linear_attention import declaration as gated_linear_attention
from subquad_kernels.gated_norm import declaration as gated_norm
from subquad_kernels.linear_attention import declaration as linear_attention
from subquad_kernels.log_linear_attention import declaration as log_linear_attention
from subquad_kernels.log_linear_delta_rule import declaration as log_linear_delta_rule
from subquad_kernels.rotary import declaration as rotary
from subquad_kernels.segment_attention import declaration as segment_attention
from subquad_kernels.selective_scan import declaration as selective_scan
from subquad_kernels.slstm_scan import declaration as slstm_scan
from subquad_kernels.softmax_attention import declaration as softmax_attention
from subquad_kernels.ttt_scan import declaration as ttt_scan

_DECLARATIONS = (
    softmax_attention,
    segment_attention,
    cached_attention,
    selective_scan,
    causal_conv,
    rotary,
    gated_norm,
    linear_attention,
    gated_linear_attention,
    delta_rule,
    slstm_scan,
    log_linear_attention,
    log_linear_delta_rule,
    ttt_scan,
)

OPERATORS: tuple[Operator, ...] = tuple(declaration.OPERATOR for declaration in _DECLARATIONS)
KERNELS: tuple[Kernel, ...] = tuple(kernel for declaration in _DECLARATIONS for kernel in declaration.KERNELS)

CATALOGUE.add_operators(OPERATORS)
CATALOGUE.add_kernels(KERNELS)
