"""The built-in optimizers, as the plugin declares them; importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from subquad.contracts import ComponentSpec
from subquad.errors import ConfigError


@dataclass(kw_only=True)
class AdamWConfig:
    """AdamW (Loshchilov and Hutter 2019); decay only where the model's parameter groups allow it."""

    lr: float = 3e-3  # the peak, after warm-up; it suits laptop sizes, some hundred million parameters want about 4e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decays of the two running means
    weight_decay: float = 0.1  # decay of weights per step, times the learning rate
    eps: float = 1e-8  # added to the root of the mean square

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ConfigError(what=f"lr is {self.lr}", where="optimizer.lr", mend="use a number above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                what=f"betas are {self.betas}", where="optimizer.betas", mend="use two numbers from 0 to below 1"
            )
        for name in ("weight_decay", "eps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(
                    what=f"{name} is {getattr(self, name)}", where=f"optimizer.{name}", mend="use 0 or more"
                )


OPTIMIZERS: tuple[ComponentSpec, ...] = (
    ComponentSpec(
        kind="optimizer",
        name="adamw",
        summary="AdamW with decoupled weight decay",
        config=AdamWConfig,
        build="subquad.training.optimizers:build_adamw",
    ),
)
