"""A request's body as its route has it: which model it names, and how it is sent to a server that knows another name. Pure."""

from __future__ import annotations

from ._form_body import boundary_of, read_form, with_form_model
from ._json_body import Pieces, read_json, with_json_model
from ._openai import Headers
from ._routes import Route
from .exceptions import InvalidRequestError

__all__ = ["is_form", "payload", "read_payload"]


def read_payload(route: Route, headers: Headers, body: bytes) -> tuple[str | None, bool]:
    """Return the model that a body names, and whether it asks for a stream. Raises `InvalidRequestError`."""
    if route.body == "form" and (boundary := _boundary(headers)) is not None:
        form = read_form(body, boundary)
        return form.model, form.streams
    return read_json(body)


def payload(route: Route, headers: Headers, body: bytes, model: str, *, named: str | None) -> Pieces:
    """Return what is sent to a server that knows the model as `model`, in pieces.

    `named` is what `read_payload` has found; `None`: the body has not been read, and may name any model, or none.
    Raises `InvalidRequestError`.
    """
    if route.body is None:
        return [b""]
    if named is None:
        named, _ = read_payload(route, headers, body)
    if named == model:
        return [body]
    if route.body == "form" and (boundary := _boundary(headers)) is not None:
        return with_form_model(body, boundary, model)
    return with_json_model(body, model)


def is_form(headers: Headers) -> bool:
    """Say whether a body is a form by its headers. Raises `InvalidRequestError`."""
    return _boundary(headers) is not None


def _boundary(headers: Headers) -> bytes | None:
    kinds = [value for name, value in headers if name.lower() == b"content-type"]
    if len(kinds) > 1:
        raise InvalidRequestError("The request has several content types.")
    return boundary_of(kinds[0]) if kinds else None
