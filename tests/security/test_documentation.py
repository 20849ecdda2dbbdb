"""The page says what is tested, and what it says exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = (TESTS.parent / "docs" / "security.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| Threat", "| ---"))
]


def functions_of(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_threat_has_a_test_that_exists() -> None:
    assert len(ROWS) >= 40
    for threat, remedy, test in ROWS:
        assert threat
        assert remedy
        path, _, name = test.strip("`").partition("::")
        assert name in functions_of(TESTS / path), test


def test_every_attack_that_is_tested_is_on_the_page() -> None:
    named = set(re.findall(r"`security/\w+\.py::(\w+)`", PAGE))
    # What must go on working in spite of it all is no threat.
    harmless = {"test_headers_below_the_limit_are_passed_on", "test_the_limits_are_those_of_the_configuration"}
    tested = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        if path != Path(__file__)
        for name in functions_of(path)
        if name.startswith("test_")
    }
    assert tested - harmless == named
