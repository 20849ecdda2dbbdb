"""No client chooses where its request is sent, and no server sends the gateway elsewhere."""

from __future__ import annotations

from contextlib import ExitStack

import anyio
import pytest

from llmux_asgi import VLLMBackend
from llmux_asgi.exceptions import BackendError
from tests.security.conftest import CHAT, Fortress, fortress
from tests.security.wire import Recorder, Request, post, recording
from tests.support.serve import EventLoop


def redirect_to(server: Recorder) -> bytes:
    head = b"HTTP/1.1 307 Temporary Redirect\r\nlocation: %s/sleep\r\ncontent-length: 0\r\n\r\n"
    return head % server.url.encode()


def test_no_header_chooses_the_server(gateway: Fortress) -> None:
    with recording() as other:
        address = other.url.removeprefix("http://").encode()
        for name in (
            b"host",
            b"x-forwarded-host",
            b"x-host",
            b"x-forwarded-server",
            b"forwarded",
            b"x-llmux-url",
            b"x-upstream",
        ):
            value = b"host=" + address if name == b"forwarded" else address
            head = b"POST %s HTTP/1.1\r\n" % CHAT.encode() + (b"" if name == b"host" else b"host: gateway\r\n")
            tail = b"connection: close\r\ncontent-length: 14\r\n\r\n" + b'{"model": "a"}'
            assert gateway.send(head + name + b": " + value + b"\r\n" + tail).statuses == [200]
            assert gateway.asked[-1].values("host") == [gateway.server.url.removeprefix("http://")]
        assert other.requests == []


@pytest.mark.parametrize("form", ["{url}", "{url}/v1", "{host}", "a@{host}", "a\\@{host}", "a/../{host}", "file:///etc/passwd"])
def test_a_model_that_is_an_address_is_a_model_that_does_not_exist(gateway: Fortress, form: str) -> None:
    with recording() as other:
        name = form.format(url=other.url, host=other.url.removeprefix("http://"))
        by_header = gateway.post(b"{}", b"x-llmux-model: " + name.encode())
        by_body = gateway.post(b'{"model": "%s"}' % name.replace("\\", "\\\\").encode())
        assert [by_header.statuses, by_body.statuses] == [[404], [404]]
        assert (gateway.asked, other.requests) == ([], [])


def test_a_target_that_names_another_host_is_not_followed(gateway: Fortress) -> None:
    with recording() as other:
        gateway.send(post(other.url + CHAT))
        assert other.requests == []


def test_a_redirect_is_passed_on_and_not_followed(gateway: Fortress) -> None:
    with recording() as other:
        gateway.server.answer = lambda request: redirect_to(other)
        assert gateway.post().statuses == [307]
        assert (len(gateway.asked), other.requests) == (1, [])


def test_a_control_call_follows_no_redirect(loop: EventLoop) -> None:
    async def ask(url: str) -> None:
        backend = VLLMBackend(url)
        with pytest.raises(BackendError):
            await backend.sleep(1)
        await backend.aclose()

    def answer(request: Request) -> bytes:
        return redirect_to(other)

    with recording() as server, recording() as other:
        server.answer = answer
        anyio.run(ask, server.url, backend=loop)
        assert server.requests
        assert other.requests == []


def test_a_proxy_of_the_environment_sees_nothing(loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        proxy = stack.enter_context(recording())
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        # The client of the test must not use it either: it goes over sockets from here on.
        monkeypatch.setattr("tests.security.conftest.httpx.post", lambda url, json: _Answered)
        running = stack.enter_context(fortress(loop))
        assert running.post().statuses == [200]
        assert {each.path for each in running.server.requests} >= {"/is_sleeping", "/v1/chat/completions"}
        assert proxy.requests == []


class _Answered:
    status_code = 200
