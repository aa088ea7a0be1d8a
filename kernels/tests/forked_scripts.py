"""Scripts that run outside of Triton's interpreter, in forks of one process that has imported torch and triton.

    python kernels/tests/forked_scripts.py [MODULE ...] < REQUESTS

The modules are imported beforehand as well. A request is a line of JSON: a script and its arguments, a file for what it
prints and one for its errors; the answer is its exit code. Python with torch and triton,
`python -c "import compile_launches"`, takes 1.9 s of a core to start, a fork some 10 ms (two busy cores of an AMD EPYC,
2026-11-30).
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn


class Forks:
    """The process, begun when a script is first run; `close` ends it. It imports the `modules` before it forks."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._server: subprocess.Popen[str] | None = None

    def run(self, script: Path, *arguments: str) -> str:
        """What the script prints.  Raises: AssertionError with the end of its errors, if it fails."""
        server = self._begun()
        assert server.stdin is not None
        assert server.stdout is not None
        with TemporaryDirectory() as folder:
            printed, errors = Path(folder, "printed"), Path(folder, "errors")
            request = [[str(script), *arguments], str(printed), str(errors)]
            print(json.dumps(request), file=server.stdin, flush=True)
            answer = server.stdout.readline()
            assert answer.strip() == "0", f"exit code {answer.strip()}: {errors.read_text()[-2000:]}"
            return printed.read_text()

    def close(self) -> None:
        if self._server is not None:
            with self._server as server:  # which reads no further line, and ends
                assert server.stdin is not None
                server.stdin.close()
            self._server = None

    def _begun(self) -> subprocess.Popen[str]:
        if self._server is None:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
            self._server = subprocess.Popen(
                [sys.executable, __file__, *self._modules],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._server


FORKS = Forks()
"""Of all tests of this folder; `conftest.py` ends it."""


def serve() -> None:
    """Answer requests until there are no more."""
    import torch  # noqa: F401
    import triton  # noqa: F401

    import subquad_kernels.builtin  # noqa: F401

    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        arguments, printed, errors = json.loads(line)
        child = os.fork()
        if child == 0:
            become(arguments, printed, errors)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(arguments: list[str], printed: str, errors: str) -> NoReturn:
    """Run a script in this process, as `python SCRIPT ARGUMENTS...` does, and end."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, printed), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
    code = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
