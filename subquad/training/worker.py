"""The process of a rank above 0: `python -m subquad.training.worker RUN_DIR`, started by rank 0 and by nobody else."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from subquad.errors import SubquadError
from subquad.training.fit import train_as_other_rank

LOST = ("Connection closed by peer", "Connection reset by peer")
"""How gloo says that another process has gone; that one has told its own reason."""


def main() -> int:
    """Take part in the run of that folder until rank 0 ends it."""
    # Ctrl-C reaches every process of the terminal; rank 0 hears it and tells the others when the step is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train_as_other_rank(Path(sys.argv[1]))
    except SubquadError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST):
            raise
        print(f"rank {os.environ['RANK']} ends: another rank has left the run", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
