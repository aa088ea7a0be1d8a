"""What this plugin declares; imports no torch, nor the library whose class it adapts."""

from __future__ import annotations

from collections.abc import Iterable

from subquad import AdapterSpec, PassSpec, hookimpl


@hookimpl
def subquad_provide_adapters() -> Iterable[AdapterSpec]:
    return [
        AdapterSpec(
            name="their_library",
            module_class="adapter_and_pass.their_library:Attention",
            build="adapter_and_pass.adapter:adapt",
        )
    ]


@hookimpl
def subquad_provide_passes() -> Iterable[PassSpec]:
    return [
        PassSpec(
            name="merge_equal_calls",
            summary="calls of one operator with equal arguments become one call",
            run="adapter_and_pass.merge_equal_calls:merge_equal_calls",
        )
    ]
