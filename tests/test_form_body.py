"""The model in a form: found where every reader finds it, replaced and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from llmux_asgi import InvalidRequestError
from llmux_asgi._form_body import boundary_of, read_form, with_form_model

FILE = b"\x00RIFF\r\n--\r\n--bound\r\nmodel\r\n\r\n" * 3


def form(fields: dict[str, str], files: dict[str, tuple[str, bytes]] | None = None) -> tuple[bytes, bytes]:
    """What httpx sends, and so OpenAI's client: the content type and the body."""
    request = httpx.Request("POST", "http://x", data=fields, files=files or {"file": ("a.wav", FILE)})
    request.read()
    return request.headers["content-type"].encode(), request.content


def part(name: str, value: str, *more: str) -> bytes:
    head = "\r\n".join([f'Content-Disposition: form-data; name="{name}"', *more])
    return f"--b\r\n{head}\r\n\r\n{value}\r\n".encode()


def as_starlette_reads(content_type: bytes, body: bytes) -> list[tuple[str, str | None]]:
    """The fields as a server reads them: with python-multipart, as vLLM does; files as `None`."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    async def parse() -> list[tuple[str, str | None]]:
        read = await MultiPartParser(Headers(raw=[(b"content-type", content_type)]), stream()).parse()
        items = [(key, value if isinstance(value, str) else None) for key, value in read.multi_items()]
        await read.close()
        return items

    return asyncio.run(parse())


def test_the_fields_that_openais_client_sends_are_found() -> None:
    content_type, body = form({"model": "org/whisper é", "stream": "true"})
    boundary = boundary_of(content_type)
    assert boundary is not None
    found = read_form(body, boundary)
    assert (found.model, found.streams) == ("org/whisper é", True)


def test_only_the_model_changes_and_the_file_is_not_copied() -> None:
    content_type, body = form({"model": "before", "language": "de"})
    boundary = boundary_of(content_type) or b""
    pieces = with_form_model(body, boundary, "after")
    assert b"".join(pieces) == body.replace(b"before", b"after")
    assert [each.obj is body for each in pieces if isinstance(each, memoryview)] == [True, True]


def test_a_form_without_a_model_gets_one() -> None:
    content_type, body = form({"language": "de"})
    changed = b"".join(with_form_model(body, boundary_of(content_type) or b"", "new"))
    assert as_starlette_reads(content_type, changed) == [("model", "new"), *as_starlette_reads(content_type, body)]


BAD = {
    "two models": part("model", "a") + part("model", "b"),
    "the model is a file": part("model", "a").replace(b'"model"', b'"model"; filename="x"'),
    "the model is long": part("model", "a" * 5000),
    "a name in pieces": part("x", "a").replace(b'name="x"', b'name*0="mod"; name*1="el"'),
    "a name with an escape": part("x", "a").replace(b'"x"', b'"mod\\el"'),
    "two names": part("x", "a").replace(b'"x"', b'"x"; name="model"'),
    "two dispositions": part("x", "a", 'content-disposition: form-data; name="model"'),
    "no disposition": b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n",
    "no headers": b"--b\r\n\r\nx\r\n",
    "a folded header": part("x", "a", "X-Y: 1", " z"),
    "a transfer encoding": part("model", "YQ==", "Content-Transfer-Encoding: base64"),
    "line feeds alone": part("model", "a").replace(b"\r\n", b"\n"),
    "a preamble": b"hello\r\n" + part("model", "a"),
    "the boundary inside a part": part("x", "a\r\n--bc\r\n"),
    "a part without an end of its headers": b"--b\r\nX: 1\r\n",
    "not in UTF-8": part("model", "").replace(b"\r\n\r\n\r\n", b"\r\n\r\n\xff\r\n"),
}


@pytest.mark.parametrize("parts", BAD.values(), ids=BAD)
def test_what_readers_could_take_differently_is_refused(parts: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read_form(parts + b"--b--\r\n", b"b")


@pytest.mark.parametrize("end", [b"", b"--b", b"--b--x", b"--b--\r\nmore", b"--b-- \r\n"])
def test_a_form_that_does_not_end_properly_is_refused(end: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read_form(part("model", "a") + end, b"b")


def test_a_form_of_very_many_parts_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="1000"):
        read_form(part("x", "a") * 1001 + b"--b--", b"b")


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'Multipart/Form-Data ; charset="UTF-8"; Boundary="a b"', b"a b"),
        (b"application/json", None),
        (b"multipart/mixed; boundary=abc", None),
    ],
)
def test_the_boundary_is_read(content_type: bytes, boundary: bytes | None) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "parameters",
    [
        "",
        "; boundary=",
        "; boundary=a; boundary=b",
        "; boundary=" + "x" * 71,
        '; boundary="a\\b"',
        "; boundary=a; charset=utf-16",
        "; boundary=a b",
        "; boundary*0=a",
    ],
)
def test_a_boundary_that_cannot_be_one_is_refused(parameters: str) -> None:
    with pytest.raises(InvalidRequestError):
        boundary_of(b"multipart/form-data" + parameters.encode())


HEADS = [
    '"model"',
    '"x"',
    "model",
    '"model"; filename="f"',
    '"model"; x="',
    '"mod\\el"',
    '"model";',
    '"x"; name="model"',
    '"Model"',
]
VALUES = ["", "a", "--b", "\r\n--b", "\r\n--b--", "\r\n--b\r\n", "\n", "\r", "\r\n\r\n", "é"]
ENDS = ["--b--\r\n", "--b--", "--b", "", "\r\n--b--", "--b--\r\n--b\r\n"]


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """Forms, most of them wrong in some way."""
    text = draw(st.sampled_from(["", "\r\n", "x"])) if draw(st.booleans()) else ""
    for _ in range(draw(st.integers(0, 3))):
        value = "".join(draw(st.lists(st.sampled_from(VALUES), max_size=3)))
        text += f"--b\r\nContent-Disposition: form-data; name={draw(st.sampled_from(HEADS))}\r\n\r\n{value}\r\n"
    return (text + draw(st.sampled_from(ENDS))).encode()


@given(forms())
@example(part("model", "a") + b"--b--\r\n")
def test_servers_read_the_same_model_from_what_is_not_refused(body: bytes) -> None:
    try:
        found = read_form(body, b"b")
    except InvalidRequestError:
        return
    try:
        fields = as_starlette_reads(b"multipart/form-data; boundary=b", body)
    except MultiPartException:
        return
    assert [value for name, value in fields if name == "model"] == ([] if found.model is None else [found.model])
