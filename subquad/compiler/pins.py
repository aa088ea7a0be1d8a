"""Pinned kernels that cannot compute every node of a use: where they give way, and what is said of it.

Training refuses a pin that cannot hold. A model that decodes calls an operator in other ways than training did, in
another type, perhaps on another device: there a pin holds wherever it can, and gives way by name where it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from subquad.compiler.example import IN_PLACE
from subquad.compiler.layer_numbers import layer_numbers
from subquad.compiler.plan import NodeChoice
from subquad.errors import ConfigError


def given_way(choices: Iterable[NodeChoice], pins: Mapping[str, str]) -> list[str]:
    """Which pins gave way to which kernels, where and why: a line for equal nodes of all layers and methods."""
    equal: dict[tuple[str, str, str, str], list[NodeChoice]] = {}
    for choice in _elsewhere(choices, pins):
        reason = choice.declined[pins[choice.operator]]
        equal.setdefault((choice.operator, choice.chosen, choice.mixer, reason), []).append(choice)
    return [
        f"kernel.{operator}={pins[operator]} gives way to {chosen} in {mixer}."
        f"{', '.join(dict.fromkeys(node.method for node in nodes))}"
        f" (layer {layer_numbers(node.layer for node in nodes)}): {reason}"
        for (operator, chosen, mixer, reason), nodes in equal.items()
    ]


def without_effect(choices: Iterable[NodeChoice], pins: Mapping[str, str]) -> list[str]:
    """Which pins are of operators that no layer calls in this use: a sweep over models may well have some.

    Training does not call what reads a cache in place, so that a pin of it begins to count when the run generates.
    """
    called = {choice.operator for choice in choices}
    return [
        f"kernel.{operator}={kernel} changes nothing here: no layer calls {operator}"
        for operator, kernel in pins.items()
        if operator not in called
    ]


def check_that_pins_decode(choices: Iterable[NodeChoice], pins: Mapping[str, str]) -> None:
    """Refuse a pin that no prefill and no decoded token of a model which calls its operator would run.

    Raises: ConfigError.
    """
    nodes = [choice for choice in choices if choice.method in ("prefill", "decode", IN_PLACE)]
    held = {choice.operator for choice in nodes if pins.get(choice.operator) == choice.chosen}
    for choice in _elsewhere(nodes, pins):
        if choice.operator not in held:
            rivals = ", ".join(figure.kernel for figure in choice.figures)
            pinned = pins[choice.operator]
            raise ConfigError(
                what=f"{choice.operator}/{pinned} cannot run here: {choice.declined[pinned]}",
                where=f"kernel.{choice.operator}",
                mend=f"use one of {rivals}, or leave it out",
            )


def _elsewhere(choices: Iterable[NodeChoice], pins: Mapping[str, str]) -> list[NodeChoice]:
    """The nodes of this use that run another kernel than the one their operator is pinned to."""
    return [choice for choice in choices if choice.used and choice.chosen != pins.get(choice.operator, choice.chosen)]
