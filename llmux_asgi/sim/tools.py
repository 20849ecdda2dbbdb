"""Calls of tools: which one a request demands, and arguments that fit its JSON schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import msgspec

from .asgi import HttpError

__all__ = ["ToolCall", "demanded"]

_PIECE = 4
"""Characters of a token of arguments."""
_MISSING = "When using `tool_choice`, `tools` must be set."
_UNKNOWN = "The tool specified in `tool_choice` does not match any of the specified `tools`"


@dataclass(frozen=True)
class ToolCall:
    """The call that the model makes. `arguments` is JSON; `named`: the request named the tool."""

    name: str
    arguments: str
    named: bool
    id: str = field(default_factory=lambda: f"chatcmpl-tool-{uuid4().hex[:16]}")

    def pieces(self) -> list[str]:
        """The arguments, a piece for each token."""
        return [self.arguments[start : start + _PIECE] for start in range(0, len(self.arguments), _PIECE)]

    def complete(self, reason: str, count: int) -> bool:
        """Whether a generation that ended for `reason` after `count` tokens has all of the arguments."""
        return reason == "length" and count == len(self.pieces())


def demanded(tools: object, choice: object) -> ToolCall | None:
    """The call that a request demands, in any of the three APIs; None if it leaves the choice to the model, which then answers.

    Raises `HttpError` 400 if it names a tool that it does not have.
    """
    if not isinstance(choice, str | dict) or choice in ("auto", "none"):
        return None
    wanted: object = None
    if isinstance(choice, dict):
        if choice.get("type") in ("auto", "none"):
            return None
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, dict) else choice.get("name")
    if not isinstance(tools, list) or not tools:
        raise HttpError(400, _MISSING, kind="BadRequestError", param="tool_choice")
    for tool in tools:
        function = tool.get("function", tool)
        if wanted in (None, function.get("name")):
            schema = function.get("parameters") or function.get("input_schema") or {"type": "object"}
            return ToolCall(function["name"], msgspec.json.encode(_sample(schema)).decode(), wanted is not None)
    raise HttpError(400, _UNKNOWN, kind="BadRequestError", param="tool_choice")


def _sample(schema: Any) -> Any:
    """A value that fits a simple schema: every property is set, of alternatives it is the first one."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return schema["const"]
    for alternatives in ("anyOf", "oneOf"):
        if schema.get(alternatives):
            return _sample(schema[alternatives][0])
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema else "null")
    if kind == "object":
        return {name: _sample(each) for name, each in schema.get("properties", {}).items()}
    if kind == "array":
        return [_sample(schema["items"])] if "items" in schema else []
    return {"string": "the quick brown fox", "integer": 1, "number": 1.5, "boolean": True}.get(kind)
