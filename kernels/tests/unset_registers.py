"""Uniform registers that Hopper's machine code reads and never wrote: what ptxas 12.8 leaves of some descriptors.

A matrix instruction finds its operands in shared memory by descriptors in uniform registers: a place and a layout.
Where one place serves operands with rows of different lengths, ptxas 12.8 (triton 3.6 to 3.7) may add the second layout
to a register that it forgot to fill. The instruction then reads anything, or where nothing is; no interpreter shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_UNIFORM = re.compile(r"UR(\d+)")
_WRITERS = ("S2UR", "R2UR", "REDUX", "CREDUX")
"""Instructions that write uniform registers, besides those whose names begin with U."""


def unset_registers(sass: str) -> list[str]:
    """Uniform instructions and matrix products that read a register which no line above them wrote.

    Other instructions may save a register, set or not, and give it back.
    """
    written: set[int] = set()
    found = []
    for name, operands in _INSTRUCTION.findall(sass):
        operation, *modifiers = name.split(".")
        destination, *sources = re.split(r",\s*", operands.strip())
        writes = (operation.startswith("U") or operation in _WRITERS) and _UNIFORM.fullmatch(destination)
        if operation.startswith("U") or operation == "HGMMA":
            read = sources if writes else [destination, *sources]
            unset = sorted(set(_registers(operation, modifiers, read)) - written)
            found += [f"{name} {operands.strip()}: UR{register} was never set" for register in unset]
        if writes:
            first = int(writes[1])
            written |= {first, first + 1} if {"64", "WIDE"} & set(modifiers) else {first}
    return found


def _registers(operation: str, modifiers: list[str], operands: list[str]) -> Iterator[int]:
    """A product with its left operand in registers ignores the first of its two descriptors."""
    left_in_registers = operation == "HGMMA" and re.match(r"R\d", operands[1]) is not None
    for operand in operands:
        for register in map(int, _UNIFORM.findall(operand)):
            if operand.startswith("gdesc["):
                yield from range(register + 2 * left_in_registers, register + 4)
            else:
                yield from (register, register + 1) if "64" in modifiers else (register,)
