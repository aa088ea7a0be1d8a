"""Which mixers agree with an implementation of their equations that shares no code with them: a record of a test run.

    python -m pytest -m oracle --record-oracles=plugins/verdicts/oracles.json

Tests that make such a comparison carry `@pytest.mark.oracle("mixer", ...)`. `tools/mixer_table.py` reads the record.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

FORMAT_VERSION = 1


class OracleRecord:
    """A pytest plugin: counts outcomes by mixer, and writes them when the session ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """A skipped test says nothing; one that fails before or after its call says that nothing agreed."""
        report = yield
        if (report.when == "call" and not report.skipped) or report.failed:
            for mixer in {mixer for marker in item.iter_markers("oracle") for mixer in marker.args}:
                self.outcomes[mixer][report.outcome] += 1
        return report

    def pytest_sessionfinish(self) -> None:
        """Write the record."""
        record = {
            "format_version": FORMAT_VERSION,
            "date": time.strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "mixers": {
                mixer: {"passed": counts["passed"], "failed": counts["failed"]}
                for mixer, counts in sorted(self.outcomes.items())
            },
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
