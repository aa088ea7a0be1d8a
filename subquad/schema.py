"""The dataclasses of a run: the one schema of Python API, YAML and command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from subquad.errors import ConfigError, suggestion

AUTO = "auto"
"""An entry of a schedule whose mixer the compiler chooses."""


MOST_LAYERS = 10_000
"""Blocks are built one by one; a number beyond this is a slip."""
MOST_PROCESSES = 1024
"""Ranks, or workers of a loader, on one machine."""
INFINITY = float("inf")
LOG_LEVELS = ("debug", "info", "warning", "error")
CHUNKED = "chunked"
LOSSES = ("whole", CHUNKED)
STD_RULES = ("width", "small")
"""Standard deviations of linear maps that follow from the width d: d^-1/2, which keeps the variance of what a map takes
(LeCun et al. 1998), and (2 / 5d)^1/2, "small init" (Nguyen and Salazar 2019)."""


def _check_limits(config: object, section: str, **limits: tuple[float, float]) -> None:
    """Each field that is given must lie between two numbers, both included; NaN never does.  Raises: ConfigError."""
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(
                what=f"{name} is {value}",
                where=f"{section}.{name}" if section else name,
                mend=f"use {least} or more" + ("" if most == INFINITY else f", at most {most}"),
            )


@dataclass(kw_only=True)
class ChannelMixerConfig:
    """The per-token map of a block: SwiGLU  W_down(silu(W_gate u) * W_up u)  of hidden width `d_hidden`."""

    d_hidden: int = 512  # width between the two maps

    def __post_init__(self) -> None:
        _check_limits(self, "channel_mixer", d_hidden=(1, INFINITY))


@dataclass(kw_only=True)
class ModelConfig:
    """Embedding, backbone and lm_head. The backbone is a schedule of mixers that repeats to `num_layers` blocks."""

    name: str = "unnamed"  # the recipe's name; shown, never looked up
    d_model: int = 256  # residual width
    num_layers: int = 4  # blocks
    vocab_size: int = 0  # 0: the tokenizer's
    context_len: int = 0  # tokens the model is built for; 0: trainer.seq_len
    # keys of `mixers`, repeated; `auto` is a layer whose mixer is chosen among the candidates, under `budget`
    schedule: list[str] = field(default_factory=lambda: ["softmax_attention"])
    candidates: list[str] = field(default_factory=list)  # keys of `mixers` or installed mixers, best first; []: all
    # each entry: {mixer: REGISTRY_KEY, channel_mixer: {d_hidden: N} or null, ...fields of that mixer's config}
    mixers: dict[str, Any] = field(default_factory=dict)
    channel_mixer: ChannelMixerConfig | None = field(default_factory=ChannelMixerConfig)  # default of every entry
    tie_embeddings: bool = True  # the lm_head is the embedding
    norm_eps: float = 1e-6  # added to mean squares in every norm
    logit_cap: float = 0.0  # logits become cap tanh(logits / cap); 0: they stay as they are
    init_std: int | float | str = 0.02  # standard deviation of linear maps at the start, or a rule: width, small
    init_from: str | None = None  # hf:PATH_OR_ID, a Hugging Face checkpoint whose weights training starts from

    def __post_init__(self) -> None:
        _check_limits(
            self,
            "model",
            d_model=(1, INFINITY),
            num_layers=(1, MOST_LAYERS),
            vocab_size=(0, INFINITY),
            context_len=(0, INFINITY),
            norm_eps=(0, 1),
            logit_cap=(0, INFINITY),
        )
        if isinstance(self.init_std, str) and self.init_std not in STD_RULES:
            raise ConfigError(
                what=f"init_std is '{self.init_std}'",
                where="model.init_std",
                mend=f"use a number, or {' or '.join(STD_RULES)}",
            )
        if not isinstance(self.init_std, str):
            _check_limits(self, "model", init_std=(0, 1e3))
        if not self.schedule and self.init_from is None:
            raise ConfigError(
                what="the schedule is empty, and no checkpoint is named whose layout could be taken",
                where="model.schedule",
                mend="name a key of model.mixers, or model.init_from=hf:PATH_OR_ID",
            )
        for key in self.schedule:
            if self.mixers and key not in self.mixers and key != AUTO:
                raise ConfigError(
                    what=f"the schedule names '{key}', which model.mixers does not hold",
                    where="model.schedule",
                    mend=f"use one of {', '.join(self.mixers)}, or add model.mixers.{key}",
                )

    def resolved_init_std(self) -> float:
        """`init_std`, or what its rule gives for the width."""
        if isinstance(self.init_std, str):
            return math.sqrt((1.0 if self.init_std == "width" else 0.4) / self.d_model)
        return float(self.init_std)


@dataclass(kw_only=True)
class TokenizerConfig:
    """`bytes` (vocabulary 256), or `file` with the path of a Hugging Face `tokenizers` JSON."""

    kind: str = "bytes"
    file: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "bytes" and self.file is not None:
            raise ConfigError(
                what=f"the file '{self.file}' is named, and the tokenizer 'bytes' reads none",
                where="tokenizer.kind",
                mend="add tokenizer=file, or leave tokenizer.file out",
            )


@dataclass(kw_only=True)
class TrainerConfig:
    """How the optimisation runs. A step takes batch_size x seq_len x accumulate x groups tokens.

    A group is a device, or the context_parallel or tensor_parallel devices that share their sequences or projections.
    """

    max_steps: int = 1000
    max_seconds: float | None = None  # stop after the step that passes this wall time
    batch_size: int = 8  # sequences per device (or devices that share them) and micro-batch
    seq_len: int = 256  # tokens
    accumulate: int = 1  # micro-batches per step
    learning_rate_warmup_steps: int = 50
    final_learning_rate_fraction: float = 0.1  # cosine down to this share of the peak
    gradient_clip_norm: float = 1.0
    nonfinite: str = "stop"  # stop | skip: what becomes of a step whose loss or gradient is not finite
    validate_every_n_steps: int = 200
    validation_batches: int = 16
    precision: str = "auto"  # auto | float32 | bfloat16
    fp8: str = "none"  # none | tensorwise | rowwise | rowwise_with_gw_hp: linear maps of blocks in float8, by torchao
    devices: int = 1
    context_parallel: int = 1  # devices that share each sequence, a part of its tokens each
    tensor_parallel: int = 1  # devices that share the projections of each layer, some heads and hidden channels each
    accelerator: str = "auto"  # auto | cpu | cuda
    strategy: str = "auto"  # auto, ddp: every device holds the model; fsdp: each holds its rows of every parameter
    activation_checkpointing: bool = False  # the backward computes a block's activations again
    loss: str = "whole"  # whole: logits of all tokens at once; chunked: of some at a time, same loss and gradients
    recompute: str = "all"  # which, then: all | cheap (what matrix products and operators return is kept)
    num_workers: int = 0
    log_every_n_steps: int = 10
    progress_bar: bool = True

    @property
    def ranks_per_group(self) -> int:
        """Devices that read the same samples, as they share the sequences or the projections."""
        return self.context_parallel * self.tensor_parallel

    def samples_per_step(self, world_size: int) -> int:
        """Sequences of one optimizer step, on so many ranks."""
        return self.batch_size * self.accumulate * (world_size // self.ranks_per_group)

    def __post_init__(self) -> None:
        _check_limits(
            self,
            "trainer",
            max_seconds=(1e-3, INFINITY),
            gradient_clip_norm=(0, INFINITY),
            validate_every_n_steps=(0, INFINITY),
            devices=(1, MOST_PROCESSES),
            context_parallel=(1, MOST_PROCESSES),
            tensor_parallel=(1, MOST_PROCESSES),
            num_workers=(0, MOST_PROCESSES),
            log_every_n_steps=(1, INFINITY),
        )


@dataclass(kw_only=True)
class CheckpointConfig:
    """When weights and trainer state are written, and how many checkpoints are kept."""

    every_n_steps: int = 200  # 0: only at the end
    keep: int = 2  # newest ones that stay
    artifacts: bool = False  # those that have stayed when the run ends become artifacts of its run of W&B

    def __post_init__(self) -> None:
        _check_limits(self, "checkpoint", every_n_steps=(0, INFINITY), keep=(0, INFINITY))


@dataclass(kw_only=True)
class CompilerConfig:
    """How kernels are chosen: estimator, whether measuring is allowed, and its budget in seconds."""

    estimator: str = "measured"  # measured | learned | roofline | constant
    fit: str | None = None  # folder of a fitted cost model; null: the newest that is shipped
    measure: bool = True  # time rivals whose intervals overlap
    measure_budget_s: float = 30.0  # of all timings before a run
    calibrate_budget_s: float = 120.0  # of `calibrate=auto`

    def __post_init__(self) -> None:
        _check_limits(self, "compiler", measure_budget_s=(0, INFINITY))


@dataclass(kw_only=True)
class BudgetConfig:
    """What a model may take whose schedule has `auto` layers, and how their quality is judged; null does not bind."""

    latency_s: float | None = None  # seconds of all blocks in one training step of a micro-batch, on one device
    memory_bytes: float | None = None  # of that step: weights, gradients, AdamW's moments, activations, workspace
    carry_bytes: float | None = None  # what generation keeps of all sequences after seq_len tokens
    seq_len: int = 0  # tokens that the limits are meant for; 0: trainer.seq_len
    batch_size: int = 0  # sequences; 0: trainer.batch_size
    quality: str = "prior"  # prior: the order of the candidates; or a file that `python -m subquad proxy` wrote
    alternatives: int = 3  # schedules that plan.json holds besides the chosen one
    distance: int = 1  # layers in which any two of them differ at least

    def __post_init__(self) -> None:
        for name in ("latency_s", "memory_bytes", "carry_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(
                    what=f"{name} is {value}",
                    where=f"budget.{name}",
                    mend="use a positive number, or null for no limit",
                )
        for name, least in (("seq_len", 0), ("batch_size", 0), ("alternatives", 0), ("distance", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    what=f"{name} is {getattr(self, name)}", where=f"budget.{name}", mend=f"use {least} or more"
                )


@dataclass(kw_only=True)
class RunConfig:
    """Everything a run depends on. `data` and `optimizer` hold a registry key (`name`) and that component's fields."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: dict[str, Any] = field(default_factory=dict)  # data=NAME, and that source's keys
    optimizer: dict[str, Any] = field(default_factory=dict)  # optimizer=NAME, and its keys
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    kernel: dict[str, str] = field(default_factory=dict)  # operator -> pinned kernel
    deny: list[str] = field(default_factory=list)  # kernels, as NAME or operator/NAME, never to be chosen
    plan: str | None = None  # a plan.json to follow instead of choosing
    target: str = "auto"  # the machine at hand, or the name or path of a device file
    calibrate: str = "offer"  # a device that the cost model does not know: offer (a line) | auto (at once) | never
    compile: bool = False  # torch.compile the rewritten model
    log_level: str = "info"  # debug | info | warning | error: what is said on stderr, by us and by those we call
    tracking: str = "csv"  # none | csv | wandb | tensorboard  (metrics.csv is always written)
    profile: bool = False  # three steps, as torch's profiler sees them, into trace.json
    run_dir: str | None = None  # default: runs/<date>/<time>-<model>
    resume: str | None = None  # a run folder to go on with
    seed: int = 0  # of parameters, data and dropout
    callbacks: list[Any] = field(default_factory=list)  # Lightning callbacks, each with _target_ (allow-listed)

    def __post_init__(self) -> None:
        _check_limits(self, "", seed=(-(2**63), 2**63 - 1))
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                what=f"log_level is '{self.log_level}'",
                where="log_level",
                mend=f"{suggestion(self.log_level, LOG_LEVELS)}use one of {', '.join(LOG_LEVELS)}",
            )


@dataclass(kw_only=True)
class GenerateConfig:
    """What `generate` needs: a run folder, what to continue, and how to sample."""

    run: str = "???"
    prompt: str = ""
    prompts: str | None = None  # a file of prompts, one a line, or of JSON objects (.jsonl); results are JSON lines
    out: str | None = None  # a new file for what is written; null: stdout
    batch_size: int = 8  # prompts of the file that are continued together
    max_tokens: int = 200
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0  # 1: no limit
    min_p: float = 0.0  # of the largest probability; 0: no limit
    repetition_penalty: float = 1.0  # 1: none
    stop: list[str] = field(default_factory=list)  # texts before which a continuation ends
    stop_ids: list[int] = field(default_factory=list)  # tokens before which it ends
    seed: int = 0
    dtype: str = "float32"  # of weights and activations: float32 or bfloat16
    cuda_graph: bool = True  # on CUDA, replay what is the same work in every step


@dataclass(kw_only=True)
class ExportConfig:
    """What `export` needs: a run folder, a format, and a new folder to write into."""

    run: str = "???"
    format: str = "safetensors"  # safetensors: for subquad.load_model; hf: for transformers
    out: str = "???"


@dataclass(kw_only=True)
class CompareConfig:
    """What `compare` needs: run folders, and where the page goes."""

    runs: list[str] = field(default_factory=list)
    html: str | None = "compare.html"  # null: no page


@dataclass(kw_only=True)
class EvaluateConfig:
    """What `evaluate` measures on a finished run, and on how much."""

    run: str = "???"
    suite: str = "auto"  # text, a synthetic task, lm_eval; auto: text, or the task that the run was trained on
    lengths: list[int] = field(
        default_factory=list
    )  # tokens; []: trainer.seq_len, for text also its parts to an eighth
    sizes: list[int] = field(default_factory=list)  # of a task: pairs, symbols, bits ...; []: as trained, or the usual
    samples: int = 0  # rows, at each size; documents of each lm_eval task; 0: as many as in validation, 256, or all
    batch_size: int = 0  # rows of trainer.seq_len tokens; 0: trainer.batch_size
    tasks: list[str] = field(default_factory=list)  # names that lm_eval knows
    seed: int = 0  # of the tasks' rows


@dataclass(kw_only=True)
class ProxyConfig:
    """What `proxy` measures: a trained run, the mixers to try in its layers, and how their loss is judged."""

    run: str = "???"
    candidates: list[str] = field(default_factory=list)  # keys of the run's model.mixers, or installed mixers; []: all
    proxy: str = "replace_one_kl"  # replace_one_kl | gauss_newton | local_error
    steps: int = 100  # of local distillation per layer and candidate
    learning_rate: float = 3e-3
    batches: int = 8  # of the run's batch size: to distil on, and as many held-out ones to judge by
    out: str = "quality.json"
    seed: int = 0


@dataclass(kw_only=True)
class BenchConfig:
    """What `bench` times. Empty lists mean all kernels but the reference, and the operator's own series of lengths."""

    operator: str = "???"
    target: str = "auto"
    kernels: list[str] = field(default_factory=list)
    dtype: str = "auto"  # auto: that of the operator's series
    shapes: list[dict[str, int]] = field(default_factory=list)  # axes that differ from the series, such as {t: 4096}
    options: dict[str, Any] = field(default_factory=dict)  # the operator's own, such as {segment_len: 64}
    plot: bool = False


@dataclass(kw_only=True)
class DecodingBenchConfig:
    """What `bench models=` measures: decoding behind contexts of growing length."""

    models: list[str] = field(default_factory=list)  # recipes
    contexts: list[int] = field(default_factory=lambda: [1024, 4096, 16384])  # tokens, the decoded ones included
    batch_sizes: list[int] = field(default_factory=lambda: [1])  # sequences that are decoded together
    tokens: int = 32  # decoded and timed at the end of each context
    dtype: str = "float32"  # of the weights: float32, as generate computes, or bfloat16
    cuda_graph: bool = True  # as generate has it; false: every kernel is launched from Python
    overrides: list[str] = field(default_factory=list)  # of `train`, for all models, such as trainer.accelerator=cpu
    budget_s: float = 600.0  # rows that would begin later are left out
    out: str = "bench-decoding.json"  # the record, written again after each row
    plot: bool = False  # draw it beside the record, as .png


@dataclass(kw_only=True)
class MeasureConfig:
    """What `measure` times, for how long, and where its rows go. Empty lists mean all of them."""

    out: str = "measurements"  # folder of parquet files; a run goes on with what is there
    budget_s: float = 540.0
    target: str = "auto"
    operators: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    layouts: int = 16  # of each operator: options, dtype, widths, heads, packed or not
    shapes: int = 64  # of each layout: lengths, batches, documents
    seed: int = 0


@dataclass(kw_only=True)
class CalibrateConfig:
    """How long `calibrate` measures this device, and which model it corrects."""

    budget_s: float = 120.0
    target: str = "auto"
    fit: str = "auto"  # a folder of `subquad_cost_model fit`; auto: the newest that is shipped; roofline: none
    operators: list[str] = field(default_factory=list)  # [] means all
    seed: int = 0


@dataclass(kw_only=True)
class ForeignConfig:
    """The model that `explain module=` looks at; null leaves the choice to the model."""

    module: str = "???"  # package.module:factory, which returns a model, or a model and the inputs of a call
    example: str | None = None  # package.module:function, which returns the inputs; null: the factory's, dummy_inputs
    target: str | None = None  # null: the device of the model
    measure: bool = True  # time candidates whose estimates overlap, where the target is at hand
