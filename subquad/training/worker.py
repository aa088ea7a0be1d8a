"""The process of a rank above 0: `python -m subquad.training.worker RUN_DIR`, started by rank 0 and by nobody else."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from subquad.errors import SubquadError
from subquad.training.distributed import EXIT_LEFT, lost_a_rank
from subquad.training.fit import train_as_other_rank


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
        if not lost_a_rank(error):
            raise
        print(f"rank {os.environ['RANK']} ends: another rank has left the run", file=sys.stderr)
        return EXIT_LEFT
    return 0


if __name__ == "__main__":
    sys.exit(main())
