"""Access control around an ASGI app: who is it, what may they use, what have they used.

The client is authenticated before its body is read, so a stranger cannot make the gateway read 32 MB. When the model's name is
found, and before the request waits for its model, the middleware asks the `Grant` whether the client may use it and has
something left. What the request took is settled when the last byte of its answer is out, or when it ends in any other way.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._errors import describe, headers_before_the_body
from .._openai import PRIORITY_HEADER, Headers, is_done, without_credentials
from .._routes import shape_of
from ..config import AccessConfig, Config, load_keys
from ..exceptions import AuthenticationError, ConfigError, LLMuxError, PermissionDeniedError, quoted
from ._credentials import SUBPROTOCOL, find_credential, without_subprotocol
from ._identity import ANY_MODEL, Identity
from ._keys import KeyRing
from ._limits import Account, Charge
from ._usage import UsageMeter, estimate

__all__ = ["SCOPE_GRANT", "AccessControl", "Grant", "Identify"]

logger = logging.getLogger("llmux_asgi.access")

SCOPE_GRANT = "llmux.grant"
"""Key of the ASGI scope under which the app behind finds the `Grant` of its request. Not there: no access control is on."""

Identify: TypeAlias = Callable[[Scope], Identity | Awaitable[Identity | None] | None]
"""The host's own authentication: says who sends the request of an ASGI scope, `None`: it does not know."""

_MOST_ACCOUNTS = 10_000
"""From so many on, those that have nothing to remember are forgotten."""
_NO_KEY = "No API key came with the request. Send it as authorization: Bearer KEY, or as x-api-key: KEY."


class AccessControl:
    """Lets those in whom `identify` knows, or whose key `config.access` has.

    `resolve` gives the model that a name or an alias stands for.
    """

    def __init__(
        self,
        config: Config,
        resolve: Callable[[str], str | None],
        identify: Identify | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        access = config.access
        if identify is None and (access is None or not (access.keys or access.keys_file)):
            raise ConfigError("$.access: there are no keys, so nobody could use the gateway: name some, or leave access out")
        self._resolve = resolve
        self._identify = identify
        self._clock = clock
        self._ring = _ring(config)
        self._head_starts = config.priorities
        self._accounts: dict[tuple[str, str], Account] = {}
        self._most_accounts = _MOST_ACCOUNTS

    def reload(self) -> None:
        """Read all keys anew. Raises `ConfigError`, and goes on with those that it had."""
        self._ring.reload()

    def prepare(self, config: Config) -> Callable[[], None]:
        """Read the keys of another configuration. Raises `ConfigError`. What is returned changes over to them.

        What clients have used of their limits stays used.
        """
        ring = _ring(config)

        def change_over() -> None:
            self._ring, self._head_starts = ring, config.priorities

        return change_over

    def knows(self, key: str) -> bool:
        """Say whether it is a client's key."""
        return self._ring.find(key) is not None

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let `app` serve an HTTP or WebSocket connection, without the client's credentials, or refuse it."""
        try:
            account = await self._account(scope)
        except LLMuxError as exc:
            await _refuse(exc, scope, receive, send)
            return
        grant = Grant(account, self._resolve, self._head_starts, self._clock)
        headers = without_credentials(scope["headers"])
        inner = {**scope, "headers": headers, SCOPE_GRANT: grant}
        if scope["type"] == "websocket":
            inner["headers"] = without_subprotocol(headers)
            inner["subprotocols"] = [each for each in scope.get("subprotocols", ()) if not each.startswith(SUBPROTOCOL)]
        try:
            await app(inner, receive, grant.watch(send))
        finally:
            grant.close()

    async def _account(self, scope: Scope) -> Account:
        if self._identify is not None:
            said = self._identify(scope)
            identity = await said if inspect.isawaitable(said) else said
            if identity is not None:
                if identity.priority is not None and identity.priority not in self._head_starts:
                    raise ConfigError(f"The identity {identity.name!r} has a priority class that is not configured.")
                return self._account_of("host", identity)
        key = find_credential(scope["headers"], scope.get("subprotocols", ()))
        if key is None:
            raise AuthenticationError(_NO_KEY)
        self._ring.refresh(self._clock())
        identity = self._ring.find(key)
        if identity is None:
            raise AuthenticationError("The API key is not valid.")
        return self._account_of("key", identity)

    def _account_of(self, source: str, identity: Identity) -> Account:
        now = self._clock()
        account = self._accounts.get((source, identity.name))
        if account is None:
            if len(self._accounts) >= self._most_accounts:
                self._accounts = {name: each for name, each in self._accounts.items() if not each.is_fresh(now)}
                self._most_accounts = max(_MOST_ACCOUNTS, 2 * len(self._accounts))
            account = self._accounts[source, identity.name] = Account(identity, now)
        elif account.identity is not identity and account.identity != identity:
            account.update(identity, now)
        return account


def _ring(config: Config) -> KeyRing:
    access = config.access or AccessConfig()
    return KeyRing("access.keys", access.keys, access.keys_file, lambda path: load_keys(path, config))


class Grant:
    """What one request of a known client may do, and what it takes. Whatever becomes of the request, `close` ends it."""

    def __init__(
        self,
        account: Account,
        resolve: Callable[[str], str | None],
        head_starts: Mapping[str, float],
        clock: Callable[[], float],
    ) -> None:
        self._account = account
        self._resolve = resolve
        self._head_starts = head_starts
        self._clock = clock
        self._charge: Charge | None = None
        self._meter: UsageMeter | None = None
        self._reached = False
        self._status = 0
        self.send: Send
        """Where `watch` sends to; may be replaced."""
        self.identity = account.identity
        """Who sends the request."""

    def allows(self, model: str) -> bool:
        """Whether the client may use a model, given by its configured name."""
        models = self.identity.models
        return ANY_MODEL in models or any(self._resolve(each) == model for each in models)

    def resolve(self, name: str) -> str | None:
        """Return the model that a name or an alias stands for, `None` if there is none that the client may use."""
        model = self._resolve(name)
        return model if model is not None and self.allows(model) else None

    def require(self, named: str) -> None:
        """Raise `PermissionDeniedError` unless the client may use what it calls `named`.

        Who may use some models only is told the same of those that there are and of those that there are not.
        """
        if ANY_MODEL not in self.identity.models and not self.allows(self._resolve(named) or ""):
            message = (
                f"The key {self.identity.name!r} may not use the model {quoted(named)}. GET /v1/models lists those that it may."
            )
            raise PermissionDeniedError(message, code="model_not_allowed", param="model")

    def priority(self, asked: str | None) -> str | None:
        """Return the class to ask for in place of `asked`. Raises `PermissionDeniedError` if that is above the client's."""
        own = self.identity.priority
        if own is None or asked is None:
            return own or asked
        if self._head_starts.get(asked, 0.0) > self._head_starts[own]:
            message = f"The key {self.identity.name!r} may not ask for the priority {asked!r}: its own is {own!r}."
            raise PermissionDeniedError(message, code="priority_not_allowed", param=PRIORITY_HEADER.decode("ascii"))
        return asked

    def admit(self, body: bytes) -> None:
        """Take the request out of the client's limits. Raises `RateLimitError`."""
        limit = self.identity.tokens_per_minute
        if limit is None or not body:  # without a body nothing is to be generated: an answer is fetched, or given up
            self._charge = self._account.admit(0.0, self._clock())
            return
        # An image is many bytes and few tokens: no estimate is to shut a client out for longer than a minute.
        prompt, answer = estimate(body)
        self._charge = self._account.admit(min(limit, prompt + answer), self._clock())
        self._meter = UsageMeter(min(limit, prompt))

    def reach(self) -> None:
        """From now on a server works on the request: what it takes counts."""
        self._reached = True

    def watch(self, send: Send) -> Send:
        """Return a `send` that tells the client what it has left, and reads what the answer took."""
        self.send = send

        async def watched(message: Message) -> None:
            match message["type"]:
                case "http.response.start":
                    self._status = message["status"]
                    if not self._reached:
                        self.close()  # it is refused: the headers are to say that it took nothing
                    if limits := self.headers():
                        kept = [pair for pair in message.get("headers", ()) if not pair[0].lower().startswith(b"x-ratelimit-")]
                        message = {**message, "headers": [*kept, *limits]}
                case "http.response.body":
                    body = message.get("body", b"")
                    if self._meter is not None:
                        self._meter.feed(body)
                    # Before it is sent: a client that has its answer may send the next request at once.
                    if not message.get("more_body", False) or is_done(body):
                        self.close()
            await self.send(message)

        return watched

    def headers(self) -> Headers:
        """Return what tells the client what it has left."""
        return self._account.headers(self._clock())

    def close(self) -> None:
        """Give back what the request did not take. Never waits, and may be called again."""
        charge, self._charge = self._charge, None
        if charge is None:
            return
        now = self._clock()
        if not self._reached:
            charge.cancel(now)
        elif self._status >= 400 or self._meter is None:
            charge.settle(0.0, now)
        else:
            charge.settle(self._meter.tokens, now)


async def _refuse(exc: LLMuxError, scope: Scope, receive: Receive, send: Send) -> None:
    client: tuple[Any, ...] | None = scope.get("client")
    if isinstance(exc, AuthenticationError):
        logger.info("refused a request from %s: %s", client[0] if client else "an unknown address", exc)
    else:
        logger.error("%s", exc)
    answer = describe(exc, shape_of(scope["path"]))
    headers = headers_before_the_body(answer, scope)
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1008, "reason": "no valid API key"})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": answer.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": answer.body})
