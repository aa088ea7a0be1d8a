"""What ptxas leaves of a descriptor is found in machine code that was wrong on an H200, and not where it was right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

WRONG = """
        /*0a60*/                   UIADD3 UR6, UR24, 0x2000, URZ ;
        /*0a80*/                   USHF.R.U32.HI UR10, URZ, 0x4, UR24 ;
        /*0b40*/                   UIADD3 UR9, UP3, UR9, 0x40, URZ ;
        /*0f20*/                   UMOV UR6, UR9 ;
"""
"""Of `_differentiate` with tiles of 32 key and 64 value channels: UR9 was to be the place, in UR10."""

PRODUCT = """
        /*0010*/                   UMOV UR26, 0x0 ;
        /*0020*/                   UMOV UR27, 0x40000040 ;
        /*0030*/              @!P0 HGMMA.64x32x16.F32.BF16 R24, R80, gdesc[UR24].tnspB, RZ, !UPT ;
"""


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unset_registers", Path(__file__).with_name("unset_registers.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_register_added_to_before_it_was_set_is_found(checker: ModuleType) -> None:
    found = checker.unset_registers("        /*0a50*/                   UMOV UR24, 0x400 ;" + WRONG)
    assert found == ["UIADD3 UR9, UP3, UR9, 0x40, URZ: UR9 was never set"]


def test_a_product_with_its_left_operand_in_registers_needs_one_descriptor(checker: ModuleType) -> None:
    assert checker.unset_registers(PRODUCT) == []
    missing = checker.unset_registers(PRODUCT.replace("R80, ", ""))
    assert [line.rpartition(": ")[2] for line in missing] == ["UR24 was never set", "UR25 was never set"]


def test_wide_results_set_two_registers(checker: ModuleType) -> None:
    wide = "  /*0090*/  UIMAD.WIDE UR28, 0x1, 0x2, URZ ;\n  /*00a0*/  USHF.L.U64.HI UR4, UR28, 0x8, UR29 ;"
    assert checker.unset_registers(wide) == []
    assert checker.unset_registers(wide.replace(".WIDE", ""))[0].endswith("UR29 was never set")
