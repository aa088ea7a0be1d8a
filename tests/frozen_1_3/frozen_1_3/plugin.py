"""Every hook of contract 1.3."""

from dataclasses import dataclass, field

from subquad import AdapterSpec, ComponentSpec, ConfigError, Growth, ImportSpec, MixerSpec, PassSpec, hookimpl
from subquad_kernels import DeviceLimits, Kernel, Operator, Tolerance, Work, Workload


@dataclass(kw_only=True)
class MixConfig:
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.factor == 0:
            raise ConfigError(what="factor is 0", where="factor", mend="use another number")


@dataclass(kw_only=True)
class CountingConfig:
    vocab_size: int = 5


@dataclass(kw_only=True)
class SgdConfig:
    lr: float = 0.1
    betas: list[float] = field(default_factory=list)


def work(workload: Workload) -> Work:
    tokens = workload.shape["b"] * workload.shape["t"] * workload.shape["c"]
    return Work(vector_flops=tokens, bytes_moved=2 * tokens * workload.element_bytes)


def supports(workload: Workload, limits: DeviceLimits) -> str | None:
    return None


OPERATOR = Operator(
    name="frozen_scale",
    summary="a factor",
    definition="frozen_1_3.operator",
    tensors=("x",),
    outputs=("y",),
    residuals=(),
    defaults={"cpu": ("scaled",), "cuda": ("scaled",)},
    work=work,
    tolerances={"float32": Tolerance(output=1e-6, gradient=1e-6, reason="one product")},
    examples=(
        Workload(operator="frozen_scale", shape={"b": 2, "t": 5, "c": 3}, dtype="float32", options={"factor": 2.0}),
    ),
)
BOTH = frozenset({"cpu", "cuda"})


@hookimpl
def subquad_provide_operators():
    return [OPERATOR]


@hookimpl
def subquad_provide_kernels():
    return [
        Kernel(
            operator="frozen_scale",
            name="reference",
            implementation="frozen_1_3.operator:REFERENCE",
            supports=supports,
            devices=BOTH,
        ),
        Kernel(
            operator="frozen_scale",
            name="scaled",
            implementation="frozen_1_3.operator:SCALED",
            supports=supports,
            devices=BOTH,
            origin="frozen-1-3",
        ),
    ]


@hookimpl
def subquad_provide_mixers():
    return [
        MixerSpec(
            name="frozen_mix",
            summary="a scaled token",
            paper="none",
            config=MixConfig,
            build="frozen_1_3.mixer:Mix",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            causal=True,
            packed=True,
            no_decay=("gain",),
            float32_parameters=(),
            operators=("frozen_scale",),
            candidate=False,
        )
    ]


@hookimpl
def subquad_provide_config_packages():
    return ["frozen_1_3.conf"]


@hookimpl
def subquad_provide_adapters():
    return [
        AdapterSpec(
            name="frozen",
            module_class="frozen_1_3.compiler:Attention",
            build="frozen_1_3.compiler:adapt",
            distinct_heads=False,
        )
    ]


@hookimpl
def subquad_provide_passes():
    return [PassSpec(name="frozen_pass", summary="copies a graph", run="frozen_1_3.compiler:run")]


@hookimpl
def subquad_provide_components():
    return [
        ComponentSpec(
            kind="data",
            name="frozen_counting",
            summary="counts",
            config=CountingConfig,
            build="frozen_1_3.training:source",
        ),
        ComponentSpec(
            kind="optimizer",
            name="frozen_sgd",
            summary="torch's",
            config=SgdConfig,
            build="frozen_1_3.training:optimizer",
        ),
    ]


@hookimpl
def subquad_provide_imports():
    return [ImportSpec(model_type="frozen_arch", summary="nobody's", build="frozen_1_3.imports:layout")]
