"""The model in a JSON body: found as every parser finds it, replaced and nothing else."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmux_asgi import InvalidRequestError
from llmux_asgi._json_body import named_model, read_json, with_json_model

keys = st.text(max_size=8) | st.sampled_from(["model", "Model", "mode", '"model"', '\\"model', "model\\", 'x"model', ""])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | keys,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=10,
)
members = st.lists(st.tuples(keys, values), max_size=6)
spaces = st.sampled_from(["", " ", "\n\t ", "\r\n"])


def spelled(text: str, escape: bool, ascii_only: bool) -> str:
    """A JSON string, with the first character as an escape if wanted."""
    if escape and text:
        return f'"\\u{ord(text[0]) & 0xFFFF:04X}' + json.dumps(text[1:], ensure_ascii=ascii_only)[1:]
    return json.dumps(text, ensure_ascii=ascii_only)


@st.composite
def objects(draw: st.DrawFn, *, escapes: bool = False, more: tuple[str, ...] = ()) -> bytes:
    """The text of a JSON object, spelled in any way, in which a key may stand more than once. `more`: keys to have in it."""
    ascii_only, space = draw(st.booleans()), draw(spaces)
    parts = [
        f"{space}{spelled(key, escapes and draw(st.booleans()) and key.isascii(), ascii_only)}{space}:{space}"
        f"{json.dumps(value, ensure_ascii=ascii_only)}{space}"
        for key, value in draw(st.lists(st.tuples(st.sampled_from(more) | keys, values), max_size=6) if more else members)
    ]
    return f"{space}{{{','.join(parts) or space}}}{space}".encode("utf-8", "surrogatepass")


def pairs_of(body: bytes) -> list[tuple[str, Any]]:
    """The members of the object itself, doubled ones too."""
    top: list[tuple[str, Any]] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        top[:] = pairs  # the outermost object is the last to be complete
        return dict(pairs)

    json.loads(body, object_pairs_hook=note)
    return top


def replaced(body: bytes, model: str) -> bytes:
    named, _ = read_json(body)
    return body if named == model else b"".join(with_json_model(body, model))


@given(objects(escapes=True))
@example(b'{"mod\\u0065l": "a"}')
@example(b'{"model": "a", "mod\\u0065l": "b"}')
@example(b'{"a": [{"model": "b"}], "model": "c"}')
def test_the_name_is_the_one_that_json_finds_and_doubles_are_refused(body: bytes) -> None:
    found = [value for key, value in pairs_of(body) if key == "model"]
    if len(found) > 1 or any(not isinstance(value, str | None) for value in found):
        with pytest.raises(InvalidRequestError) as caught:
            read_json(body)
        assert caught.value.param == "model"
    else:
        assert read_json(body)[0] == (found[0] if found else None)


@given(objects(escapes=True), st.text(max_size=8).filter(str.isprintable))
@example(b'{"x": {"model": 1}, "mod\\u0065l": "a"}', "b")
@example(b'{"x\\"model":"q","model":"a","z":"model"}', "b")
@example(b'{"m":{"model":1},"model":"a","n":{"model":2}}', "b")
@example(b'{"m":{"model":1},"n":["model",{"model":{"model":3}}],"model":"a","o":["model",{"model":2}], "p":"model"}', "b")
@example(b'{"m":{"model":1},"n":{"model":2}}', "b")
@example(b'{"m":{"model":"a"},"model":"a"}', "b")
@example(b'{"m":[{"model":"a"},"x"],"model":"a","n":{"model":"a"}}', "b")
def test_only_the_model_changes(body: bytes, model: str) -> None:
    try:
        read_json(body)
    except InvalidRequestError:
        return
    before, after = pairs_of(body), pairs_of(replaced(body, model))
    if any(key == "model" for key, _ in before):
        assert after == [(key, model if key == "model" else value) for key, value in before]
    else:
        assert after == [("model", model), *before]


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_what_is_read_is_an_object_for_others_too(body: bytes) -> None:
    try:
        model, _ = read_json(body)
    except InvalidRequestError:
        return
    content = json.loads(body.decode("utf-8", "replace"), strict=False)
    assert content.get("model") == model


def test_other_values_keep_their_bytes() -> None:
    body = b' {"t": 1.0, "big": 12345678901234567890123, "e": 1E5, "s": "\\u00e9",\n "model" : "x" , "a": [ ]} '
    expected = body.replace(b'"x"', b'"b\\"\\n"')
    assert replaced(body, 'b"\n') == expected
    assert replaced(b'{ "model" :null}', "b") == b'{ "model" :"b"}'
    assert replaced(b" { } ", "b") == b' {"model":"b" } '
    assert replaced(b'{"a":1}', "b") == b'{"model":"b","a":1}'


@pytest.mark.parametrize("before", [0, 1, 1000, 256 * 1024 - 20, 256 * 1024, 700_000])
@pytest.mark.parametrize("behind", [0, 300_000])
def test_the_value_is_found_wherever_it_stands_in_a_large_body(before: int, behind: int) -> None:
    head = b'{"m": {"model": "a"}, "x": "%b", "model": ' % (b"y" * before)
    tail = b', "z": "%b", "n": {"model": "a"}}' % (b"y" * behind)
    assert replaced(head + b'"a"' + tail, "b") == head + b'"b"' + tail


def test_the_unchanged_parts_are_not_copied() -> None:
    body = b'{"model": "a", "messages": []}'
    views = [each for each in with_json_model(body, "b") if isinstance(each, memoryview)]
    assert [each.obj is body for each in views] == [True, True]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"7",
        b"\xff\xfe",
        b'{"a":' + b"[" * 100_000,
        b'{"a":1}x',
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_json(body)
    assert caught.value.param is None


@pytest.mark.parametrize("model", ["null", "7", '""', '["a"]', '{"a": "b"}', '"%s"' % ("x" * 1025)])
def test_what_names_no_model_is_refused(model: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        named_model(read_json(b'{"model": %b}' % model.encode())[0])
    assert caught.value.param == "model"


def test_a_model_of_another_kind_is_not_built_in_memory() -> None:
    body = b'{"model": [%b0]}' % (b"[]," * 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError):
            read_json(body)
        assert tracemalloc.get_traced_memory()[1] < len(body) / 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("stream", "streams"), [(b"true", True), (b"false", False), (b"1", False), (b"[true]", False)])
def test_whether_a_stream_is_asked_for(stream: bytes, streams: bool) -> None:
    assert read_json(b'{"model": "a", "stream": %b}' % stream)[1] is streams
