"""The command line: the first argument is a verb, the rest belongs to it.

Nothing is imported before the verb is known, so that help and completion answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

from subquad import __version__
from subquad.errors import ConfigError, NotFoundError, SubquadError, suggestion

VERBS: Mapping[str, str] = MappingProxyType(
    {
        "train": "train a model: train model=scout_mamba trainer.max_steps=200",
        "explain": "show which kernel each operator would get, and why: explain model=scout_mamba target=h100",
        "bench": "time an operator's kernels as lengths grow: bench operator=segment_attention",
        "measure": "time kernels over a pool of shapes into a table that models are fitted to: measure budget_s=540",
        "calibrate": "correct the cost model by a few rows of this device: calibrate budget_s=120",
        "warmup": "compile, check and measure what a run will call: warmup model=scout_mamba",
        "generate": 'continue a text: generate run=RUN_DIR prompt="def "',
        "export": "write a trained model for others: export run=RUN_DIR format=hf out=FOLDER",
        "compare": "lay runs side by side: compare runs=[RUN_DIR,OTHER_RUN_DIR]",
        "evaluate": "judge a trained run by position, length and task: evaluate run=RUN_DIR suite=mqar",
        "proxy": "measure what other mixers would lose in a run's layers: proxy run=RUN_DIR candidates=[window]",
        "plan": "compare two plans: plan diff A/plan.json B/plan.json",
        "plugins": "list what is installed (--json); check NAME judges it; new NAME writes a package",
        "doctor": "versions, devices, caches, and a check of every usable kernel",
        "completion": 'print bash completion: eval "$(subquad completion)"',
    }
)
USAGE, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: the call was wrong; the run failed; Ctrl-C (128 + SIGINT)."""
EXTRAS: Mapping[str, str] = MappingProxyType(
    {"lightning": "train", "wandb": "train", "matplotlib": "plot", "transformers": "hf"}
)
"""Modules that an extra of the distribution installs."""
REQUIRED = frozenset(
    {"torch", "hydra", "omegaconf", "yaml", "pluggy", "packaging", "platformdirs", "filelock", "rich", "numpy",
     "safetensors", "tokenizers", "subquad_kernels", "subquad_cost_model"}
)  # fmt: skip
"""What a bare checkout lacks. Any other module that cannot be found is somebody's bug and shows its traceback."""
HELP = f"""subquad {__version__}: choose, verify and train sub-quadratic sequence mixers

  python -m subquad VERB [arguments]

{{verbs}}

VERB --help says what each key=value means; train, explain and warmup take group=choice, --multirun and --cfg job too.
--traceback shows where an error came from."""


class Verb(Protocol):
    """What a module of `subquad.commands` offers."""

    @staticmethod
    def run(arguments: list[str]) -> int:
        """Carry the verb out and return the exit code.  Raises: SubquadError."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; errors that a user can mend are printed in three lines."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    full_error = "--traceback" in arguments or os.environ.get("HYDRA_FULL_ERROR") == "1"
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        with _short_warnings(), _full_errors(full_error):
            return _run(arguments)
    except SubquadError as error:
        if full_error:
            traceback.print_exc()
        else:
            print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as error:  # argparse, and verbs that have said all there is to say
        return error.code if isinstance(error.code, int) else USAGE if error.code else 0
    except BrokenPipeError:  # `subquad plugins | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if full_error or _top_level(error) not in REQUIRED | set(EXTRAS):
            traceback.print_exc()
            return FAILED
        print(_not_installed(error), file=sys.stderr)
        return USAGE
    except Exception:
        traceback.print_exc()
        return FAILED


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<11} {summary}" for verb, summary in VERBS.items())))
        return 0 if arguments else USAGE
    if arguments[0] in ("--version", "-V"):
        print(f"subquad {__version__}")
        return 0
    return int(_verb(arguments[0]).run(arguments[1:]))


def _verb(name: str) -> Verb:
    if name not in VERBS:
        raise NotFoundError(
            what=f"there is no verb '{name}'",
            where="the first argument",
            mend=f"{suggestion(name, VERBS)}the verbs are {', '.join(VERBS)}",
        )
    return cast(Verb, import_module(f"subquad.commands.{name}"))


def _not_installed(error: ModuleNotFoundError) -> ConfigError:
    name = _top_level(error)
    if name in EXTRAS:
        mend = f"pip install 'subquad[{EXTRAS[name]}]'"
    else:
        mend = "in a checkout run `make install`, then .venv/bin/python; elsewhere install subquad with what it needs"
    return ConfigError(what=f"{name} is not installed", where=sys.executable, mend=mend)


def _top_level(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]


@contextmanager
def _full_errors(wanted: bool) -> Iterator[None]:
    """Say it in Hydra's way to whoever reports errors further inside."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    if wanted:
        os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if wanted and before is None:
            del os.environ["HYDRA_FULL_ERROR"]


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print our own warnings on one line; those of other packages keep file and line."""
    package, before = str(Path(__file__).parent), warnings.formatwarning

    def short(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename.startswith(package) and issubclass(category, UserWarning):
            return f"warning: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = before


if __name__ == "__main__":
    sys.exit(main())
