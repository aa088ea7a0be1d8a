"""A script in a fork runs as under Python, with its arguments and exit code, and leaves the next one alone."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from forked_scripts import FORKS

SEEN = """
import os, sys
assert __name__ == "__main__"
loaded = {"torch", "triton"} <= sys.modules.keys()
sys.modules["left"] = os.environ["LEFT"] = "behind"
print(loaded, os.environ.get("TRITON_INTERPRET"), sys.argv[1:], sys.stdin.read())
print("said", file=sys.stderr)
"""


def test_it_is_the_main_module_with_its_arguments_outside_of_the_interpreter(tmp_path: Path) -> None:
    script = tmp_path / "seen.py"
    script.write_text(SEEN)
    assert FORKS.run(script, "one", "two words") == "True None ['one', 'two words'] \n"
    script.write_text("import os, sys; print('left' in sys.modules, 'LEFT' in os.environ)")
    assert FORKS.run(script) == "False False\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit('no such kernel')", "exit code 1: no such kernel"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_one_that_fails_is_an_error_and_the_next_one_runs(text: str, said: str, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(text)
    with pytest.raises(AssertionError, match=said):
        FORKS.run(script)
    script.write_text("print('runs')")
    assert FORKS.run(script) == "runs\n"
