"""The middleware around an app of one's own, with hand-written receive and send. On asyncio and on trio."""

from __future__ import annotations

import json
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.types import Message, Receive, Scope, Send

from llmux_asgi import BackendError, Lease, LLMuxMiddleware, QueueTimeoutError, UpstreamError
from llmux_asgi.middleware import route_path
from tests.support.pool import LIMIT, Pool

pytestmark = pytest.mark.anyio


class Connection:
    """A client of the app under test: what it sends, and what it has received."""

    def __init__(
        self,
        body: bytes = b"{}",
        *,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        headers: dict[str, str] | None = None,
        chunks: list[bytes] | None = None,
    ) -> None:
        self.scope: Message = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        }
        parts = chunks or [body]
        self.incoming: list[Message] = [
            {"type": "http.request", "body": part, "more_body": index < len(parts) - 1} for index, part in enumerate(parts)
        ]
        self.gone = anyio.Event()
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self.incoming:
            return self.incoming.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await anyio.lowlevel.checkpoint()
        self.sent.append(message)

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def error(self) -> Message:
        error: Message = json.loads(self.body)["error"]
        return error


class Inner:
    """The inner app: reads its request, answers in two pieces, and does something afterwards."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.bodies: list[bytes] = []
        self.leases: list[Lease | None] = []
        self.in_flight: list[dict[str, int]] = []
        self.answering = anyio.Event()
        self.go_on = anyio.Event()
        self.go_on.set()

    def note(self) -> None:
        self.in_flight.append({m: n for m, n in self.pool.switcher.statistics().in_flight.items() if n})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        self.bodies.append(message.get("body", b""))
        self.leases.append(scope.get("llmux.lease"))
        await send({"type": "http.response.start", "status": 201, "headers": []})
        self.note()
        self.answering.set()
        await self.go_on.wait()
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        self.note()
        await send({"type": "http.response.body", "body": b"two"})
        self.note()


@pytest.fixture
def pool() -> Pool:
    return Pool(awake="a", aliases={"gpt": "a"})


async def call(app: Any, connection: Connection) -> None:
    with anyio.fail_after(LIMIT):
        await app(connection.scope, connection.receive, connection.send)


async def test_the_lease_is_held_until_the_last_byte_and_no_longer(pool: Pool) -> None:
    inner = Inner(pool)
    connection = Connection(b'{"model": "gpt"}')
    await call(LLMuxMiddleware(inner, pool.switcher), connection)
    assert (connection.status, connection.body) == (201, b"onetwo")
    # After the headers, between the chunks, and when the app goes on after its last byte:
    assert inner.in_flight == [{"a": 1}, {"a": 1}, {}]
    assert inner.leases[0] is not None
    assert inner.leases[0].model == "a"


async def test_the_body_is_handed_on_whole(pool: Pool) -> None:
    inner = Inner(pool)
    connection = Connection(chunks=[b'{"mod', b'el": ', b'"a"}'])
    await call(LLMuxMiddleware(inner, pool.switcher), connection)
    assert inner.bodies == [b'{"model": "a"}']


async def test_the_body_is_read_before_a_lease_is_taken_also_if_the_header_names_the_model(pool: Pool) -> None:
    """A client that takes its time to send it would keep the other models waiting."""
    inner = Inner(pool)
    await pool.switcher.reconcile()
    connection = Connection(chunks=[b"first", b"second"], headers={"x-llmux-model": "a"})
    held: list[int] = []
    receive = connection.receive

    async def watched() -> Message:
        held.append(pool.switcher.statistics().in_flight["a"])
        return await receive()

    connection.receive = watched  # type: ignore[method-assign]
    await call(LLMuxMiddleware(inner, pool.switcher), connection)
    assert inner.bodies == [b"firstsecond"]
    assert held == [0, 0]


async def test_the_class_of_a_request_is_that_of_its_lease_whether_it_waits_or_not() -> None:
    pool = Pool(priorities={"high": 9.0, "low": 1.0}, default_priorities={"a": "low"})
    seen = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["llmux.lease"].head_start)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    for headers in ({"x-llmux-priority": "high"}, {"x-llmux-priority": "high"}, {}):
        await call(LLMuxMiddleware(inner, pool.switcher), Connection(b'{"model": "a"}', headers=headers))
    await pool.switcher.aclose()
    assert seen == [9.0, 9.0, 1.0]
    pool.check()


@pytest.mark.parametrize("headers", [{}, {"x-llmux-model": "a"}])
async def test_a_body_is_refused_beyond_the_limit_and_not_at_it(pool: Pool, headers: dict[str, str]) -> None:
    body = b'{"model": "a"}'
    for limit, status in ((len(body), 201), (len(body) - 1, 413)):
        inner = Inner(pool)
        connection = Connection(body, headers=headers)
        await call(LLMuxMiddleware(inner, pool.switcher, max_body=limit), connection)
        assert connection.status == status
        assert len(inner.bodies) == (1 if status == 201 else 0)


async def test_a_body_that_announces_too_much_is_refused_before_it_is_read(pool: Pool) -> None:
    connection = Connection(b'{"model": "a"}', headers={"content-length": "101"})
    await call(LLMuxMiddleware(Inner(pool), pool.switcher, max_body=100), connection)
    assert (connection.status, connection.error["code"]) == (413, "request_too_large")
    assert len(connection.incoming) == 1


async def test_the_lease_is_held_while_the_last_byte_is_being_sent(pool: Pool) -> None:
    sending, sent = anyio.Event(), anyio.Event()

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"last"})

    async def slow_send(message: Message) -> None:
        if message["type"] == "http.response.body":
            sending.set()
            await sent.wait()

    connection = Connection(b'{"model": "a"}')
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(LLMuxMiddleware(inner, pool.switcher), connection.scope, connection.receive, slow_send)
            await sending.wait()
            assert pool.switcher.statistics().in_flight["a"] == 1
            sent.set()
    assert pool.switcher.statistics().in_flight["a"] == 0


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"model": "b"}', ["llmux_asgi._steps", "llmux_asgi.switcher"]),  # the first try; the failed switch: by the switcher
        (b'{"model": "slow"}', ["llmux_asgi.middleware"]),  # a queue timeout: here
        (b'{"model": "nobody"}', []),  # the client's own mistakes: not at all
        (b"nonsense", []),
    ],
)
async def test_a_failure_is_logged_once_in_the_place_where_it_happened(
    body: bytes, where: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool(awake="a", aliases={"slow": "c"}, request_timeouts={"c": 0.01})
    pool.backends["b"].fail("wake", BackendError("out of memory"), times=2)
    lease = await pool.switcher.acquire("a") if b"slow" in body else None
    await call(LLMuxMiddleware(Inner(pool), pool.switcher), Connection(body))
    if lease is not None:
        lease.release()
    await pool.switcher.aclose()
    assert [record.name for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == where


async def test_a_body_named_by_the_header_survives_the_wait_for_its_model(pool: Pool) -> None:
    inner = Inner(pool)
    connection = Connection(chunks=[b"first", b"second"], headers={"x-llmux-model": "b"})
    await call(LLMuxMiddleware(inner, pool.switcher), connection)
    assert inner.bodies == [b"firstsecond"]
    assert pool.gpu.awake == {"b"}


@pytest.mark.parametrize(
    "scope",
    [
        {"type": "lifespan"},
        {"type": "websocket", "path": "/v1/chat/completions"},
        {"type": "http", "method": "GET", "path": "/v1/chat/completions", "headers": []},
        {"type": "http", "method": "POST", "path": "/mine", "headers": []},
    ],
)
async def test_everything_else_reaches_the_app_untouched(pool: Pool, scope: Message) -> None:
    seen: list[tuple[Any, ...]] = []

    async def inner(*arguments: Any) -> None:
        seen.append(arguments)

    connection = Connection()
    await LLMuxMiddleware(inner, pool.switcher)(scope, connection.receive, connection.send)
    assert len(seen) == 1
    assert seen[0][0] is scope
    assert seen[0][1:] == (connection.receive, connection.send)


async def test_unknown_models_are_refused_or_passed_by_choice(pool: Pool) -> None:
    inner = Inner(pool)
    connection = Connection(b'{"model": "mine"}')
    await call(LLMuxMiddleware(inner, pool.switcher), connection)
    assert (connection.status, connection.error["code"]) == (404, "model_not_found")
    connection = Connection(b'{"model": "mine"}')
    await call(LLMuxMiddleware(inner, pool.switcher, unknown="pass"), connection)
    assert connection.status == 201
    assert inner.bodies == [b'{"model": "mine"}']
    assert inner.leases == [None]


async def test_paths_can_be_chosen(pool: Pool) -> None:
    inner = Inner(pool)
    connection = Connection(b'{"model": "a"}', path="/mine")
    await call(LLMuxMiddleware(inner, pool.switcher, paths=["/mine"]), connection)
    assert inner.leases[0] is not None


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue_and_the_app_is_never_called(pool: Pool) -> None:
    inner = Inner(pool)
    app = LLMuxMiddleware(inner, pool.switcher)
    running, waiting = Connection(b'{"model": "a"}'), Connection(b'{"model": "b"}')
    inner.go_on = anyio.Event()
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, running.scope, running.receive, running.send)
            await inner.answering.wait()
            async with anyio.create_task_group() as second:
                second.start_soon(app, waiting.scope, waiting.receive, waiting.send)
                while not pool.switcher.statistics().waiting["b"]:
                    await anyio.lowlevel.checkpoint()
                waiting.gone.set()
            assert pool.switcher.statistics().waiting["b"] == 0
            inner.go_on.set()
    assert waiting.sent == []
    assert len(inner.bodies) == 1
    assert pool.gpu.events == []


async def test_a_client_that_leaves_while_its_body_is_read_is_forgotten(pool: Pool) -> None:
    inner = Inner(pool)
    connection = Connection(chunks=[b'{"mod', b"never"])
    connection.incoming.pop()
    connection.gone.set()
    await call(LLMuxMiddleware(inner, pool.switcher), connection)
    assert connection.sent == []
    assert inner.bodies == []


async def test_a_host_that_cancels_the_request_while_it_waits_leaves_nothing_behind(pool: Pool) -> None:
    app = LLMuxMiddleware(Inner(pool), pool.switcher)
    lease = await pool.switcher.acquire("a")
    connection = Connection(b'{"model": "b"}')
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app, connection.scope, connection.receive, connection.send)
        while not pool.switcher.statistics().waiting["b"]:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    lease.release()
    await pool.switcher.aclose()
    pool.check()


async def test_a_host_that_cancels_the_request_at_the_instant_of_its_grant_leaves_nothing_behind(pool: Pool) -> None:
    app = LLMuxMiddleware(Inner(pool), pool.switcher)
    connection = Connection(b'{"model": "b"}')
    gate = pool.backends["b"].gate("ready")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app, connection.scope, connection.receive, connection.send)
        await gate.entered.wait()
        gate.open.set()
        while not pool.switcher.statistics().in_flight["b"]:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    await pool.switcher.aclose()
    pool.check()


async def test_the_inner_app_sees_that_the_client_left_though_the_middleware_saw_it_first(pool: Pool) -> None:
    seen: list[str] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"], (await receive())["type"]])

    connection = Connection(b'{"model": "b"}')
    gate = pool.backends["b"].gate("ready")
    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(LLMuxMiddleware(inner, pool.switcher), connection.scope, connection.receive, connection.send)
            await gate.entered.wait()
            # In one step: the lease is granted and the client leaves.
            gate.open.set()
            while not pool.switcher.statistics().in_flight["b"]:
                await anyio.lowlevel.checkpoint()
            connection.gone.set()
    await pool.switcher.aclose()
    pool.check()
    assert seen in ([], ["http.request", "http.disconnect", "http.disconnect"])


async def test_an_app_that_raises_gives_its_lease_back(pool: Pool) -> None:
    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    connection = Connection(b'{"model": "a"}')
    with pytest.raises(ZeroDivisionError):
        await call(LLMuxMiddleware(inner, pool.switcher), connection)
    pool.check()


async def test_an_error_of_ours_after_the_answer_has_begun_is_not_answered_twice(pool: Pool) -> None:
    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise QueueTimeoutError("a", 1.0, "of the inner app's own making")

    connection = Connection(b'{"model": "a"}')
    with pytest.raises(QueueTimeoutError):
        await call(LLMuxMiddleware(inner, pool.switcher), connection)
    assert len(connection.sent) == 1


async def test_a_failed_switch_is_answered_in_openais_shape(pool: Pool) -> None:
    pool.backends["b"].fail("wake", BackendError("out of memory"), times=2)
    connection = Connection(b'{"model": "b"}')
    await call(LLMuxMiddleware(Inner(pool), pool.switcher), connection)
    assert connection.status == 503
    assert connection.error["code"] == "model_switch_failed"
    assert "out of memory" in connection.error["message"]
    assert (b"retry-after", b"1") in connection.sent[0]["headers"]


@pytest.mark.parametrize(
    ("path", "root", "route"),
    [
        ("/v1/models", "", "/v1/models"),
        ("/llm/v1/models", "/llm", "/v1/models"),
        ("/llm/v1/models", "/llm/", "/v1/models"),
        ("/v1/models", "/llm", "/v1/models"),
        ("/llmore/v1", "/llm", "/llmore/v1"),
        ("/llm", "/llm", "/"),
        ("/v1/models/", "", "/v1/models"),
        ("/llm/v1/models/", "/llm", "/v1/models"),
        ("v1/models", "", "/v1/models"),
        ("v1/models/", "", "/v1/models"),
        ("//v1/models", "", "//v1/models"),
        ("/", "", "/"),
        ("", "", "/"),
    ],
)
async def test_the_path_below_the_mount_is_found(path: str, root: str, route: str) -> None:
    assert route_path({"path": path, "root_path": root}) == route


async def test_a_request_that_is_sent_once_more_does_not_wait_for_longer_than_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool(awake="a", request_timeouts={"a": 10.0})
    acquire, limits, bodies = pool.switcher.acquire, [], []

    async def slow_acquire(model: str, *, timeout: float | None = None, priority: str | None = None) -> Lease:
        limits.append(timeout)
        lease = await acquire(model, timeout=timeout, priority=priority)
        lease.waited = 4.0
        return lease

    async def break_down_once(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append((await receive())["body"])
        if len(bodies) == 1:
            pool.switcher.distrust()  # as the relay does: so it has to wait again
            raise UpstreamError("a", "broke off.", may_retry=True)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"yes"})

    monkeypatch.setattr(pool.switcher, "acquire", slow_acquire)
    connection = Connection(b'{"model": "a"}')
    middleware = LLMuxMiddleware(break_down_once, pool.switcher)
    with anyio.fail_after(LIMIT):
        await middleware(connection.scope, connection.receive, connection.send)
        await pool.switcher.aclose()
    assert (connection.status, connection.body) == (200, b"yes")
    assert bodies == [b'{"model": "a"}'] * 2
    assert limits == [10.0, 6.0]
    pool.check()
