"""From a mapping that names a source to the source."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from subquad.component_config import typed_config
from subquad.registry import load_registry
from subquad.training.sources.source import DataContext, Source


def build_source(values: Mapping[str, object], context: DataContext, where: str) -> Source:
    """The source of the registry key `name` with its fields; `where` is the mapping's place in the configuration.

    Raises: ConfigError, DataError, NotFoundError.
    """
    fields = dict(values)
    spec = load_registry().component("data", str(fields.pop("name", "python_source")), where=f"{where}.name")
    config: Any = typed_config(spec.config, fields, where)
    module, _, attribute = spec.build.partition(":")
    source: Source = getattr(importlib.import_module(module), attribute)(config, context)
    return source
