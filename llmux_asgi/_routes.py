"""The routes that clients may use: the one list of what is ever relayed to a server. Pure.

They are those of vLLM 0.32 that do inference, and OpenAI's for speech and images, which vLLM-Omni and others have.
docs/api.md says of each further route of vLLM why it is not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl

from .config import Task
from .exceptions import InvalidRequestError, UnknownModelError

__all__ = [
    "INFERENCE_ROUTES",
    "REALTIME",
    "RESPONSES",
    "ROUTES",
    "Address",
    "ErrorShape",
    "Route",
    "address_of",
    "find_route",
    "is_id",
    "methods_of",
    "model_in_query",
    "response_id",
    "split_model_path",
]

ErrorShape = Literal["openai", "anthropic"]
"""Whose error objects the clients of a route understand."""


@dataclass(frozen=True, slots=True)
class Route:
    """One route of a server that is relayed."""

    path: str
    """As the server has it; `{id}` stands for one segment."""
    method: Literal["GET", "POST", "WEBSOCKET"] = "POST"
    task: Task | None = "generate"
    """What a model must be able to do, to serve it; `None`: every model can."""
    body: Literal["json", "form", None] = "json"
    """Where the body names the model: in JSON, in a form (`multipart/form-data`; JSON is taken too), or nowhere."""
    errors: ErrorShape = "openai"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a request wants to go."""

    route: Route
    path: str
    """Of this request, below the mount point and without a model's prefix."""
    model: str | None = None
    """The model that the path names, as the client spells it."""


RESPONSES = "/v1/responses"
REALTIME = "/v1/realtime"

ROUTES = (
    Route("/v1/chat/completions"),
    Route("/v1/completions"),
    Route(RESPONSES),
    Route(RESPONSES + "/{id}", "GET", body=None),
    Route(RESPONSES + "/{id}/cancel", body=None),
    Route("/v1/messages", errors="anthropic"),
    Route("/v1/messages/count_tokens", errors="anthropic"),
    Route("/v1/embeddings", task="embed"),
    Route("/v2/embed", task="embed"),
    Route("/pooling", task="pooling"),
    Route("/classify", task="classify"),
    Route("/score", task="score"),
    Route("/v1/score", task="score"),
    Route("/rerank", task="score"),
    Route("/v1/rerank", task="score"),
    Route("/v2/rerank", task="score"),
    Route("/tokenize", task=None),
    Route("/detokenize", task=None),
    Route("/v1/audio/transcriptions", task="transcription", body="form"),
    Route("/v1/audio/translations", task="transcription", body="form"),
    Route("/v1/audio/speech", task="speech"),
    Route("/v1/images/generations", task="image"),
    Route("/v1/images/edits", task="image", body="form"),
    Route(REALTIME, "WEBSOCKET", task="realtime", body=None),
)
"""Nothing else is ever sent to a server for a client."""

INFERENCE_ROUTES: Mapping[str, Route] = {
    route.path: route for route in ROUTES if route.method == "POST" and "{" not in route.path
}
"""The POST routes whose body names the model, by their path."""

_BY_ID = {route.path.removeprefix(RESPONSES + "/{id}"): route for route in ROUTES if "{" in route.path}
# An id goes into the path of the request to the server, so nothing may be in it that means something there.
_ID = re.compile(r"(?!\.+$)[A-Za-z0-9_.:-]{1,256}")


def address_of(path: str) -> Address | None:
    """Return the address of a POST route whose body names the model, in one look-up; `None`: it is none of those."""
    return _ADDRESSES.get(path)


_ADDRESSES = {path: Address(route, path) for path, route in INFERENCE_ROUTES.items()}


def find_route(method: str, path: str) -> Route | None:
    """Return the route of a request. `path` is what stands below the mount point; the method `WEBSOCKET` is a handshake's."""
    if method == "POST" and (route := INFERENCE_ROUTES.get(path)) is not None:
        return route
    return next((route for route in _routes_at(path) if route.method == method), None)


def methods_of(path: str) -> list[str]:
    """Return the HTTP methods that a path has; none if it is not relayed."""
    return [route.method for route in _routes_at(path) if route.method != "WEBSOCKET"]


def is_id(text: str) -> bool:
    """Say whether a response of this id can be asked for."""
    return _ID.fullmatch(text) is not None


def response_id(address: Address) -> str | None:
    """Return the id of the response that a path means, if it means one."""
    if "{" not in address.route.path:
        return None
    return address.path.removeprefix(RESPONSES + "/").partition("/")[0]


def split_model_path(path: str, knows: Callable[[str], object | None]) -> tuple[str, str] | None:
    """Split `/models/NAME/v1/…` into the name and the rest; `None` if the path does not begin like that.

    A name may have slashes in it: the longest one counts that `knows` does not answer with `None`. Raises
    `UnknownModelError` if there is none.
    """
    if not path.startswith("/models/"):
        return None
    named = path.removeprefix("/models/")
    at = len(named)
    while (at := named.rfind("/", 0, at)) > 0:
        if knows(named[:at]) is not None:
            return named[:at], named[at:]
    name, found, _ = named.partition("/v1/")
    if not found:
        return None
    raise UnknownModelError(name)


def model_in_query(query: bytes) -> str | None:
    """Return the model that a query names, `None` if it names none. Raises `InvalidRequestError` if it names several."""
    if b"model" not in query:
        return None
    named = [value for key, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True) if key == "model"]
    if len(named) > 1:
        raise InvalidRequestError("The query must name one model.", param="model")
    return named[0] if named else None


def _routes_at(path: str) -> Collection[Route]:
    if (route := INFERENCE_ROUTES.get(path)) is not None:
        return (route,)
    if path == REALTIME:
        return [route for route in ROUTES if route.path == REALTIME]
    if path.startswith(RESPONSES + "/"):
        name, slash, rest = path.removeprefix(RESPONSES + "/").partition("/")
        if _ID.fullmatch(name) and (route := _BY_ID.get(slash + rest)) is not None:
            return (route,)
    return ()
