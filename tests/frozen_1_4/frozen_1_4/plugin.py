"""What contract 1.4 has that 1.3 had not."""

from dataclasses import dataclass

from subquad import Growth, ImportSpec, MixerContext, MixerSpec, SharedTensor, Sharing, hookimpl
from subquad_kernels import DeviceLimits, Kernel, Workload


@dataclass(kw_only=True)
class TellConfig:
    num_heads: int = 2


@dataclass(kw_only=True)
class ListenConfig:
    num_heads: int = 2
    share: float = 1.0


@dataclass(kw_only=True)
class DriftConfig:
    bidirectional: bool = False


def shared(config, context: MixerContext) -> dict[str, SharedTensor]:
    """Keys and values of all tokens so far, and a tensor of the call's own."""
    heads = (config.num_heads, context.d_model // config.num_heads)
    past = SharedTensor(shape=heads, history=True, options={"turned": False})
    return {"frozen.keys": past, "frozen.values": past, "frozen.tokens": SharedTensor(shape=(context.d_model,))}


def tells(config: TellConfig, context: MixerContext) -> Sharing:
    return Sharing(publishes=shared(config, context))


def listens(config: ListenConfig, context: MixerContext) -> Sharing:
    """To whoever told something last."""
    return Sharing(reads=shared(config, context))


def supports(workload: Workload, limits: DeviceLimits) -> str | None:
    return "does not compute in float16" if workload.dtype == "float16" else None


def launches(workload: Workload) -> int:
    return 9 if workload.phase == "forward" else 20


def serial_steps(workload: Workload) -> int:
    return 1


@hookimpl
def subquad_provide_kernels():
    return [
        Kernel(
            operator="softmax_attention",
            name="frozen_exact",
            implementation="frozen_1_4.kernel",
            supports=supports,
            devices=frozenset({"cpu"}),
            requires=(),
            extensions=(),
            origin="frozen-1-4",
            first_calls_in_threads=True,
            launches=launches,
            serial_steps=serial_steps,
        )
    ]


@hookimpl
def subquad_provide_mixers():
    return [
        MixerSpec(
            name="frozen_teller",
            summary="attention that tells what it saw",
            paper="none",
            config=TellConfig,
            build="frozen_1_4.mixers:Teller",
            work_growth=Growth.QUADRATIC,
            carry_growth=Growth.LINEAR,
            operators=("softmax_attention",),
            shares=tells,
        ),
        MixerSpec(
            name="frozen_listener",
            summary="attention to what another layer saw",
            paper="none",
            config=ListenConfig,
            build="frozen_1_4.mixers:Listener",
            work_growth=Growth.QUADRATIC,
            carry_growth=Growth.LINEAR,
            no_decay=("gain",),
            operators=("softmax_attention",),
            shares=listens,
        ),
        MixerSpec(
            name="frozen_drift",
            summary="a sum that decays, or one to both sides",
            paper="none",
            config=DriftConfig,
            build="frozen_1_4.drift:build",
            work_growth=Growth.LINEAR,
            carry_growth=Growth.CONSTANT,
            operators=("linear_attention",),
            bidirectional=True,
        ),
    ]


@hookimpl
def subquad_provide_config_packages():
    return ["frozen_1_4.conf"]


@hookimpl
def subquad_provide_imports():
    return [
        ImportSpec(
            model_type="frozen_1_4_arch",
            summary="nobody's",
            build="frozen_1_4.exports:layout",
            mixer="frozen_drift",
            export="frozen_1_4.exports:config",
        )
    ]
