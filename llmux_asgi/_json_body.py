"""The model in a JSON body: read without building the rest, replaced without encoding the rest anew. Pure.

What is read is what every parser reads: the key counts at the top level only, however it is spelled, and a body in which it
stands twice is refused, because some parsers take the first and some the last. All passes over the body are msgspec's or
those of `bytes`; nothing here walks through it.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from .exceptions import InvalidRequestError

__all__ = ["Pieces", "RequestFields", "decode", "named_model", "read_json", "with_json_model"]

Pieces = list[bytes | memoryview]
"""A body in parts: the unchanged ones are views of the original."""

LONGEST_NAME = 1024
"""Characters of a model's name; who sends more is not asking for a model."""


class RequestFields(msgspec.Struct):
    """The fields of a request's body that matter here; the rest is not looked at."""

    model: str | None = None
    stream: msgspec.Raw = msgspec.Raw(b"false")

    @property
    def streams(self) -> bool:
        """Whether the answer is to be a stream."""
        return memoryview(self.stream) == memoryview(b"true")


class _Model(msgspec.Struct):
    # msgspec hands an `object` to `dec_hook`, once for each time that the key is met.
    model: object = None


class _Anything(msgspec.Struct):
    pass


_T = TypeVar("_T")
_fields = msgspec.json.Decoder(RequestFields)
_object = msgspec.json.Decoder(_Anything)
_KEY = b'"model"'
_OTHER_KEY = b'"MODEL"'  # of the same length
_VALUE = re.compile(rb'"model"[ \t\r\n]*:[ \t\r\n]*("(?:[^"\\]|\\.)*+"|null)', re.DOTALL)
_CLOSING = re.compile(rb"[ \t\r\n]*\}")


def read_json(body: bytes) -> RequestFields:
    """Read the fields of a JSON body.

    Raises `InvalidRequestError` if it is not a JSON object, if the model is not a string, and if it stands there twice.
    """
    # First as a string: a value of any other kind would be built in memory for the second look.
    fields = decode(_fields, body)
    met: list[object] = []

    def note(_: type, value: object) -> object:
        met.append(value)
        return value

    msgspec.json.decode(body, type=_Model, dec_hook=note)
    if len(met) > 1:
        raise InvalidRequestError("The request body has the key model more than once.", param="model")
    return fields


def named_model(model: str | None) -> str:
    """Return the model that a body names. Raises `InvalidRequestError` if it names none, or not one that could exist."""
    if model is None:
        raise InvalidRequestError("You must provide a model parameter.", param="model")
    if not model:
        raise InvalidRequestError("The model must be a string that is not empty.", param="model")
    if len(model) > LONGEST_NAME:
        raise InvalidRequestError(f"The model's name is longer than {LONGEST_NAME} characters.", param="model")
    return model


def with_json_model(body: bytes, model: str) -> Pieces:
    """Return a body that `read_json` has passed, with `model` as its top-level model; everything else keeps its bytes.

    Raises `InvalidRequestError` if the key is there and spelled with escapes.
    """
    value, view = msgspec.json.encode(model), memoryview(body)
    found = _VALUE.match(body, at) if (at := _find_key(body)) is not None else None
    if found is not None:
        start, end = found.span(1)
        return [view[:start], value, view[end:]]
    at = body.index(b"{") + 1
    more = b"" if _CLOSING.match(body, at) else b","
    return [view[:at], _KEY + b":" + value + more, view[at:]]


def decode(decoder: msgspec.json.Decoder[_T], body: bytes | bytearray) -> _T:
    """Decode a request's JSON. Raises `InvalidRequestError`."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        if "`$.model`" in str(exc):
            raise InvalidRequestError("The model must be a string that is not empty.", param="model") from None
        raise InvalidRequestError(f"The request body must be a JSON object: {exc}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidRequestError(f"The request body is not valid JSON: {exc}.") from None
    except RecursionError:
        raise InvalidRequestError("The request body is nested too deeply.") from None


def _find_key(body: bytes) -> int | None:
    """Return where the top-level key stands in a valid JSON object that has it at most once, `None` if it has not."""
    for at in {body.find(_KEY), body.rfind(_KEY)} - {-1}:
        if _is_top_level(body, at):
            return at
    if not _has_key(body):
        return None
    # It is neither the first nor the last `"model"` of several. It is the nth if it is gone without the first n of them,
    # and is not without the first n - 1.
    low, high = 1, body.count(_KEY) + 1
    while low < high:
        middle = (low + high) // 2
        if _has_key(body.replace(_KEY, _OTHER_KEY, middle)):
            low = middle + 1
        else:
            high = middle
    at = body.replace(_KEY, _OTHER_KEY, low - 1).find(_KEY)
    if at < 0:
        raise InvalidRequestError("Spell the key model without escapes.", param="model")
    return at


def _has_key(body: bytes) -> bool:
    met: list[object] = []
    msgspec.json.decode(body, type=_Model, dec_hook=lambda _, value: met.append(value))
    return bool(met)


def _is_top_level(body: bytes, at: int) -> bool:
    """Say whether the `"model"` at `at` is a key of the object itself.

    If so, what comes before it is an object when it is closed behind one more member, and the rest is one when it is
    opened: the shorter of the two is tried. A quote behind a backslash is inside a string.
    """
    if body[at - 1 : at] == b"\\":
        return False
    try:
        _object.decode(body[:at] + b'"":0}' if 2 * at < len(body) else b"{" + body[at:])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True
