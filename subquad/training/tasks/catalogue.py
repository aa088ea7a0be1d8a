"""All tasks by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from subquad.errors import NotFoundError, suggestion
from subquad.training.tasks.copying import COPYING, SELECTIVE_COPYING
from subquad.training.tasks.in_context_recall import IN_CONTEXT_RECALL
from subquad.training.tasks.modular_arithmetic import MODULAR_ARITHMETIC
from subquad.training.tasks.mqar import MQAR
from subquad.training.tasks.needle import NEEDLES
from subquad.training.tasks.parity import PARITY
from subquad.training.tasks.task import Task
from subquad.training.tasks.variable_tracking import VARIABLE_TRACKING

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            MQAR, COPYING, SELECTIVE_COPYING, IN_CONTEXT_RECALL, NEEDLES, VARIABLE_TRACKING, PARITY, MODULAR_ARITHMETIC,
        )
    }
)  # fmt: skip


def task_named(name: str, *, where: str) -> Task:
    """Raises: NotFoundError."""
    if name not in TASKS:
        mend = f"{suggestion(name, TASKS)}there are {', '.join(TASKS)}"
        raise NotFoundError(what=f"no task is called '{name}'", where=where, mend=mend)
    return TASKS[name]
