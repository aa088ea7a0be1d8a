"""Train the cells of `quality_cells.py` side by side on one device, and keep a line of JSON for each.

    python tools/quality_run.py RECORD.jsonl study=mixers [budget_s=540] [workers=14] [key=value ...]

Cells that the record holds are passed over: the command goes on where it stopped. No cell is begun that would not end
within the budget by what its like took before; one that the budget cuts short is kept with the steps that it made, and
made again next time, from where it stopped if runs=FOLDER holds what it left. A cell that fails is kept as such, and
tried again with failed=again. Models are small, so that a device is shared by as many processes as there are cores;
what is timed (`speed`) comes first and has it alone.
Further keys: models=[gla,retnet], tasks=[text], steps=3, accelerator=cpu, and runs=FOLDER for what training leaves
(else removed).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import quality_cells
from command_line import refuse, words_of
from quality_cells import QUICK, STUDIES, Cell, cells

FIRST_GUESS_S = 45.0
"""What a cell is taken to need before one like it has ended."""
LAST_S = 15.0
"""Of the budget, for what follows the last step: a checkpoint, a report, the judgement."""
LEAST_S = 10.0
"""A cell that would be cut before this many seconds of training is not begun."""

Record = dict[str, Any]


@dataclass
class Settings:
    """What the arguments say; `runs` holds the folders of the runs."""

    record: Path
    study: str = "mixers"
    budget_s: float = 540.0
    workers: int = field(default_factory=lambda: max(1, len(os.sched_getaffinity(0)) - 2))
    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    steps: int | None = None
    accelerator: str = "auto"
    failed: str = "kept"
    runs: Path | None = None


def main(arguments: Sequence[str]) -> int:
    """Make what is missing from the record; 1 if a cell failed."""
    started = time.monotonic()
    settings = parsed(arguments)
    done = {record["key"] for record in read(settings.record) if is_done(record, settings.failed == "again")}
    wanted = [
        cell
        for cell in cells(settings.study, models_of(settings), settings.steps)
        if cell.key not in done and (not settings.tasks or cell.task in settings.tasks)
    ]
    print(f"{len(wanted)} cells to make, {len(done)} in the record", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        crew = Crew(settings, wanted, started + settings.budget_s, settings.runs or Path(temporary))
        crew.work()
    print(f"{crew.made} made, {crew.broken} of them failed, {len(crew.waiting)} left out for want of time", flush=True)
    return 1 if crew.broken else 0


def parsed(arguments: Sequence[str]) -> Settings:
    """RECORD.jsonl key=value ...; exits with a message on anything else."""
    readers: dict[str, Any] = {
        "study": str, "budget_s": float, "workers": int, "steps": int, "accelerator": str, "failed": str,
        "models": _names, "tasks": _names, "runs": lambda text: Path(text).absolute(),
    }  # fmt: skip
    (record,), words = words_of(__doc__, arguments, "RECORD.jsonl", keys=readers)
    settings = Settings(record=Path(record).absolute())
    for key, _, value in (word.partition("=") for word in words):
        setattr(settings, key, readers[key](value))
    if settings.study not in STUDIES:
        refuse(f"no study is called '{settings.study}'; there are {', '.join(STUDIES)}")
    return settings


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.strip("[]").split(","))


def models_of(settings: Settings) -> tuple[str, ...]:
    """Those that were asked for, or all of the study; a mixer that looks ahead would read the answers."""
    if settings.models:
        return settings.models
    own = quality_cells.models_of(settings.study)
    if own is not None:
        return own
    from subquad.registry import load_registry

    return tuple(spec.name for spec in load_registry().mixers.values() if spec.causal)


def read(path: Path) -> list[Record]:
    """The lines of a record; none where there is no file yet. What a kill has left of a line is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def is_done(record: Record, again: bool = False) -> bool:
    """Whether a cell need not be made: it ended with all its steps, or it failed and is not to be tried again."""
    return not again if "failed" in record else bool(record["made_steps"] == record["steps"])


class Crew:
    """Processes that take cells from one list, in its order, until it is empty or the time is up."""

    def __init__(self, settings: Settings, wanted: list[Cell], end: float, runs: Path) -> None:
        self._settings, self._end, self._runs = settings, end, runs
        self._lock = threading.Lock()
        self._took: dict[tuple[str, ...], list[float]] = defaultdict(list)
        self.waiting, self.made, self.broken = wanted, 0, 0

    def work(self) -> None:
        """One process at first, for what must be alone and for what all share (tokens, the device's ceilings)."""
        number = min(self._settings.workers, len(self.waiting))
        workers = [Worker(self._runs / f"worker-{index}.log") for index in range(number)]
        try:
            if workers:
                self._keep_busy(workers[0], lambda cell: cell.task == "speed")
                self._warm_up(workers[0])
            threads = [threading.Thread(target=self._keep_busy, args=(worker,)) for worker in workers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for worker in workers:
                worker.close()

    def _warm_up(self, worker: Worker) -> None:
        """A step of each task, so that the tokens and the device's ceilings are cached before many ask for them."""
        for task in dict.fromkeys(cell.task for cell in self.waiting):
            first = min((cell for cell in self.waiting if cell.task == task), key=lambda cell: cell.model not in QUICK)
            with tempfile.TemporaryDirectory() as folder:
                found = worker.ask(self._request(replace(first, steps=1), Path(folder) / "run"), self._left_s())
            print(f"warmed up for {task}: {found.get('failed', 'done')}", flush=True)

    def _request(self, cell: Cell, folder: Path) -> Record:
        return {
            "cell": asdict(cell),
            "run_dir": str(folder),
            "max_seconds": max(LEAST_S, self._left_s() - LAST_S),
            "accelerator": self._settings.accelerator,
        }

    def _left_s(self) -> float:
        return self._end - time.monotonic()

    def _keep_busy(self, worker: Worker, which: Any = lambda cell: cell.task != "speed") -> None:
        for cell in self._taken(which):
            begun = time.monotonic()
            found = worker.ask(self._request(cell, self._runs / cell.key.replace("/", "-")), self._left_s())
            seconds = time.monotonic() - begun
            self._keep({"key": cell.key, **asdict(cell), "seconds": round(seconds, 1), **found}, cell, seconds)

    def _taken(self, which: Any) -> Iterator[Cell]:
        """Cells of a kind, each with time enough for it."""
        while True:
            with self._lock:
                left = self._left_s()
                fitting = (cell for cell in self.waiting if which(cell) and self._guess_s(cell) <= left)
                cell = next(fitting, None)
                if cell is None:
                    return
                self.waiting.remove(cell)
            yield cell

    def _guess_s(self, cell: Cell) -> float:
        """The longest that this model took for this task; any model, if this one has not ended yet."""
        own, like = self._took.get((cell.task, cell.model)), self._took.get((cell.task,))
        return max(own) if own else min(like or [FIRST_GUESS_S], default=FIRST_GUESS_S) + LAST_S

    def _keep(self, record: Record, cell: Cell, seconds: float) -> None:
        with self._lock:
            self.made += 1
            self.broken += "failed" in record
            if "failed" not in record:
                self._took[cell.task, cell.model].append(seconds)
                self._took[cell.task,].append(seconds)
            with self._settings.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            said = record.get("failed") or record.get("accuracy") or record.get("bits_per_byte") or record.get("speed")
            print(f"{record['seconds']:6.1f} s  {cell.key}  {str(said).splitlines()[-1][:150]}", flush=True)


class Worker:
    """A process that trains one cell after another, so that imports are paid once; it is started anew when it dies."""

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._process = self._started()

    def ask(self, request: Record, limit_s: float) -> Record:
        """What the process answers; after the limit it is killed, and that it was is the answer."""
        if self._process.poll() is not None:
            self._close_pipes()
            self._process = self._started()
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Timer(max(limit_s, LEAST_S) + LAST_S, self._process.kill)
        late.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
        if line:
            answer = dict(json.loads(line))
            if "failed" in answer:  # it ends then: the next request is another process's
                self._process.wait()
            return answer
        code = self._process.wait()
        return {"failed": f"the process ended with code {code}: {self._last_words()}"}

    def close(self) -> None:
        """End the process."""
        self._close_pipes()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # of what was asked and never read
                assert pipe is not None
                pipe.close()

    def _started(self) -> subprocess.Popen[str]:
        script = Path(__file__).resolve().with_name("quality_cell.py")
        with self._log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, str(script)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
