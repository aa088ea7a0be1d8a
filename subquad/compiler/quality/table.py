"""What the choice of mixers minimises: the loss of every candidate in every layer, and where the figures come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from subquad.errors import ConfigError

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class QualityTable:
    """`loss[layer][candidate]`, smaller is better; only differences within a layer and their sums over layers count.

    `proxy` says how it was found and `origin` on what: which run, how many tokens. `mixers` are the entries of
    `model.mixers` that were measured: the figures hold for these and no others.
    """

    proxy: str
    origin: str
    loss: tuple[Mapping[str, float], ...]
    mixers: Mapping[str, Mapping[str, object]]
    d_model: int
    notes: tuple[str, ...] = field(default=())

    def save(self, path: Path) -> None:
        """Write the table as JSON, all of it or nothing."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path, where: str = "budget.quality") -> QualityTable:
        """Read a table.  Raises: ConfigError when the file is missing or no table of this format."""
        mend = "name a file that `python -m subquad proxy` wrote, or `prior`"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format_version") != FORMAT_VERSION:
                raise ConfigError(what=f"{path} has another format version", where=where, mend=mend)
            loss = tuple({str(key): float(value) for key, value in layer.items()} for layer in content.pop("loss"))
            return cls(loss=loss, notes=tuple(content.pop("notes")), **content)
        except OSError as error:
            raise ConfigError(what=f"{path} cannot be read ({error.strerror})", where=where, mend=mend) from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(what=f"{path} is no table of qualities", where=where, mend=mend) from None

    def rows(
        self, keys: Sequence[str], mixers: Mapping[str, Mapping[str, object]], num_layers: int, d_model: int
    ) -> tuple[Mapping[str, float], ...]:
        """The losses of these candidates in every layer.

        Raises: ConfigError when the table was measured on another depth, width or candidate.
        """
        mend = "measure this model: python -m subquad proxy run=RUN_DIR, or use budget.quality=prior"
        for what, measured, asked in (
            ("layers", len(self.loss), num_layers), ("d_model", self.d_model, d_model),
        ):  # fmt: skip
            if measured != asked:
                raise ConfigError(
                    what=f"the table was measured with {what} {measured}, the model has {asked}",
                    where="budget.quality",
                    mend=mend,
                )
        for key in keys:
            if key not in self.mixers or any(key not in layer for layer in self.loss):
                raise ConfigError(
                    what=f"the table does not know the candidate '{key}'",
                    where="budget.quality",
                    mend=f"it holds {', '.join(self.mixers)}; {mend}",
                )
            if dict(self.mixers[key]) != dict(mixers[key]):
                raise ConfigError(
                    what=f"'{key}' was measured as {dict(self.mixers[key])}, the model has {dict(mixers[key])}",
                    where="budget.quality",
                    mend=mend,
                )
        return tuple({key: layer[key] for key in keys} for layer in self.loss)
