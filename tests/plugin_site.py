"""Distributions that are installed for one test, by writing what an installer would write."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

from subquad.registry import ENTRY_POINT_GROUP, Registry, build_registry


class Site:
    """A folder on sys.path where distributions are installed by writing their metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self, distribution: str, source: str, *, entry: str | None = None) -> None:
        """A distribution of one module, `NAME_module`, behind one entry point."""
        module = distribution.replace("-", "_") + "_module"
        (self.path / f"{module}.py").write_text(source)
        metadata = self.path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{entry or distribution} = {module}\n")

    def registry(self) -> Registry:
        return build_registry(entry_points(group=ENTRY_POINT_GROUP))
