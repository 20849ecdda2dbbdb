"""The OpenAPI 3.1 description of the admin API. https://spec.openapis.org/oas/v3.1.1"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import msgspec

from ..config import ReloadReport
from ._status import ModelList, ModelStatus, Status

__all__ = ["EVENT_KINDS", "description"]


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong and what to do, as OpenAI's API has it."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct, frozen=True):
    """An answer with an error status."""

    error: ErrorDetail


def _strict(properties: dict[str, Any], text: str) -> dict[str, Any]:
    return {"type": "object", "description": text, "properties": properties, "required": sorted(properties)}


_SECONDS = {"type": "number", "minimum": 0}
_TIME = {"type": "number", "description": "Unix time in seconds."}
_COUNT = {"type": "integer", "minimum": 0}
_NAME = {"type": "string"}
_NAME_OR_NULL = {"type": ["string", "null"]}
_NAMES = {"type": "array", "items": _NAME}
_PHASE = {"enum": ["cooldown", "drain", "sleep", "wake", "ready"]}
_SWITCH = {"switch": _COUNT, "from": _NAME_OR_NULL, "to": _NAME_OR_NULL}

EVENT_KINDS: dict[str, dict[str, Any]] = {
    "switch": _strict(
        {"time": _TIME, **_SWITCH, "waiting": _COUNT, "in_flight": _COUNT},
        "A switch has begun; `to` is null where a model is only put to sleep.",
    ),
    "phase": _strict(
        {"time": _TIME, "switch": _COUNT, "phase": _PHASE, "model": _NAME_OR_NULL},
        "One of its phases has begun, and the one before has ended.",
    ),
    "switched": _strict(
        {
            "time": _TIME,
            **_SWITCH,
            "outcome": {"enum": ["completed", "abandoned", "failed"]},
            "duration": _SECONDS,
            "phases": {"type": "object", "propertyNames": _PHASE, "additionalProperties": _SECONDS},
            "served": _COUNT,
            "longest_wait": {"type": ["number", "null"], "minimum": 0},
        },
        "It is over: what it took in seconds, how many requests it let in and how long the longest of them had waited.",
    ),
    "model": _strict(
        {"time": _TIME, "model": _NAME, "state": {"enum": ["awake", "asleep", "stopped", "unreachable", "unknown"]}},
        "What is known of a model's server has changed.",
    ),
    "error": _strict({"time": _TIME, "model": _NAME_OR_NULL, "kind": _NAME, "message": _NAME}, "Something went wrong."),
    "pin": _strict({"time": _TIME, "model": _NAME_OR_NULL}, "A model was pinned, or none is any more."),
    "drain": _strict({"time": _TIME, "draining": {"type": "boolean"}}, "New requests are refused, or admitted again."),
    "config": _strict(
        {"time": _TIME, "added": _NAMES, "changed": _NAMES, "removed": _NAMES, "settings": _NAMES},
        "The configuration was read anew: models by name, and the other sections that have changed.",
    ),
}
"""The data of each kind of event."""

_EVENTS = """Server-sent events. Each has an `id`, its kind as `event`, and JSON as `data`: see the schemas `Event.KIND`. The
stream begins after the event that the header `Last-Event-ID` or the parameter `last_event_id` names, without one with the
oldest that is kept (1000 are). If what came after the named one is not kept any more, or it was another process's, the event
`reset` comes first. Between them comes `status` without an id, see the schema `Status`: at the beginning, and whenever it has
changed, four times a second at most. A comment comes every 10 seconds. The stream ends when the gateway does."""
_REFUSALS = {
    "400": "A parameter is wrong.",
    "401": "No key, or not a valid one.",
    "404": "There is no such model.",
    "409": "It is not possible in the state that the gateway is in; says what to do before.",
    "422": "The configuration is wrong, and the one before goes on.",
    "429": "There are too many event streams.",
    "502": "The model's server, or its process, has failed.",
    "503": "The switch has failed, or is not tried again yet.",
    "504": "It took too long.",
}
_ACT = ("401", "404", "409", "502", "503", "504")


def description() -> dict[str, Any]:
    """Return the description."""
    model = {"name": "model", "in": "path", "required": True, "schema": _NAME, "description": "Its name or an alias."}
    wait = {
        "name": "wait",
        "in": "query",
        "schema": {"type": "number", "minimum": 0, "maximum": 3600},
        "description": "Answer when all requests are over, or after so many seconds.",
    }
    last = {"name": "last_event_id", "in": "query", "schema": _NAME, "description": "As the header Last-Event-ID."}
    of_model = "/api/models/{model}"

    def on_model(summary: str, *refusals: str) -> dict[str, Any]:
        return {"parameters": [model], **_operation(summary, "ModelStatus", refusals)}

    pin = on_model("Wake a model and keep it active until it is unpinned", *_ACT)
    drain = _operation("Refuse new requests; running and waiting ones finish", "Status", ("400", "401"))
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmux_asgi admin API", "version": version("llmux-asgi")},
        # Relative to where this description is: right at each mount, and behind a proxy that strips a prefix.
        "servers": [{"url": ".."}],
        "security": [{"bearer": []}, {"header": []}],
        "paths": {
            "/api/status": {"get": _operation("What the gateway is doing", "Status", ("401",))},
            "/api/models": {"get": _operation("All models", "ModelList", ("401",))},
            of_model: {"get": on_model("One model", "401", "404")},
            f"{of_model}/wake": {"post": on_model("Wake a model; answers when it serves", *_ACT)},
            f"{of_model}/sleep": {"post": on_model("Put a model to sleep; requests for it wait", *_ACT)},
            f"{of_model}/stop": {"post": on_model("Put a model to sleep and end its process", *_ACT)},
            f"{of_model}/pin": {"post": pin, "delete": on_model("Let a pinned model make way again", "401", "404")},
            "/api/drain": {"post": {**drain, "parameters": [wait]}},
            "/api/resume": {"post": _operation("Admit requests again", "Status", ("401",))},
            "/api/reload": {"post": _operation("Read the configuration anew", "ReloadReport", ("401", "409", "422"))},
            "/api/events": {"get": {**_events(), "parameters": [last]}},
            "/api/openapi.json": {"get": _described("This description")},
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(summary: str, schema: str, refusals: tuple[str, ...]) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": _json("Done.", _ref(schema)), **_refused(refusals)},
    }


def _described(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": _json("Done.", {"type": "object"}), **_refused(("401",))}}


def _events() -> dict[str, Any]:
    stream = {"description": _EVENTS, "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    return {"summary": "What happens, as it happens", "responses": {"200": stream, **_refused(("401", "429"))}}


def _refused(statuses: tuple[str, ...]) -> dict[str, Any]:
    return {each: _json(_REFUSALS[each], _ref("Error")) for each in statuses}


def _json(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas() -> dict[str, Any]:
    _, found = msgspec.json.schema_components(
        (Status, ModelList, ModelStatus, ReloadReport, Error), ref_template="#/components/schemas/{name}"
    )
    return {**found, **{f"Event.{kind}": schema for kind, schema in EVENT_KINDS.items()}}
