"""One folder for what Triton compiles, in this process and the next."""

from __future__ import annotations

import os


def keep_triton_cache() -> None:
    """Name Triton's own folder in the environment, where nobody has named one.

    torch's inductor otherwise names a temporary folder there with the first kernel it makes, and from then on Triton
    compiles into that: what an earlier process compiled is not found, nor is what this one compiles found by the next.
    """
    home = os.environ.get("TRITON_HOME", os.path.expanduser("~"))
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(home, ".triton", "cache"))
