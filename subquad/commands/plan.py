"""plan: look at plans that runs have left behind."""

from __future__ import annotations

from pathlib import Path

from subquad.errors import ConfigError

HELP = """Compare two plans: mixers, kernels, versions and device.

  python -m subquad plan diff RUN_DIR OTHER_RUN_DIR
  python -m subquad plan diff A/plan.json B/plan.json

The exit code is 0 when they do the same, 1 when they differ."""
SAME, DIFFERENT = 0, 1


def run(arguments: list[str]) -> int:
    """Compare the plans that the arguments name; a run folder stands for its plan.  Raises: ConfigError."""
    if not arguments or any(argument in ("--help", "-h") for argument in arguments):
        print(HELP)
        return 0 if arguments else 2
    if arguments[0] != "diff" or len(arguments) != 3:
        raise ConfigError(
            what=f"'plan {' '.join(arguments)}' cannot be read",
            where="the command line",
            mend="write: plan diff A/plan.json B/plan.json",
        )
    from subquad.compiler.plan import Plan
    from subquad.compiler.plan_diff import plan_diff

    paths = [Path(argument).expanduser() for argument in arguments[1:]]
    try:
        old, new = (Plan.load(path / "plan.json" if path.is_dir() else path) for path in paths)
    except ConfigError as error:
        mend = "name two run folders, or two files plan.json of this version"
        raise ConfigError(what=error.what, where="plan diff", mend=mend) from None
    lines = plan_diff(old, new)
    print("\n".join(lines) if lines else "the plans do the same")
    return DIFFERENT if lines else SAME
