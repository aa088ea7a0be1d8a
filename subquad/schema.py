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
    vocab_size: int = 0  # symbols; 0: as many as the tokenizer has
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

    kind: str = "bytes"  # bytes: a token per byte, 256 in all; file: the tokenizer that `file` names
    file: str | None = None  # path of a tokenizer.json, as Hugging Face `tokenizers` writes it

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

    max_steps: int = 1000  # optimizer steps after which the run ends; the learning rate falls until then
    max_seconds: float | None = None  # end after the step that passes this wall time; null: no limit
    batch_size: int = 8  # sequences per device (or devices that share them) and micro-batch
    seq_len: int = 256  # tokens of a sequence
    accumulate: int = 1  # micro-batches per step, whose gradients are summed
    learning_rate_warmup_steps: int = 50  # steps in which the learning rate rises to optimizer.lr
    final_learning_rate_fraction: float = 0.1  # share of optimizer.lr that is left at the end of the cosine
    gradient_clip_norm: float = 1.0  # largest norm of all gradients together; 0: they are not clipped
    nonfinite: str = "stop"  # a step whose loss or gradient is not finite: stop (the run) | skip (the step)
    validate_every_n_steps: int = 200  # steps between two looks at held-out text; 0: only at the end
    validation_batches: int = 16  # batches of held-out text per look, if there are so many
    precision: str = "auto"  # auto (bfloat16 on CUDA, else float32) | float32 | bfloat16
    fp8: str = "none"  # linear maps of blocks in float8, by torchao: none | tensorwise | rowwise | rowwise_with_gw_hp
    devices: int = 1  # devices of a machine that train, a process each
    context_parallel: int = 1  # devices that share each sequence, a part of its tokens each
    tensor_parallel: int = 1  # devices that share the projections of each layer, some heads and hidden channels each
    accelerator: str = "auto"  # auto (CUDA where there is one) | cpu | cuda
    strategy: str = "auto"  # auto, ddp: every device holds the model | fsdp: each holds its rows of every parameter
    activation_checkpointing: bool = False  # the backward computes activations of a block again
    loss: str = "whole"  # whole: logits of all tokens at once | chunked: of some at a time, same loss and gradients
    recompute: str = "all"  # of them: all | cheap (what matrix products and operators return is kept)
    num_workers: int = 0  # processes that prepare batches; 0: the run itself does
    log_every_n_steps: int = 10  # steps between two rows of metrics.csv
    progress_bar: bool = True  # say on stderr how the run goes

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

    every_n_steps: int = 200  # steps between two checkpoints; 0: only one at the end
    keep: int = 2  # newest checkpoints that stay; 0: the last one alone
    artifacts: bool = False  # those that have stayed when the run ends become artifacts of its run of W&B

    def __post_init__(self) -> None:
        _check_limits(self, "checkpoint", every_n_steps=(0, INFINITY), keep=(0, INFINITY))


@dataclass(kw_only=True)
class CompilerConfig:
    """How kernels are chosen: estimator, whether measuring is allowed, and its budget in seconds."""

    estimator: str = "measured"  # what predicts seconds: measured | learned | roofline | constant
    fit: str | None = None  # folder of a fitted cost model; null: the newest that is shipped
    measure: bool = True  # time rivals whose intervals overlap
    measure_budget_s: float = 30.0  # seconds for all timings before a run
    calibrate_budget_s: float = 120.0  # seconds for calibrate=auto

    def __post_init__(self) -> None:
        _check_limits(self, "compiler", measure_budget_s=(0, INFINITY))


@dataclass(kw_only=True)
class BudgetConfig:
    """What a model may take whose schedule has `auto` layers, and how their quality is judged; null does not bind."""

    latency_s: float | None = None  # seconds of all blocks in one training step of a micro-batch, on one device
    memory_bytes: float | None = None  # peak of that step: weights, gradients, moments, activations, workspace
    carry_bytes: float | None = None  # what generation keeps for all sequences after seq_len tokens
    seq_len: int = 0  # tokens that the limits are meant for; 0: trainer.seq_len
    batch_size: int = 0  # sequences that the limits are meant for; 0: trainer.batch_size
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
    kernel: dict[str, str] = field(default_factory=dict)  # pinned kernels by operator: kernel.selective_scan=chunked
    deny: list[str] = field(default_factory=list)  # kernels that are never chosen: NAME, or operator/NAME
    plan: str | None = None  # a plan.json to follow instead of choosing
    target: str = "auto"  # the device: auto (the one at hand), or the name or path of a device file, such as h100
    calibrate: str = "offer"  # on a device unknown to the cost model: offer (say how) | auto (at once) | never
    compile: bool = False  # torch.compile the model, after kernels are chosen
    log_level: str = "info"  # what is said on stderr: debug | info | warning | error
    tracking: str = "csv"  # where metrics go besides metrics.csv: csv (nowhere) | none | wandb | tensorboard
    profile: bool = False  # write three steps of torch's profiler into trace.json
    run_dir: str | None = None  # the folder of the run; null: runs/<date>/<time>-<model>
    resume: str | None = None  # a run folder to go on with
    seed: int = 0  # random seed of parameters, order of data, and dropout
    # Lightning callbacks, each {_target_: lightning.pytorch.callbacks.NAME, ...its arguments}
    callbacks: list[Any] = field(default_factory=list)

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

    run: str = "???"  # a run folder (its newest whole checkpoint), or a folder that `export` wrote
    prompt: str = ""  # the text to continue, as it stands; an empty one stands for a line's end
    prompts: str | None = None  # instead of prompt, a file: a prompt a line, or (.jsonl) {prompt: ...} a line
    out: str | None = None  # a new file for the text or the results; null: stdout
    batch_size: int = 8  # prompts of the file that are continued together
    max_tokens: int = 200  # tokens to add, at most
    temperature: float = 0.8  # divides logits before a token is drawn; 0: always the likeliest token
    top_k: int = 0  # draw among so many likeliest tokens; 0: among all
    top_p: float = 1.0  # of these, among the likeliest with this probability together; 1: among all
    min_p: float = 0.0  # of these, among those with this share of the largest probability; 0: among all
    repetition_penalty: float = 1.0  # makes tokens that came before, prompt included, less likely; 1: not
    stop: list[str] = field(default_factory=list)  # texts before which it ends: one as it stands, or '["a", "b"]'
    stop_ids: list[int] = field(default_factory=list)  # tokens before which it ends: [0, 1]
    seed: int = 0  # of the draws; prompt number i has seed + i
    dtype: str = "float32"  # of weights and activations: float32 | bfloat16 (half the memory)
    cuda_graph: bool = True  # on CUDA, replay what is the same work in every step; false: launch it from Python


@dataclass(kw_only=True)
class ExportConfig:
    """What `export` needs: a run folder, a format, and a new folder to write into."""

    run: str = "???"  # a run folder, whose newest weights are written
    format: str = "safetensors"  # safetensors (for subquad.load_model) | hf (for transformers)
    out: str = "???"  # a new folder


@dataclass(kw_only=True)
class CompareConfig:
    """What `compare` needs: run folders, and where the page goes."""

    runs: list[str] = field(default_factory=list)  # run folders; plans are compared with that of the first
    html: str | None = "compare.html"  # a page with tables and curves that needs nothing else; null: none


@dataclass(kw_only=True)
class EvaluateConfig:
    """What `evaluate` measures on a finished run, and on how much."""

    run: str = "???"  # the run folder that `train` printed
    suite: str = "auto"  # text | a synthetic task | lm_eval | auto (text, or the task that the run was trained on)
    # tokens of a row, of text each a divisor of the longest; []: trainer.seq_len, for text its half to eighth too
    lengths: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # of a task: pairs, symbols, bits ...; []: as trained, or the usual
    samples: int = 0  # rows, at each size; documents of each lm_eval task; 0: as many as in validation, 256, or all
    batch_size: int = 0  # rows of trainer.seq_len tokens at once; 0: trainer.batch_size
    tasks: list[str] = field(default_factory=list)  # for suite=lm_eval: its names, or paths of its YAML files
    seed: int = 0  # of the rows of a synthetic task


@dataclass(kw_only=True)
class ProxyConfig:
    """What `proxy` measures: a trained run, the mixers to try in its layers, and how their loss is judged."""

    run: str = "???"  # the folder of a trained run
    candidates: list[str] = field(default_factory=list)  # keys of its model.mixers, or installed mixers; []: all
    proxy: str = "replace_one_kl"  # how loss is judged: replace_one_kl | gauss_newton | local_error (below)
    steps: int = 100  # steps of distillation for each layer and candidate
    learning_rate: float = 3e-3  # of the distillation
    batches: int = 8  # of the run's batch size, to distil on; as many held-out ones to judge by
    out: str = "quality.json"  # the file for budget.quality
    seed: int = 0  # of the new mixers and of the batches


@dataclass(kw_only=True)
class BenchConfig:
    """What `bench` times. Empty lists mean all kernels but the reference, and the operator's own series of lengths."""

    operator: str = "???"  # the operator's name; `python -m subquad plugins` lists them
    target: str = "auto"  # auto | cpu | cuda, or a device file of the machine at hand
    kernels: list[str] = field(default_factory=list)  # [NAME, ...]; []: all but the reference
    dtype: str = "auto"  # float32, bfloat16, ...; auto: that of the operator's series
    # instead of the series; axes left out are as there: [{t: 4096}, {t: 8192, documents: 4}]
    shapes: list[dict[str, int]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # the operator's own: {segment_len: 64}
    plot: bool = False  # draw time and memory over length into bench-OPERATOR.png (needs `subquad[plot]`)


@dataclass(kw_only=True)
class DecodingBenchConfig:
    """What `bench models=` measures: decoding behind contexts of growing length."""

    models: list[str] = field(default_factory=list)  # recipes: [scout_mamba, transformer]
    contexts: list[int] = field(default_factory=lambda: [1024, 4096, 16384])  # tokens, the decoded ones included
    batch_sizes: list[int] = field(default_factory=lambda: [1])  # sequences that are decoded together
    tokens: int = 32  # decoded and timed at the end of each context, in four rounds whose median counts
    dtype: str = "float32"  # of the weights: float32 (as generate computes) | bfloat16
    cuda_graph: bool = True  # replay what is the same in every step, as generate does; false: launch it from Python
    overrides: list[str] = field(default_factory=list)  # keys of `train` for all models: [trainer.accelerator=cpu]
    budget_s: float = 600.0  # seconds; rows that would begin later are left out
    out: str = "bench-decoding.json"  # the record, written again after each row
    plot: bool = False  # draw it beside the record, as .png (needs `subquad[plot]`)


@dataclass(kw_only=True)
class MeasureConfig:
    """What `measure` times, for how long, and where its rows go. Empty lists mean all of them."""

    out: str = "measurements"  # folder of parquet files; a later run goes on with what is there
    budget_s: float = 540.0  # seconds of all, at most 35 % of them for compiling and checking
    target: str = "auto"  # auto | cpu | cuda, or a device file of the machine at hand
    operators: list[str] = field(default_factory=list)  # [NAME, ...]; []: all
    kernels: list[str] = field(default_factory=list)  # [NAME, ...]; []: all but the reference
    kinds: list[str] = field(default_factory=list)  # [packed | whole | decode, ...]: packed documents, whole sequences
    layouts: int = 16  # drawn for each operator: options, dtype, widths, heads, packed or not
    shapes: int = 64  # drawn for each layout: lengths, batches, documents, channels
    seed: int = 0  # another one draws another pool
    doubts: bool = True  # from 1,000 rows on, every other batch is what a model of them doubts most; false: none is


@dataclass(kw_only=True)
class CalibrateConfig:
    """How long `calibrate` measures this device, and which model it corrects."""

    budget_s: float = 120.0  # seconds of measuring
    target: str = "auto"  # auto | cpu | cuda, or a device file of the machine at hand
    fit: str = "auto"  # what is corrected: a folder of `subquad_cost_model fit` | auto (the newest shipped) | roofline
    operators: list[str] = field(default_factory=list)  # [NAME, ...]; []: all
    seed: int = 0  # of the shapes that are drawn, and of those kept apart


@dataclass(kw_only=True)
class ForeignConfig:
    """The model that `explain module=` looks at; null leaves the choice to the model."""

    module: str = "???"  # package.module:factory, your own code; returns a model, or a model and the inputs of a call
    example: str | None = None  # package.module:function that returns the inputs; null: the factory's, dummy_inputs
    target: str | None = None  # a device as for every verb; null: that of the model
    measure: bool = True  # time candidates whose estimates overlap, where the target is at hand
