"""The one user cache directory: self-check verdicts, measurements, device profiles, token caches."""

from __future__ import annotations

import os
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import platformdirs


def user_cache(name: str) -> Path | None:
    """The folder `name` of the user cache, created; None when the cache cannot be written (one warning).

    `SUBQUAD_CACHE` names another place for the cache.
    """
    root = _writable_root(os.environ.get("SUBQUAD_CACHE") or platformdirs.user_cache_dir("subquad"))
    if root is None:
        return None
    folder = root / name
    folder.mkdir(exist_ok=True)
    return folder


@lru_cache(maxsize=8)
def _writable_root(root: str) -> Path | None:
    path = Path(root)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        warnings.warn(f"no cache: {root} cannot be written ({error.strerror}); set SUBQUAD_CACHE", stacklevel=3)
        return None
    return path
