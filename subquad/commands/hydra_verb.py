"""A verb behind Hydra's command line: composed, checked, and run as one job or as a sweep."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, cast

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from subquad.commands.key_help import run_in_help, terminal_width
from subquad.compose import (
    CONFIG_PACKAGE,
    VERSION_BASE,
    composition_errors,
    hydra_for,
    refuse_hydra_targets,
    to_run_config,
)
from subquad.errors import ConfigError, SubquadError
from subquad.log import at_level
from subquad.registry import Registry, load_registry
from subquad.schema import RunConfig

ROOT_CONFIG = "train"
SWEEP_DIR = "SUBQUAD_SWEEP_DIR"
"""Names the folder that conf/train.yaml gives Hydra for its own record of a sweep."""

Job = Callable[[RunConfig, Sequence[str]], object]
"""What a verb does with a configuration and the overrides that led to it."""


def run_with_hydra(
    verb: str, arguments: Sequence[str], job: Job, job_of_sweep: Job | None = None, *, about: str
) -> int:
    """Give the arguments to Hydra, and every configuration that it composes to `job`, or to `job_of_sweep`.

    `about` is what --help says before it shows the groups and the keys.

    Raises: SubquadError, for Hydra's errors too; what a job raises. In a sweep every job is run, failures are reported
    as they come, and the first one ends the command.
    """
    registry = load_registry()
    parsed = _parsed(verb, arguments)
    arguments = _options_first(arguments, parsed.overrides)
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    task = _Task(verb, (job, job_of_sweep or job), registry, sys.argv, full_error)
    try:
        with (
            composition_errors(registry),
            hydra_for(registry, parsed.config_dir),
            _hydras_world(verb, arguments, parsed),
        ):
            if parsed.help:
                print(_help(about, parsed, registry))
                return 0
            if not (parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion):
                _check_beforehand(parsed, registry)
            hydra.main(config_path=f"pkg://{CONFIG_PACKAGE}", config_name=ROOT_CONFIG, version_base=VERSION_BASE)(
                task
            )()
    except SubquadError as error:
        if full_error != "1" and any(error is reported for reported in task.reported):
            return error.exit_code
        raise
    return 0


class _Task:
    """The function that Hydra calls for each job, here or in the process of a launcher."""

    def __init__(
        self, verb: str, jobs: tuple[Job, Job], registry: Registry, argv: list[str], full_error: str | None
    ) -> None:
        self.__name__ = self.__qualname__ = verb
        self._jobs, self._registry, self._argv, self._full_error = jobs, registry, argv, full_error
        self.reported: list[SubquadError] = []

    def __reduce__(self) -> tuple[object, ...]:
        # Records of plugins hold functions; another process finds its own.
        return _task_elsewhere, (self.__name__, self._jobs, self._argv, self._full_error)

    def __call__(self, composed: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        is_sweep = hydra_config.mode == RunMode.MULTIRUN
        # Overrides may hold interpolations; they are shown and compared as they were typed.
        overrides = cast("list[str]", OmegaConf.to_container(hydra_config.overrides.task, resolve=False))
        try:
            with self._callers_world():
                config = to_run_config(composed, self._registry)
                if is_sweep and config.run_dir is not None:
                    config.run_dir = str(Path(config.run_dir) / str(hydra_config.job.num))
                with at_level(config.log_level):
                    self._jobs[is_sweep](config, overrides)
        except SubquadError as error:
            if is_sweep:  # Hydra runs the other jobs before it says which one failed first
                print(f"job {hydra_config.job.num} failed: {' '.join(overrides)}\n{error}", file=sys.stderr, flush=True)
                self.reported.append(error)
                raise
            if self._full_error == "1":
                raise
            # Hydra would add a line of its own to an exception.
            print(error, file=sys.stderr)
            raise SystemExit(error.exit_code) from error

    @contextmanager
    def _callers_world(self) -> Iterator[None]:
        """The job sees the command line and the environment of its caller, not what we lent Hydra."""
        lent_argv, lent = sys.argv, os.environ.pop("HYDRA_FULL_ERROR", None)
        sys.argv = self._argv
        if self._full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = self._full_error
        try:
            yield
        finally:
            sys.argv = lent_argv
            if lent is not None:
                os.environ["HYDRA_FULL_ERROR"] = lent


def _task_elsewhere(verb: str, jobs: tuple[Job, Job], argv: list[str], full_error: str | None) -> _Task:
    return _Task(verb, jobs, load_registry(), argv, full_error)


@contextmanager
def _hydras_world(verb: str, arguments: Sequence[str], parsed: Namespace) -> Iterator[None]:
    """What Hydra reads besides its arguments.

    HYDRA_FULL_ERROR lets its errors through, which it would otherwise print in its own way. The record of a sweep that
    runs in this process goes to a folder that is removed: each run folder holds its own configuration.
    """
    argv, environment, logger = sys.argv, os.environ.copy(), logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    sys.argv = [f"subquad {verb}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    in_this_process = parsed.multirun and not any(word.startswith("hydra/launcher") for word in arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="subquad-sweep-") as scratch:
            if in_this_process:
                os.environ.setdefault(SWEEP_DIR, scratch)
            yield
    finally:
        sys.argv = argv
        logger.handlers[:] = handlers
        logger.setLevel(level)
        for name in ("HYDRA_FULL_ERROR", SWEEP_DIR):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]


def _parsed(verb: str, arguments: Sequence[str]) -> Namespace:
    """The arguments as Hydra's own parser reads them.  Raises: ConfigError."""
    parser = get_args_parser()
    parser.prog = f"subquad {verb}"

    def refuse(message: str) -> NoReturn:
        raise ConfigError(
            what=message,
            where="the command line",
            mend=f"write key=value: `python -m subquad {verb} --help` lists them, --hydra-help Hydra's options",
        )

    parser.error = refuse  # type: ignore[method-assign]
    parsed = parser.parse_intermixed_args(list(arguments))
    modes = {"--run": parsed.run, "--multirun": parsed.multirun, "--cfg": parsed.cfg, "--info": parsed.info}
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        refuse(f"{' and '.join(given)} exclude each other")
    return parsed


def _options_first(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The arguments in the order that Hydra's own parser needs: it refuses overrides behind `a=1 --multirun`."""
    options = list(arguments)
    for override in overrides:
        options.remove(override)
    return [*options, *overrides]


def _check_beforehand(parsed: Namespace, registry: Registry) -> None:
    """Compose once before Hydra does, to see what it would build, and whether a single job is sound.

    Raises: SubquadError; Hydra's errors.
    """
    composed = _composed(_loader(parsed), parsed)
    refuse_hydra_targets(composed)
    if not _is_sweep(parsed):
        to_run_config(_without_hydra(composed), registry)


def _help(about: str, parsed: Namespace, registry: Registry) -> str:
    """What the verb does, the groups, and the configuration that the other arguments compose, key by key."""
    loader = _loader(parsed)
    groups = [
        textwrap.fill(
            f"  {group}: {', '.join(loader.get_group_options(group))}",
            terminal_width(),
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for group in sorted(loader.list_groups(""))
        if group != "hydra" and loader.get_group_options(group)
    ]
    keys = OmegaConf.to_container(_without_hydra(_composed(loader, parsed)), resolve=False)
    assert isinstance(keys, dict)
    shown = run_in_help({str(key): value for key, value in keys.items()}, registry)
    headed = [about, "Groups: group=choice", "\n".join(groups), "Keys: key=value, such as trainer.max_steps=20", shown]
    return "\n\n".join(headed)


def _loader(parsed: Namespace) -> ConfigLoaderImpl:
    search_path = create_automatic_config_search_path(
        calling_file=None, calling_module=__name__, config_path=parsed.config_path or f"pkg://{CONFIG_PACKAGE}"
    )
    if parsed.config_dir is not None:
        folder = f"file://{Path(parsed.config_dir).absolute()}"
        search_path.prepend("command-line", folder, anchor=SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(config_search_path=search_path)


def _composed(loader: ConfigLoaderImpl, parsed: Namespace) -> DictConfig:
    is_sweep = _is_sweep(parsed)
    return loader.load_configuration(
        config_name=parsed.config_name or ROOT_CONFIG,
        overrides=list(parsed.overrides),
        # A sweep leaves swept groups out, as Hydra itself does when it asks for `hydra.mode`.
        run_mode=RunMode.MULTIRUN if is_sweep else RunMode.RUN,
        validate_sweep_overrides=not is_sweep,
    )


def _is_sweep(parsed: Namespace) -> bool:
    return bool(parsed.multirun) or any(override.startswith("hydra.mode=") for override in parsed.overrides)


def _without_hydra(composed: DictConfig) -> DictConfig:
    with open_dict(composed):
        del composed["hydra"]
    return composed
