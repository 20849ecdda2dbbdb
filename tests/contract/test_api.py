"""docs/api.md says of every route of the real server whether it is relayed, and why not."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.real.server import RealServer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def documented(page: str) -> set[tuple[str, str]]:
    """Method and path of each row of the page's tables."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return {(row[0], row[1].strip("`").replace("{id}", "{}")) for row in rows if row[1].startswith("`/")}


@pytest.mark.vllm
def test_every_route_of_the_real_server_is_in_the_tables(real_server: RealServer) -> None:
    paths = httpx.get(f"{real_server.url}/openapi.json", timeout=30, trust_env=False).raise_for_status().json()["paths"]
    served = {(method.upper(), path.replace("{response_id}", "{}")) for path, methods in paths.items() for method in methods}
    assert len(served) > 30
    assert served - documented(PAGE.read_text()) == set()
