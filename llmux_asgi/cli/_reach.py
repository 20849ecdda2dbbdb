"""What of a configuration the servers must be: each is asked, all at the same time, and what it says is explained."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import anyio
import httpx
import msgspec

from ..backends import Backend, BackendState, FreezingBackend, api_key_of, build_backend
from ..backends._http import ControlClient
from ..config import Config, ModelConfig
from ..exceptions import (
    BackendDeadError,
    BackendError,
    BackendTimeoutError,
    BackendUnsupportedError,
)
from ._findings import Finding, Kind, Level

__all__ = ["ServerReport", "look_at_servers"]

_INFO_SECONDS = 15.0
"""vLLM looks at the whole machine before it answers `/server_info` for the first time."""


class ServerReport(msgspec.Struct, kw_only=True):
    """What one server said."""

    model: str
    url: str | None
    server: str
    state: str
    """As `BackendState`; `unknown` if there was no clear answer, `managed` if the gateway starts it."""
    findings: list[Finding] = []


class _Card(msgspec.Struct):
    id: str


class _Cards(msgspec.Struct):
    data: list[_Card]


class _VersionAnswer(msgspec.Struct):
    version: str


class _ModelInfo(msgspec.Struct):
    enable_sleep_mode: bool | None = None


class _VllmInfo(msgspec.Struct):
    model_config: _ModelInfo | None = None


class _ServerInfo(msgspec.Struct):
    vllm_config: _VllmInfo | None = None


async def look_at_servers(config: Config, done: Callable[[str], None] = lambda model: None) -> list[ServerReport]:
    """Ask every server at once; returns their reports in the order of the configuration. `done` is told each that is over.

    Takes as long as the slowest: some `timeouts.connect` and `timeouts.probe` at most.
    """
    reports = {name: _report(name, model) for name, model in config.models.items()}

    async def look(name: str) -> None:
        await _Look(name, config, reports[name]).run()
        done(name)

    async with anyio.create_task_group() as tasks:
        for name in config.models:
            tasks.start_soon(look, name)
    found = list(reports.values())
    awake = [report.model for report in found if report.state == BackendState.AWAKE.value]
    if len(awake) > 1:
        sleeper = next(report for report in found if report.model == awake[-1])
        fault = f"{', '.join(awake)} are awake at once"
        mend = (
            "None is needed if the GPU has room: with its first request the gateway keeps the model that is asked for, and "
            "puts the others to sleep. Else put them to sleep before you start it"
        )
        sleeper.findings.append(Finding(level="warning", kind="several-awake", where="$.models", fault=fault, mend=mend))
    return found


def _report(name: str, model: ModelConfig) -> ServerReport:
    kind = "hooks" if model.hooks is not None else model.server
    return ServerReport(model=name, url=model.url, server=kind, state="unknown")


class _Look:
    """One look at one server."""

    def __init__(self, name: str, config: Config, report: ServerReport) -> None:
        self._name, self._config, self._report = name, config, report
        self._model = config.models[name]
        self._where = f"$.models.{name}"

    async def run(self) -> None:
        """Fill in the report."""
        if self._model.command is not None:
            self._report.state = "managed"
            await self._look_at_port()
            return
        level = self._model.sleep_level or self._config.policy.sleep_level
        plain = msgspec.structs.replace(self._model, probe="none", warm_up=None)
        backend = build_backend(self._name, plain, sleep_level=level)
        client = ControlClient(self._model.address, self._model.timeouts, hint="", api_key=api_key_of(self._name, self._model))
        try:
            await self._ask(backend, client)
        finally:
            await backend.aclose()
            await client.aclose()

    def _find(self, kind: Kind, fault: str, mend: str, *, key: str = "url", warn: bool = False) -> None:
        where = f"{self._where}.{key}" if not key.startswith("$") else key
        level: Level = "warning" if warn else "error"
        self._report.findings.append(Finding(level=level, kind=kind, where=where, fault=fault, mend=mend))

    async def _look_at_port(self) -> None:
        """A server that the gateway starts must find its port free. It is not started here: that may take minutes."""
        if self._model.url is None:
            return
        address = httpx.URL(self._model.url)
        try:
            with anyio.fail_after(self._model.timeouts.connect):
                async with await anyio.connect_tcp(address.host, address.port or 80):
                    pass
        except (OSError, TimeoutError):
            return
        fault = f"{self._model.address}: something listens there already, and the gateway is to start this model's server there"
        mend = "If that is not the gateway's own (one that runs now), end it, or write another port"
        self._find("port-taken", fault, mend, warn=True)

    async def _ask(self, backend: Backend, client: ControlClient) -> None:
        try:
            state = await backend.state()
        except BackendError as error:
            await self._explain(error, client)
            return
        self._report.state = state.value
        if state is BackendState.UNREACHABLE:
            fault = f"nothing listens at {self._model.address}"
            self._find("unreachable", fault, f"Start the server, or correct the address, {self._where[2:]}.url")
            return
        if self._model.hooks is not None:
            return
        if self._config.policy.drain == "preempt" and isinstance(backend, FreezingBackend):
            try:
                await backend.require_freezing()
            except BackendError as error:
                fault = _sentences(error)[0]
                mend = "Upgrade vLLM to 0.17 or later, or write policy.drain: wait"
                self._find("no-preempt", fault, mend, key="$.policy.drain")
        if self._model.server == "vllm":
            await self._look_for_sleep_mode(client)
        await self._look_for_name(client)

    async def _look_for_sleep_mode(self, client: ControlClient) -> None:
        try:
            answer = await client.call("GET", "/server_info", params={"config_format": "json"}, timeout=_INFO_SECONDS)
            told = msgspec.json.decode(answer.content, type=_ServerInfo)
        except (BackendError, msgspec.DecodeError):
            return  # older versions do not tell; then the first sleep does
        if (
            told.vllm_config is not None
            and (model := told.vllm_config.model_config) is not None
            and model.enable_sleep_mode is False
        ):
            fault = f"{self._model.address}: vLLM runs without sleep mode: its /sleep answers 200 and frees nothing"
            self._find("no-sleep-mode", fault, "Start vLLM with --enable-sleep-mode")

    async def _look_for_name(self, client: ControlClient) -> None:
        wanted = self._model.served_name or self._name
        try:
            answer = await client.ask("/v1/models")
            served = [card.id for card in msgspec.json.decode(answer.content, type=_Cards).data]
        except (BackendError, msgspec.DecodeError) as error:
            fault = f"{self._model.address}: the names of its models cannot be read: {_sentences(error)[0]}"
            mend = "If it asks for an API key, clients have to send it. Nothing else is needed"
            self._find("names-unknown", fault, mend, key="served_name", warn=True)
            return
        names = {*served, *(name.removesuffix(":latest") for name in served if self._model.server == "ollama")}
        if self._model.server == "llama.cpp" or wanted in names:  # llama.cpp's own check knows aliases too
            return
        fault = f"{self._model.address}: it serves no {wanted!r}, but {', '.join(map(repr, served)) or 'nothing'}"
        mend = "Start it with a model"
        if self._model.server == "ollama":
            mend = f"Run: ollama pull {wanted}"
        elif served:
            mend = (
                f"Write {self._where[2:]}.served_name: {json.dumps(served[0])}, or start it with --served-model-name {wanted}"
            )
        self._find("wrong-name", fault, mend, key="served_name")

    async def _explain(self, error: BackendError, client: ControlClient) -> None:
        """Say why a server gives no clear answer. The kind of the error tells, and where it does not, a question more."""
        fault, advice = _sentences(error)
        add = functools.partial(self._find, fault=fault)
        if self._model.hooks is not None:
            add("hook-failed", mend=advice or "Run the hook by hand; it has to exit with 0 or 1", key="hooks.alive")
        elif isinstance(error.__cause__, (httpx.ConnectError, httpx.ConnectTimeout)):
            add(
                "no-connection",
                mend="Correct the host in url; look whether the network or a firewall lets this machine through",
            )
        elif isinstance(error, BackendTimeoutError):
            mend = "Wait if it is loading its weights, start it again if it hangs; a slow network needs a longer timeouts.probe"
            add("hangs", mend=mend)
        elif isinstance(error, BackendDeadError):
            add("engine-dead", mend="Start the server again; its log says what it died of")
        elif isinstance(error.__cause__, httpx.HTTPError):
            add("not-http", mend="Correct the port in url: what listens there is no HTTP server, or ends connections at once")
        elif self._model.server == "vllm" and not await _answers(client, "/version", _VersionAnswer):
            other = await _recognise(client)
            mend = (
                f"It looks like {other}: write server: {other}"
                if other
                else "Correct the port in url, or name its kind: server"
            )
            self._find("not-vllm", f"{self._model.address}: an HTTP server, but not vLLM's: it tells no version", mend)
        elif isinstance(error, BackendUnsupportedError) and self._model.server == "vllm":
            if await _exists(client, "/is_sleeping"):
                add("unsafe-version", mend=advice)
            else:
                mend = "Start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment and with --enable-sleep-mode"
                self._find("no-dev-mode", f"{self._model.address}: vLLM runs without the sleep routes", mend)
        else:
            add("server-error", mend=advice or "Its log says why")


async def _answers(client: ControlClient, path: str, kind: type) -> bool:
    try:
        msgspec.json.decode((await client.ask(path)).content, type=kind)
    except (BackendError, msgspec.DecodeError):
        return False
    return True


async def _exists(client: ControlClient, path: str) -> bool:
    try:
        await client.ask(path)
    except BackendUnsupportedError:  # 404
        return False
    except BackendError:
        return True
    return True


async def _recognise(client: ControlClient) -> str | None:
    """What kind of server it is, if not vLLM's: by a route that only that one has."""
    routes = (("ollama", "/api/ps"), ("sglang", "/model_info"), ("sglang", "/get_model_info"), ("llama.cpp", "/models"))
    for kind, path in routes:
        if await _answers(client, path, dict):
            return kind
    return None


def _sentences(error: Exception) -> tuple[str, str]:
    """What an error says in its first sentence, and what it advises in those that follow."""
    fault, _, advice = str(error).partition(". ")
    return fault.removesuffix("."), advice.removesuffix(".")
