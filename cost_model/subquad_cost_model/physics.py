"""The physics head: a quantity as a sum of what the row asks of a device, each part times a factor of the kernel.

    seconds = max(sum over j of  c_kj x_j(row, device),  what the host needs beyond its head start),    c >= 0

x_j are seconds that the units work, launches, steps that wait for each other, waves of programs; k is the kernel. What
the host needs is by its pace, where a device knows it: over the usual one of the rows of the fit. Such
a sum goes on beyond what was measured: twice the tokens of a linear operator take twice the time. What widths and
options cost a kernel beyond it is left to `gaussian_process`. Bytes at the peak are a sum alike, of other terms.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from subquad_cost_model.features import Floats
from subquad_cost_model.rows import CostRow
from subquad_cost_model.terms import HOST, MOST_FUSED, SECONDS, STARTS, Keys, Terms

PULL = 1.0
"""How firmly a kernel's factors are held near those of all kernels: the square of it counts like so many rows."""
FIRM = 0.3
"""How firmly what a call of a fused kernel costs to begin with is held, as a share of itself, or of one launch where
that is more: long rows say nothing of it, and a few of them would have short ones begin with their milliseconds."""
LEAST = 1e-12
"""A sum is a little more than nothing."""
LEAST_ROWS = 6
"""Of a kernel with fewer rows only the level is its own, and so it is for the wide dtypes of a kernel."""
MOST = 100.0
"""No unit is slower than its ceiling by more: a term that hardly shows in the rows would take any factor."""
OUTLIER = 0.15
"""Log errors beyond this count by their size, not its square."""
FINEST_DOUBT = 0.05
"""Rows whose repeats lie closer together than this are equally good."""


@dataclass(frozen=True, kw_only=True)
class Physics:
    """Factors by kernel (with its operator), and those pooled over a kind of kernels for one that was never measured.

    A kernel has factors of its own for half precision, or for float32 and wider, where either has rows enough.
    Kinds are `fused` (a few launches a call) and `composed`, and `kinds` says which a kernel is.
    `terms` says of what the sum is made: `SECONDS` or `BYTES`; `host_s` is the usual pace of the host, None if no row
    knew one. `exact` are the kernels that compute float16 as they compute float32, whose factors are its then.
    """

    terms: tuple[str, ...]
    kernels: Mapping[str, tuple[float, ...]]
    pooled: Mapping[str, tuple[float, ...]]
    kinds: Mapping[str, str]
    host_s: float | None = None
    exact: tuple[str, ...] = ()

    @classmethod
    def fit(cls, asked: Terms, quantity: Floats, doubts: Floats) -> Physics:
        """Non-negative least squares of relative errors, row i weighing 1 / doubts_i, outliers less at each round.

            min over c >= 0:  sum_i w_i (c x_i / y_i - 1)^2  +  PULL^2 sum_j (s_j (c_j - c0_j))^2

        x_i are the terms of the host or the others, whichever say more so far. s_j is the size of the term in these
        rows, c0 the factors of its kind at levels of this kernel: one for what a call costs to begin with, one for what
        grows, one for each of the host's. Those of a kernel's dtypes are held near the kernel's in turn.
        """
        paces_s = [pace_s for pace_s in asked.paces_s if pace_s]
        host_s = statistics.median(paces_s) if paces_s else None
        terms, rows, own, weights = asked.names, asked.rows, _own(asked.names), 1 / np.maximum(doubts, FINEST_DOUBT)
        most = np.array([math.inf if t in (*STARTS, "host") else 1.0 if t == "clears" else MOST for t in terms])

        def factors(here: Sequence[int], near: Floats, pull: float, firm: float = 0.0) -> Floats:
            held = np.where(begins, firm, 0.0)
            return _factors(values[here], own, quantity[here], weights[here], near, pull, most, held)

        of_kernel = _by(lambda index: asked.keys[index][0], range(len(rows)))
        exact: tuple[str, ...] = ()
        if terms == SECONDS:
            exact = tuple(name for name, here in of_kernel.items() if _computes_wide(asked, here, quantity, host_s))
        values, keys = asked.computed(exact, host_s)
        kinds = {name: _kind(max(rows[index].launches for index in here)) for name, here in of_kernel.items()}
        of_kind = _by(lambda index: kinds[asked.keys[index][0]], range(len(rows)))
        begins, hosts = np.isin(terms, STARTS), np.isin(terms, HOST)
        pooled = {kind: factors(here, hosts.astype(np.float64), 0.05) for kind, here in of_kind.items()}
        for kind, here in of_kind.items():
            device, host = _sides(values[here], own, pooled[kind])
            if not (host > device).any():
                pooled[kind][own:] = 0  # nothing says that the host ever matters
        groups = np.array([begins, ~begins & ~hosts, *np.eye(len(terms), dtype=bool)[own:]])
        kernels: dict[str, Floats] = {}
        for kernel, here in of_kernel.items():
            near = pooled[kinds[kernel]]
            parts, ones = values[here] @ (near * groups).T, np.ones(len(groups))
            firm = FIRM if kinds[kernel] == "fused" and terms == SECONDS else 0.0
            held = firm * np.eye(len(groups))[0]
            levels = _factors(parts, 2, quantity[here], weights[here], ones, PULL, math.inf * ones, held)
            kernels[kernel] = near * (levels @ groups)
            if len(here) < LEAST_ROWS:
                continue
            kernels[kernel] = factors(here, kernels[kernel], PULL, firm)
            for dtypes, those in _by(lambda index: keys[index][1], here).items():
                if len(those) < LEAST_ROWS:
                    continue
                kernels[dtypes] = factors(those, kernels[kernel], PULL, firm)
        found, of_kinds = ({name: tuple(f.tolist()) for name, f in of.items()} for of in (kernels, pooled))
        return cls(terms=terms, kernels=found, pooled=of_kinds, kinds=kinds, host_s=host_s, exact=exact)

    def predict(self, asked: Terms) -> Floats:
        """The sum of each row on its device."""
        return total(self.parts(asked))

    def parts(self, asked: Terms) -> Floats:
        """What each term is of the sum of each row, one line each: c_kj x_j, and 0 on the side that takes less long."""
        values, keys = asked.computed(self.exact, self.host_s)
        of_rows = [self._factors_of(*of_row) for of_row in zip(asked.rows, keys, strict=True)]
        parts = values * np.array(of_rows, dtype=np.float64).reshape(values.shape)
        own = _own(self.terms)
        waits = parts[:, own:].sum(axis=1) > parts[:, :own].sum(axis=1)
        return np.where(waits[:, None] == (np.arange(len(self.terms)) >= own), parts, 0.0)

    def _factors_of(self, row: CostRow, keys: Keys) -> Sequence[float]:
        """Those of the row's kernel, or of its kind if that was never measured."""
        for name in reversed(keys):
            if name in self.kernels:
                return self.kernels[name]
        return self.pooled.get(_kind(row.launches), next(iter(self.pooled.values())))


def total(parts: Floats) -> Floats:
    """The sum of each line, a little more than nothing."""
    return np.asarray(np.maximum(parts.sum(axis=1), LEAST), dtype=np.float64)


def _kind(launches: int) -> str:
    return "fused" if launches <= MOST_FUSED else "composed"


def _computes_wide(asked: Terms, here: Sequence[int], quantity: Floats, host_s: float | None) -> bool:
    """Whether factors of its float32 rows are off on those of float16 by less than half of what bfloat16's are."""
    of_dtype = _by(lambda index: asked.rows[index].dtype, here)
    halves = of_dtype.get("float16", [])
    if min(map(len, (halves, of_dtype.get("bfloat16", ()), of_dtype.get("float32", ())))) < LEAST_ROWS:
        return False

    def off(dtype: str) -> float:
        """Of float16, by the factors of another dtype and as if computed in it."""
        known = of_dtype[dtype]
        exact = {asked.keys[here[0]][0]} if dtype == "float32" else ()
        (values, _), (others, _) = (asked.take(which).computed(exact, host_s) for which in (halves, known))
        far, nothing = np.full(values.shape[1], math.inf), np.zeros(values.shape[1])
        found = _factors(others, values.shape[1], quantity[known], np.ones(len(known)), nothing, 0.1, far)
        return float(np.median(np.abs(np.log(np.maximum(values @ found, LEAST) / quantity[halves]))))

    as_half = off("bfloat16")
    return as_half > OUTLIER and off("float32") < as_half / 2


def _by(name: Callable[[int], str], here: Sequence[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for index in here:
        found[name(index)].append(index)
    return found


def _own(terms: tuple[str, ...]) -> int:
    """How many terms are not the host's."""
    return len(terms) - sum(term in HOST for term in terms)


def _factors(
    values: Floats,
    own: int,
    quantity: Floats,
    weights: Floats,
    near: Floats,
    pull: float,
    most: Floats,
    firm: Floats | float = 0.0,
) -> Floats:
    """Near `near` and at most `most`; weights of any scale. The first `own` values are not the host's.

    Factors are held near `near` by as much as their terms show in the rows, or by `firm` of their own size if that is
    more (of 1 where they are smaller).
    """
    weights = weights / weights.mean()
    relative, current = values / quantity[:, None], weights
    device, host = _sides(relative, own, near)
    # Where nothing is known of the device yet, rows wait that took no longer than the host is expected to need.
    waits = host > (device if near[:own].any() else 1.0)
    found = near
    for _ in range(8):
        ratios = np.where(waits[:, None] == (np.arange(len(near)) >= own), relative, 0.0)
        sizes = np.sqrt((ratios**2).mean(axis=0)) + 1e-12
        held = np.maximum(pull, firm / (sizes * np.maximum(near, 1)))
        system = np.vstack([ratios / sizes * current[:, None], np.diag(held)])
        solved, _ = nnls(system, np.concatenate([current, held * sizes * near]), maxiter=2000)
        found = np.minimum(solved / sizes, most)
        device, host = _sides(relative, own, found)
        waits, predicted = host > device, np.maximum(np.maximum(device, host), 1e-9)
        # Twice too much is a relative error of 1, half of it one of 1/2: the square root makes them alike.
        errors = np.abs(np.log(predicted))
        current = weights * np.sqrt(np.minimum(1, OUTLIER / np.maximum(errors, 1e-3)) * np.minimum(1, 1 / predicted))
    return np.asarray(found, dtype=np.float64)


def _sides(values: Floats, own: int, factors: Floats) -> tuple[Floats, Floats]:
    return values[..., :own] @ factors[:own], values[..., own:] @ factors[own:]
