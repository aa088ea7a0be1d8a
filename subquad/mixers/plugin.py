"""The built-in plugin: found by the host's own entry point, like anyone's."""

from __future__ import annotations

from collections.abc import Iterable

from subquad.compiler.foreign.declarations import ADAPTERS
from subquad.contracts import AdapterSpec, ComponentSpec, ImportSpec, MixerSpec
from subquad.hookspecs import hookimpl
from subquad.mixers.declarations import IMPORTS, MIXERS
from subquad.training.optimizer_declarations import OPTIMIZERS
from subquad.training.sources.declarations import DATA_SOURCES
from subquad_kernels.builtin import KERNELS, OPERATORS
from subquad_kernels.catalogue import Kernel, Operator


@hookimpl
def subquad_provide_operators() -> Iterable[Operator]:
    return OPERATORS


@hookimpl
def subquad_provide_kernels() -> Iterable[Kernel]:
    return KERNELS


@hookimpl
def subquad_provide_config_packages() -> Iterable[str]:
    return ["subquad.conf"]


@hookimpl
def subquad_provide_mixers() -> Iterable[MixerSpec]:
    return MIXERS


@hookimpl
def subquad_provide_adapters() -> Iterable[AdapterSpec]:
    return ADAPTERS


@hookimpl
def subquad_provide_components() -> Iterable[ComponentSpec]:
    return [*DATA_SOURCES, *OPTIMIZERS]


@hookimpl
def subquad_provide_imports() -> Iterable[ImportSpec]:
    return IMPORTS
