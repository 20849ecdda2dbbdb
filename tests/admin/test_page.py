"""The page's files: what they come with, and where they are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmux_asgi.admin import _app
from llmux_asgi.admin._static import StaticFiles
from tests.admin.stage import Stage

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """Nothing here waits."""
    return "asyncio"


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    (tmp_path / "deeper").mkdir()
    for name in ("index.html", "app.js", "style.css", "deeper/icon.svg", "notes.md"):
        (tmp_path / name).write_text(f"this is {name}")
    monkeypatch.setattr(_app, "StaticFiles", lambda: StaticFiles(tmp_path))
    return Stage()


async def test_the_page_needs_no_key_and_lets_no_foreign_script_run(stage: Stage) -> None:
    page = await stage.ask("GET", "/", authorization="")
    assert (page.status, page.body) == (200, b"this is index.html")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("app.js", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("deeper/icon.svg", "image/svg+xml"),
    ],
)
async def test_files_have_their_type_and_are_not_sent_twice(stage: Stage, name: str, kind: str) -> None:
    first = await stage.ask("GET", f"/static/{name}", authorization="")
    assert (first.status, first.headers["content-type"], first.body) == (200, kind, f"this is {name}".encode())
    assert first.headers["cache-control"] == "no-cache"
    again = await stage.ask("GET", f"/static/{name}", authorization="", if_none_match=f'"x", W/{first.headers["etag"]}')
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert (await stage.ask("HEAD", f"/static/{name}")).body == b""


async def test_without_its_slash_the_page_is_redirected_to_relatively(stage: Stage) -> None:
    answer = await stage.ask("GET", "", authorization="")
    assert (answer.status, answer.headers["location"], answer.body) == (302, "admin/", b"")
    # Litestar adds the slash to `path`; what the client has sent is in `raw_path`.
    scope = stage.scope("GET", "/")
    for raw, owned in ((b"/llm/admin", False), (b"/llm/admin/", True)):
        assert _app._asks_for_folder({**scope, "raw_path": raw}) is owned
    assert _app._asks_for_folder({**scope, "raw_path": None})


def test_it_owns_what_is_below_its_prefix_and_nothing_else(stage: Stage) -> None:
    for path in ("/llm/admin", "/llm/admin/", "/llm/admin/api/status", "/llm/admin/v1/chat/completions"):
        assert stage.admin.owns({"type": "http", "path": path, "root_path": "/llm"}), path
    assert stage.admin.owns({"type": "http", "path": "admin/", "root_path": ""})  # as Litestar has it at its root
    for path in ("/llm/v1/models", "/llm/administrator", "/llm/v1/admin/api", "/llm//admin", "/llm/ADMIN"):
        assert not stage.admin.owns({"type": "http", "path": path, "root_path": "/llm"}), path
    assert not stage.admin.owns({"type": "websocket", "path": "/llm/admin", "root_path": "/llm"})


async def test_files_of_other_kinds_and_the_folders_are_not_there(stage: Stage) -> None:
    for path in ("/static/notes.md", "/static/", "/static/deeper", "/static/../_app.py", "/static//index.html", "/index.html"):
        assert (await stage.ask("GET", path)).status == 404


def test_what_is_installed_is_read() -> None:
    StaticFiles()
