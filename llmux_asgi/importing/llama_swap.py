"""llama-swap's configurations: each model is a command line, which is started for a request and ended for another model's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ..access import hash_key
from ._command import Command, split_command, without_comments
from ._draft import Draft, list_at, mapping_at, number_at
from ._hooks import process_hooks
from ._macros import expand, used_macros
from .errors import ConfigImportError

__all__ = ["convert_llama_swap"]

_LOCAL = ("localhost", "127.0.0.1", "::1")
_STEP = 30
"""Head start of a priority over the next lower one, in seconds."""
_CONTAINER_STOP = 60
"""Time that a container has to end in, in seconds: if its client is killed, it stays."""


def convert_llama_swap(raw: Mapping[str, Any], environment: Mapping[str, str]) -> Draft:
    """Convert a configuration of llama-swap. `environment` is what `${env.NAME}` stands for. Raises `ConfigImportError`."""
    draft = Draft()
    models = mapping_at(raw, "models")
    ports = _Ports(raw, models)
    for name, model in models.items():
        draft.config["models"][name] = _Model(name, model, raw, environment, ports, draft).convert()
    _preload(raw, draft)
    if raw.get("sendLoadingState") or any(model.get("sendLoadingState") for model in models.values()):
        draft.config["loading_notice"] = "events"
        draft.config["limits"] = {"heartbeat": 1}
    _priorities(raw, draft)
    _keys(raw, environment, draft)
    draft.config["policy"] = {"name": "gated_quantum", "request_timeout": None}
    return draft


class _Ports:
    """Hands out ports to servers that need a fixed one, as llama-swap does: from `startPort` on."""

    def __init__(self, raw: Mapping[str, Any], models: Mapping[str, Any]) -> None:
        self._next = int(number_at(raw, "startPort") or 5800)
        said = " ".join(str(model.get("proxy", "")) for model in models.values())
        self._taken = {int(port) for port in re.findall(r":(\d+)", said)}
        self.owners: dict[str, str] = {}
        """Which model is served at an address."""

    def take(self) -> int:
        while self._next in self._taken:
            self._next += 1
        self._taken.add(self._next)
        return self._next


class _Model:
    """The conversion of one model."""

    def __init__(
        self,
        name: str,
        model: Mapping[str, Any],
        raw: Mapping[str, Any],
        environment: Mapping[str, str],
        ports: _Ports,
        draft: Draft,
    ) -> None:
        self.where = f"models.{name}."
        self.name, self.model, self.raw, self.draft, self.ports = name, model, raw, draft, ports
        self._macros = {**mapping_at(raw, "macros"), **mapping_at(model, "macros", self.where), "MODEL_ID": name}
        self._environment = environment

    def convert(self) -> dict[str, Any]:
        # Comments first: a macro in one may have several lines.
        text = without_comments(str(self.model.get("cmd") or ""))
        command = Command(split_command(self._expand(text, f"{self.where}cmd"), f"{self.where}cmd"))
        uses_port = "PORT" in self._macros_in(text)
        served = self._text("useModelName")
        router = None
        if command.kind == "llama.cpp" and not (self._is_router(command) or (router := command.to_router())):
            return self._by_hooks(command, uses_port, "the gateway cannot tell llama-server's router the name of this model")
        if command.kind == "other":
            return self._by_hooks(command, uses_port, "the gateway has no way to put this kind of server to sleep")
        command.prepare()
        url = self._url(command, uses_port)
        if router:
            if served and served != router:
                self.draft.say(f"{self.where}useModelName", f"llama-server's router calls the model {router}")
            served = router
        elif not served and command.kind == "vllm":
            served = self._name_in_vllm(command)
        level = self._sleep_level(command)
        for note in command.notes:
            self.draft.say(f"{self.where}cmd", note)
        kind = {} if command.kind == "vllm" else {"server": command.kind}
        return {
            "command": command.words,
            **({"url": url} if url else {}),
            **({"env": env} if (env := self._env()) else {}),
            **kind,
            **self._names(served),
            **self._parameters(),
            **self._ttl(),
            **({"sleep_level": level} if level else {}),
            **self._timeouts(loads="start", wakes_by_loading=command.kind == "llama.cpp", container=command.container),
        }

    def _by_hooks(self, command: Command, uses_port: bool, why: str) -> dict[str, Any]:
        url = self._url(command, uses_port, fixed=True)
        port = str(urlsplit(url).port)
        words = [word.replace("{port}", port) for word in command.words]
        check = self._text("checkEndpoint") or "/health"
        stop = split_command(self._text("cmdStop"), f"{self.where}cmdStop") if self.model.get("cmdStop") else None
        env = {key: value.replace("{port}", port) for key, value in self._env().items()}
        self.draft.say(f"{self.where}cmd", f"`hooks` run it, because {why}; its output goes to a file beside its process id")
        for key in ("checkEndpoint", "cmdStop"):
            if key in self.model:
                self.draft.say(f"{self.where}{key}", "in `hooks`", status="converted")
        hooks = process_hooks(self.name, words, env=env, check=None if check == "none" else url.rstrip("/") + check, stop=stop)
        return {
            "url": url,
            "hooks": hooks,
            **self._names(self._text("useModelName")),
            **self._parameters(),
            **self._ttl(),
            **self._timeouts(loads="wake", wakes_by_loading=True),
        }

    def _url(self, command: Command, uses_port: bool, *, fixed: bool = False) -> str:
        """Return the server's root; empty: the gateway may choose the port."""
        proxy = self._text("proxy") or "http://localhost:{port}"
        local = any(f"//{host}:" in proxy.replace("[", "").replace("]", "") for host in _LOCAL)
        if "{port}" in proxy and uses_port and local and not fixed:
            return ""
        if "{port}" in proxy:
            said = command.option("--port")[:1]
            port = int(said[0]) if said and said[0].isdigit() else self.ports.take()
            if not uses_port and not said:
                self.draft.say(f"{self.where}proxy", f"the command says no port: make it listen on {port}, or correct `url`")
            proxy = proxy.replace("{port}", str(port))
        try:
            parts = urlsplit(proxy)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            raise ConfigImportError(f"{self.where}proxy: {proxy!r} is not a URL") from None
        if not parts.hostname:
            raise ConfigImportError(f"{self.where}proxy: {proxy!r} is not a URL")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        host = "127.0.0.1" if host == "localhost" else host
        path = re.sub(r"/v1(/.*)?$", "", parts.path.rstrip("/"))
        url = f"{parts.scheme}://{host}:{port}{path}"
        if (owner := self.ports.owners.setdefault(url, self.name)) == self.name:
            return url
        # llama-swap allows one port for all models. Here a sleeping server keeps its own.
        pattern = rf"(?<!\d){port}(?!\d)"
        if host not in ("127.0.0.1", "[::1]") or not any(re.search(pattern, word) for word in command.words):
            raise ConfigImportError(f"{self.where}proxy: {url} is the server of models.{owner} too: give it another port")
        command.words = [re.sub(pattern, "{port}", word) for word in command.words]
        self.draft.say(f"{self.where}proxy", f"{url} is the server of models.{owner}: this one has a port of its own")
        return f"{parts.scheme}://{host}:{self.ports.take()}{path}" if fixed else ""

    def _sleep_level(self, command: Command) -> int | None:
        if command.kind != "vllm":
            return None
        if command.sleeps:
            return 1
        self.draft.say(
            f"{self.where}cmd",
            "`sleep_level: 3` ends the process, as llama-swap does; 1 keeps the weights in CPU memory and wakes in seconds",
        )
        return 3

    def _name_in_vllm(self, command: Command) -> str:
        names = command.vllm_names
        if not names or self.name in names:
            return ""
        self.draft.say(f"{self.where}cmd", f"vLLM calls the model {names[0]}: `served_name`")
        return names[0]

    @staticmethod
    def _is_router(command: Command) -> bool:
        return command.has("--models-dir", "--models-preset")

    def _names(self, served: str) -> dict[str, Any]:
        names: list[str] = []
        given = list_at(self.model, "aliases", self.where)
        for each in [*given, *mapping_at(mapping_at(self.model, "filters", self.where), "setParamsByID", self.where)]:
            alias = self._expand(str(each.get("id", "") if isinstance(each, Mapping) else each), f"{self.where}aliases")
            if alias and alias != self.name and alias not in names:
                names.append(alias)
        return {**({"served_name": served} if served and served != self.name else {}), **({"aliases": names} if names else {})}

    def _parameters(self) -> dict[str, Any]:
        filters = mapping_at(self.model, "filters", self.where)
        where = f"{self.where}filters."
        forced = self._forced(mapping_at(filters, "setParams", where), f"{where}setParams")
        strip = dict.fromkeys(name.strip() for name in self._expand(str(filters.get("stripParams") or ""), where).split(","))
        by_name: dict[str, dict[str, Any]] = {}
        for each in (by_id := mapping_at(filters, "setParamsByID", where)):
            name = self._expand(each, f"{where}setParamsByID")
            if own := self._forced(mapping_at(by_id, each, f"{where}setParamsByID."), f"{where}setParamsByID"):
                by_name[name] = {"forced": own}
        found: dict[str, Any] = {
            "forced": forced,
            "strip": [name for name in strip if name and name not in forced and name not in ("model", "stream")],
            "aliases": by_name,
        }
        found = {key: value for key, value in found.items() if value}
        return {"parameters": found} if found else {}

    def _forced(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {name: self._values(value, where) for name, value in given.items() if name not in ("model", "stream")}

    def _values(self, value: Any, where: str) -> Any:
        """Replace macros in the texts of a value. A text that is a macro becomes what that is, a number for instance."""
        match value:
            case str():
                if (only := re.fullmatch(r"\$\{([\w-]+)\}", value)) and isinstance(self._macros.get(only[1]), int | float):
                    return self._macros[only[1]]
                return self._expand(value, where)
            case list():
                return [self._values(each, where) for each in value]
            case dict():
                return {str(name): self._values(each, where) for name, each in value.items()}
        return value

    def _ttl(self) -> dict[str, Any]:
        own = number_at(self.model, "ttl", self.where)
        ttl = number_at(self.raw, "globalTTL") if own is None or own < 0 else own
        return {"ttl": ttl} if ttl and ttl > 0 else {}

    def _env(self) -> dict[str, str]:
        env: dict[str, str] = {}
        for each in list_at(self.model, "env", self.where):
            name, equals, value = self._expand(str(each), f"{self.where}env").partition("=")
            if not equals:
                raise ConfigImportError(f"{self.where}env: expected NAME=value, got {each!r}")
            env[name] = value
        return env

    def _timeouts(self, *, loads: str, wakes_by_loading: bool, container: bool = False) -> dict[str, Any]:
        given = mapping_at(self.model, "timeouts", self.where)
        found: dict[str, Any] = {}
        if connect := number_at(given, "connect", f"{self.where}timeouts."):
            found["connect"] = connect
        if (read := number_at(given, "responseHeader", f"{self.where}timeouts.")) is not None:
            found["read"] = read or None
        if health := number_at(self.raw, "healthCheckTimeout"):
            found[loads] = max(health, 15)
            if wakes_by_loading:
                found["wake"] = max(health, 15)
        stop = number_at(self.model, "unloadTimeout", self.where) or number_at(self.raw, "unloadTimeout")
        if stop := stop or (_CONTAINER_STOP if container else None):
            # Hooks end the server in their command `sleep`.
            found["sleep" if loads == "wake" else "stop"] = stop
        return {"timeouts": found} if found else {}

    def _text(self, key: str) -> str:
        value = self.model.get(key)
        return "" if value is None else self._expand(str(value), f"{self.where}{key}")

    def _expand(self, text: str, where: str) -> str:
        return expand(text, {**self._macros, "PORT": "{port}"}, self._environment, where)

    def _macros_in(self, text: str) -> set[str]:
        """The macros that a text uses, also by way of others."""
        found: set[str] = set()
        new = used_macros(text)
        while new:
            found |= new
            new = {inner for name in new for inner in used_macros(str(self._macros.get(name, "")))} - found
        return found


def _preload(raw: Mapping[str, Any], draft: Draft) -> None:
    wanted = list_at(mapping_at(mapping_at(raw, "hooks"), "on_startup", "hooks."), "preload", "hooks.on_startup.")
    lost = []
    for name in wanted:
        model = draft.config["models"].get(str(name))
        if model is not None:
            model["preload"] = True
        else:
            lost.append(str(name))
    if lost:
        draft.say("hooks.on_startup.preload", f"not {', '.join(lost)}: no model of that name")


def _keys(raw: Mapping[str, Any], environment: Mapping[str, str], draft: Draft) -> None:
    keys: dict[str, dict[str, str]] = {}
    for number, each in enumerate(list_at(raw, "apiKeys"), 1):
        if variable := re.fullmatch(r"\$\{env\.(\w+)\}", str(each)):
            keys[f"key{number}"] = {"env": variable[1]}
        else:
            key = expand(str(each), mapping_at(raw, "macros"), environment, "apiKeys")
            keys[f"key{number}"] = {"hash": hash_key(key)}
    if keys:
        draft.config["access"] = {"keys": keys}


def _priorities(raw: Mapping[str, Any], draft: Draft) -> None:
    settings = mapping_at(mapping_at(mapping_at(raw, "routing"), "scheduler"), "settings")
    given = mapping_at(mapping_at(settings, "fifo"), "priority")
    models = draft.config["models"]
    values = {name: number_at(given, name, "priority.") or 0 for name in given if name in models}
    if not any(values.values()):
        return
    steps = {value: step for step, value in enumerate(sorted({0, *values.values()}))}
    draft.config["priorities"] = {f"p{value:g}": step * _STEP for value, step in steps.items()}
    for name, model in models.items():
        model["priority"] = f"p{values.get(name, 0):g}"
