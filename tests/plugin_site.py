"""Distributions that are installed for one test, by writing what an installer would write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from subquad.registry import ENTRY_POINT_GROUP, Registry, build_registry, installed_plugins


class Site:
    """A folder on sys.path where distributions are installed by writing their metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self, distribution: str, source: str, *, entry: str | None = None, groups: Sequence[str] = (ENTRY_POINT_GROUP,)
    ) -> None:
        """A distribution of one module, `NAME_module`, behind one entry point, in each of the groups."""
        module = distribution.replace("-", "_") + "_module"
        (self.path / f"{module}.py").write_text(source)
        metadata = self.path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        entries = [f"[{group}]\n{entry or distribution} = {module}\n" for group in groups]
        (metadata / "entry_points.txt").write_text("".join(entries))

    def registry(self) -> Registry:
        return build_registry(installed_plugins())
