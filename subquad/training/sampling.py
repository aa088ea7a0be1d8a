"""How the next token is drawn from logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.errors import ConfigError, RunError
from subquad.schema import GenerateConfig


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is done to logits before a token is drawn, in this order:

    repetition_penalty r   logits of tokens that came before are divided by r if positive, multiplied if negative
                           (Keskar et al. 2019, section 4.1)
    temperature T          logits / T; 0 takes the largest and ends here
    top_k                  only the k largest (Fan et al. 2018); 0: all
    top_p                  only the likeliest tokens that together reach p (Holtzman et al. 2020); 1: all
    min_p                  only tokens of at least min_p times the largest probability (Nguyen et al. 2024); 0: all
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, is_right, mend in (
            ("temperature", self.temperature >= 0, "use 0 (always the likeliest token) or more"),
            ("top_k", self.top_k >= 0, "use 0 (no limit) or more"),
            ("top_p", 0 < self.top_p <= 1, "use a share above 0, up to 1 (no limit)"),
            ("min_p", 0 <= self.min_p <= 1, "use 0 (no limit) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "use 1 (none) or more"),
        ):
            if not is_right:
                raise ConfigError(what=f"{name} is {getattr(self, name)}", where=name, mend=mend)

    @classmethod
    def of(cls, config: GenerateConfig) -> Sampling:
        """What a request asks for.  Raises: ConfigError."""
        return cls(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
        )


class Sampler:
    """Draws the tokens of one sequence, on the CPU, so that a seed gives one text whatever the device."""

    def __init__(self, sampling: Sampling, seed: int, prompt: Iterable[int]) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(seed)
        self._before = set(prompt)

    def __call__(self, logits: Tensor) -> int:
        """The next token.  Shapes:  logits: v.  Raises: RunError where logits are not numbers."""
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise RunError(
                what="the model's logits are not finite",
                where="generate",
                mend="train from an earlier checkpoint: these weights are of no use",
            )
        if self._sampling.repetition_penalty != 1.0:
            logits = penalised(logits, self._before, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(probabilities(logits, self._sampling), 1, generator=self._generator))
        self._before.add(token)
        return token


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """softmax(logits / temperature) under the limits, which is renormalised after each.  Shapes:  logits: v  ->  v"""
    # From the largest down and in float64: no temperature makes a logit infinite, or is taken for 0.
    found = torch.softmax((logits - logits.max()).double() / sampling.temperature, dim=0).to(logits.dtype)
    if 0 < sampling.top_k < len(found):
        found = _kept(found, logits >= logits.topk(sampling.top_k).values[-1])
    if sampling.top_p < 1:
        ordered, order = found.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered  # what likelier tokens have: the likeliest always stays
        found = _kept(
            found, torch.zeros_like(found, dtype=torch.bool).index_fill(0, order[before < sampling.top_p], True)
        )
    if sampling.min_p > 0:
        found = _kept(found, found >= sampling.min_p * found.max())
    return found


def penalised(logits: Tensor, before: Iterable[int], penalty: float) -> Tensor:
    """Logits in which tokens that came before are less likely.  Shapes:  logits: v  ->  v"""
    tokens = torch.tensor(sorted(before), dtype=torch.int64)
    found = logits[tokens]
    return logits.index_copy(0, tokens, torch.where(found > 0, found / penalty, found * penalty))


def _kept(shares: Tensor, kept: Tensor) -> Tensor:
    shares = shares.masked_fill(~kept, 0.0)
    return shares / shares.sum()
