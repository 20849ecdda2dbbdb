"""The model in a form (`multipart/form-data`): found without a copy of the files, replaced in place. Pure.

It is stricter than what servers read with, so that both see the same fields: what RFC 7578 does not have, or what readers
take differently, is refused. No preamble, no folded or doubled headers, no transfer encodings, one field `model`.

Sources: RFC 7578 (forms), RFC 2046 section 5.1 (multipart).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ._json_body import Pieces
from .exceptions import InvalidRequestError

__all__ = ["FormFields", "boundary_of", "read_form", "with_form_model"]

_MOST_PARTS = 1000
_LONGEST_HEAD = 8192
"""Bytes of one part's headers."""
_LONGEST_VALUE = 4096
"""Bytes of a field that is read."""

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_PARAMETER = re.compile(rb"[ \t]*;[ \t]*(" + _TOKEN + rb")=(?:(" + _TOKEN + rb')|"([^"\\\r\n]*)")')
_HEADER = re.compile(rb"(" + _TOKEN + rb"):[ \t]*([^\r\n\x00]*)")


class FormFields(NamedTuple):
    """The fields of a form that matter here."""

    model: str | None
    span: tuple[int, int]
    """Where the model's name stands; without one, twice the place where a part for it belongs."""
    streams: bool


def boundary_of(content_type: bytes) -> bytes | None:
    """Return the boundary of a form, `None` if the header is not a form's. Raises `InvalidRequestError`."""
    kind, _, _ = content_type.partition(b";")
    if kind.strip().lower() != b"multipart/form-data":
        return None
    parameters = _parameters(content_type[len(kind) :])
    boundary = parameters.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(boundary) or parameters.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise InvalidRequestError("The content type of a form must have a boundary by RFC 2046, and no charset but utf-8.")
    return boundary


def read_form(body: bytes, boundary: bytes) -> FormFields:
    """Find the fields of a form. Raises `InvalidRequestError`."""
    found: dict[bytes, tuple[int, int]] = {}
    for name, is_file, start, end in _parts(body, boundary):
        if name not in (b"model", b"stream"):
            continue
        field = name.decode("ascii")
        if name in found or is_file or end - start > _LONGEST_VALUE:
            raise InvalidRequestError(f"The form must have at most one {field}, which is not a file, and short.", param=field)
        found[name] = start, end
    model = None
    if b"model" in found:
        try:
            model = body[slice(*found[b"model"])].decode()
        except UnicodeDecodeError:
            raise InvalidRequestError("The model must be in UTF-8.", param="model") from None
    streams = b"stream" in found and body[slice(*found[b"stream"])].lower() in (b"true", b"1", b"on", b"yes", b"t", b"y")
    return FormFields(model, found.get(b"model", (0, 0)), streams)


def with_form_model(body: bytes, boundary: bytes, model: str) -> Pieces:
    """Return the form with `model` as its model; everything else keeps its bytes. Raises `InvalidRequestError`."""
    fields, view = read_form(body, boundary), memoryview(body)
    start, end = fields.span
    value = model.encode()
    if fields.model is None:
        value = b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % (boundary, value)
    return [view[:start], value, view[end:]]


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[bytes, bool, int, int]]:
    """Yield each part's name, whether it is a file, and where its content begins and ends."""
    line = b"--" + boundary
    if not body.startswith(line + b"\r\n"):
        raise _broken("does not begin with its boundary")
    at = len(line) + 2
    for _ in range(_MOST_PARTS):
        head_end = body.find(b"\r\n\r\n", at, at + _LONGEST_HEAD)
        if head_end < 0:
            raise _broken("has a part without an end of its headers")
        name, is_file = _read_head(body[at:head_end])
        start = head_end + 4
        # The line break before a boundary belongs to it; an empty part has only that of its headers.
        end = body.find(b"\r\n" + line, start)
        if end < 0:
            raise _broken("has no end")
        yield name, is_file, start, end
        at = end + 2 + len(line) + 2
        behind = body[at - 2 : at]
        if behind == b"--":
            if body[at:] not in (b"", b"\r\n"):
                raise _broken("goes on behind its end")
            return
        if behind != b"\r\n":
            raise _broken("has its boundary inside a part")
    raise _broken(f"has more than {_MOST_PARTS} parts")


def _read_head(head: bytes) -> tuple[bytes, bool]:
    """Return a part's name and whether it is a file."""
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n"):
        found = _HEADER.fullmatch(line)
        if found is None or found[1].lower() in headers:
            raise _broken("has a part with a faulty or doubled header")
        headers[found[1].lower()] = found[2].strip()
    if headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"7bit", b"8bit", b"binary"):
        raise _broken("has a part with a transfer encoding")
    kind, semicolon, rest = headers.get(b"content-disposition", b"").partition(b";")
    parameters = _parameters(semicolon + rest)
    if kind.strip().lower() != b"form-data" or b"name" not in parameters:
        raise _broken("has a part without a name")
    return parameters[b"name"], b"filename" in parameters or b"filename*" in parameters


def _parameters(text: bytes) -> dict[bytes, bytes]:
    """Read `; name=value; …` to the end, keys in lower case."""
    found: dict[bytes, bytes] = {}
    at = 0
    text = text.strip()
    while at < len(text):
        match = _PARAMETER.match(text, at)
        key = match[1].lower() if match is not None else b""
        # A star stands for pieces and encodings of RFC 2231, which some readers put together.
        if match is None or key in found or (b"*" in key and key != b"filename*"):
            raise _broken("has parameters that cannot be read")
        found[key] = match[2] if match[2] is not None else match[3]
        at = match.end()
    return found


def _broken(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"The form (multipart/form-data) {what}.")
