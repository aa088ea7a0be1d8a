"""plugins check NAME: the conformance suites on what is installed, as a table and as a JSON verdict."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from subquad.commands.key_help import keys_in_help
from subquad.commands.key_values import key_values
from subquad.commands.table import table
from subquad.component_config import typed_config
from subquad.contracts import CONTRACT_VERSION, MixerSpec
from subquad.errors import ConfigError, NotFoundError, suggestion
from subquad.registry import Registry, load_registry

if TYPE_CHECKING:
    from subquad.testing.verdict import Outcome

FORMAT_VERSION = 1
KEPT, BROKEN = 0, 1
WIDTHS = (16, 32, 64, 128)
"""Residual widths that are tried where none is asked for: the least that a mixer's config takes is the quickest."""


@dataclass(kw_only=True)
class CheckConfig:
    """How a check is made."""

    target: str = "cpu"  # the device that the suites run on: cpu | cuda
    config: dict[str, Any] = field(default_factory=dict)  # keys of the mixer's config: {num_heads: 2}
    d_model: int = 0  # residual width; 0: the least of 16, 32, 64 and 128 that the mixer's config takes
    seed: int = 0  # of parameters and inputs; a failure prints the command that repeats it
    only: str = ""  # one promise, by name; '': all
    json: str = ""  # a file for the verdict; '': none

    def __post_init__(self) -> None:
        if self.target.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(what=f"the target is '{self.target}'", where="target", mend="use cpu or cuda")
        if self.d_model < 0:
            raise ConfigError(what=f"d_model is {self.d_model}", where="d_model", mend="use 1 or more, or leave it out")


HELP = """Run the conformance suites for a mixer, or for all mixers and kernels of a distribution.

  python -m subquad plugins check NAME [key=value ...]

{keys}

What does not apply to a mixer, such as a bidirectional form that it does not have, is said and not counted.
The exit code is 0 when every promise that applies is kept, 1 when one is broken."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the suite found about one mixer or kernel; `again` is the command that repeats it."""

    kind: str
    name: str
    origin: str
    outcomes: tuple[Outcome, ...]
    again: str

    @property
    def judged(self) -> tuple[Outcome, ...]:
        """The promises that apply."""
        return tuple(outcome for outcome in self.outcomes if outcome.inapplicable is None)

    @property
    def broken(self) -> tuple[Outcome, ...]:
        """The promises that are not kept."""
        return tuple(outcome for outcome in self.outcomes if outcome.broken is not None)


def run(arguments: list[str]) -> int:
    """Print what is kept and what is broken.  Raises: ConfigError, NotFoundError."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(HELP.format(keys=keys_in_help(CheckConfig)))
        return KEPT if arguments else 2
    name, *rest = arguments
    config = _parsed(rest)
    _check_target(config.target)
    verdicts = check(name, config, load_registry())
    for verdict in verdicts:
        print(table(f"{verdict.kind} {verdict.name} ({verdict.origin}) on {config.target}",
                    ("promise", "verdict", "seconds"), [_row(outcome) for outcome in verdict.outcomes]))  # fmt: skip
        for outcome in verdict.broken:
            print(f"BROKEN {outcome.promise}\n  {outcome.broken}\n  again: {verdict.again} only={outcome.promise}\n")
    print(summary(verdicts))
    if config.json:
        path = Path(config.json).expanduser()
        path.write_text(json.dumps(as_json(name, config, verdicts), indent=2) + "\n", encoding="utf-8")
    return BROKEN if any(verdict.broken for verdict in verdicts) else KEPT


def summary(verdicts: list[Verdict]) -> str:
    """How many of the promises that apply are kept, and how many do not apply."""
    broken, judged, all_of_them = (
        sum(map(len, lists)) for lists in zip(*((one.broken, one.judged, one.outcomes) for one in verdicts))
    )
    others = all_of_them - judged
    said = f"{broken} of {judged} promises are broken" if broken else f"{judged} of {judged} promises are kept"
    return said + (f", {others} {'does' if others == 1 else 'do'} not apply" if others else "")


def check(name: str, config: CheckConfig, registry: Registry) -> list[Verdict]:
    """The verdicts on a mixer of that name, or on all that a distribution of that name declares.

    Raises: NotFoundError for a name that is neither, or a promise that no suite has.
    """
    # Only here: the suites load torch.
    from subquad.testing.kernel_suite import KernelSuite
    from subquad.testing.mixer_suite import MixerSuite
    from subquad.testing.verdict import judge, promises

    mixers, kernels = named(name, registry, config.target.partition(":")[0])
    if config.config.get("bidirectional") and any(spec.bidirectional for spec in mixers):
        raise ConfigError(
            what="the form that sees both sides has a promise of its own, and no carry to judge",
            where="config.bidirectional",
            mend="leave it out; only=its_bidirectional_form_sees_both_sides judges that form alone",
        )
    suites: list[tuple[str, str, str, type[Any], Mapping[str, object]]] = [
        ("mixer", spec.name, registry.origin(spec), MixerSuite,
         {"mixer": spec.name, "config": config.config, "device": config.target, "seed": config.seed})
        for spec in mixers
    ]  # fmt: skip
    for key in kernels:
        operator, _, kernel = key.partition("/")
        on_device = {"operator": operator, "kernel": kernel, "device": config.target}
        suites.append(("kernel", key, registry.origin(registry.kernels[key]), KernelSuite, on_device))
    known = sorted({promise for *_, suite, _ in suites for promise in promises(suite)})
    if config.only and config.only not in known:
        raise NotFoundError(
            what=f"no promise is called '{config.only}'",
            where="only",
            mend=f"{suggestion(config.only, known)}there are {', '.join(known)}",
        )
    verdicts = []
    for kind, thing, origin, suite, settings in suites:
        checked = type("Checked", (suite,), dict(settings))
        if kind == "mixer":
            checked.d_model = _fitting_width(checked, thing, config.d_model)  # type: ignore[attr-defined]
        outcomes = judge(checked, only=config.only or None)
        behind = checked.behind_itself() if kind == "mixer" and outcomes else None  # type: ignore[attr-defined]
        if behind is not None:
            outcomes = [_of_both(*pair) for pair in zip(outcomes, judge(behind, only=config.only or None))]
        if not outcomes:
            continue  # the one promise that is asked for is of the other suite
        width = checked.d_model if kind == "mixer" else config.d_model  # type: ignore[attr-defined]
        again = _command(thing if kind == "mixer" else name, replace(config, d_model=width))
        verdicts.append(Verdict(kind=kind, name=thing, origin=origin, outcomes=tuple(outcomes), again=again))
    return verdicts


def _of_both(first: Outcome, behind: Outcome) -> Outcome:
    """A promise of a mixer in front of, and behind, a layer of its own kind."""
    said = first.broken if behind.broken is None else f"behind a layer of its own kind: {behind.broken}"
    return replace(
        first,
        broken=first.broken or said,
        seconds=first.seconds + behind.seconds,
        inapplicable=first.inapplicable and behind.inapplicable,  # it may share there alone
    )


def _fitting_width(suite: type[Any], mixer: str, asked: int) -> int:
    """The width that is asked for, or the least that the mixer's config takes.

    One that it refuses is the caller's error, or a default that does not fit: no promise is broken by it.
    Raises: ConfigError.
    """
    refused: ConfigError | None = None
    for width in (asked,) if asked else WIDTHS:
        try:
            type("Tried", (suite,), {"d_model": width})().build(device="meta")
        except ConfigError as error:
            refused = refused or error
        except Exception:  # whatever else it raises breaks promises, and is said under each
            return width
        else:
            return width
    assert refused is not None
    raise ConfigError(
        what=refused.what,
        where=f"plugins check {mixer}, {refused.where}",
        mend=f"{refused.mend}: config={{KEY: VALUE}} d_model=WIDTH",
    )


def named(name: str, registry: Registry, device_kind: str) -> tuple[list[MixerSpec], list[str]]:
    """The mixers, and the keys of the kernels that run on such a device, of a mixer's or a distribution's name.

    Raises: NotFoundError for another name, and for a distribution whose plugins could not be loaded.
    """
    if name in registry.mixers:
        return [registry.mixers[name]], []
    distributions = {record.distribution for record in registry.plugins}
    if name in distributions:
        mixers = [spec for spec in registry.mixers.values() if registry.origins[spec].distribution == name]
        kernels = [
            key for key, kernel in registry.kernels.items()
            if registry.origins[kernel].distribution == name and kernel.missing() is None
            and device_kind in kernel.devices
        ]  # fmt: skip
        if mixers or kernels:
            return mixers, kernels
        raise NotFoundError(
            what=f"{name} declares neither mixers nor kernels of {device_kind}",
            where="plugins check",
            mend="name another distribution, or another target",
        )
    for problem in registry.problems:
        if name in (problem.distribution, problem.name):
            raise NotFoundError(what=f"{name} was skipped: {problem.reason}", where="plugins check", mend=problem.mend)
    known = [*registry.mixers, *sorted(distributions)]
    raise NotFoundError(
        what=f"no mixer and no distribution is called '{name}'",
        where="plugins check",
        mend=f"{suggestion(name, known)}there are {', '.join(known)}",
    )


def as_json(name: str, config: CheckConfig, verdicts: list[Verdict]) -> dict[str, Any]:
    """The verdicts as JSON values."""
    import torch

    on_cuda = config.target.startswith("cuda")
    return {
        "format_version": FORMAT_VERSION,
        "contract_version": CONTRACT_VERSION,
        "checked": name,
        "kept": not any(verdict.broken for verdict in verdicts),
        "summary": summary(verdicts),
        "target": config.target,
        "device": torch.cuda.get_device_name(config.target) if on_cuda else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "seed": config.seed,
        "d_model": config.d_model,
        "config": config.config,
        "verdicts": [
            {
                "kind": verdict.kind,
                "name": verdict.name,
                "origin": verdict.origin,
                "again": verdict.again,
                "promises": [
                    {"name": outcome.promise, "kept": outcome.broken is None, "seconds": round(outcome.seconds, 3),
                     "applies": outcome.inapplicable is None}
                    | ({} if outcome.inapplicable is None else {"reason": outcome.inapplicable})
                    | ({} if outcome.broken is None else {
                        "broken": outcome.broken, "again": f"{verdict.again} only={outcome.promise}"
                    })
                    for outcome in verdict.outcomes
                ],
            }
            for verdict in verdicts
        ],
    }  # fmt: skip


def _parsed(arguments: list[str]) -> CheckConfig:
    values = key_values("plugins check", CheckConfig, arguments)
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}" for key, value in values.items()]))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(
            what=str(error).splitlines()[0], where="plugins check", mend="write values as YAML: config={num_heads: 2}"
        ) from None
    assert isinstance(plain, dict)
    return typed_config(CheckConfig, {str(key): value for key, value in plain.items()}, "plugins check")


def _check_target(target: str) -> None:
    import torch

    if target.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(what=f"there is no {target} here", where="target", mend="use target=cpu")


def _command(name: str, config: CheckConfig) -> str:
    words = ["python", "-m", "subquad", "plugins", "check", name, f"target={config.target}", f"seed={config.seed}"]
    words.append(f"d_model={config.d_model}")
    if config.config:
        words.append(f"config={json.dumps(config.config)}")
    return shlex.join(words)


def _row(outcome: Outcome) -> list[str]:
    if outcome.inapplicable is not None:
        return [outcome.promise, f"does not apply: {outcome.inapplicable}", ""]
    return [outcome.promise, "kept" if outcome.broken is None else "BROKEN", f"{outcome.seconds:.2f}"]
