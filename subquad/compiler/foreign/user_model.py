"""A model named on the command line: the user's own code, imported and called because the user said so."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from subquad.errors import ConfigError


def user_model(module: str, example: str | None = None) -> tuple[nn.Module, object]:
    """The model and its example inputs, from `package.module:factory` and, if given, another such name for the inputs.

    The factory takes no arguments. It returns a model and the inputs of a call; or a model alone, whose inputs are
    what `example` returns, or else its attribute `dummy_inputs`, of which a warning tells.
    Raises: ConfigError.  What the user's code raises is an error of that code, and passes.
    """
    made = _called(module, "module")
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            what=f"it returned {type(model).__name__}, not a torch.nn.Module",
            where=f"module={module}",
            mend="return a model, or a model and the inputs of a call",
        )
    if example is not None:
        inputs = _called(example, "example")
    if inputs is None:
        inputs = getattr(model, "dummy_inputs", None)
        if inputs is not None:
            # Hugging Face's are a few tokens: kernels chosen for them say little of a text.
            warnings.warn(
                f"{type(model).__name__} is called with its own dummy_inputs; return (model, inputs), or name "
                "example=package.module:function, for the sizes that you mean",
                stacklevel=2,
            )
    if inputs is None:
        raise ConfigError(
            what=f"nothing says how {type(model).__name__} is called",
            where=f"module={module}",
            mend="return (model, inputs), or name a function that returns inputs: example=package.module:function",
        )
    return model, inputs


def _called(name: str, key: str) -> object:
    mend = "write package.module:function, a function without arguments that can be imported from here"
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(what=f"'{name}' names no function", where=key, mend=mend)
    with _current_folder():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there, and lacks one of its own
            raise ConfigError(what=f"there is no module '{error.name}'", where=f"{key}={name}", mend=mend) from None
        function: Callable[[], object] | None = getattr(module, attribute, None)
        if function is None or not callable(function):
            raise ConfigError(
                what=f"{module_name} has no function '{attribute}'", where=f"{key}={name}", mend=mend
            )
        return function()


@contextmanager
def _current_folder() -> Iterator[None]:
    """Modules beside the user are found, as `python -m` finds them and the installed command does not."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
