"""Discovery of plugins, the check for duplicates, and the read-only answer to 'what is there?'."""

from __future__ import annotations

import importlib.metadata
import re
import time
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import pluggy

from subquad import hookspecs
from subquad.contracts import (
    CONTRACT_VERSION,
    AdapterSpec,
    ComponentKind,
    ComponentSpec,
    ImportSpec,
    MixerSpec,
    PassSpec,
)
from subquad.errors import NotFoundError, PluginError, suggestion
from subquad_kernels.catalogue import CATALOGUE, CatalogueError, Kernel, Operator

ENTRY_POINT_GROUP = "subquad"
"""Plugins of contract 1 stand here, those of contract N in `subquad.N`: known before any of their code runs."""
SLOW_IMPORT_S = 0.5
"""Seconds from which a plugin is named as slow: every command waits for it, and declarations need no more than 0.1."""
KNOWN_PLUGINS: Mapping[str, str] = MappingProxyType(
    {
        "delta_net": "subquad-linear",
        "gated_delta_net": "subquad-linear",
        "gla": "subquad-linear",
        "lightning": "subquad-linear",
        "log_linear": "subquad-linear",
        "log_linear_gated_delta_net": "subquad-linear",
        "log_linear_mamba2": "subquad-ssm",
        "mamba": "subquad-ssm",
        "mamba2": "subquad-ssm",
        "mamba3": "subquad-ssm",
        "mlstm": "subquad-linear",
        "retnet": "subquad-linear",
        "rwkv6": "subquad-linear",
        "rwkv7": "subquad-linear",
        "rwkv_channel_mix": "subquad-linear",
        "segment_attention": "subquad-scout",
        "short_conv": "subquad-linear",
        "slstm": "subquad-linear",
        "ttt_linear": "subquad-linear",
        "ttt_linear_mamba": "subquad-linear",
        "ttt_mlp": "subquad-linear",
        "ttt_mlp_mamba": "subquad-linear",
    }
)
"""Mixers of plugins that are published with subquad: named when a recipe asks for one that is not installed."""
KNOWN_IMPORTS: Mapping[str, str] = MappingProxyType(
    {"mamba": "subquad-ssm", "mamba2": "subquad-ssm", "qwen3_next": "subquad-linear", "xlstm": "subquad-linear"}
)
"""Architectures whose checkpoints these plugins load, named in the same way."""

HOOKS = tuple(name for name in dir(hookspecs) if name.startswith("subquad_provide"))
Answers: TypeAlias = "dict[str, dict[str, list[object]]]"
"""What every plugin answers, by its name and by hook."""
Declared = TypeVar("Declared")


@dataclass(frozen=True)
class PluginRecord:
    """A plugin that was loaded: entry point, module, the distribution that installed it, seconds of its import."""

    name: str
    module: str
    distribution: str
    version: str
    import_s: float = 0.0

    @property
    def is_slow(self) -> bool:
        """Whether its import is worth naming."""
        return self.import_s >= SLOW_IMPORT_S

    @property
    def origin(self) -> str:
        """`distribution version`, as errors and tables show it."""
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class PluginProblem:
    """A plugin that was skipped, why, and what to do about it."""

    name: str
    distribution: str
    reason: str
    mend: str

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.distribution}) was skipped: {self.reason}; {self.mend}"


@dataclass(frozen=True)
class Registry:
    """Everything the installed plugins declare; read-only."""

    plugins: tuple[PluginRecord, ...]
    problems: tuple[PluginProblem, ...]
    mixers: Mapping[str, MixerSpec]
    operators: Mapping[str, Operator]
    kernels: Mapping[str, Kernel]  # key: operator/kernel
    adapters: Mapping[str, AdapterSpec]
    passes: Mapping[str, PassSpec]
    imports: Mapping[str, ImportSpec]  # key: model_type
    components: Mapping[tuple[ComponentKind, str], ComponentSpec]
    config_packages: Mapping[str, PluginRecord]
    origins: Mapping[Hashable, PluginRecord]

    def mixer(self, name: str, where: str = "model.mixers") -> MixerSpec:
        """The mixer of that name. Raises: NotFoundError."""
        if name in self.mixers:
            return self.mixers[name]
        raise NotFoundError(
            what=f"no mixer is called '{name}'",
            where=where,
            mend=self._mend(name, self.mixers, KNOWN_PLUGINS.get(name)),
        )

    def component(self, kind: ComponentKind, name: str, where: str | None = None) -> ComponentSpec:
        """The optimizer or data source of that name. Raises: NotFoundError."""
        if (kind, name) in self.components:
            return self.components[kind, name]
        have = [known for known_kind, known in self.components if known_kind == kind]
        raise NotFoundError(
            what=f"no {kind} component is called '{name}'", where=where or kind, mend=self._mend(name, have, None)
        )

    def checkpoint_import(self, model_type: str, where: str) -> ImportSpec:
        """Who loads checkpoints of a Hugging Face `model_type`.  Raises: NotFoundError."""
        if model_type in self.imports:
            return self.imports[model_type]
        raise NotFoundError(
            what=f"no plugin loads checkpoints of model_type '{model_type}'",
            where=where,
            mend=self._mend(model_type, self.imports, KNOWN_IMPORTS.get(model_type)),
        )

    def origin(self, spec: Hashable) -> str:
        """`distribution version` of the plugin that declared a record."""
        return self.origins[spec].origin

    def _mend(self, name: str, known: Iterable[str], distribution: str | None) -> str:
        if distribution is not None:
            return f"pip install {distribution}"
        skipped = "".join(f"; {problem}" for problem in self.problems)
        return (
            f"{suggestion(name, known)}there are {', '.join(sorted(known))}"
            f" (`python -m subquad plugins` lists what is installed){skipped}"
        )


@lru_cache(maxsize=1)
def load_registry() -> Registry:
    """Load every installed plugin once, and answer what they declare.

    A plugin that cannot be imported, or whose hooks raise, is skipped with one warning line.
    Raises: PluginError when a hook is misspelt or when two plugins declare one name.
    """
    registry = build_registry(installed_plugins())
    for problem in registry.problems:
        warnings.warn(str(problem), stacklevel=2)
    return registry


def installed_plugins() -> list[importlib.metadata.EntryPoint]:
    """The entry points of every installed plugin, whatever contract it is written against."""
    found = importlib.metadata.entry_points()
    groups = [group for group in sorted(found.groups) if _contract_of(group) is not None]
    return [entry for group in groups for entry in found.select(group=group)]


def build_registry(entry_points: Iterable[importlib.metadata.EntryPoint]) -> Registry:
    """Ask the plugins behind these entry points what they declare; those of another contract are named and skipped."""
    manager = pluggy.PluginManager("subquad")
    manager.add_hookspecs(hookspecs)
    records: dict[str, PluginRecord] = {}
    answers: Answers = {}
    found = sorted(set(entry_points), key=lambda entry: (entry.name != "builtin", entry.name, entry.value))
    ours = [entry for entry in found if _contract_of(entry.group) == _MAJOR]
    problems = list(_of_other_contracts(found, {(entry.name, _distribution(entry)) for entry in ours}))
    for entry_point in ours:
        distribution = entry_point.dist
        dist_name = _distribution(entry_point)
        if entry_point.name in records:
            raise PluginError(
                what=f"two plugins are called '{entry_point.name}'",
                where=f"{records[entry_point.name].distribution} and {dist_name}",
                mend="uninstall one of them, or ask its author to rename the entry point",
            )
        mend = f"repair or uninstall it (pip uninstall {dist_name})"
        start = time.perf_counter()
        try:
            plugin = entry_point.load()
        except (Exception, SystemExit) as error:  # a stranger's module may raise anything; it is named, the rest works
            problems.append(PluginProblem(entry_point.name, dist_name, _reason(error), mend))
            continue
        record = PluginRecord(
            entry_point.name,
            entry_point.value,
            dist_name,
            distribution.version if distribution else "unknown",
            time.perf_counter() - start,
        )
        manager.register(plugin, name=entry_point.name)
        _refuse_misspelt_hooks(manager, plugin, record)
        try:
            answers[entry_point.name] = _asked(manager, entry_point.name)
        except (Exception, SystemExit) as error:  # as above; nothing that it declares is taken
            manager.unregister(name=entry_point.name)
            reason = f"what it declares raises {_reason(error)}"
            problems.append(PluginProblem(entry_point.name, dist_name, reason, mend))
            continue
        records[entry_point.name] = record
    return _collect(answers, records, tuple(problems))


_MAJOR = int(CONTRACT_VERSION.partition(".")[0])


def _contract_of(group: str) -> int | None:
    """The major version of the contract whose plugins stand in a group, None where nothing of ours does."""
    match = re.fullmatch(rf"{ENTRY_POINT_GROUP}(?:\.(\d+))?", group)
    return int(match[1] or 1) if match else None


def _of_other_contracts(
    entry_points: Iterable[importlib.metadata.EntryPoint], ours: set[tuple[str, str]]
) -> Iterator[PluginProblem]:
    """Plugins of another major version that do not bring one for ours as well."""
    for entry_point in entry_points:
        contract, dist_name = _contract_of(entry_point.group), _distribution(entry_point)
        if contract is None or contract == _MAJOR or (entry_point.name, dist_name) in ours:
            continue
        older = "subquad" if contract > _MAJOR else dist_name
        yield PluginProblem(
            entry_point.name,
            dist_name,
            f"it is written against contract {contract}, this subquad has contract {CONTRACT_VERSION}",
            f"upgrade {older} (pip install -U {older}), or uninstall the plugin (pip uninstall {dist_name})",
        )


def _distribution(entry_point: importlib.metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else "unknown"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _asked(manager: pluggy.PluginManager, plugin_name: str) -> dict[str, list[object]]:
    """What one plugin answers to every hook it implements."""
    return {
        hook: list(implementation.function())
        for hook in HOOKS
        for implementation in getattr(manager.hook, hook).get_hookimpls()
        if implementation.plugin_name == plugin_name
    }


def _refuse_misspelt_hooks(manager: pluggy.PluginManager, plugin: object, record: PluginRecord) -> None:
    for name in dir(plugin):
        if name.startswith("subquad_provide") and name not in HOOKS:
            raise PluginError(
                what=f"no hook is called '{name}'",
                where=f"plugin '{record.name}' ({record.origin})",
                mend=f"{suggestion(name, HOOKS)}the hooks are {', '.join(HOOKS)}",
            )
        if name in HOOKS and manager.parse_hookimpl_opts(plugin, name) is None:
            raise PluginError(
                what=f"{name} is not marked as a hook",
                where=f"plugin '{record.name}' ({record.origin})",
                mend="decorate it with @subquad.hookimpl",
            )
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(
            what=str(error).splitlines()[0],
            where=f"plugin '{record.name}' ({record.origin})",
            mend=f"the hooks are {', '.join(HOOKS)}",
        ) from None


def _collect(declared_by: Answers, records: dict[str, PluginRecord], problems: tuple[PluginProblem, ...]) -> Registry:
    origins: dict[Hashable, PluginRecord] = {}

    def ask(hook: str) -> list[tuple[PluginRecord, object]]:
        # The host's own declarations first, then alphabetically, so that tables read the same everywhere.
        order = sorted(records.values(), key=lambda record: (record.name != "builtin", record.name))
        return [(record, declared) for record in order for declared in declared_by[record.name].get(hook, ())]

    def named(hook: str, kind: type[Declared], what: str) -> dict[str, Declared]:
        found: dict[str, Declared] = {}
        for record, declared in ask(hook):
            if not isinstance(declared, kind):
                raise PluginError(
                    what=f"{hook} returned {type(declared).__name__}, not {kind.__name__}",
                    where=f"plugin '{record.name}' ({record.origin})",
                    mend=f"return {kind.__name__} records",
                )
            name = getattr(declared, "key", None) or declared.name  # type: ignore[attr-defined]
            if name in found:
                raise PluginError(
                    what=f"two {what} are called '{name}'",
                    where=f"{origins[found[name]].origin} and {record.origin}",  # type: ignore[index]
                    mend="uninstall one of the two plugins, or ask an author to rename",
                )
            found[name] = declared
            try:
                origins[declared] = record  # type: ignore[index]
            except TypeError:  # a list where the record says tuple
                raise PluginError(
                    what=f"'{name}' of {hook} holds a list, set or mapping where a tuple belongs",
                    where=f"plugin '{record.name}' ({record.origin})",
                    mend="write tuples in what is declared",
                ) from None
        return found

    components: dict[tuple[ComponentKind, str], ComponentSpec] = {}
    for record, declared in ask("subquad_provide_components"):
        if not isinstance(declared, ComponentSpec):
            raise PluginError(
                what=f"subquad_provide_components returned {type(declared).__name__}, not ComponentSpec",
                where=f"plugin '{record.name}' ({record.origin})",
                mend="return ComponentSpec records",
            )
        if (declared.kind, declared.name) in components:
            raise PluginError(
                what=f"two {declared.kind} components are called '{declared.name}'",
                where=f"{origins[components[declared.kind, declared.name]].origin} and {record.origin}",
                mend="uninstall one of the two plugins, or ask an author to rename",
            )
        components[declared.kind, declared.name] = declared
        origins[declared] = record

    operators = named("subquad_provide_operators", Operator, "operators")
    kernels = named("subquad_provide_kernels", Kernel, "kernels")
    try:
        CATALOGUE.add_operators(operators.values())
        CATALOGUE.add_kernels(kernels.values())
    except CatalogueError as error:
        raise PluginError(what=str(error), where="operators and kernels", mend="uninstall one of the two") from None
    return Registry(
        plugins=tuple(records.values()),
        problems=problems,
        mixers=MappingProxyType(named("subquad_provide_mixers", MixerSpec, "mixers")),
        operators=MappingProxyType(operators),
        kernels=MappingProxyType(kernels),
        adapters=MappingProxyType(named("subquad_provide_adapters", AdapterSpec, "adapters")),
        passes=MappingProxyType(named("subquad_provide_passes", PassSpec, "passes")),
        imports=MappingProxyType(named("subquad_provide_imports", ImportSpec, "imports of checkpoints")),
        components=MappingProxyType(components),
        config_packages=MappingProxyType(
            {str(package): record for record, package in ask("subquad_provide_config_packages")}
        ),
        origins=MappingProxyType(origins),
    )
