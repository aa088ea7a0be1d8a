from torch import nn

from subquad import PassOutcome, copy_graph, forward_as_written, replace_forward


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def adapt(module, attention):
    reason = replace_forward(module, attention[""], _forward)
    return {} if reason is None else {"": reason}


def _forward(module, attention, x):
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(q, k, v, mask=None, causal=False, scale=None, dropout_p=0.0)
    assert attention.written in ("sdpa", "softmax")
    return forward_as_written(module)(x) if out is None else out.transpose(1, 2).flatten(2)


def run(graph_module):
    return PassOutcome(copy_graph(graph_module), ("copied",))
