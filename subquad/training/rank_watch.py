"""No rank outlives the run: a process ends although a device holds it in an exchange that will never be complete.

When a rank dies, gloo tells the others at once; NCCL lets them wait on the device, where no Python code runs. A thread
gives each process a while to leave by itself, and then ends it.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable

PATIENCE_S = 20.0
"""For closing files and telling what happened; children are ended within this time too."""
POLL_S = 0.2


class RankWatch:
    """Ends this process with code 1 if it has not left by itself after another rank has gone, or failed on its own.

    `gone` says why another rank is missed (None: none is), `end_others` is called before the end.
    """

    def __init__(
        self, gone: Callable[[], str | None], end_others: Callable[[], None], *, patience_s: float = PATIENCE_S
    ) -> None:
        self._gone, self._end_others, self._patience_s = gone, end_others, patience_s
        self._error: BaseException | None = None
        self._left = threading.Event()
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    def failed(self, error: BaseException) -> None:
        """This rank has an error and is about to leave; if it cannot, the error is printed all the same."""
        self._error = error

    def stop(self) -> None:
        """This process has left the run."""
        self._left.set()

    def _watch(self) -> None:
        while not self._left.wait(POLL_S):
            reason = self._gone()
            if reason is None and self._error is None:
                continue
            if self._left.wait(self._patience_s):
                return
            if self._error is not None:
                traceback.print_exception(self._error)
            print(f"this rank is ended: {reason or 'it could not leave the run'}", file=sys.stderr, flush=True)
            self._end_others()
            os._exit(1)
