"""subquad: describe a model of sequence mixers, let measured kernels be chosen for your device, train it.

Importing this package loads neither torch nor any plugin; names are resolved when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subquad.bidirectional import Bidirectional, BothDirections, ReversedDocuments
    from subquad.compiler.capture import copy_graph
    from subquad.compiler.compile_model import compile_model
    from subquad.compiler.example import Example
    from subquad.compiler.foreign.replaced_forward import forward_as_written, replace_forward
    from subquad.compose import load_config
    from subquad.contracts import (
        AdapterSpec,
        Carry,
        ComponentSpec,
        Computed,
        DecodesInPlace,
        Growth,
        ImportMap,
        ImportSpec,
        Mixer,
        MixerContext,
        MixerSpec,
        PassOutcome,
        PassSpec,
        ProjectionSplit,
        SharedTensor,
        Sharing,
    )
    from subquad.errors import (
        ConfigError,
        DataError,
        NotFoundError,
        PluginError,
        ResumeError,
        RunError,
        SubquadError,
    )
    from subquad.hookspecs import hookimpl
    from subquad.model.build import build_model
    from subquad.model.checkpoint_config import CheckpointConfig
    from subquad.model.exported import load_model
    from subquad.model.import_weights import import_weights
    from subquad.schema import ChannelMixerConfig, ModelConfig
    from subquad.training.fit import train

__version__ = "0.1.0"

_HOMES = {
    "AdapterSpec": "contracts", "Carry": "contracts", "ComponentSpec": "contracts", "Growth": "contracts",
    "Mixer": "contracts", "MixerContext": "contracts", "MixerSpec": "contracts", "PassOutcome": "contracts",
    "PassSpec": "contracts", "Computed": "contracts", "ImportMap": "contracts", "ImportSpec": "contracts",
    "Bidirectional": "bidirectional", "BothDirections": "bidirectional", "ReversedDocuments": "bidirectional",
    "DecodesInPlace": "contracts", "SharedTensor": "contracts", "Sharing": "contracts", "ProjectionSplit": "contracts",
    "ChannelMixerConfig": "schema", "ModelConfig": "schema", "CheckpointConfig": "model.checkpoint_config",
    "import_weights": "model.import_weights", "load_model": "model.exported",
    "ConfigError": "errors", "DataError": "errors", "NotFoundError": "errors", "PluginError": "errors",
    "ResumeError": "errors", "RunError": "errors", "SubquadError": "errors",
    "build_model": "model.build", "compile_model": "compiler.compile_model", "hookimpl": "hookspecs",
    "load_config": "compose", "Example": "compiler.example", "train": "training.fit",
    "copy_graph": "compiler.capture", "forward_as_written": "compiler.foreign.replaced_forward",
    "replace_forward": "compiler.foreign.replaced_forward",
}  # fmt: skip

__all__ = [
    "AdapterSpec", "Bidirectional", "BothDirections", "Carry", "ChannelMixerConfig", "CheckpointConfig",
    "ComponentSpec", "Computed", "ConfigError", "DataError", "DecodesInPlace", "Example", "Growth", "ImportMap",
    "ImportSpec", "Mixer", "MixerContext", "MixerSpec", "ModelConfig", "NotFoundError", "PassOutcome", "PassSpec",
    "PluginError", "ProjectionSplit", "ResumeError", "ReversedDocuments", "RunError", "SharedTensor", "Sharing",
    "SubquadError", "build_model", "compile_model", "copy_graph", "forward_as_written", "hookimpl", "import_weights",
    "load_config", "load_model", "replace_forward", "train",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"subquad.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'subquad' has no attribute '{name}'")
