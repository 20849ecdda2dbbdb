"""The description of the admin API: it leaves nothing out, and answers are as it says."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import msgspec
import pytest

from llmux_asgi import BackendError
from llmux_asgi.admin._api import AdminApi
from llmux_asgi.admin._events import EventStreams
from llmux_asgi.admin._openapi import EVENT_KINDS, description
from tests.admin.stage import Stage, events_of

pytestmark = pytest.mark.anyio

DESCRIPTION = json.loads(msgspec.json.encode(description()))


@pytest.fixture
def anyio_backend() -> str:
    """What is sent does not depend on the loop."""
    return "asyncio"


def check(content: Any, schema: str) -> None:
    jsonschema.validate(content, {"$ref": f"#/components/schemas/{schema}", "components": DESCRIPTION["components"]})


def schema_of(method: str, path: str, status: int) -> str:
    answer = DESCRIPTION["paths"][path][method.lower()]["responses"][str(status)]
    found: str = answer["content"]["application/json"]["schema"].get("$ref", "")
    return found.rpartition("/")[2]


def test_every_route_is_described() -> None:
    stage = Stage()
    routes = AdminApi(stage, EventStreams(stage)).routes()
    served = {
        (method, re.sub(r":path", "", route.path)) for route in routes for method in (route.methods or ()) if method != "HEAD"
    }
    described = {(method.upper(), path) for path, methods in DESCRIPTION["paths"].items() for method in methods}
    assert described == served


async def test_answers_are_as_described() -> None:
    stage = Stage()
    stage.backends["org/c"].fail("wake", BackendError("why"), times=2)
    for method, path, model, status in (
        ("POST", "/api/models/{model}/wake", "a", 200),
        ("POST", "/api/models/{model}/wake", "org/c", 503),
        ("POST", "/api/models/{model}/wake", "nobody", 404),
        ("GET", "/api/status", "", 200),
        ("GET", "/api/models", "", 200),
        ("GET", "/api/models/{model}", "org/c", 200),
        ("POST", "/api/models/{model}/pin", "b", 200),
        ("POST", "/api/models/{model}/wake", "a", 409),
        ("DELETE", "/api/models/{model}/pin", "b", 200),
        ("POST", "/api/models/{model}/sleep", "b", 200),
        ("POST", "/api/models/{model}/stop", "b", 200),
        ("POST", "/api/models/{model}/stop", "a", 409),
        ("POST", "/api/drain", "", 200),
        ("POST", "/api/resume", "", 200),
        ("POST", "/api/reload", "", 200),
    ):
        answer = await stage.ask(method, path.replace("{model}", model))
        assert answer.status == status, (method, path, model)
        check(answer.json, schema_of(method, path, status))
    refused = await stage.ask("GET", "/api/status", authorization="")
    check(refused.json, schema_of("GET", "/api/status", 401))
    assert (await stage.ask("GET", "/api/openapi.json")).json == DESCRIPTION


async def test_a_status_in_the_middle_of_a_switch_is_as_described() -> None:
    stage = Stage()
    await stage.switcher.wake("a")
    gate = stage.backends["b"].gate("wake")
    async with stage.connected("POST", "/api/models/b/wake"):
        await gate.entered.wait()
        status = (await stage.ask("GET", "/api/status")).json
        gate.open.set()
    assert status["switch"].items() >= {"switch": 1, "from": "a", "to": "b", "phase": "wake"}.items()
    check(status, "Status")


async def test_events_are_as_described() -> None:
    stage = Stage()
    stage.backends["org/c"].fail("wake", BackendError("why"), times=2)
    for call in ("models/b/wake", "models/org/c/wake", "models/b/pin", "drain", "models/b/stop", "resume"):
        await stage.ask("POST", f"/api/{call}")
    stage.switcher.journal.write("config", added=["d"], changed=[], removed=[], settings=["policy"])
    async with stage.connected("GET", "/api/events") as client:
        await client.until(lambda body: b"event: config" in body)
    seen = set()
    for _, kind, data in events_of(client.body):
        check(data, "Status" if kind == "status" else f"Event.{kind}")
        assert set(data) <= set(EVENT_KINDS[kind]["properties"]) if kind != "status" else True
        seen.add(kind)
    assert seen == {"status", *EVENT_KINDS}


def test_it_is_openapi_3_1() -> None:
    assert DESCRIPTION["openapi"].startswith("3.1")
    for name, schema in DESCRIPTION["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema.get("description"), name
    for methods in DESCRIPTION["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert "401" in operation["responses"]
