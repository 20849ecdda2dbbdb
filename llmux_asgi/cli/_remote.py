"""The admin API of a running gateway, as the commands that talk to one use it."""

from __future__ import annotations

import difflib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Annotated, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote

import anyio
import httpx
import msgspec
import typer

from ..config import SecretConfig, load_config, read_secret
from ..exceptions import ConfigError
from ._app import FAILED, UNUSABLE, fail, progress_console
from ._remote_status import GatewayStatus, ModelStatus
from ._remote_text import doing, printable
from ._sse import Event, EventParser

__all__ = [
    "Address",
    "ConfigOption",
    "Gateway",
    "JsonOption",
    "KeyFileOption",
    "Options",
    "RemoteError",
    "UrlOption",
    "ask",
    "complete_model",
    "connect",
    "decoded",
    "find_gateway",
    "resolve",
]

T = TypeVar("T")
Options: TypeAlias = tuple[str | None, Path | None, Path | None]
"""URL, key file and configuration, as a command was given them."""

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_PREFIX = "/admin"
KEY_VARIABLE = "LLMUX_ADMIN_KEY"

_CONNECT = 5.0
"""Seconds."""
_ANSWER = 10.0
"""Seconds for an answer to what the gateway answers at once."""
_SILENCE = 30.0
"""Seconds without a byte, after which a stream of events counts as lost: the gateway sends a comment every 10."""
_STATUS_INTERVAL = 0.5
"""Seconds between two looks at what a long operation is at."""
_COMPLETION = 1.0
"""Seconds that the shell waits for names at most."""

UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="LLMUX_URL",
        metavar="URL",
        show_default=f"{DEFAULT_URL}{DEFAULT_PREFIX}",
        help="The gateway's admin API, with its prefix.",
    ),
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", help=f"File with the admin key; default: the variable {KEY_VARIABLE}."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="The gateway's configuration: its admin prefix and key are taken."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class RemoteError(Exception):
    """What was asked of the gateway did not happen. `status` is the command's exit status, `code` HTTP's, if any."""

    def __init__(self, message: str, status: int, code: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Address(NamedTuple):
    """Where the admin API is, and the key for it."""

    url: str
    key: str | None


def find_gateway(url: str | None, key_file: Path | None, config: Path | None) -> Address:
    """Put together what options, environment and configuration say. Raises `ConfigError`."""
    prefix, key = DEFAULT_PREFIX, None
    if config is not None:
        prefix, key = _from_config(config)
    if key_file is not None:
        key = read_secret(SecretConfig(file=str(key_file)), "--key-file")
    elif os.environ.get(KEY_VARIABLE):
        key = read_secret(SecretConfig(env=KEY_VARIABLE), KEY_VARIABLE)
    try:
        parts = httpx.URL(url or DEFAULT_URL)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.userinfo:
        raise ConfigError(f"--url {url}: write it as in {DEFAULT_URL}{DEFAULT_PREFIX}")
    root = str(parts).partition("#")[0].rstrip("/")
    return Address(root + prefix if parts.path == "/" else root, key)


def _from_config(path: Path) -> tuple[str, str | None]:
    """Return prefix and key. The key is `None` if what is known of each is its hash, or nothing here."""
    admin = load_config(path).admin
    if admin is None:
        raise ConfigError(f"{path}: it has no admin:, so its gateway has no admin API")
    for name, source in admin.keys.items():
        if source.hash is None:
            with suppress(ConfigError):  # not a key of this machine
                key = read_secret(SecretConfig(env=source.env, file=source.file), f"admin.keys.{name}")
                if not key.startswith("sha256:"):
                    return admin.prefix, key
    return admin.prefix, None


@asynccontextmanager
async def connect(address: Address) -> AsyncIterator[Gateway]:
    """Connections to a gateway, closed in the end. Nothing is sent yet."""
    headers = {"accept": "application/json", "user-agent": "llmux-asgi"}
    if address.key is not None:
        headers["authorization"] = f"Bearer {address.key}"
    host = httpx.URL(address.url).host
    # A proxy of the environment is for other hosts.
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    timeout = httpx.Timeout(_ANSWER, connect=_CONNECT)
    secure = address.url.startswith("https:")  # without it no certificates are loaded, which takes a while
    async with httpx.AsyncClient(headers=headers, timeout=timeout, trust_env=not loopback, verify=secure) as client:
        yield Gateway(client, address.url)


class Gateway:
    """A running gateway. Every method raises `RemoteError`."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self.url = url

    async def get(self, path: str) -> bytes:
        """Ask for something that is there."""
        return await self._send("GET", path, _ANSWER)

    async def post(self, path: str, *, method: str = "POST") -> bytes:
        """Have something done. Waits for as long as it takes."""
        return await self._send(method, path, None)

    async def status(self) -> GatewayStatus:
        """The status object."""
        return decoded(await self.get("status"), GatewayStatus, self.url)

    async def operate(self, model: str, operation: str, *, method: str = "POST") -> bytes:
        """Have an operation done on a model, which may be named by an alias. Returns the model's object."""
        try:
            return await self.post(f"models/{quote(model, safe='')}/{operation}", method=method)
        except RemoteError as error:
            if error.code != 404:
                raise
            name = resolve((await self.status()).models, model)  # raises if it is the API that is not there
            if name == model:
                raise
        return await self.post(f"models/{quote(name, safe='')}/{operation}", method=method)

    async def events(self, after: str | None) -> AsyncGenerator[Event, None]:
        """Events after the one with this id, then those to come; `None`: from the oldest that is kept. Ends with an error."""
        headers = {"accept": "text/event-stream", **({} if after is None else {"last-event-id": after})}
        timeout = httpx.Timeout(_SILENCE, connect=_CONNECT)
        parser = EventParser()
        with _explained(self.url):
            async with self._client.stream("GET", f"{self.url}/api/events", headers=headers, timeout=timeout) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise _refused(answer, self.url)
                if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                    raise _no_admin_api(self.url)
                async for data in answer.aiter_bytes():
                    for event in parser.feed(data):
                        yield event
        raise RemoteError(f"{self.url} has ended the stream of events: the gateway stops", FAILED)

    async def _send(self, method: str, path: str, timeout: float | None) -> bytes:
        with _explained(self.url):
            limits = httpx.Timeout(timeout, connect=_CONNECT)
            answer = await self._client.request(method, f"{self.url}/api/{path}", timeout=limits)
        if answer.status_code != 200:
            raise _refused(answer, self.url)
        return answer.content


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way into a line that says what to do."""
    try:
        yield
    except httpx.ConnectError as error:
        mend = "Does the gateway run there? --url or LLMUX_URL says where it is"
        raise RemoteError(f"cannot reach {url}: {_reason(error)}. {mend}", FAILED) from None
    except httpx.TimeoutException:
        raise RemoteError(f"{url} did not answer in time", FAILED) from None
    except httpx.TransportError as error:
        raise RemoteError(f"{url}: the connection was lost: {_reason(error)}", FAILED) from None


def _reason(error: httpx.TransportError) -> str:
    text = str(error)
    if text in ("", "All connection attempts failed"):  # what anyio says of several addresses, and of one
        return "nothing listens there" if isinstance(error, httpx.ConnectError) else type(error).__name__
    return text


def _refused(answer: httpx.Response, url: str) -> RemoteError:
    """What an answer other than 200 means."""
    code = answer.status_code
    try:
        message = msgspec.json.decode(answer.content, type=_Refusal).error.message
    except msgspec.DecodeError:
        message = None
    if code == 401:
        if "authorization" not in answer.request.headers:
            return RemoteError(f"{url} wants an admin key: name its file by --key-file, or set {KEY_VARIABLE}", UNUSABLE, code)
        return RemoteError(f"{url} refuses the admin key: {message or 'is it one of admin.keys?'}", UNUSABLE, code)
    if (message is None and code < 500) or (code == 404 and "/api/models/" not in answer.request.url.path):
        return _no_admin_api(url, code)
    status = UNUSABLE if code in (400, 403, 404, 422) else FAILED
    return RemoteError(message or f"{url} answered {code}", status, code)


def _no_admin_api(url: str, code: int | None = None) -> RemoteError:
    return RemoteError(
        f"there is no admin API at {url}. Does the gateway's configuration have admin:, and the URL its prefix, "
        f"as in {DEFAULT_URL}{DEFAULT_PREFIX}?",
        UNUSABLE,
        code,
    )


class _Message(msgspec.Struct):
    message: str


class _Refusal(msgspec.Struct):
    error: _Message


def decoded(content: bytes, kind: type[T], url: str) -> T:
    """What an answer holds. Raises `RemoteError` if it is something else."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise RemoteError(f"{url} is no admin API that this version knows: {error}", FAILED) from None


def resolve(models: list[ModelStatus], name: str) -> str:
    """The model that goes by a name or an alias. Raises `RemoteError`, which names those that are spelled alike."""
    for model in models:
        if name == model.name or name in model.aliases:
            return model.name
    known = [each for model in models for each in (model.name, *model.aliases)]
    alike = difflib.get_close_matches(name, known, 3, 0.5) or [each for each in known if name.lower() in each.lower()][:3]
    hint = f"Did you mean {' or '.join(alike)}?" if alike else f"There are {', '.join(model.name for model in models)}"
    raise RemoteError(f"there is no model {name!r}. {hint}", UNUSABLE, 404)


def ask(
    command: str,
    options: Options,
    work: Callable[[Gateway], Awaitable[T]],
    busy: str | None = None,
) -> T:
    """Do some work with the gateway that `options` (URL, key file, configuration) name; what fails ends the command.

    On a terminal `busy` is shown meanwhile, with what the gateway says that it is doing.
    """
    progress = progress_console()
    try:
        address = find_gateway(*options)
        if busy is None or not progress.is_terminal:
            return anyio.run(_work, address, work)
        with progress.status(busy) as status:
            return anyio.run(_work, address, work, lambda now: status.update(f"{busy}: {now}"))
    except ConfigError as error:
        fail(f"{command}: {error}", UNUSABLE)
    except RemoteError as error:
        fail(f"{command}: {printable(str(error))}", error.status)


async def _work(address: Address, work: Callable[[Gateway], Awaitable[T]], update: Callable[[str], None] | None = None) -> T:
    async with connect(address) as gateway:
        if update is None:
            return await work(gateway)
        outcome: T | RemoteError
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_watch, gateway, update)
            try:
                outcome = await work(gateway)
            except RemoteError as error:
                outcome = error  # raised here it would come out as a group
            tasks.cancel_scope.cancel()
    if isinstance(outcome, RemoteError):
        raise outcome
    return outcome


async def _watch(gateway: Gateway, update: Callable[[str], None]) -> None:
    while True:
        with suppress(RemoteError):  # the work itself says what is wrong
            update(doing(await gateway.status()))
        await anyio.sleep(_STATUS_INTERVAL)


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """Names for the shell to complete: those of the gateway, if it answers at once."""

    async def names() -> list[str]:
        with anyio.move_on_after(_COMPLETION):
            async with connect(find_gateway(*(context.params.get(each) for each in ("url", "key_file", "config")))) as gateway:
                return [model.name for model in (await gateway.status()).models if model.name.startswith(incomplete)]
        return []

    try:
        return anyio.run(names)
    except (ConfigError, RemoteError, TypeError):
        return []
