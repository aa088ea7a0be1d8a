"""Which adapter takes which owner, and letting it: outermost modules first, then the owner's own class, then any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from subquad.compiler.foreign.attention_call import AttentionCall
from subquad.compiler.foreign.declarations import ANY_MODULE
from subquad.contracts import Adapter, AdapterSpec
from subquad.errors import PluginError
from subquad.registry import Registry
from subquad_kernels.catalogue import load_attribute


def adapters_for(model: nn.Module, owner: str, registry: Registry) -> Iterator[tuple[str, AdapterSpec]]:
    """The adapters to ask for an owner, in order, each with the path of the module that it is declared for.

    A module around the owner comes before the owner; a plugin's adapter before ours for the same class.
    """
    specs = sorted(registry.adapters.values(), key=lambda spec: registry.origins[spec].name == "builtin")
    steps = owner.split(".") if owner else []
    for length in range(len(steps) + 1):
        path = ".".join(steps[:length])
        for kind in type(model.get_submodule(path)).__mro__:
            name = f"{kind.__module__}:{kind.__qualname__}"
            if name != ANY_MODULE:
                yield from ((path, spec) for spec in specs if spec.module_class == name)
    yield from ((owner, spec) for spec in specs if spec.module_class == ANY_MODULE)


def adapt_owners(
    model: nn.Module, calls: Mapping[str, AttentionCall], registry: Registry
) -> tuple[dict[str, str], dict[str, str]]:
    """Let each owner call its function: the adapter's name by owner, and why none would, by owner.

    Raises: PluginError when an adapter fails.
    """
    adapted: dict[str, str] = {}
    declined: dict[str, str] = {}
    for owner, call in calls.items():
        reasons = []
        for path, spec in adapters_for(model, owner, registry):
            relative = owner.removeprefix(path).removeprefix(".")
            adapter: Adapter = load_attribute(spec.build)  # type: ignore[assignment]
            answer = _asked(spec, registry, lambda: adapter(model.get_submodule(path), {relative: call}))  # noqa: B023
            if relative not in answer:
                adapted[owner] = spec.name
                break
            reasons.append(f"{spec.name}: {answer[relative]}")
        else:
            declined[owner] = "; ".join(reasons)
    return adapted, declined


def _asked(spec: AdapterSpec, registry: Registry, ask: Callable[[], Mapping[str, str]]) -> Mapping[str, str]:
    try:
        return ask()
    except Exception as error:
        raise PluginError(
            what=f"the adapter '{spec.name}' failed: {type(error).__name__}: {error}".splitlines()[0],
            where=registry.origin(spec),
            mend="report it to its author, or uninstall the plugin",
        ) from error
