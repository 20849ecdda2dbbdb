"""The model in a JSON body: read without building the rest, replaced without encoding the rest anew. Pure.

What is read is what every parser reads: the key counts at the top level only, however it is spelled, and a body in which it
stands twice is refused, because some parsers take the first and some the last. All passes over the body are msgspec's or
those of `bytes`; nothing here walks through it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

from .exceptions import InvalidRequestError

__all__ = ["Pieces", "decode", "find_value", "named_model", "read_json", "with_json_model"]

Pieces = list[bytes | memoryview]
"""A body in parts: the unchanged ones are views of the original."""

_NO_STRING = "The model must be a string that is not empty."
LONGEST_NAME = 1024
"""Characters of a model's name; who sends more is not asking for a model."""


_TRUE = memoryview(b"true")
_BLOCK = 256 * 1024
_SMALL = 64 * 1024
"""Bytes of a body up to which a value of any kind may be built in memory."""


class RequestFields(msgspec.Struct):
    """The fields of a request's body that matter here; the rest is not looked at."""

    # msgspec hands an `object` to `dec_hook`, once for each time that the key is met.
    model: object = None
    stream: msgspec.Raw = msgspec.Raw(b"false")


class _Checked(msgspec.Struct):
    model: str | None = None


class _Span(msgspec.Struct):
    model: msgspec.Raw = msgspec.Raw(b"")


_T = TypeVar("_T")
_CLOSING = re.compile(rb"[ \t\r\n]*\}")
_COLON = re.compile(rb"[ \t\r\n]*:[ \t\r\n]*")


def read_json(body: bytes) -> tuple[str | None, bool]:
    """Return the model that a JSON body names, and whether it asks for a stream.

    Raises `InvalidRequestError` if it is not a JSON object, if the model is not a string, and if it stands there twice.
    """
    if len(body) > _SMALL:
        decode(body, _Checked)  # refuses a model of another kind before it is built
    met: list[object] = []

    def note(_: type, value: object) -> object:
        met.append(value)
        return value

    fields = decode(body, RequestFields, note)
    if len(met) > 1:
        raise InvalidRequestError("The request body has the key model more than once.", param="model")
    if fields.model is not None and not isinstance(fields.model, str):
        raise InvalidRequestError(_NO_STRING, param="model")
    return fields.model, memoryview(fields.stream) == _TRUE


def named_model(model: str | None) -> str:
    """Return the model that a body names. Raises `InvalidRequestError` if it names none, or not one that could exist."""
    if model is None:
        raise InvalidRequestError("You must provide a model parameter.", param="model")
    if not model:
        raise InvalidRequestError(_NO_STRING, param="model")
    if len(model) > LONGEST_NAME:
        raise InvalidRequestError(f"The model's name is longer than {LONGEST_NAME} characters.", param="model")
    return model


def with_json_model(body: bytes, model: str) -> Pieces:
    """Return a body that `read_json` has passed, with `model` as its top-level model; everything else keeps its bytes."""
    value, view = msgspec.json.encode(model), memoryview(body)
    if (span := _find_model(body)) is not None:
        start, end = span
        return [view[:start], value, view[end:]]
    at = body.index(b"{") + 1
    more = b"" if _CLOSING.match(body, at) else b","
    return [view[:at], b'"model":' + value + more, view[at:]]


def decode(body: bytes | bytearray, kind: type[_T], hook: Callable[[type, object], object] | None = None) -> _T:
    """Decode a request's JSON. Raises `InvalidRequestError`."""
    try:
        return msgspec.json.decode(body, type=kind, dec_hook=hook)
    except msgspec.ValidationError as exc:
        if "`$.model`" in str(exc):
            raise InvalidRequestError(_NO_STRING, param="model") from None
        raise InvalidRequestError(f"The request body must be a JSON object: {exc}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidRequestError(f"The request body is not valid JSON: {exc}.") from None
    except RecursionError:
        raise InvalidRequestError("The request body is nested too deeply.") from None


def _find_model(body: bytes) -> tuple[int, int] | None:
    """Return where the value of the model begins and ends, `None` if there is none."""
    copy = bytearray(body)
    value = memoryview(decode(copy, _Span).model)
    return find_value(body, copy, value, "model") if value else None


def find_value(body: bytes, copy: bytearray, value: memoryview, name: str) -> tuple[int, int]:
    """Return where a value of the top-level key `name` begins and ends.

    msgspec has found it in `copy`, and gives it as a view of what it has read, without its place. So the copy of the body is
    written over, part by part, until it is known which byte shows in the view.
    """

    def is_in(low: int, high: int) -> bool:
        mark = 1 if value[0] != 1 else 2
        copy[low:high] = bytes((mark,)) * (high - low)
        return value[0] == mark

    # Most bodies have one `"name"`, and its value behind it.
    key = b'"%b"' % name.encode()
    if (at := body.find(key)) >= 0 and (colon := _COLON.match(body, at + len(key))) and is_in(colon.end(), colon.end() + 1):
        return colon.end(), colon.end() + len(value)
    low, high = next(
        (low, high)
        for low in range(0, len(copy), _BLOCK)
        if (high := min(low + _BLOCK, len(copy))) == len(copy) or is_in(low, high)
    )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_in(low, middle) else (middle, high)
    return low, low + len(value)
