"""A fitted model as files of text: trees, widths, a card, and a manifest that vouches for them.

manifest.json       format, features' hash, versions, date; the sha256 of every other file
heads.json          words, widths, reach of each head, and its physics head
<head>.point.txt    the rows of a Gaussian process, JSON, or where there is none trees for z, LightGBM's own text
<head>.rest.txt     trees for what the process leaves, where it does not hold all rows
<head>.spread.txt   trees for its spread
<head>.work.txt     trees by work alone, for kernels of few rows or none, where it has these
card.md             what it was fitted to, how it was judged, where it is wrong
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from subquad_cost_model.envelope import Smaller
from subquad_cost_model.estimator import Estimator
from subquad_cost_model.features import Vocabulary, schema_hash
from subquad_cost_model.gaussian_process import GaussianProcess
from subquad_cost_model.head import Head
from subquad_cost_model.learned import LearnedEstimator
from subquad_cost_model.physics import Physics
from subquad_cost_model.process_records import process_from_record, process_record
from subquad_cost_model.roofline import RooflineEstimator
from subquad_cost_model.terms import BYTES, SECONDS
from subquad_cost_model.work_alone import WorkAlone

FORMAT_VERSION = 6
READABLE = (1, 2, 3, 4, 5, 6)
"""Fits of version 1 have no physics head and one head for peaks at most; Gaussian processes came with version 3, with 4
what kernels compute float16 as, with 5 the shares of terms in a process (an earlier process has other scales), with 6
layouts and widths by device."""
MANIFEST, HEADS, CARD = "manifest.json", "heads.json", "card.md"
FILES = ("point", "rest", "spread", "work")
"""Of each head."""
PEAK = "peak_"
"""Before the phase, in the names of heads for peak memory."""
FITS = Path(__file__).parent / "fits"


class FitError(ValueError):
    """The files hold no fit of this format, not all of it, or not what the manifest vouches for."""


def shipped_fit() -> Path:
    """The fit that comes with this package: to kernels of serving frameworks (its `card.md` says more)."""
    return FITS / "serving"


def newest_fit(name: str) -> Path | None:
    """The shipped fit `name` or `name-...` of the latest date; None where there is none."""
    dated = []
    for folder in (FITS / name, *FITS.glob(f"{name}-*")):
        if (folder / MANIFEST).is_file():
            try:
                date = str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["date"])
            except (ValueError, KeyError, TypeError):
                date = ""  # whoever loads it says what is wrong
            dated.append((date, folder))
    return max(dated)[1] if dated else None


def save_fit(estimator: LearnedEstimator, folder: Path, *, card: str) -> None:
    """Write the fit; `card` says what it was fitted to and how it was judged.

    The manifest comes last and all at once: a folder whose writing was cut off is refused.
    """
    import lightgbm

    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    heads = {**estimator.heads, **{f"{PEAK}{phase}": head for phase, head in estimator.peaks.items()}}
    texts = {HEADS: json.dumps({name: _head_record(head) for name, head in heads.items()}, indent=1) + "\n", CARD: card}
    for name, head in heads.items():
        assert head.process is not None or head.trees is not None, "a head of physics is for comparison alone"
        if head.process is not None:
            texts[f"{name}.point.txt"] = _process_text(head.process)
        if head.trees is not None:
            texts[f"{name}.{'rest' if head.process else 'point'}.txt"] = head.trees.model_to_string()
        texts[f"{name}.spread.txt"] = head.spread.model_to_string()
        if head.work_alone is not None:
            texts[f"{name}.work.txt"] = head.work_alone.trees.model_to_string()
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    manifest = {
        "format_version": FORMAT_VERSION,
        "features": schema_hash(),
        "lightgbm": lightgbm.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sorted(texts.items())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def load_fit(folder: Path) -> LearnedEstimator:
    """Read a fit.  Raises: FitError with what is wrong; ModuleNotFoundError without lightgbm."""
    import lightgbm

    texts = _vouched(folder)
    try:
        records = json.loads(texts[HEADS])
        heads = {
            name: _head(record, {what: text for what in FILES if (text := texts.get(f"{name}.{what}.txt"))})
            for name, record in records.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, lightgbm.basic.LightGBMError) as error:
        raise FitError(f"{folder} is not a fit: {type(error).__name__}: {error}") from None
    peaks = {name.removeprefix(PEAK): heads.pop(name) for name in list(heads) if name.startswith(PEAK)}
    return LearnedEstimator(heads=heads, peaks=peaks)


def learned_or_roofline(folder: Path, *, smaller: Smaller | None = None) -> Estimator:
    """The fit in this folder; if it cannot be used, the roofline, with a warning and a note on each estimate.

    `smaller` is that of `LearnedEstimator`, which no file holds.
    """
    try:
        return replace(load_fit(folder), smaller=smaller)
    except (FitError, ModuleNotFoundError) as error:
        reason = f"the learned model is not used: {error}"
        warnings.warn(reason, stacklevel=2)
        return RooflineEstimator(name="roofline for learned", note=reason)


def _vouched(folder: Path) -> dict[str, str]:
    """The files' texts, each as the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, features, sums = manifest["format_version"], manifest["features"], dict(manifest["sha256"])
    except FileNotFoundError:
        raise FitError(f"there is no fit in {folder} ({MANIFEST} is missing)") from None
    except OSError as error:
        raise FitError(f"there is no fit in {folder} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FitError(f"{folder / MANIFEST} is no manifest: {type(error).__name__}: {error}") from None
    if version not in READABLE:
        raise FitError(f"{folder} has format version {version}; this package reads {', '.join(map(str, READABLE))}")
    if features != schema_hash():
        raise FitError(f"{folder} was fitted to other features ({features}; here {schema_hash()}): fit it again")
    texts: dict[str, str] = {}
    for name, expected in sums.items():
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != expected:
            raise FitError(f"{path} is {'not what the manifest says' if path.is_file() else 'missing'}")
        texts[name] = content.decode()
    return texts


def _process_text(process: GaussianProcess) -> str:
    record = process_record(process)
    rows = ",\n".join(json.dumps(line, separators=(",", ":")) for line in record["rows"])
    scales, choices = json.dumps(record["scales"]), json.dumps(record["choices"])
    return f'{{"scales": {scales}, "choices": {choices}, "rows": [\n{rows}\n]}}\n'


def _head_record(head: Head) -> dict[str, Any]:
    return {
        "words": {name: list(words) for name, words in head.vocabulary.words.items()},
        "level": head.level,
        "seen_width": {name: _finite(width) for name, width in head.seen_width.items()},
        "new_width": _finite(head.new_width),
        "lowest": head.lowest,
        "highest": head.highest,
        "devices": list(head.devices),
        "kinds": list(head.kinds),
        "reach": head.reach,
        "layout_width": _finite(head.layout_width),
        "beyond_width": _finite(head.beyond_width),
        "layouts": {
            device: {kernel: sorted(layouts) for kernel, layouts in sorted(of_device.items())}
            for device, of_device in sorted(head.layouts.items())
        },
        "devices_width": dict(head.devices_width),
        "physics": None if head.physics is None else asdict(head.physics),
        "settled": [] if head.work_alone is None else list(head.work_alone.settled),
    }


def _head(record: Mapping[str, Any], texts: Mapping[str, str]) -> Head:
    import lightgbm

    process = process_from_record(json.loads(texts["point"])) if texts["point"].startswith("{") else None
    trees = {what: lightgbm.Booster(model_str=text) for what, text in texts.items() if not text.startswith("{")}
    return Head(
        trees=trees.get("rest" if process else "point"),
        process=process,
        spread=trees["spread"],
        vocabulary=Vocabulary(record["words"]),
        level=record["level"],
        seen_width={name: _width(width) for name, width in record["seen_width"].items()},
        new_width=_width(record["new_width"]),
        lowest=record["lowest"],
        highest=record["highest"],
        devices=tuple(record["devices"]),
        kinds=tuple(record["kinds"]),
        reach={
            kernel: {axis: (smallest, largest) for axis, (smallest, largest) in axes.items()}
            for kernel, axes in record["reach"].items()
        },
        layout_width=_width(record.get("layout_width")),
        beyond_width=_width(record.get("beyond_width")),
        layouts=_layouts(record),
        devices_width=dict(record.get("devices_width", {})),
        physics=_physics(record.get("physics")),
        work_alone=WorkAlone(trees=trees["work"], settled=tuple(record["settled"])) if "work" in trees else None,
    )


def _layouts(record: Mapping[str, Any]) -> dict[str, dict[str, frozenset[str]]]:
    """Those of each device; in fits before version 6 what one has measured counts for all."""
    by_device = record.get("layouts", {})
    if "devices_width" not in record:
        by_device = dict.fromkeys(record["devices"], by_device)
    return {
        device: {kernel: frozenset(layouts) for kernel, layouts in of_device.items()}
        for device, of_device in by_device.items()
    }


def _physics(record: Mapping[str, Any] | None) -> Physics | None:
    if record is None:
        return None
    if tuple(record["terms"]) not in (SECONDS, BYTES):
        raise ValueError("its physics head has other terms than this package's: fit it again")
    return Physics(
        terms=tuple(record["terms"]),
        kernels={name: tuple(factors) for name, factors in record["kernels"].items()},
        pooled={kind: tuple(factors) for kind, factors in record["pooled"].items()},
        kinds=dict(record["kinds"]),
        host_s=record.get("host_s"),
        exact=tuple(record.get("exact", ())),
    )


def _finite(width: float) -> float | None:
    return width if math.isfinite(width) else None


def _width(width: float | None) -> float:
    return math.inf if width is None else width
