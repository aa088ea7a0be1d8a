"""How kernels are chosen: which estimator, how long it may measure, what is pinned and what is forbidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from subquad.errors import ConfigError, NotFoundError, suggestion
from subquad.schema import RunConfig
from subquad_kernels.catalogue import CATALOGUE

ESTIMATORS = ("measured", "learned", "roofline", "constant")


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """`pins` maps an operator to the one kernel it must run; `deny` lists kernels, as NAME or operator/NAME.

    With `pins_give_way` a pinned kernel that cannot compute a node leaves it to the others, and the plan says so; else
    it is refused. `fit` is the folder of a fitted cost model; None: the newest that is shipped for our kernels.
    """

    estimator: str = "measured"
    fit: str | None = None
    measure: bool = True
    measure_budget_s: float = 30.0
    pins: Mapping[str, str] = field(default_factory=dict)
    deny: tuple[str, ...] = ()
    pins_give_way: bool = False

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ConfigError(
                what=f"no estimator is called '{self.estimator}'",
                where="compiler.estimator",
                mend=f"{suggestion(self.estimator, ESTIMATORS)}there are {', '.join(ESTIMATORS)}",
            )
        if self.fit is not None and self.estimator not in ("measured", "learned"):
            raise ConfigError(
                what=f"a fit is named, and the estimator '{self.estimator}' asks none",
                where="compiler.fit",
                mend="use compiler.estimator=learned or measured, or leave fit out",
            )
        if self.measure_budget_s <= 0:
            raise ConfigError(
                what=f"measure_budget_s is {self.measure_budget_s}",
                where="compiler.measure_budget_s",
                mend="use a number above 0, or compiler.measure=false",
            )
        operators = [operator.name for operator in CATALOGUE]
        for operator, kernel in self.pins.items():
            if operator not in operators:
                raise NotFoundError(
                    what=f"no operator is called '{operator}'",
                    where=f"kernel.{operator}",
                    mend=f"{suggestion(operator, operators)}there are {', '.join(operators)}",
                )
            _check_kernel(kernel, [known.name for known in CATALOGUE.kernels(operator)], f"kernel.{operator}")
        kernels = [kernel for operator in CATALOGUE for kernel in CATALOGUE.kernels(operator.name)]
        known = [kernel.name for kernel in kernels] + [kernel.key for kernel in kernels]
        for name in self.deny:
            _check_kernel(name, known, "deny")

    @classmethod
    def of_run(cls, config: RunConfig) -> CompileOptions:
        """What a run's configuration asks for."""
        return cls(
            estimator=config.compiler.estimator,
            fit=config.compiler.fit,
            measure=config.compiler.measure,
            measure_budget_s=config.compiler.measure_budget_s,
            pins=dict(config.kernel),
            deny=tuple(config.deny),
        )

    def denies(self, operator: str, kernel: str) -> bool:
        """Whether that kernel must not be chosen."""
        return kernel in self.deny or f"{operator}/{kernel}" in self.deny


def _check_kernel(name: str, known: list[str], where: str) -> None:
    if name not in known:
        raise NotFoundError(
            what=f"no kernel is called '{name}'",
            where=where,
            mend=f"{suggestion(name, known)}there are {', '.join(dict.fromkeys(known))}",
        )
