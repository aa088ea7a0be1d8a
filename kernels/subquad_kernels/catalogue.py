"""Records of operators and kernels, and the catalogue that holds them: start reading here.

Records are plain data and import no torch; code is named by `module:attribute` and loaded when first needed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from packaging.requirements import Requirement

from subquad_kernels.workload import DeviceLimits, Work, Workload

if TYPE_CHECKING:
    import torch

    Argument = torch.Tensor | bool | int | float | str | None
    Arguments = Mapping[str, Argument]
    Outputs = tuple[torch.Tensor, ...]


class CatalogueError(ValueError):
    """An operator or kernel was declared twice, or asked for and not declared."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a kernel may stand from its fp64 reference, and why.

    The error is ‖kernel − reference‖∞ / max(‖reference‖∞, 1e-2), per output and per gradient; where a gradient sums a
    term a token (`Operator.spread`), ‖sum of |terms|‖∞ stands for ‖reference‖∞.
    """

    output: float
    gradient: float
    reason: str


class OperatorDefinition(Protocol):
    """The torch half of an operator, found at `Operator.definition`."""

    @staticmethod
    def reference(**arguments: Argument) -> Outputs:
        """Compute every output and residual in plain differentiable torch, as the equation is written."""

    @staticmethod
    def workload_of(arguments: Arguments, phase: str) -> Workload:
        """Describe a call by its workload; works on fake and meta tensors."""

    @staticmethod
    def check(arguments: Arguments) -> None:
        """Raise ValueError, naming the axes, when the shapes do not fit together."""

    @staticmethod
    def empty_outputs(arguments: Arguments) -> Outputs:
        """Make empty outputs and residuals of the right shape, type and device; works on fake tensors."""

    @staticmethod
    def batch_and_length(arguments: Arguments) -> tuple[int, int]:
        """Read the batch b and the number of query tokens t of a call, for the kernel table."""

    @staticmethod
    def sample_inputs(workload: Workload, *, seed: int, device: str) -> dict[str, Argument]:
        """Draw arguments of this workload: realistic ones, and among them the extreme ones that a kernel must stand.

        Decays near 0 and near 1, scores of tens, and of four documents and more an empty one and one of one token.
        """


class KernelFunctions(Protocol):
    """The torch half of a kernel, found at `Kernel.implementation`; both functions run without autograd."""

    @staticmethod
    def forward(**arguments: Argument) -> Outputs:
        """Compute the operator's outputs, then its residuals (what the operator's declaration lists)."""

    @staticmethod
    def backward(
        arguments: Arguments, outputs: Outputs, gradients: tuple[torch.Tensor | None, ...]
    ) -> dict[str, torch.Tensor | None]:
        """Compute the gradient of every tensor argument, by name."""


def nothing_shared(arguments: Arguments) -> dict[str, torch.Tensor]:
    """Every tensor has values of its own for every token, or far more of them than may all cancel."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Operator:
    """A mathematical function with a name; mixers call it, kernels compute it.

    `definition` names a module or object that satisfies `OperatorDefinition`. `tensors` lists its tensor arguments in
    the order of the torch op's signature, `outputs` the results callers see and `residuals` what the forward hands to
    the backward. `defaults` maps a device kind to the kernels that run when nobody chose, most wanted first: the first
    one that is installed and supports the call. `examples` are small workloads on which every kernel can be checked
    within a second. `benchmarks` maps a device kind to the smallest workload of a series in which `t` doubles.
    `spread` gives a tensor whose few values all tokens share to each token, as a view that means the same call: its
    gradient is a sum over tokens, and a check takes the size of what may cancel there from the terms.
    """

    name: str
    summary: str
    definition: str
    tensors: tuple[str, ...]
    outputs: tuple[str, ...]
    residuals: tuple[str, ...]
    defaults: Mapping[str, tuple[str, ...]]
    work: Callable[[Workload], Work]
    tolerances: Mapping[str, Tolerance]
    examples: tuple[Workload, ...] = ()
    benchmarks: Mapping[str, Workload] = field(default_factory=dict)
    spread: Callable[[Arguments], dict[str, torch.Tensor]] = nothing_shared

    @property
    def op_name(self) -> str:
        """The name of the torch.library operator."""
        return f"subquad::{self.name}"

    @property
    def takes_sequences(self) -> bool:
        """False for one that decodes alone: all its examples take a single token behind a carry."""
        return any(example.phase != "decode" for example in self.examples)

    @cached_property
    def torch_half(self) -> OperatorDefinition:
        """The definition, imported on first use."""
        return load_attribute(self.definition)  # type: ignore[return-value]

    def __hash__(self) -> int:
        return hash(self.name)


def no_padding(workload: Workload) -> float:
    """A kernel that computes the pairs of tokens that its operator counts, and no others."""
    return 1.0


def one_launch(workload: Workload) -> int:
    """A fused kernel, or one that starts a few device kernels at any size (16 at most: `test_declared_launches.py`).

    Those few are the same for every length or nearly so, and are in what a cost model finds that a call of the kernel
    costs. Where how many there are depends on lengths, a declaration says so.
    """
    return 1


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to compute an operator.

    `supports` answers None, or the reason why this workload cannot run on that device. `requires` are requirement
    strings of optional distributions, and `extensions` the compiled modules that a build of the first of them may lack;
    a kernel that is not installed is a reported fact, never an ImportError.
    `first_calls_in_threads` is False where a first call must have the process to itself, as torch.compile's must.
    `launches` says how many device kernels one call starts, to within a third, or `one_launch`: a kernel composed of
    torch's own starts dozens, or some for every chunk, and then takes as long as the host needs to start them.
    `serial_steps` counts the dependent steps of a kernel that cuts time where its operator's work does not, or goes
    from token to token where that goes from chunk to chunk (None: those of the operator). `padding` is how many times
    the pairs of tokens that the operator counts this kernel computes: more than once where it computes what it then
    masks, or twice. `scratch_bytes` are what one call holds at most beside its tensors in and out (None: not counted;
    measured and learned peaks tell).
    `replayable` promises that its host code follows from the signature of its arguments alone and reaches the device by
    torch's operations and `QuickLaunch` only: calls through the op leave it out when it is known (`replay.py`), and
    before anything is compiled it is run for what it launches, on memory with anything in it (`compile_processes.py`).
    """

    operator: str
    name: str
    implementation: str
    supports: Callable[[Workload, DeviceLimits], str | None]
    devices: frozenset[str]
    requires: tuple[str, ...] = ()
    extensions: tuple[str, ...] = ()
    origin: str = "subquad-kernels"
    first_calls_in_threads: bool = True
    launches: Callable[[Workload], int] = one_launch
    serial_steps: Callable[[Workload], int] | None = None
    replayable: bool = False
    padding: Callable[[Workload], float] = no_padding
    scratch_bytes: Callable[[Workload], int] | None = None

    @property
    def key(self) -> str:
        """`operator/name`: unique in the catalogue."""
        return f"{self.operator}/{self.name}"

    @property
    def compiles(self) -> bool:
        """Whether its first call compiles Triton kernels, which takes seconds."""
        return any(Requirement(text).name == "triton" for text in self.requires)

    @cached_property
    def version(self) -> str:
        """A hash of the source beside the kernel and of what it calls: what was found out about other code expires."""
        module_name = self.implementation.partition(":")[0]
        spec = importlib.util.find_spec(module_name)
        if spec is None or spec.origin is None:
            return "unknown"
        digest = hashlib.sha256()
        # A module in a package of its own may use its neighbours; a top-level module stands alone.
        file = Path(spec.origin)
        for source in sorted(file.parent.glob("*.py")) if "." in module_name else [file]:
            digest.update(source.read_bytes())
        for text in self.requires:
            name = Requirement(text).name
            if name != "triton":  # its version stands beside every verdict and measurement
                digest.update(f"{name} {installed_version(name)}".encode())
        return digest.hexdigest()[:12]

    def missing(self) -> str | None:
        """None when everything it requires is installed, else what to install."""
        for text in self.requires:
            requirement = Requirement(text)
            version = installed_version(requirement.name)
            if version is None:
                return f"{requirement.name} is not installed (pip install '{text}')"
            if not requirement.specifier.contains(version, prereleases=True):
                return f"{requirement.name} {version} is installed, {text} is needed (pip install '{text}')"
        for module in self.extensions:
            if importlib.util.find_spec(module) is None:
                name, text = Requirement(self.requires[0]).name, self.requires[0]
                return f"{name} is here without its {module} (pip install --no-build-isolation '{text}')"
        return None

    def refusal(self, workload: Workload, limits: DeviceLimits) -> str | None:
        """None when the kernel may run this workload on this device, else the first reason why not."""
        if limits.kind not in self.devices:
            return f"runs on {', '.join(sorted(self.devices))} only"
        return self.missing() or self.supports(workload, limits)

    @cached_property
    def torch_half(self) -> KernelFunctions:
        """The functions, imported on first use."""
        return load_attribute(self.implementation)  # type: ignore[return-value]

    def __hash__(self) -> int:
        return hash(self.key)


def load_attribute(reference: str) -> object:
    """Import `module:attribute`, or a whole module when there is no colon."""
    module_name, _, attribute = reference.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def installed_version(distribution: str) -> str | None:
    """The version that its metadata states, None where it is not installed; nothing is imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class Catalogue:
    """The operators and kernels known to this process, each under one name."""

    def __init__(self) -> None:
        self._operators: dict[str, Operator] = {}
        self._kernels: dict[str, dict[str, Kernel]] = {}

    def add_operators(self, operators: Iterable[Operator]) -> None:
        """Add operators; the same record twice is no change, another record under a taken name is an error."""
        for operator in operators:
            known = self._operators.setdefault(operator.name, operator)
            if known is not operator:
                raise CatalogueError(f"two operators are called '{operator.name}'")

    def add_kernels(self, kernels: Iterable[Kernel]) -> None:
        """Add kernels; the same record twice is no change, another record under a taken name is an error."""
        for kernel in kernels:
            known = self._kernels.setdefault(kernel.operator, {}).setdefault(kernel.name, kernel)
            if known is not kernel:
                raise CatalogueError(
                    f"two kernels are called '{kernel.key}' (from {known.origin} and from {kernel.origin})"
                )

    def operator(self, name: str) -> Operator:
        """The operator of that name."""
        try:
            return self._operators[name]
        except KeyError:
            raise CatalogueError(f"no operator is called '{name}'; there are {', '.join(self._operators)}") from None

    def kernel(self, operator: str, name: str) -> Kernel:
        """The kernel of that operator and name."""
        try:
            return self._kernels[operator][name]
        except KeyError:
            have = ", ".join(self._kernels.get(operator, {})) or "none"
            raise CatalogueError(f"{operator} has no kernel called '{name}'; it has {have}") from None

    def kernels(self, operator: str) -> tuple[Kernel, ...]:
        """All kernels of an operator, in the order of declaration."""
        return tuple(self._kernels.get(operator, {}).values())

    def __iter__(self) -> Iterator[Operator]:
        return iter(self._operators.values())


CATALOGUE = Catalogue()
"""What the torch operators dispatch to; the package's own records are added by `subquad_kernels.builtin`."""
