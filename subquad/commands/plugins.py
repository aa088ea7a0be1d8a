"""plugins: what is installed, from which distribution, and which kernels are usable here; loads no torch."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from subquad.commands.flags import flags
from subquad.commands.table import table
from subquad.contracts import CONTRACT_VERSION, Growth
from subquad.registry import Registry, load_registry
from subquad_kernels.catalogue import Kernel, Operator
from subquad_kernels.workload import DeviceLimits

FORMAT_VERSION = 1
ACTIONS = {"new": "subquad.commands.new_plugin", "check": "subquad.commands.check_plugin"}
"""Modules by the word after `plugins`; imported only then: one of them loads torch."""
HELP = """List what is installed: mixers, operators, kernels and whether they run here, data, skipped plugins.

  python -m subquad plugins               as tables
  python -m subquad plugins --json        the same as one JSON object
  python -m subquad plugins new NAME      write a package for a mixer of that name
  python -m subquad plugins check NAME    judge a mixer, or all that a distribution declares

`new` and `check` have a --help of their own."""
GROWTH = {
    Growth.CONSTANT: "1",
    Growth.LOGARITHMIC: "log t",
    Growth.SQRT: "t^0.5",
    Growth.LINEAR: "t",
    Growth.LOG_LINEAR: "t log t",
    Growth.POWER_1_5: "t^1.5",
    Growth.QUADRATIC: "t^2",
}


def run(arguments: list[str]) -> int:
    """Print tables, or JSON with --json; or do what the first argument names."""
    if arguments and arguments[0] in ACTIONS:
        return int(import_module(ACTIONS[arguments[0]]).run(arguments[1:]))
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP)
        return 0
    wants_json = bool(flags("plugins", arguments, ["--json", *ACTIONS]))
    content = inventory(load_registry())
    print(json.dumps(content, indent=2) if wants_json else as_tables(content))
    return 0


def inventory(registry: Registry) -> dict[str, Any]:
    """Everything the plugins declare, as JSON values."""
    kinds = device_kinds()
    return {
        "format_version": FORMAT_VERSION,
        "contract_version": CONTRACT_VERSION,
        "plugins": [
            {
                "name": plugin.name,
                "module": plugin.module,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "import_s": round(plugin.import_s, 3),
                "slow": plugin.is_slow,
            }
            for plugin in registry.plugins
        ],
        "mixers": [
            {
                "name": mixer.name,
                "work_growth": GROWTH[mixer.work_growth],
                "carry_growth": GROWTH[mixer.carry_growth],
                "causal": mixer.causal,
                "bidirectional": mixer.bidirectional,
                "packed": mixer.packed,
                "operators": list(mixer.operators),
                "summary": mixer.summary,
                "paper": mixer.paper,
                "origin": registry.origin(mixer),
            }
            for mixer in registry.mixers.values()
        ],
        "operators": [
            {"name": operator.name, "summary": operator.summary, "origin": registry.origin(operator)}
            for operator in registry.operators.values()
        ],
        "kernels": [
            {
                "operator": kernel.operator,
                "name": kernel.name,
                "devices": sorted(kernel.devices),
                "reason": (reason := why_unusable(kernel, registry.operators.get(kernel.operator), kinds)),
                "usable": reason is None,
                "origin": registry.origin(kernel),
            }
            for kernel in registry.kernels.values()
        ],
        "components": [
            {"kind": kind, "name": name, "summary": component.summary, "origin": registry.origin(component)}
            for (kind, name), component in registry.components.items()
        ],
        "adapters": [
            {"name": adapter.name, "module_class": adapter.module_class, "origin": registry.origin(adapter)}
            for adapter in registry.adapters.values()
        ],
        "passes": [
            {"name": graph_pass.name, "summary": graph_pass.summary, "origin": registry.origin(graph_pass)}
            for graph_pass in registry.passes.values()
        ],
        "imports": [
            {"model_type": spec.model_type, "summary": spec.summary, "origin": registry.origin(spec)}
            for spec in registry.imports.values()
        ],
        "config_packages": [
            {"name": package, "origin": record.origin} for package, record in registry.config_packages.items()
        ],
        "problems": [
            {"name": problem.name, "distribution": problem.distribution, "reason": problem.reason, "mend": problem.mend}
            for problem in registry.problems
        ],
    }


def device_kinds() -> frozenset[str]:
    """The kinds of device that this machine seems to have; `doctor` asks torch, which takes seconds to load."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    has_driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()
    return frozenset({"cpu", "cuda"}) if has_driver and not hidden else frozenset({"cpu"})


def why_unusable(kernel: Kernel, operator: Operator | None, kinds: frozenset[str]) -> str | None:
    """None if the kernel can run some workload of its operator here, else the reason why not."""
    if operator is None:
        return f"nobody declares the operator {kernel.operator}"
    missing = kernel.missing()
    if missing is not None:
        return missing
    if not kernel.devices & kinds:
        return f"runs on {', '.join(sorted(kernel.devices))}, which is not here"
    if "cpu" not in kernel.devices or not operator.examples:
        return None  # what a GPU supports, only torch can tell
    refusals = [kernel.supports(example, DeviceLimits(kind="cpu", name="cpu")) for example in operator.examples]
    return None if None in refusals else refusals[0]


def as_tables(content: dict[str, Any]) -> str:
    """The inventory for people."""
    return "\n".join(_tables(content))


def _tables(content: dict[str, Any]) -> list[str]:
    def rows(kind: str, *keys: str) -> list[list[str]]:
        return [[_text(entry[key]) for key in keys] for entry in content[kind]]

    tables = [
        f"Contract {content['contract_version']}: what mixers and declarations are written against\n",
        table("Plugins", ("name", "distribution", "version"), rows("plugins", "name", "distribution", "version")),
        table(
            "Mixers",
            ("name", "work", "carry", "packed", "paper", "from", "what it does"),
            rows("mixers", "name", "work_growth", "carry_growth", "packed", "paper", "origin", "summary"),
        ),
        table("Operators", ("name", "from", "what it is"), rows("operators", "name", "origin", "summary")),
        table(
            "Kernels",
            ("operator", "name", "devices", "usable here", "from"),
            [
                [entry["operator"], entry["name"], _text(entry["devices"]), entry["reason"] or "yes", entry["origin"]]
                for entry in content["kernels"]
            ],
        ),
        table(
            "Data and optimizers",
            ("kind", "name", "from", "what it is"),
            rows("components", "kind", "name", "origin", "summary"),
        ),
        table("Conf packages", ("name", "from"), rows("config_packages", "name", "origin")),
    ]
    for kind, title, keys in (
        ("adapters", "Adapters", ("name", "module_class", "origin")),
        ("passes", "Graph passes", ("name", "summary", "origin")),
        ("imports", "Checkpoints that load (model.init_from)", ("model_type", "summary", "origin")),
        ("problems", "Skipped plugins", ("name", "distribution", "reason", "mend")),
    ):
        if content[kind]:
            tables.append(table(title, keys, rows(kind, *keys)))
    slow = [
        [entry["name"], entry["distribution"], f"{entry['import_s']:.1f}"]
        for entry in content["plugins"]
        if entry["slow"]
    ]
    if slow:
        tables.append(table("Slow to import: every command waits for them", ("name", "distribution", "seconds"), slow))
    return tables


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
