"""The reference page of the ops is what their declarations say now.

``python -m trimtab.ir.reference_page > docs/ir-reference.md`` writes it anew.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.ir import OP_CLASSES
from trimtab.ir.reference_page import PAGE, reference_page

ROOT = Path(__file__).parent.parent


def test_the_page_is_up_to_date() -> None:
    committed = (ROOT / PAGE).read_text(encoding="utf-8")
    assert committed == reference_page(), f"write it anew: python -m trimtab.ir.reference_page > {PAGE}"


def test_the_page_has_every_op_and_attribute() -> None:
    page = reference_page()
    for name, cls in OP_CLASSES.items():
        entry = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
        assert "def reference(" in entry
        for attribute in cls.attribute_fields:
            assert f"| `{attribute}` |" in entry
        for field in cls.operand_fields:
            assert field.name in entry
