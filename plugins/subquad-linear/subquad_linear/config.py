"""How the mixers of this plugin are configured; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from subquad import ConfigError


def at_least_one(config: object, *names: str) -> None:
    """Refuse a size below 1 by name.  Raises: ConfigError."""
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(what=f"{name} is {getattr(config, name)}", where=name, mend="use 1 or more")


def positive(config: object, *names: str) -> None:
    """Refuse a number that is not above 0 by name.  Raises: ConfigError."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(what=f"{name} is {getattr(config, name)}", where=name, mend="use a number above 0")


def width_of_a_head(total: float, num_heads: int, what: str) -> int:
    """`total / num_heads` channels, which must be whole.  Raises: ConfigError."""
    if total != int(total) or int(total) % num_heads or total < num_heads:
        raise ConfigError(
            what=f"{num_heads} heads do not share {total:g} channels of {what} evenly",
            where="num_heads",
            mend="use a divisor of them, or change model.d_model",
        )
    return int(total) // num_heads


@dataclass(kw_only=True)
class RetNetConfig:
    """Linear attention with rotary positions and one constant decay per head (RetNet, 2023)."""

    num_heads: int = 4  # the paper's heads are 256 keys wide
    expand_v: int = 2  # width of all values / d_model
    rope_theta: float = 10_000.0  # base of the rotary angles

    def __post_init__(self) -> None:
        at_least_one(self, "num_heads", "expand_v")
        positive(self, "rope_theta")
