"""Who is let in, by hand-written ASGI calls: WebSockets, the host's own authentication, keys that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp
from typer.testing import CliRunner

from llmux_asgi import ConfigError, Identity, LLMuxApp, PermissionDeniedError, RateLimitError, cli, load_config
from llmux_asgi.access import SCOPE_GRANT, AccessControl, Grant, hash_key, new_key
from llmux_asgi.access import _control as control
from tests.support.clock import Clock

pytestmark = pytest.mark.anyio

KEY = "llmux-0123456789abcdef"
ACCESS = {"keys": {"alice": {"hash": hash_key(KEY)}}}
MODELS = {"a": {"url": "http://127.0.0.1:1", "aliases": ["gpt"]}}


def configured(access: Any = ACCESS, **more: Any) -> Any:
    return load_config({"models": MODELS, "access": access, **more})


class Inner:
    """The app behind: keeps the scopes that reach it."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)

    @property
    def grant(self) -> Grant:
        grant: Grant = self.scopes[-1][SCOPE_GRANT]
        return grant


async def call(access: AccessControl, inner: ASGIApp, **scope: Any) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": f"{scope['type']}.connect"} if scope.get("type") == "websocket" else {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], **scope}
    await access.serve(inner, scope, receive, send)
    return sent


def resolve(name: str) -> str | None:
    return {"a": "a", "gpt": "a"}.get(name)


# WebSockets


async def test_a_websocket_may_bring_its_key_as_a_subprotocol_which_goes_no_further() -> None:
    inner = Inner()
    offered = ["realtime", f"openai-insecure-api-key.{KEY}", "openai-beta.realtime-v1"]
    headers = [(b"sec-websocket-protocol", ", ".join(offered).encode()), (b"x", b"1")]
    access = AccessControl(configured(), resolve)
    assert await call(access, inner, type="websocket", headers=headers, subprotocols=offered) == []
    assert inner.grant.identity.name == "alice"
    assert inner.scopes[0]["subprotocols"] == ["realtime", "openai-beta.realtime-v1"]
    assert inner.scopes[0]["headers"] == [(b"sec-websocket-protocol", b"realtime, openai-beta.realtime-v1"), (b"x", b"1")]
    alone = [(b"sec-websocket-protocol", offered[1].encode())]
    await call(access, inner, type="websocket", headers=alone, subprotocols=[offered[1]])
    assert inner.scopes[1]["headers"] == []


@pytest.mark.parametrize("can_answer", [True, False])
async def test_a_websocket_without_a_key_is_refused_as_far_as_the_server_can(can_answer: bool) -> None:
    inner = Inner()
    extensions: dict[str, Any] = {"websocket.http.response": {}} if can_answer else {}
    sent = await call(AccessControl(configured(), resolve), inner, type="websocket", extensions=extensions)
    if can_answer:
        assert [message["type"] for message in sent] == ["websocket.http.response.start", "websocket.http.response.body"]
        assert sent[0]["status"] == 401
        assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]
    else:
        assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]
    assert inner.scopes == []


async def test_several_keys_in_one_request_are_refused_wherever_they_are() -> None:
    inner = Inner()
    protocols = [f"openai-insecure-api-key.{KEY}", "openai-insecure-api-key.other"]
    sent = await call(AccessControl(configured(), resolve), inner, type="websocket", subprotocols=protocols)
    assert sent[0]["type"] == "websocket.close"


# The host's own authentication


async def test_the_host_says_who_it_is_and_what_it_does_not_know_is_looked_for_among_the_keys() -> None:
    inner = Inner()

    async def identify(scope: Any) -> Identity | None:
        return Identity("bob", models=("gpt",)) if scope.get("user") == "bob" else None

    access = AccessControl(configured(), resolve, identify)
    await call(access, inner, user="bob", headers=[(b"authorization", b"Basic the-hosts-own"), (b"cookie", b"session")])
    assert inner.grant.identity.name == "bob"
    assert inner.grant.allows("a")
    assert inner.scopes[0]["headers"] == []
    await call(access, inner, headers=[(b"x-api-key", KEY.encode())])
    assert inner.grant.identity.name == "alice"
    assert (await call(access, inner))[0]["status"] == 401


async def test_the_hosts_users_share_their_limits_by_name_and_not_with_the_keys() -> None:
    inner = Inner()
    clock = Clock()
    access = AccessControl(
        configured(),
        resolve,
        lambda scope: Identity(scope["user"], requests_per_minute=1) if "user" in scope else None,
        clock=clock,
    )
    await call(access, inner, user="alice")
    inner.grant.admit(b"")
    await call(access, inner, user="alice")
    with pytest.raises(RateLimitError):
        inner.grant.admit(b"")
    await call(access, inner, user="carol")
    inner.grant.admit(b"")
    await call(access, inner, headers=[(b"x-api-key", KEY.encode())])
    inner.grant.admit(b"")


async def test_users_who_have_nothing_to_remember_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_MOST_ACCOUNTS", 10)
    inner, clock = Inner(), Clock()
    access = AccessControl(configured(), resolve, lambda scope: Identity(scope["user"], requests_per_minute=1), clock=clock)
    for number in range(50):
        await call(access, inner, user=str(number))
        if number == 0:
            inner.grant.admit(b"")
        assert len(access._accounts) <= 11
    assert ("host", "0") in access._accounts


async def test_a_class_that_is_not_configured_is_the_hosts_fault() -> None:
    access = AccessControl(configured(), resolve, lambda scope: Identity("bob", priority="urgent"))
    assert (await call(access, Inner()))[0]["status"] == 500


async def test_what_the_hosts_authentication_raises_is_the_hosts_to_answer() -> None:
    def identify(scope: Any) -> Identity | None:
        raise LookupError("no such user")

    with pytest.raises(LookupError):
        await call(AccessControl(configured(), resolve, identify), Inner())


@pytest.mark.parametrize(
    ("version", "headers", "closes"),
    [
        ("1.1", [(b"content-length", b"5")], True),
        ("1.0", [(b"transfer-encoding", b"chunked")], True),
        ("1.1", [(b"accept", b"*/*")], False),
        ("2", [(b"content-length", b"5")], False),  # there it is forbidden, and not needed
    ],
)
async def test_the_connection_of_a_body_that_is_not_read_is_not_used_again(
    version: str, headers: list[tuple[bytes, bytes]], closes: bool
) -> None:
    sent = await call(AccessControl(configured(), resolve), Inner(), http_version=version, headers=headers)
    assert sent[0]["status"] == 401
    assert ((b"connection", b"close") in sent[0]["headers"]) == closes


# A request that ends in any way


@pytest.mark.parametrize(("body", "left"), [(b"{}", b"300"), (b"", b"1000")])
async def test_fetching_an_answer_does_not_take_again_what_it_took_when_it_was_made(body: bytes, left: bytes) -> None:
    access = AccessControl(configured({"keys": {"alice": {"hash": hash_key(KEY), "tokens_per_minute": 1000}}}), resolve)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope[SCOPE_GRANT].admit(body)
        scope[SCOPE_GRANT].reach()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"x-ratelimit-limit-tokens", b"of the server's")]}
        )
        await send({"type": "http.response.body", "body": b'{"usage": {"total_tokens": 700}}'})
        await send({"type": "http.response.start", "status": 200})  # only to have the headers once more

    sent = await call(access, app, headers=[(b"x-api-key", KEY.encode())])
    assert dict(sent[-1]["headers"])[b"x-ratelimit-remaining-tokens"] == left
    assert [value for name, value in sent[0]["headers"] if name == b"x-ratelimit-limit-tokens"] == [b"1000"]


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
async def test_a_place_is_given_back_when_the_app_raises(raised: type[BaseException]) -> None:
    access = AccessControl(configured({"keys": {"alice": {"hash": hash_key(KEY), "max_concurrent": 1}}}), resolve)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope[SCOPE_GRANT].admit(b"{}")
        scope[SCOPE_GRANT].reach()
        raise raised

    for _ in range(2):
        with pytest.raises(raised):
            await call(access, app, headers=[(b"x-api-key", KEY.encode())])
    assert access._accounts["key", "alice"].in_flight == 0


async def test_a_refusal_tells_what_is_left_now_that_it_has_taken_nothing() -> None:
    access = AccessControl(configured({"keys": {"alice": {"hash": hash_key(KEY), "requests_per_minute": 5}}}), resolve)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope[SCOPE_GRANT].admit(b"{}")
        await send({"type": "http.response.start", "status": 429, "headers": []})  # its queue is full
        await send({"type": "http.response.body", "body": b""})

    sent = await call(access, app, headers=[(b"x-api-key", KEY.encode())])
    assert dict(sent[0]["headers"])[b"x-ratelimit-remaining-requests"] == b"5"


async def test_a_huge_name_that_is_not_allowed_is_cut_where_it_is_told() -> None:
    inner = Inner()
    access = AccessControl(configured({"keys": {"alice": {"hash": hash_key(KEY), "models": ["gpt"]}}}), resolve)
    await call(access, inner, headers=[(b"x-api-key", KEY.encode())])
    with pytest.raises(PermissionDeniedError) as caught:
        inner.grant.require("x" * 1_000_000)
    assert len(str(caught.value)) < 500


def test_without_access_in_the_configuration_there_is_no_access_control() -> None:
    assert LLMuxApp({"models": MODELS})._access is None
    LLMuxApp({"models": MODELS}).reload_keys()


# Keys that cannot be read


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"x": {"env": "LLMUX_NO_SUCH"}}, r"access\.keys\.x: the environment variable LLMUX_NO_SUCH is empty"),
        ({"x": {"env": "LLMUX_SHORT"}}, "16 or more visible ASCII"),
        ({"x": {"env": "LLMUX_BLANK"}}, "characters that no key has"),
        ({"x": {"file": "/nowhere"}}, r"access\.keys\.x\.file: /nowhere cannot be read"),
        ({"x": {"file": "EMPTY"}}, "is empty"),
        ({"x": {"file": "BINARY"}}, "characters that no key has"),
        ({"x": {"file": "HALF"}}, "not a hash of 64"),
        ({"x": {"hash": hash_key(KEY)}, "y": {"hash": hash_key(KEY)}}, "has the same key as 'x'"),
        ({}, "there are no keys"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused_at_the_start_and_not_repeated(
    keys: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMUX_SHORT", "secret-word")
    monkeypatch.setenv("LLMUX_BLANK", "secret-word and another")
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").write_text("\n")
    Path("BINARY").write_bytes(b"secret-word\xff")
    Path("HALF").write_text("sha256:secret-word")
    with pytest.raises(ConfigError, match=words) as caught:
        LLMuxApp({"models": MODELS, "access": {"keys": keys}})
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ({}, "name one of hash, env, file"),
        ({"hash": hash_key(KEY), "env": "X"}, "name one of hash, env, file"),
        ({"hash": "secret-word"}, "is not sha256: and 64"),
        ("secret-word", "expected `object`"),
        ({"hash": hash_key(KEY), "models": ["b"]}, r"alice\.models\[0\]: 'b' is no model"),
        ({"hash": hash_key(KEY), "priority": "x"}, r"alice\.priority: 'x' must be none"),
    ],
)
@pytest.mark.parametrize("place", ["configuration", "file"])
def test_a_wrong_key_is_told_by_its_place(key: Any, words: str, place: str, tmp_path: Path) -> None:
    access: dict[str, Any] = {"keys": {"alice": key}}
    if place == "file":
        path = tmp_path / "keys.json"
        path.write_text(json.dumps(access["keys"]))
        access = {"keys_file": str(path)}
    with pytest.raises(ConfigError, match=words) as caught:
        LLMuxApp({"models": MODELS, "access": access})
    assert "secret-word" not in str(caught.value)
    assert ("keys.json" in str(caught.value)) == (place == "file")


def test_a_name_in_both_places_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"alice": {"env": "X"}}')
    with pytest.raises(ConfigError, match=r"\$\.alice: is in access\.keys too"):
        LLMuxApp({"models": MODELS, "access": {**ACCESS, "keys_file": str(path)}})


@pytest.mark.parametrize(
    "api_key", [{}, {"env": "A", "file": "b"}, {"env": "LLMUX_NO_SUCH"}, {"file": "/nowhere"}, "secret-word"]
)
def test_a_servers_key_that_cannot_be_read_is_refused(api_key: Any) -> None:
    with pytest.raises(ConfigError, match=r"models\.a\.api_key") as caught:
        LLMuxApp({"models": {"a": {"url": "http://127.0.0.1:1", "api_key": api_key}}})
    assert "secret-word" not in str(caught.value)


# The command


def test_the_command_makes_a_key_and_its_hash() -> None:
    first, second = (CliRunner().invoke(cli.app, ["hash-key"]).output.split() for _ in range(2))
    assert first[0::2] == ["key:", "hash:"]
    assert first[3] == hash_key(first[1])
    assert first[1] != second[1]
    assert len(new_key()) >= 43
    assert CliRunner().invoke(cli.app, ["hash-key", "--stdin"], input=f"{KEY}\n").output == f"hash: {hash_key(KEY)}\n"
