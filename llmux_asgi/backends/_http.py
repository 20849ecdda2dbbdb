"""Control calls over HTTP: time limits, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import httpx
import msgspec

from .._body import Body
from ..config import TimeoutsConfig
from ..exceptions import BackendError, BackendTimeoutError, BackendUnreachableError, BackendUnsupportedError

__all__ = ["POLL_FIRST", "POLL_LONGEST", "ControlClient", "limit"]

POLL_FIRST, POLL_LONGEST = 0.001, 0.1
"""Seconds between two questions whether a server is done: doubling from the first to the longest."""


class ControlClient:
    """Sends control calls to the server at `url`, with its `api_key` if it has one.

    `hint` completes the error for a route that does not exist.
    """

    def __init__(self, url: str, timeouts: TimeoutsConfig, *, hint: str, api_key: str | None = None) -> None:
        self.url = url
        self._timeouts = timeouts
        self._hint = hint
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self._client: httpx.AsyncClient | None = None

    def retune(self, timeouts: TimeoutsConfig) -> None:
        """Go by other time limits from the next call on."""
        self._timeouts = timeouts

    async def aclose(self) -> None:
        """Close the HTTP client; the next call opens a new one."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def ask(self, path: str) -> httpx.Response:
        """Send a probe, and once more if its connection breaks: a process that is ending may accept one to the last."""
        try:
            return await self.call("GET", path, timeout=self._timeouts.probe)
        except BackendUnreachableError:
            raise
        except BackendError as exc:
            if not isinstance(exc.__cause__, (httpx.NetworkError, httpx.RemoteProtocolError)):
                raise
        await anyio.sleep(POLL_LONGEST)
        return await self.call("GET", path, timeout=self._timeouts.probe)

    async def post(self, path: str, params: dict[str, str] | None = None, *, json: object = None) -> httpx.Response:
        """Send a step. It has no limit of its own: the caller sets one with `limit`."""
        return await self.call("POST", path, params=params, json=json, timeout=None)

    async def call(
        self,
        method: str,
        path: str,
        *,
        timeout: float | None,
        params: dict[str, str] | None = None,
        json: object = None,
    ) -> httpx.Response:
        """Send one call. Raises `BackendError` unless the answer is a success, and the kind of it that tells why."""
        if self._client is None:
            # No connection is kept: switches are rarer than a server's keep-alive timeout, and a stale one would fail the
            # switch. trust_env is off so that a proxy of the environment never sees control calls.
            # To load the certificates takes 20 ms in which the event loop stands still: only where there is need to.
            limits = httpx.Limits(max_keepalive_connections=0)
            self._client = httpx.AsyncClient(trust_env=False, limits=limits, verify=self.url.startswith("https:"))
        timeouts = httpx.Timeout(None, connect=self._timeouts.connect)
        call = f"{method} {path}"
        content = b"" if json is None else msgspec.json.encode(json)
        body, headers = Body([content]), {"content-length": str(len(content)), **self._headers}
        if content:
            headers["content-type"] = "application/json"
        try:
            with anyio.fail_after(timeout):
                response = await self._client.request(
                    method, self.url + path, params=params or None, content=body, headers=headers, timeout=timeouts
                )
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            if isinstance(exc, httpx.ConnectTimeout) or not _refused(exc):
                raise BackendTimeoutError(f"{self.url}: no connection for {call}: {exc or 'timed out'}") from exc
            raise BackendUnreachableError(f"{self.url}: nothing listens there ({call}). Is the server running?") from exc
        except TimeoutError as exc:
            raise BackendTimeoutError(f"{self.url}: {call} was not answered in {timeout:.3g} s") from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise BackendError(f"{self.url}: {call} failed: {exc or type(exc).__name__}") from exc
        if response.status_code == 404:
            raise BackendUnsupportedError(f"{self.url}: {call} answered 404. {self._hint}")
        if not response.is_success:
            detail = " ".join(response.text.split())[:200]
            raise BackendError(f"{self.url}: {call} answered {response.status_code}: {detail}")
        return response


@contextmanager
def limit(seconds: float, what: str) -> Iterator[None]:
    """Raise `BackendTimeoutError` if the block takes longer than `seconds`; `what` begins its message."""
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError:
        raise BackendTimeoutError(f"{what} took longer than {seconds:.3g} s") from None


def _refused(exc: BaseException) -> bool:
    """Say whether a failed connection was refused, which proves that no process listens, at every address tried."""
    if isinstance(exc, BaseExceptionGroup):
        return all(_refused(each) for each in exc.exceptions)
    if isinstance(exc, OSError) and exc.errno is not None:
        return isinstance(exc, ConnectionRefusedError)
    cause = exc.__cause__ or exc.__context__
    return cause is not None and _refused(cause)
