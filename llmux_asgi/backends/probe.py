"""A server that is asked something after each wake, before it gets any request of a client."""

from __future__ import annotations

import logging
from typing import Literal

import msgspec

from ..config import TimeoutsConfig, WarmUpConfig
from ..exceptions import BackendError, BackendUnsupportedError
from ._http import ControlClient, limit
from ._protocol import Backend, BackendState, FreezingBackend, TunableBackend

__all__ = ["FINGERPRINT_TOKENS", "ProbedBackend", "say"]

logger = logging.getLogger(__name__)

_PROMPT = "1 2 3 4 5 6 7 8"
FINGERPRINT_TOKENS = 16
_HINT = "A probe needs a model that serves /v1/completions."


class _Choice(msgspec.Struct):
    text: str


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class ProbedBackend:
    """`server`, with a probe after each wake (one token, or a fingerprint), a request that warms it up, or both.

    The fingerprint is what the model says to a fixed prompt, the likeliest token each time. If it is not the one that was
    taken when the model was first seen awake, its weights have not come back: it is put to sleep at level 2, which makes the
    next wake read them from disk again, and this one fails. If the warm-up fails, that is logged, and the model serves.
    """

    def __init__(
        self,
        server: Backend,
        url: str,
        served_name: str,
        kind: Literal["none", "token", "fingerprint"],
        *,
        warm_up: WarmUpConfig | None = None,
        timeouts: TimeoutsConfig | None = None,
        api_key: str | None = None,
    ) -> None:
        self._server = server
        self._served_name = served_name
        self._kind = kind
        self._warm_up = warm_up
        self._timeouts = timeouts or TimeoutsConfig()
        self._client = ControlClient(url, self._timeouts, hint=_HINT, api_key=api_key)
        self._fingerprint: str | None = None

    def __str__(self) -> str:
        return str(self._server)

    async def state(self) -> BackendState:
        """Ask the server."""
        return await self._server.state()

    async def sleep(self, level: int) -> None:
        """Put the server to sleep; take the fingerprint before, if there is none yet."""
        await self._take_fingerprint()
        await self._server.sleep(level)

    async def require_freezing(self) -> None:
        """Ask the server."""
        await self._freezing().require_freezing()

    async def freeze(self, level: int) -> None:
        """Have the server keep its requests while it sleeps; take the fingerprint before, if there is none yet."""
        await self._take_fingerprint()
        await self._freezing().freeze(level)

    def _freezing(self) -> FreezingBackend:
        if not isinstance(self._server, FreezingBackend):
            raise BackendUnsupportedError(f"{self}: this kind of server cannot keep its requests while it sleeps")
        return self._server

    async def _take_fingerprint(self) -> None:
        if self._kind == "fingerprint" and self._fingerprint is None:
            try:
                if await self._server.state() is BackendState.AWAKE:
                    self._fingerprint = await self._generate(FINGERPRINT_TOKENS)
            except BackendError as exc:
                logger.warning("no fingerprint was taken of %r: %s", self._served_name, exc)

    async def wake(self) -> None:
        """Wake the server."""
        await self._server.wake()

    async def ready(self) -> None:
        """Return when the server has answered the probe. Raises `BackendError` if it does not, or not as it did."""
        await self._server.ready()
        if self._kind != "none":
            await self._probe()
        if self._warm_up is not None:
            await self._send(self._warm_up)

    async def _probe(self) -> None:
        said = await self._generate(1 if self._kind == "token" else FINGERPRINT_TOKENS)
        if self._kind == "token":
            return
        if self._fingerprint is None:
            self._fingerprint = said
        elif said != self._fingerprint:
            await self._server.sleep(2)
            raise BackendError(
                f"{self}: the model does not answer as it did before it slept: its weights have not come back. It said "
                f"{said[:60]!r} instead of {self._fingerprint[:60]!r}."
            )

    def retune(self, timeouts: TimeoutsConfig, *, freezes: bool) -> None:
        """Go by other time limits from the next call on."""
        self._timeouts = timeouts
        self._client.retune(timeouts)
        if isinstance(self._server, TunableBackend):
            self._server.retune(timeouts, freezes=freezes)

    async def _send(self, warm_up: WarmUpConfig) -> None:
        try:
            with limit(self._timeouts.wake, f"{self._client.url}: the warm-up of the model"):
                await self._client.post(warm_up.path, json=warm_up.request(self._served_name))
        except BackendError as exc:
            logger.warning("the warm-up of %r failed, it serves all the same: %s", self._served_name, exc)

    async def aclose(self) -> None:
        """Close connections."""
        await self._client.aclose()
        await self._server.aclose()

    async def _generate(self, tokens: int) -> str:
        return await say(self._client, self._served_name, tokens, self._timeouts.wake)


async def say(client: ControlClient, model: str, tokens: int, seconds: float) -> str:
    """Have an awake model go on with a fixed prompt, the likeliest token each time, and return its text: a fingerprint.

    Raises `BackendError` if there is no answer within `seconds`, or none that can be read.
    """
    body = {"model": model, "prompt": _PROMPT, "max_tokens": tokens, "temperature": 0, "seed": 0}
    with limit(seconds, f"{client.url}: the probe of the model"):
        response = await client.post("/v1/completions", json=body)
    try:
        return msgspec.json.decode(response.content, type=_Completion).choices[0].text
    except (msgspec.DecodeError, IndexError) as exc:
        raise BackendError(f"{client.url}: the probe of the model gave no usable answer: {exc}") from None
