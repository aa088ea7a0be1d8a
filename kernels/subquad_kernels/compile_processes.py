"""What calls are about to compile, collected without a launch and compiled in processes beside each other.

Triton builds a kernel in Python before MLIR, LLVM and ptxas take over, and threads of one process wait for each other
there. Host code that follows from the signature of its arguments (`Kernel.replayable`) can be run for what it launches
alone: triton's own way of handing compilations to others (`AsyncCompileMode`) tells for what it would compile, under
the key by which it will look for it on disk. Each is then compiled in a fork of this process, which has imported
everything, and the calls themselves find it in Triton's folder.

A fork computes nothing on a device: what is asked of the driver while it compiles was found out before. One that dies
or hangs is named in a warning, and its kernel is left to the call.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import SimpleNamespace
from typing import Any

from triton import AsyncCompileMode
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from subquad_kernels.compilations import Compilation, compilations
from subquad_kernels.triton_launch import COLLECTING

_LONGEST_S = 300.0
"""Of one compilation; the longest of ours takes eight seconds."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One kernel for one list of types, constants and alignments: `compile` does what triton would at its launch.

    `source` is triton's record of all that, of which before triton 3.7 a launcher is built.
    """

    kernel: str
    key: str
    arguments: int
    source: Any
    compile: Callable[[], Any]

    @property
    def on_disk(self) -> bool:
        """Whether triton would find it compiled."""
        folder = get_cache_manager(hashlib.sha256(self.key.encode()).hexdigest())
        return bool(folder.get_group(f"{self.kernel[:150]}.json"))


class Collection(AsyncCompileMode):  # type: ignore[misc]  # triton has no types
    """What launches would compile, each once; nothing is compiled, and triton's tables stay as they are."""

    def __init__(self) -> None:
        super().__init__(None)
        self._launched: Any = None
        self._found: dict[str, Wanted] = {}

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """In the order of the launches."""
        return tuple(self._found.values())

    def launch(
        self, jitted: Any, programs: tuple[int, ...], values: Iterable[Any], constants: Mapping[str, Any]
    ) -> None:
        """Stand where a launch stood."""
        self._launched = jitted
        with self:
            jitted.warmup(*values, grid=programs, **constants)

    def submit(self, key: str, compile_fn: Callable[[], Any], *rest: Any) -> None:
        """What triton asks of whoever compiles for it; None leaves the kernel unknown to it."""
        name, arguments = self._launched.__name__, len(self._launched.arg_names)
        source = inspect.getclosurevars(compile_fn).nonlocals["src"]  # `JITFunction._do_compile`, triton 3.6 to 3.9
        one = Wanted(kernel=name, key=key, arguments=arguments, source=source, compile=compile_fn)
        self._found.setdefault(key, one)


@contextmanager
def collecting() -> Iterator[Collection]:
    """Launches of `QuickLaunch` by this thread are collected, and not made."""
    collection = Collection()
    COLLECTING.collection = collection
    try:
        yield collection
    finally:
        COLLECTING.collection = None


def compile_in_processes(wanted: Iterable[Wanted], processes: int) -> dict[str, Compilation]:
    """Compile into Triton's folder what is not there, in so many processes at a time; what each took, by its hash.

    One alone is left to its call, and so is everything where processes would not be beside each other or may not be
    forked. Kernels of more arguments take longer, as a rule, and are begun first.
    """
    missing = sorted((one for one in wanted if not one.on_disk), key=lambda one: one.arguments)
    if len(missing) < 2 or processes < 2 or not _may_fork():
        return {}
    device = _known_of_device()
    compiled: dict[str, Compilation] = {}
    running: list[_Fork] = []
    try:
        while missing or running:
            while missing and len(running) < processes:
                running.append(_Fork(missing.pop(), device))
            left_s = min(fork.end_s for fork in running) - time.monotonic()
            ready = wait([fork.answers for fork in running], timeout=max(left_s, 0.0))
            for fork in list(running):
                if fork.answers in ready or fork.end_s <= time.monotonic():
                    running.remove(fork)
                    compiled |= {one.hash: one for one in fork.result()}
    finally:  # on Ctrl-C what has begun is dropped
        for fork in running:
            fork.kill()
    return compiled


def _may_fork() -> bool:
    daemonic = multiprocessing.current_process().daemon  # may have no children
    return "fork" in multiprocessing.get_all_start_methods() and not daemonic


def _known_of_device() -> SimpleNamespace:
    """A driver for processes that may not ask one: what compilations ask, answered here."""
    known, target = driver.active, driver.active.get_current_target()
    return SimpleNamespace(get_current_target=lambda: target, utils=known.utils, launcher_cls=known.launcher_cls)


class _Fork:
    """A process that compiles one kernel and answers with what that took, or why it did not."""

    def __init__(self, wanted: Wanted, device: SimpleNamespace) -> None:
        self._kernel = wanted.kernel
        self.end_s = time.monotonic() + _LONGEST_S
        self.answers, answer = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_compile, args=(wanted, device, answer), daemon=True)
        with warnings.catch_warnings(), answer:  # of ours only the fork may hold its end: when it dies, that shows
            # Python 3.12 warns of threads that a fork does not have; none of them holds what a compilation needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()

    def result(self) -> tuple[Compilation, ...]:
        """What it compiled; nothing, and a warning that names the kernel, where it failed."""
        try:
            found = self.answers.recv() if self.answers.poll() else f"not done after {_LONGEST_S:.0f} s"
        except (EOFError, OSError):
            self._process.join()
            found = f"exit code {self._process.exitcode}"
        self.kill()
        if isinstance(found, str):
            warnings.warn(
                f"the process that compiled {self._kernel} failed ({found}): it is compiled when it is called",
                RuntimeWarning,
                stacklevel=3,
            )
            return ()
        return tuple(found)

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.join()
        self.answers.close()


def _compile(wanted: Wanted, device: SimpleNamespace, answer: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # this process has nothing to save
    gc.disable()  # nor to free: a collection would walk through all that torch and triton have made
    found: list[Compilation] | str
    try:
        driver.set_active(device)
        with ThreadPoolExecutor(1) as beside, compilations() as found:
            beside.submit(_begin_launcher, wanted, device)
            kernel = wanted.compile()
        device.launcher_cls(kernel.src, kernel.metadata)  # finds what was begun, or builds what that could not know
    except BaseException as error:  # the call will raise it again
        found = f"{type(error).__name__}: {error}".splitlines()[0]
    answer.send(found)


def _begin_launcher(wanted: Wanted, device: SimpleNamespace) -> None:
    """Build what launches a kernel while it is compiled: before triton 3.7 a C module, one for every signature.

    Its text follows from the source, and on AMD from the width of a warp. triton asks for the rest of what it knows of
    compiled kernels when the module is built, and does not find it here.
    """
    with suppress(Exception):  # what fails is done again when all is known
        device.launcher_cls(wanted.source, SimpleNamespace(warp_size=device.get_current_target().warp_size))
