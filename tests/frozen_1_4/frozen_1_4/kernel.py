import torch

from subquad_kernels.softmax_attention.definition import REFERENCE


def forward(q, k, v, cu_seqlens, causal, window, scale):
    with torch.no_grad():
        return REFERENCE.forward(
            q=q, k=k, v=v, cu_seqlens=cu_seqlens, causal=causal, window=window, scale=scale
        )


def backward(arguments, outputs, gradients):
    return REFERENCE.backward(arguments, outputs, gradients)
