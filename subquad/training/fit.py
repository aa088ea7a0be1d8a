"""train: from a composed configuration to a run folder with a trained model."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from subquad.bidirectional import Bidirectional
from subquad.compiler.assign_mixers import with_mixers
from subquad.compiler.html_report import write_html
from subquad.compiler.know_device import know_device
from subquad.compiler.options import CompileOptions
from subquad.compiler.pipeline import kernel_versions, kernels_in_use, plan_versions
from subquad.compiler.plan import Plan
from subquad.compiler.predict_step import predict_step
from subquad.compiler.report import PLAN_COLUMNS, choice_table
from subquad.errors import ConfigError, ResumeError, suggestion
from subquad.log import at_level, caution, says
from subquad.model.build import build_model
from subquad.model.import_weights import import_weights
from subquad.model.language_model import LanguageModel
from subquad.model.recompute import RECOMPUTE
from subquad.model.shared_projections import shared_projections
from subquad.schema import LOSSES, RunConfig
from subquad.training import run_folder
from subquad.training.checkpoint import Checkpoint, newest_checkpoint
from subquad.training.compilation import compiled, device_of, plan_of, target_of, uses_bfloat16
from subquad.training.data import TextData, build_data
from subquad.training.denial import denied_after, deny, free_memory, message, without_denied
from subquad.training.distributed import (
    Ranks,
    check_alike,
    process_group,
    ranks_here,
    share_of_threads,
    share_sequences,
    started_by_rank_zero,
    told_by_rank_zero,
)
from subquad.training.environment import environment_record
from subquad.training.fp8 import OFF, RECIPES, check_fp8, convert_to_fp8
from subquad.training.gradient_norms import GradientNorms
from subquad.training.metrics import drop_samples_of_other_ranks
from subquad.training.module import TrainingModule, Validation
from subquad.training.optimizers import check_schedule, optimizer_config
from subquad.training.profile import Profile
from subquad.training.progress import ProgressBar
from subquad.training.recorder import Recorder
from subquad.training.report import write_report
from subquad.training.resume import check_same_data, check_same_samples, resumed_config
from subquad.training.room import check_room
from subquad.training.run_folder import RunFolder, disk_errors
from subquad.training.run_page import write_run_section
from subquad.training.sharding import is_sharded
from subquad.training.step_clock import StepClock
from subquad.training.stopping import EXIT_TERMINATED, Interrupts, StopAfterStep
from subquad.training.tokenizer import save_tokenizer
from subquad.training.tracking import NoTracker, build_tracker, check_tracking, record_checkpoints
from subquad.training.user_callbacks import build_callbacks
from subquad.training.utilisation import utilisation


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where the run lies and what it reached: nats per token, and bits per byte of text if it is text."""

    run_dir: Path
    step: int
    train_loss: float | None
    validation_loss: float
    validation_bits_per_byte: float | None
    tokens_per_s: float | None

    def __str__(self) -> str:
        bits = self.validation_bits_per_byte
        shown = "" if bits is None else f", {bits:.4f} bits per byte"
        return f"{self.run_dir}: validation loss {self.validation_loss:.4f}{shown} after step {self.step}"


def train(config: RunConfig, *, overrides: Sequence[str] | None = None) -> TrainResult:
    """Train the model that a configuration describes, or go on with the run that `config.resume` names.

    data -> model -> plan -> fit -> final validation -> report; the last line printed is the run folder with that
    validation. `overrides` are those of the command line, if there is one (see `resume.resumed_config`).
    Raises: SubquadError. On Ctrl-C the step is finished, a checkpoint written, and KeyboardInterrupt raised;
    on SIGTERM likewise, and SystemExit(143).
    """
    config = copy.deepcopy(config)  # sizes are filled in; the caller's stays as it is
    folder: RunFolder | None = None
    if config.resume is not None:
        folder, config = resumed_config(config, overrides)
    ranks = ranks_here(config.trainer)
    with at_level(config.log_level), share_of_threads(config.trainer.devices), ExitStack() as stack:
        if ranks.from_outside and ranks.rank > 0:
            with process_group(ranks, None):
                return _fit(_joined(RunFolder(Path(told_by_rank_zero(None))), ranks), ranks)
        if folder is None:
            prepared = _started(config)
            stack.enter_context(_held(prepared.folder, "run_dir"))
        else:
            stack.enter_context(_held(folder, "resume"))
            prepared = _resumed(folder, config, ranks)
        with process_group(ranks, prepared.folder.path):
            if ranks.from_outside and ranks.world_size > 1:
                told_by_rank_zero(str(prepared.folder.path))
            with disk_errors(prepared.folder):
                try:
                    prepared, result = _fit_without_failing_kernels(prepared, ranks)
                except (KeyboardInterrupt, SystemExit):
                    write_run_section(prepared.folder)
                    raise
        with disk_errors(prepared.folder):
            write_report(
                prepared.folder, unigram_bits_per_byte=prepared.data.unigram_bits_per_byte, overrides=overrides
            )
    print(result, flush=True)
    return result


@contextmanager
def _held(folder: RunFolder, option: str) -> Iterator[None]:
    with ExitStack() as stack:
        with disk_errors(folder):
            stack.enter_context(run_folder.held(folder, f"{option}={folder.path}"))
        yield


def _fit_without_failing_kernels(prepared: _Prepared, ranks: Ranks) -> tuple[_Prepared, TrainResult]:
    """Fit; when a kernel raises, deny it and go on from the last checkpoint, as often as another one can run."""
    while True:
        try:
            return prepared, _fit(prepared, ranks)
        except Exception as error:
            folder, config = prepared.folder, prepared.config
            kernel = denied_after(error, config, folder, ranks.world_size)
            if kernel is None:
                raise
            plan = deny(kernel, error, config, prepared.plan, packed=prepared.data.source.packed)
            failure = error.with_traceback(None)  # lets go of the tensors of the attempt
        _write_plan(folder, config, _predicted(plan, config))
        checkpoint = newest_checkpoint(folder.checkpoints)
        caution(message(kernel, failure, checkpoint.step if checkpoint else 0))
        del prepared
        free_memory()
        prepared = _prepared(folder, config, checkpoint)


def train_as_other_rank(run_dir: Path) -> None:
    """Take part in a run as one of the ranks that rank 0 started."""
    folder = RunFolder(run_dir)
    config = run_folder.read_config(folder, "run_dir")
    ranks = ranks_here(config.trainer)
    with at_level(config.log_level), process_group(ranks, None):
        _fit(_joined(folder, ranks), ranks)


@dataclass(frozen=True)
class _Prepared:
    """A run that can start: everything is built, and its folder holds the configuration and the plan."""

    folder: RunFolder
    config: RunConfig
    data: TextData
    model: LanguageModel
    plan: Plan
    checkpoint: Checkpoint | None


def _started(config: RunConfig) -> _Prepared:
    """A new run. Whatever the configuration may have wrong is found before anything is written."""
    _check(config)
    folder = run_folder.new_run_folder(config)
    followed = plan_of(config)
    if followed is None:
        know_device(target_of(config), config)
    config, assignment = with_mixers(config, target_of(config), followed)
    data, model, config = _built(config, starts=True)
    model, plan = compiled(model, config, followed, packed=data.source.packed)
    plan = _predicted(replace(plan, assignment=assignment or plan.assignment), config)
    run_folder.create(folder)
    with disk_errors(folder):
        _write_plan(folder, config, plan)
        run_folder.write_json(folder.data, {"fingerprint": data.fingerprint})
        run_folder.write_json(folder.environment, environment_record(device_of(config)))
        save_tokenizer(data.tokenizer, folder.path)
    return _Prepared(folder, config, data, model, plan, None)


def _resumed(folder: RunFolder, config: RunConfig, ranks: Ranks) -> _Prepared:
    """A run that goes on."""
    _check(config)
    checkpoint = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ResumeError(
            what="the run holds no checkpoint that is whole",
            where=f"resume={folder.path}",
            mend="start it again in another folder",
        )
    if checkpoint.step >= config.trainer.max_steps:
        caution(
            f"nothing is left to train: the run is at step {checkpoint.step} of {config.trainer.max_steps}; "
            "trainer.max_steps=N goes on"
        )
    check_same_samples(checkpoint, folder, config, ranks.world_size)
    prepared = _prepared(folder, config, checkpoint)
    prepared = replace(prepared, plan=_predicted(prepared.plan, config))
    with disk_errors(folder):
        folder.report.unlink(missing_ok=True)  # its presence says that the run has ended
        _write_plan(folder, config, prepared.plan)
        write_run_section(folder)
    return prepared


def _predicted(plan: Plan, config: RunConfig) -> Plan:
    """The plan with the step that it predicts for this configuration: kernels, devices or loss may have changed."""
    return replace(plan, prediction=predict_step(config, target_of(config), plan))


def _write_plan(folder: RunFolder, config: RunConfig, plan: Plan) -> None:
    """Leave in the folder what a run, or another rank, starts from, and the page that shows it."""
    run_folder.write_config(folder, config)
    plan.save(folder.plan)
    write_html(plan, target_of(config), CompileOptions.of_run(config), folder.page)


def _joined(folder: RunFolder, ranks: Ranks) -> _Prepared:
    """The run of that folder, on a rank that rank 0 has told of it; its weights, if they are sharded, come later."""
    config = run_folder.read_config(folder, "run_dir")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank 0 has told of damaged checkpoints and stale plans
        return _prepared(
            folder, config, newest_checkpoint(folder.checkpoints), hollow=is_sharded(config, ranks.world_size)
        )


def _prepared(
    folder: RunFolder, config: RunConfig, checkpoint: Checkpoint | None, *, hollow: bool = False
) -> _Prepared:
    """What the folder of a run describes, built with its plan, to start at that checkpoint."""
    data, model, config = _built(config, starts=checkpoint is None, hollow=hollow)
    recorded = run_folder.read_json(folder.data)
    check_same_data(recorded["fingerprint"], data.fingerprint, str(folder.data))
    plan = without_denied(Plan.load(folder.plan), config, packed=data.source.packed)
    model, plan = compiled(model, config, plan, packed=data.source.packed)
    return _Prepared(folder, config, data, model, plan, checkpoint)


def _check(config: RunConfig) -> None:
    """Refuse what can be refused without building anything.  Raises: ConfigError, NotFoundError."""
    trainer = config.trainer
    check_schedule(trainer)
    check_tracking(config.tracking, config.checkpoint.artifacts)
    optimizer_config(config.optimizer)
    CompileOptions.of_run(config)
    build_callbacks(config.callbacks)
    for key, value, allowed in (
        ("precision", trainer.precision, ("auto", "float32", "bfloat16")),
        ("accelerator", trainer.accelerator, ("auto", "cpu", "cuda")),
        ("strategy", trainer.strategy, ("auto", "ddp", "fsdp")),
        ("nonfinite", trainer.nonfinite, ("stop", "skip")),
        ("recompute", trainer.recompute, RECOMPUTE),
        ("loss", trainer.loss, LOSSES),
        ("fp8", trainer.fp8, (OFF, *RECIPES)),
    ):
        if value not in allowed:
            raise ConfigError(
                what=f"{key} is '{value}'",
                where=f"trainer.{key}",
                mend=f"{suggestion(value, allowed)}use one of {', '.join(allowed)}",
            )
    if (trainer.strategy == "fsdp" or trainer.tensor_parallel > 1) and trainer.context_parallel > 1:
        raise ConfigError(
            what="a model in shards, on ranks that share sequences, was never tried",
            where="trainer.context_parallel",
            mend="use trainer.strategy=ddp and trainer.tensor_parallel=1, or trainer.context_parallel=1",
        )
    if trainer.strategy == "ddp" and trainer.tensor_parallel > 1:
        raise ConfigError(
            what="ranks that share projections hold their parameters in shards",
            where="trainer.strategy",
            mend="use trainer.strategy=fsdp or auto",
        )
    if config.compile and trainer.tensor_parallel > 1:
        raise ConfigError(
            what="torch.compile of projections that ranks share was never tried",
            where="compile",
            mend="use compile=false, or trainer.tensor_parallel=1",
        )
    have = torch.cuda.device_count()
    if trainer.accelerator == "cuda" and not have:
        raise ConfigError(
            what="no CUDA device is here", where="trainer.accelerator", mend="use trainer.accelerator=cpu"
        )
    if device_of(config).type == "cuda" and trainer.devices > have:
        raise ConfigError(
            what=f"{trainer.devices} devices are asked for and {have} are here",
            where="trainer.devices",
            mend=f"use {have} or fewer",
        )
    check_fp8(config, device_of(config))
    target_of(config)


def _built(config: RunConfig, *, starts: bool, hollow: bool = False) -> tuple[TextData, LanguageModel, RunConfig]:
    """Data and model, seeded; the sizes that the configuration left to the data are filled in.

    A run that starts, instead of going on from a checkpoint of its own, reads the weights that `init_from` names. A
    hollow model is on the meta device and is given its weights by another rank.
    """
    data = build_data(config)
    _fill(config, "vocab_size", data.vocab_size, "the tokenizer's size")
    _fill(config, "context_len", config.trainer.seq_len, "trainer.seq_len")
    check_room(config, device_of(config))
    torch.manual_seed(config.seed)
    model = build_model(config.model, device="meta") if hollow else build_model(config.model)
    _refuse_both_sides(model)
    for block in model.blocks:
        shared_projections(block, config.trainer.tensor_parallel)  # type: ignore[arg-type]
    if starts and not hollow and config.model.init_from is not None:
        import_weights(model, config.model)
        if config.tokenizer.kind != "file":
            warnings.warn(
                f"{config.model.init_from} numbers tokens by its own vocabulary, and tokenizer={config.tokenizer.kind}"
                " by another: use tokenizer=file tokenizer.file=FOLDER/tokenizer.json",
                stacklevel=2,
            )
    if config.trainer.fp8 != OFF:
        convert_to_fp8(model, config.trainer.fp8)
    model.activation_checkpointing = config.trainer.activation_checkpointing
    model.recompute = config.trainer.recompute
    return data, model, config


def _refuse_both_sides(model: LanguageModel) -> None:
    """A recipe is refused when it is composed; this is for configurations made in Python."""
    for index, block in enumerate(model.blocks):
        if isinstance(block.mixer, Bidirectional):
            raise ConfigError(
                what=f"layer {index} sees later tokens, and runs learn to predict the next one",
                where=f"model.mixers, {block.mixer_name}.bidirectional",
                mend="leave it out, or train the model that build_model makes with a loop of your own",
            )


def _fill(config: RunConfig, key: str, least: int, what: str) -> None:
    """Set a size of the model that is 0, or check that it suffices."""
    value = getattr(config.model, key)
    if value == 0:
        setattr(config.model, key, least)
    elif value < least:
        raise ConfigError(
            what=f"{key} is {value}, below {what} ({least})", where=f"model.{key}", mend=f"use 0, {least} or more"
        )


def _fit(prepared: _Prepared, ranks: Ranks) -> TrainResult:
    """Run Lightning from the checkpoint (or the beginning) to the end."""
    config, folder, checkpoint = prepared.config, prepared.folder, prepared.checkpoint
    if ranks.world_size > 1:
        check_alike(kernels_in_use(prepared.model) | plan_versions() | kernel_versions(prepared.plan))
    state: dict[str, Any] | None = None
    if checkpoint is not None:
        if ranks.rank > 0 and is_sharded(config, ranks.world_size):
            state = checkpoint.trainer_outline()  # rank 0 sends the rest
        else:
            prepared.model.load_state_dict(checkpoint.weights())
            state = checkpoint.trainer_state()
        prepared.data.load_state_dict(state["data"])
    if prepared.model.part is not None:
        share_sequences(prepared.model.part, ranks)
    module = TrainingModule(prepared.model, config, state, prepared.model.part)
    resumed_at, spent_s = (checkpoint.step, float(state["seconds"])) if checkpoint and state else (None, 0.0)
    del state  # the module lets go of it once the optimizer has it
    norms = GradientNorms(prepared.model, config.trainer)
    used = utilisation(prepared.model, prepared.plan, target_of(config), config.trainer)
    tracker = build_tracker(config.tracking, folder, asdict(config), resumed_at) if ranks.rank == 0 else NoTracker()
    tracker.table("plan", PLAN_COLUMNS, choice_table(prepared.plan))
    recording = range(0, ranks.world_size, config.trainer.ranks_per_group)
    recorder = Recorder(
        folder, tracker, norms, used, rank=ranks.rank, records_samples=ranks.rank in recording,
        seq_len=config.trainer.seq_len, resumed_at=resumed_at, spent_s=spent_s,
    )  # fmt: skip
    if ranks.rank == 0 and resumed_at is not None:
        drop_samples_of_other_ranks(folder.samples(0).parent, recording, resumed_at)
    interrupts = Interrupts()
    callbacks: list[L.Callback] = [norms, recorder, StopAfterStep(interrupts, recorder, folder)]
    if ranks.rank == 0:
        callbacks.append(StepClock(folder, tracker, prepared.plan.prediction))
        if config.profile:
            callbacks.append(Profile(folder))
    if config.trainer.progress_bar and says("info") and ranks.rank == 0:
        callbacks.append(ProgressBar(recorder, resumed_at or 0))
    exit_code = 1
    try:
        with interrupts.listening(), _quiet_lightning():
            trainer = _lightning(config, ranks, [*callbacks, *build_callbacks(config.callbacks)])
            if config.compile and not is_sharded(config, ranks.world_size):
                module.model.compile()
            if resumed_at is not None and resumed_at >= config.trainer.max_steps:
                trainer.validate(module, prepared.data, verbose=False)
            else:
                _go_on_from(trainer, resumed_at or 0, config.trainer.accumulate)
                _run(trainer, module, prepared.data, folder.path)
        exit_code = 0
    finally:
        recorder.close()
        if config.checkpoint.artifacts and ranks.rank == 0:
            record_checkpoints(tracker, folder)
        tracker.finish(exit_code)
    found = module.validation
    assert isinstance(found, Validation), "Lightning ended without the final validation"
    return TrainResult(
        run_dir=folder.path,
        step=max(int(trainer.global_step), resumed_at or 0),
        train_loss=recorder.last.get("train/loss"),
        validation_loss=found.loss,
        validation_bits_per_byte=found.bits_per_byte,
        tokens_per_s=recorder.last.get("tokens_per_s"),
    )


def _run(trainer: L.Trainer, module: TrainingModule, data: TextData, run_dir: Path) -> None:
    """Fit; an interrupt leaves as an interrupt, where Lightning would end the process with code 1.

    On SIGTERM the step is finished, a checkpoint written and SystemExit raised.
    """
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit as error:
        interrupted = isinstance(error.__context__, KeyboardInterrupt)
        if interrupted or error.code == EXIT_TERMINATED:
            said = f"{'interrupted' if interrupted else 'terminated'} after step {int(trainer.global_step)}"
            caution(f"{said}; go on with resume={run_dir}")
        if interrupted:
            raise KeyboardInterrupt from None
        raise


def _lightning(config: RunConfig, ranks: Ranks, callbacks: list[L.Callback]) -> L.Trainer:
    settings, device = config.trainer, device_of(config)
    never = sys.maxsize
    return L.Trainer(
        accelerator=device.type,
        devices=settings.devices,
        num_nodes=ranks.world_size // settings.devices,
        strategy=_strategy(config, ranks),
        # Within a job of SLURM Lightning would take its tasks for ranks, also where rank 0 has started them.
        plugins=[LightningEnvironment()] if ranks.world_size > 1 and started_by_rank_zero(ranks) else None,
        precision="bf16-mixed" if uses_bfloat16(config) else "32-true",
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        val_check_interval=settings.validate_every_n_steps * settings.accumulate or never,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        use_distributed_sampler=False,  # each rank's batches are already its own
        inference_mode=False,  # tables that a mixer builds during validation may be used in training
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(config: RunConfig, ranks: Ranks) -> Strategy | str:
    """How ranks share the work; one rank has nothing to share, whatever is asked for."""
    if ranks.world_size == 1:
        return "auto"
    if is_sharded(config, ranks.world_size):
        sharing = config.trainer.tensor_parallel
        return ModelParallelStrategy(data_parallel_size=ranks.world_size // sharing, tensor_parallel_size=sharing)
    return DDPStrategy()


def _go_on_from(trainer: L.Trainer, step: int, accumulate: int) -> None:
    """Set the trainer's counters to a step that is over; weights, optimizer and data are restored by their owners."""
    loop = trainer.fit_loop.epoch_loop
    seen = loop.batch_progress.total
    seen.ready = seen.started = seen.processed = seen.completed = step * accumulate
    done = loop.automatic_optimization.optim_progress.optimizer.step.total
    done.ready = done.completed = step


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's warnings of our way of using it from the terminal: each is answered here."""
    with warnings.catch_warnings():
        # Batches are cheap to make: no worker processes are needed.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        # Lightning 2.6 with torch 2.13: it asks pytree in a way that will go away.
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        # We run on the CPU because the configuration says so.
        warnings.filterwarnings("ignore", ".*GPU available but not used.*")
        yield
