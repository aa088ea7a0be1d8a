"""Triton's interpreter without what it makes again at every operation: the same results in two fifths of the time.

An interpreted kernel spends its time in Python and not in numpy: a third of it went into a check for overflow whose
verdict is thrown away, and another into lists, types and shapes that had been made before. Forward and backward over 40
tokens, `assert_exact(sample(workload(40)))` of `test_linear_attention_fused.py`, took 0.56 s of a core, the best of
three, and take 0.23 (triton 3.7.1, two busy cores of an AMD EPYC, 2026-11-30).

What is replaced is private to triton: a version that lacks one of the names is as fast as it is.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

Function = Callable[..., Any]


def hurry(interpreter: Any, language: ModuleType) -> None:
    """Replace parts of `triton.runtime.interpreter` and `triton.language` for the rest of the process."""
    core = language.core
    _leave_out_verdicts_that_nobody_hears(interpreter)
    if hasattr(interpreter, "_LangPatchScope"):
        _replace(interpreter, "_patch_lang", lambda patch: _once_a_launch(patch, interpreter, language))
    _replace(interpreter, "_patch_builtin", lambda patch: _listing_members_once(patch, core))
    _replace(interpreter, "_get_np_dtype", lambda find: _remembering_elements(find, core))
    _replace(core.block_type, "__init__", _sharing_equal_types)
    _replace(core.tensor, "__init__", _sharing_what_follows_from_a_type)


def _replace(owner: Any, name: str, quicker: Callable[[Function], Function]) -> None:
    if hasattr(owner, name):
        setattr(owner, name, quicker(getattr(owner, name)))


def _leave_out_verdicts_that_nobody_hears(interpreter: Any) -> None:
    """Integers are added in 64 bits as well and compared, for an assertion that is made in debugging only."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _once_a_launch(patch: Function, interpreter: Any, language: ModuleType) -> Function:
    """A launch puts the interpreter's functions into the language; a function that it calls finds them there."""
    core, seen_by = language.core, dict[Any, list[Any]]()

    def patch_lang(function: Any) -> Any:
        if function not in seen_by:
            seen_by[function] = [value for value in function.__globals__.values() if value is language or value is core]
        if any(core.is_builtin(module.load) for module in seen_by[function]):
            return patch(function)
        return interpreter._LangPatchScope()  # of no changes

    return patch_lang


def _listing_members_once(patch: Function, core: ModuleType) -> Function:
    """A part of the language is searched for its functions when it is first replaced, and left when it is."""
    names: dict[Any, list[str]] = {}

    def patch_builtin(part: Any, *rest: Any) -> None:
        if part not in names:
            names[part] = [name for name, member in inspect.getmembers(part) if core.is_builtin(member)]
        # All of them are replaced together; a function that another one calls finds that done.
        if any(core.is_builtin(getattr(part, name)) for name in names[part][:1]):
            patch(part, *rest)

    return patch_builtin


def _remembering_elements(find: Function, core: ModuleType) -> Function:
    """Numpy's type of a type: the table of all of them was made at every call."""
    remembered = lru_cache(find)

    def numpy_type(wanted: Any) -> Any:
        element = wanted.element_ty if isinstance(wanted, core.block_type) else wanted
        return find(element) if isinstance(element, core.pointer_type) else remembered(element)

    return numpy_type


def _sharing_equal_types(make: Function) -> Function:
    """The type of a tile is checked when its element type and shape are first seen; equal ones share what they hold."""
    seen: dict[tuple[int, tuple[Any, ...]], dict[str, Any]] = {}

    def initialise(tile: Any, element_ty: Any, shape: Any) -> None:
        # What is kept holds the element type, so that its id is given to no other.
        key = id(element_ty), tuple([getattr(size, "value", size) for size in shape])
        if key in seen:
            tile.__dict__ = seen[key]
        else:
            make(tile, element_ty, shape)
            seen[key] = tile.__dict__

    return initialise


def _sharing_what_follows_from_a_type(make: Function) -> Function:
    """All that a tensor holds besides its handle follows from its type."""

    def initialise(tensor: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("_of_tensors")
        if known is None:
            make(tensor, handle, type)
            type._of_tensors = {name: value for name, value in tensor.__dict__.items() if name != "handle"}
        else:
            tensor.__dict__.update(known, handle=handle)

    return initialise
