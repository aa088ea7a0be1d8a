"""Small models that decode, by mixer and by what layers share, what is chosen for them, and work taken down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from subquad.compiler.example import Example
from subquad.compiler.pipeline import compile_model
from subquad.model.build import build_model
from subquad.model.language_model import LanguageModel
from subquad.registry import load_registry
from subquad.schema import ChannelMixerConfig, ModelConfig

SIZES = {"num_heads": 2, "head_dim": 16, "window": 4, "segment_len": 3, "state_dim": 16}
"""Sizes for a width of 32, where a mixer's config has such a field."""
SHARED: Mapping[str, Mapping[str, Any]] = {
    "value residual": {"rwkv7": {"mixer": "rwkv7", "num_heads": 2, "blocks_per_layer": 1}},
    "shared keys": {
        "publisher": {"mixer": "softmax_attention", "kv": "publish"},
        "mamba": {"mixer": "mamba"},
        "reader": {"mixer": "softmax_attention", "kv": "read"},
    },
}
"""Entries of `model.mixers` whose layers exchange tensors."""


def model_of(
    *mixers: str, shared: str = "", channel_mixers: bool = True, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> LanguageModel:
    """A block of each mixer, or of each entry of `SHARED`, in this order."""
    entries = dict(SHARED[shared]) if shared else {name: {"mixer": name} for name in mixers}
    for entry in entries.values():
        known = [field.name for field in dataclasses.fields(load_registry().mixer(entry["mixer"]).config)]
        entry |= {name: size for name, size in SIZES.items() if name in known and name not in entry}
    torch.manual_seed(0)
    config = ModelConfig(
        d_model=32,
        num_layers=len(mixers),
        vocab_size=16,
        context_len=64,
        schedule=list(mixers),
        mixers=entries,  # type: ignore[arg-type]
        channel_mixer=ChannelMixerConfig(d_hidden=48) if channel_mixers else None,
        init_std=0.3,  # so that logits differ from token to token
    )
    return build_model(config).to(device, dtype).eval()


def types_that_kernels_are_chosen_for(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with the type of each model that is compiled from now on."""
    types: list[str] = []

    def chosen(model: LanguageModel, example: Example, **rest: Any) -> object:
        types.append(example.dtype)
        return compile_model(model, example, **rest)

    monkeypatch.setattr("subquad.training.compilation.compile_model", chosen)
    return types


_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Tape(TorchDispatchMode):
    """Operations of torch and of ours with the very tensors they were given: as blind to Python as a CUDA graph.

    What would wait for a device raises, as it does there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _WAITS & set(func.tags):
            raise RuntimeError(f"{func} waits for the device")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        """Do the same to the same memory."""
        for func, args, kwargs, found in self.calls:
            again = func(*args, **kwargs)
            pairs = zip(found, again) if isinstance(found, (tuple, list)) else [(found, again)]
            for old, new in pairs:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # a flattened view may be a copy
                    old.copy_(new)


def taped(work: Callable[[], None]) -> Callable[[], None]:
    """What stands for a CUDA graph; the work runs beforehand, and is taken down where it would not run."""
    work()
    with Tape() as tape:
        work()
    return tape.replay
