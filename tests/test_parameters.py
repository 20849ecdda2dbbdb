"""Parameters of a model in a JSON body: set at its own keys, and nothing else of it changes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from llmux_asgi import InvalidRequestError, ModelConfig, ModelParametersConfig, ParametersConfig
from llmux_asgi._parameters import Parameters
from llmux_asgi._routes import INFERENCE_ROUTES

from .test_json_body import objects, pairs_of, values

CHAT = INFERENCE_ROUTES["/v1/chat/completions"]
FORM = INFERENCE_ROUTES["/v1/audio/transcriptions"]

settings = st.fixed_dictionaries(
    {},
    optional={
        key: st.tuples(st.sampled_from(["default", "forced", "strip"]), values) for key in ["a", "b", "é", "x model", "c"]
    },
)


def configured(said: dict[str, tuple[str, Any]]) -> ParametersConfig:
    return ParametersConfig(
        defaults={key: value for key, (kind, value) in said.items() if kind == "default"},
        forced={key: value for key, (kind, value) in said.items() if kind == "forced"},
        strip=tuple(key for key, (kind, _) in said.items() if kind == "strip"),
    )


def applied(body: bytes, *configs: ParametersConfig) -> bytes:
    return Parameters(*configs).apply(CHAT, [], body)


def expected(content: dict[str, Any], config: ParametersConfig) -> dict[str, Any]:
    kept = {key: value for key, value in content.items() if key not in config.strip}
    return {**config.defaults, **kept, **config.forced}


@given(objects(escapes=True, more=("a", "b", "é", "x model", "c")), settings)
@example(b'{"\\u0061": 1}', {"a": ("forced", 2)})
@example(b'{"c": {"a": 1}}', {"a": ("default", 2)})
@example(b'{"a": 1, "a": 2}', {"a": ("strip", None)})
@example(b'{"c": 0, "a": 1, "b" : 2 }', {"a": ("strip", None), "b": ("strip", None)})
@example(b'{ "a": 1, "c": 0, "b": 2}', {"a": ("strip", None), "b": ("strip", None)})
@example(b'{ "a": 1 , "b": 2 } ', {"a": ("strip", None), "b": ("strip", None)})
@example(b'{ "a": 1 , "b": 2 } ', {"a": ("strip", None), "b": ("strip", None), "c": ("default", 1)})
@example(b'{"a\\\\": 1, "a": "\\"a\\\\\\": 1", "b\\\\\\"": {"b": 1}}', {"a": ("strip", None), "b": ("forced", 1)})
def test_what_json_reads_is_what_was_configured(body: bytes, said: dict[str, tuple[str, Any]]) -> None:
    config = configured(said)
    assume(all(character < "\ud800" or character > "\udfff" for character in body.decode("utf-8", "replace")))
    pairs = pairs_of(body)
    doubled = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    if doubled & set(said):
        with pytest.raises(InvalidRequestError) as caught:
            applied(body, config)
        assert caught.value.param in doubled
    else:
        assert json.loads(applied(body, config)) == expected(json.loads(body), config)


def test_the_rest_keeps_its_bytes_and_its_order() -> None:
    body = b' {"t": 1.0, "big": 12345678901234567890123,\n "top_k" : 4 , "e": 1E5, "s": "\\u00e9", "n": [ ]} '
    config = ParametersConfig(defaults={"max_tokens": 5, "e": 0}, forced={"top_k": None}, strip=("big", "n"))
    assert applied(body, config) == b' {"max_tokens":5,"t": 1.0,\n "top_k" : null , "e": 1E5, "s": "\\u00e9"} '
    assert applied(b" { } ", config) == b' {"max_tokens":5,"e":0,"top_k":null } '
    nothing = b'{"a": {"big": 1}}'
    assert applied(nothing, ParametersConfig(strip=("big",))) is nothing


def test_in_a_large_body_too() -> None:
    filling = json.dumps({"messages": ["temperature", {"temperature": 3, "text": '"temperature": 4,' * 20_000}]})[1:-1]
    for body in (f'{{"temperature": 1, {filling}}}', f'{{{filling}, "temperature": 1}}', f"{{{filling}}}"):
        changed = json.loads(applied(body.encode(), ParametersConfig(forced={"temperature": 2})))
        assert changed == json.loads(body) | {"temperature": 2}


def test_an_alias_has_its_own_on_top() -> None:
    given = ModelParametersConfig(
        defaults={"max_tokens": 1, "a": 1},
        strip=("top_k", "b"),
        aliases={
            "m:high": ParametersConfig(forced={"effort": "high", "top_k": 3}, defaults={"max_tokens": 9}, strip=("a",)),
            "m": ParametersConfig(defaults={"effort": "medium"}),
        },
    )
    of_all = Parameters.of(
        {
            "m": ModelConfig(url="http://h:1", aliases=("m:high", "n"), parameters=given),
            "o": ModelConfig(url="http://h:2", aliases=("p",)),
        }
    )
    body = b'{"top_k": 1, "a": 2, "b": 3}'
    assert {name: json.loads(each.apply(CHAT, [], body)) for name, each in of_all.items()} == {
        "m": {"max_tokens": 1, "a": 2, "effort": "medium"},
        "m:high": {"max_tokens": 9, "effort": "high", "top_k": 3},
        "n": {"max_tokens": 1, "a": 2},
    }


def test_a_form_is_left_alone_and_json_on_its_route_is_not() -> None:
    parameters = Parameters(ParametersConfig(forced={"temperature": 1}))
    form = [(b"content-type", b"multipart/form-data; boundary=x")]
    assert parameters.apply(FORM, form, b"--x\r\n") == b"--x\r\n"
    assert parameters.apply(FORM, [], b"{}") == b'{"temperature":1}'
    with pytest.raises(InvalidRequestError, match="JSON"):
        parameters.apply(CHAT, [], b"--x\r\n")
