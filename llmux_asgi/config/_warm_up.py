"""The request that a woken model gets before any other."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ._values import Name, ValueConfigError

__all__ = ["WarmUpConfig"]

_PATH = "/v1/completions"
_BODY = {"prompt": "Hello", "max_tokens": 1}


class WarmUpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A POST to the model's server."""

    path: Annotated[Name, Meta(description="Path at the server.")] = _PATH
    body: Annotated[
        dict[Name, Any],
        Meta(
            description="Its JSON object; `model` is added if it is not in it. Empty, for the path /v1/completions: one token."
        ),
    ] = {}

    def __post_init__(self) -> None:
        if not self.path.startswith("/"):
            raise ValueConfigError("path", f"{self.path!r} must begin with a slash, such as /v1/embeddings")
        if not self.body and self.path != _PATH:
            raise ValueConfigError("body", f"is missing: only for {_PATH} the gateway knows what to send")

    def request(self, model: str) -> dict[str, Any]:
        """Return the body to send; the server knows the model as `model`."""
        return {"model": model, **(self.body or _BODY)}
