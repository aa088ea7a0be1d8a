"""Where the calibration of a device lies in the user's cache."""

from __future__ import annotations

import re
from pathlib import Path

from subquad.cache import user_cache
from subquad_cost_model import Device


def profile_path(device: Device) -> Path | None:
    """The file of this device under its versions, written by `calibrate`; None where nothing can be cached."""
    folder = user_cache("profiles")
    words = [device.name, *(f"{name} {version}" for name, version in sorted(device.versions.items()))]
    return None if folder is None else folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', '-'.join(words))}.json"
