"""The configuration is read anew by the admin API. On asyncio and on trio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmux_asgi import LLMuxApp
from llmux_asgi.access import hash_key
from tests.admin.stage import KEY

pytestmark = pytest.mark.anyio

NEXT_KEY = "llmux-next-0123456789"


def config(key: str = KEY, **models: str) -> dict[str, Any]:
    return {
        "models": {name: {"url": url} for name, url in models.items()},
        "admin": {"keys": {"ops": {"hash": hash_key(key)}}},
    }


async def test_models_and_keys_change_and_what_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "llmux.json"
    path.write_text(json.dumps(config(a="http://127.0.0.1:9", b="http://127.0.0.1:10")))
    llm = LLMuxApp(path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(llm), base_url="http://gateway/admin/api") as client:

        async def call(method: str, what: str, key: str) -> tuple[int, Any]:
            answer = await client.request(method, what, headers={"x-api-key": key})
            return answer.status_code, answer.json()

        async def models(key: str) -> list[str]:
            return [each["name"] for each in (await call("GET", "/models", key))[1]["models"]]

        path.write_text(json.dumps(config(NEXT_KEY, a="http://127.0.0.1:9", c="http://127.0.0.1:11")))
        status, report = await call("POST", "/reload", KEY)
        assert (status, report["added"], report["changed"], report["removed"]) == (200, ["c"], [], ["b"])
        assert (await call("GET", "/status", KEY))[0] == 401
        assert await models(NEXT_KEY) == ["a", "c"]
        for wrong, words in (
            (config(NEXT_KEY, a="nonsense"), "$.models.a.url"),
            ({**config(NEXT_KEY, a="http://127.0.0.1:9"), "memory": {"settle": 1}}, "restart"),
        ):
            path.write_text(json.dumps(wrong))
            status, refused = await call("POST", "/reload", NEXT_KEY)
            assert (status, refused["error"]["code"]) == (422, "invalid_configuration")
            assert words in refused["error"]["message"]
            assert await models(NEXT_KEY) == ["a", "c"]
    await llm.aclose()
