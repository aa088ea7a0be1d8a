"""The hooks: the questions that subquad asks its plugins. Start reading here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from subquad.contracts import AdapterSpec, ComponentSpec, ImportSpec, MixerSpec, PassSpec

if TYPE_CHECKING:
    from subquad_kernels.catalogue import Kernel, Operator

hookspec = pluggy.HookspecMarker("subquad")
hookimpl = pluggy.HookimplMarker("subquad")


@hookspec
def subquad_provide_mixers() -> Iterable[MixerSpec]:  # type: ignore[empty-body]
    """Declare the sequence mixers this plugin provides."""


@hookspec
def subquad_provide_operators() -> Iterable[Operator]:  # type: ignore[empty-body]
    """Declare the operators this plugin provides."""


@hookspec
def subquad_provide_kernels() -> Iterable[Kernel]:  # type: ignore[empty-body]
    """Declare the kernels this plugin provides, for its own operators or for anybody's."""


@hookspec
def subquad_provide_adapters() -> Iterable[AdapterSpec]:  # type: ignore[empty-body]
    """Declare the foreign module classes that this plugin can rewrite."""


@hookspec
def subquad_provide_passes() -> Iterable[PassSpec]:  # type: ignore[empty-body]
    """Declare the graph passes that this plugin adds to the compiler."""


@hookspec
def subquad_provide_config_packages() -> Iterable[str]:  # type: ignore[empty-body]
    """Name the packages whose YAML joins the config search path."""


@hookspec
def subquad_provide_components() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Declare the optimizers and data sources this plugin provides."""


@hookspec
def subquad_provide_imports() -> Iterable[ImportSpec]:  # type: ignore[empty-body]
    """Declare the Hugging Face architectures whose checkpoints this plugin can load into its mixers."""
