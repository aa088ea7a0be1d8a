"""`compile_model`: one name for models that subquad built and for those that it did not."""

from __future__ import annotations

from typing import TypeVar, overload

from torch import nn

from subquad.compiler import pipeline
from subquad.compiler.example import Example
from subquad.compiler.foreign.compile_foreign import compile_foreign
from subquad.compiler.options import CompileOptions
from subquad.compiler.plan import Plan
from subquad.compiler.target import Target
from subquad.errors import ConfigError
from subquad.model.language_model import LanguageModel
from subquad.schema import BudgetConfig

ForeignModel = TypeVar("ForeignModel", bound=nn.Module)


@overload
def compile_model(
    model: LanguageModel,
    example: Example,
    *,
    target: str | Target | None = ...,
    options: CompileOptions | None = ...,
    plan: Plan | None = ...,
    budget: BudgetConfig | None = ...,
) -> tuple[LanguageModel, Plan]: ...


@overload
def compile_model(
    model: ForeignModel,
    example: object,
    *,
    target: str | Target | None = ...,
    options: CompileOptions | None = ...,
    plan: Plan | None = ...,
    budget: BudgetConfig | None = ...,
) -> tuple[ForeignModel, Plan]: ...


def compile_model(
    model: nn.Module,
    example: object,
    *,
    target: str | Target | None = None,
    options: CompileOptions | None = None,
    plan: Plan | None = None,
    budget: BudgetConfig | None = None,
) -> tuple[nn.Module, Plan]:
    """Let the model run the kernels chosen for the target, in place; return it and the plan.

    A model of ours takes an `Example` of its shapes, any other module the inputs of a call: a tensor, a tuple of
    positional arguments or a dictionary of keyword arguments. The function stays, up to rounding; parameters,
    state_dict keys and attributes stay as they are. `target` None is the best device here, or that of a foreign model.
    With a `plan` its choices are followed and nothing is estimated or measured.
    Raises: ConfigError, NotFoundError.
    """
    if not isinstance(model, LanguageModel):
        return compile_foreign(model, example, target=target, options=options, plan=plan, budget=budget)
    if budget is not None:
        raise ConfigError(
            what="a budget chooses mixers, and this model has its mixers",
            where="budget",
            mend="put it into the recipe, where layers can be `auto`, and build the model of that",
        )
    if not isinstance(example, Example):
        raise ConfigError(
            what=f"the example of a model of ours is an Example, not {type(example).__name__}",
            where="example",
            mend="give subquad.Example(tokens_shape=(batch, tokens))",
        )
    return pipeline.compile_model(
        model, example, target="auto" if target is None else target, options=options, plan=plan
    )
