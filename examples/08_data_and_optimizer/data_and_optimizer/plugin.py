"""What this plugin declares; imports neither numpy nor torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from subquad import ComponentSpec, ConfigError, hookimpl


@dataclass(kw_only=True)
class ParityConfig:
    """Random bits; after each one, whether an odd number of ones was seen since the last mark."""

    mark_probability: float = 0.1
    train_samples: int = 100_000
    validation_samples: int = 2_000
    seed: int = 0  # of the samples; their order follows the run's seed

    def __post_init__(self) -> None:
        if not 0 <= self.mark_probability <= 1:
            raise ConfigError(
                what=f"mark_probability is {self.mark_probability}",
                where="data.mark_probability",
                mend="use a number from 0 to 1",
            )


@dataclass(kw_only=True)
class LionConfig:
    """Lion (Chen et al. 2023). Its steps have one size, so that it wants a tenth of Adam's learning rate."""

    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 1.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                what=f"betas are {self.betas}", where="optimizer.betas", mend="use two numbers from 0 to below 1"
            )


@hookimpl
def subquad_provide_components() -> Iterable[ComponentSpec]:
    return [
        ComponentSpec(
            kind="data",
            name="parity",
            summary="synthetic: parity of the bits since the last mark",
            config=ParityConfig,
            build="data_and_optimizer.parity:build",
        ),
        ComponentSpec(
            kind="optimizer",
            name="lion",
            summary="Lion: the sign of a momentum",
            config=LionConfig,
            build="data_and_optimizer.lion:build",
        ),
    ]
