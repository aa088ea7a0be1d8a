"""subquad: describe a model of sequence mixers, let measured kernels be chosen for your device, train it.

Importing this package loads neither torch nor any plugin; names are resolved when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from subquad.compiler.compile_model import compile_model
    from subquad.compiler.example import Example
    from subquad.compose import load_config
    from subquad.contracts import (
        AdapterSpec,
        Carry,
        ComponentSpec,
        Growth,
        Mixer,
        MixerContext,
        MixerSpec,
        PassOutcome,
        PassSpec,
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
    from subquad.training.fit import train

__version__ = "0.1.0"

_HOMES = {
    "AdapterSpec": "contracts", "Carry": "contracts", "ComponentSpec": "contracts", "Growth": "contracts",
    "Mixer": "contracts", "MixerContext": "contracts", "MixerSpec": "contracts", "PassOutcome": "contracts",
    "PassSpec": "contracts",
    "ConfigError": "errors", "DataError": "errors", "NotFoundError": "errors", "PluginError": "errors",
    "ResumeError": "errors", "RunError": "errors", "SubquadError": "errors",
    "build_model": "model.build", "compile_model": "compiler.compile_model", "hookimpl": "hookspecs",
    "load_config": "compose", "Example": "compiler.example", "train": "training.fit",
}  # fmt: skip

__all__ = [
    "AdapterSpec", "Carry", "ComponentSpec", "ConfigError", "DataError", "Example", "Growth", "Mixer", "MixerContext",
    "MixerSpec", "NotFoundError", "PassOutcome", "PassSpec", "PluginError", "ResumeError", "RunError", "SubquadError",
    "build_model", "compile_model", "hookimpl", "load_config", "train",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"subquad.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'subquad' has no attribute '{name}'")
