"""Stop an installation early, with a reason, when the interpreter is not one that subquad runs on."""

import sys

if sys.argv[1:] in (["--help"], ["-h"]):
    print(__doc__)
    sys.exit()
if sys.argv[1:]:
    sys.exit(f"'{sys.argv[1]}' is not understood; --help says what this does")
if not sys.version_info[:2] >= (3, 11):
    sys.exit(
        f"subquad needs Python 3.11 or newer; this is {sys.version.split()[0]}.\n"
        "Name another interpreter: make train PYTHON=python3.12"
    )
