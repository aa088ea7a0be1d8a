"""One rank of several that share projections: it compares losses and gradients with those of the whole model.

Used by test_tensor_parallel.py, which starts as many processes as the grid of ranks has places.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from subquad.compiler.capture import install
from subquad.compiler.example import Example
from subquad.compiler.pipeline import capture_model
from subquad.model.build import build_model
from subquad.model.language_model import LanguageModel
from subquad.schema import ChannelMixerConfig, ModelConfig
from subquad.training.sharding import clip_to_norm, shard_model, whole_tensor

MIXERS: dict[str, Any] = {
    "softmax_attention": {"mixer": "softmax_attention", "num_heads": 4, "num_kv_heads": 2},
    "mamba": {"mixer": "mamba", "state_dim": 4},
    "segment_attention": {"mixer": "segment_attention", "num_heads": 2, "segment_len": 4},
    "window": {"mixer": "window", "num_heads": 2, "window": 5, "channel_mixer": None},
}
MODEL = ModelConfig(
    name="grid", d_model=24, num_layers=4, vocab_size=37, context_len=32, schedule=list(MIXERS), mixers=MIXERS,
    channel_mixer=ChannelMixerConfig(d_hidden=46),  # of 23 channels, rows that two ranks cannot halve
)  # fmt: skip
CLIP = 0.1


def main(rank: int, grid: tuple[int, int], store: str, result: str, device: str = "cpu") -> None:
    """Write the largest error, relative to the largest value, of each loss, of gradients and of what clipping does."""
    torch.set_num_threads(1)
    ranks = grid[0] * grid[1]
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    mesh = init_device_mesh(device, grid, mesh_dim_names=("data_parallel", "tensor_parallel"))
    errors = {
        name: _errors(mesh, device, **case)
        for name, case in {
            "whole logits": {"checkpointed": True},
            "packed, captured, loss in chunks": {"packed": True, "chunked": True, "captured": True},
            "autocast": {"dtype": torch.float32, "autocast": True},
        }.items()
    }
    Path(result).write_text(json.dumps(errors), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _model(dtype: torch.dtype, *, captured: bool) -> LanguageModel:
    torch.manual_seed(3)
    model = build_model(MODEL).to(dtype)
    if captured:
        for block, graphs in zip(model.blocks, capture_model(model, Example(tokens_shape=(1, 8)))):
            install(block.mixer, graphs.graphs)  # type: ignore[arg-type]
    return model


def _errors(
    mesh: Any,
    device: str,
    *,
    packed: bool = False,
    chunked: bool = False,
    checkpointed: bool = False,
    captured: bool = False,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
) -> float:
    whole, shared = (_model(dtype, captured=captured) for _ in range(2))
    tokens, targets = torch.randint(37, (2, 16)), torch.randint(37, (2, 16)).masked_fill(torch.rand(2, 16) < 0.2, -100)
    tokens, targets = tokens.to(device), targets.to(device)
    bounds = torch.tensor([0, 7, 7, 16, 32], dtype=torch.int32, device=device) if packed else None
    if dist.get_rank() > 0:  # it is given rank 0's values
        for parameter in shared.parameters():
            parameter.data.fill_(float("nan"))
    shard_model(shared, mesh)
    shared.activation_checkpointing = checkpointed
    whole.to(device)

    def loss(model: Any) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            if chunked:
                return model(tokens, bounds, targets)  # type: ignore[no-any-return]
            logits = model(tokens, bounds)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).to(dtype), targets.flatten(), reduction="sum")

    ours, theirs = loss(shared), loss(whole)
    pairs = [(ours, theirs)]
    ours.backward()
    theirs.backward()
    gradients = dict(whole.named_parameters())
    compared = [(whole_tensor(mine.grad), gradients[name].grad) for name, mine in shared.named_parameters()]
    pairs += [(mine.clone(), other.clone()) for mine, other in compared]  # type: ignore[union-attr]
    pairs.append((clip_to_norm(shared.parameters(), CLIP), clip_to_norm(whole.parameters(), CLIP)))
    pairs += [(whole_tensor(mine.grad), gradients[name].grad) for name, mine in shared.named_parameters()]  # type: ignore[misc]
    return max(float(((mine - other).abs().max() / other.abs().max()).detach()) for mine, other in pairs)
