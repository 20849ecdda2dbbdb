"""What can be configured: the classes, and what their values must be like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from ._access import AccessConfig, AdminConfig, KeyConfig, SecretConfig
from ._metrics import MetricsConfig
from ._parameters import ModelParametersConfig
from ._values import Name as _Name
from ._values import PositiveInt, PositiveSeconds, Seconds
from ._values import ValueConfigError as _ValueConfigError
from ._warm_up import WarmUpConfig

__all__ = [
    "POLICY_PARAMETERS",
    "ROUTERS",
    "Config",
    "CostsConfig",
    "DrainMode",
    "HooksConfig",
    "LimitsConfig",
    "LoadingNotice",
    "MemoryCheckKind",
    "MemoryConfig",
    "ModelConfig",
    "PolicyConfig",
    "PolicyName",
    "ProbeKind",
    "ServerKind",
    "SleepLevel",
    "Task",
    "TimeoutsConfig",
]

SleepLevel: TypeAlias = Literal[1, 2, 3]
ProbeKind: TypeAlias = Literal["none", "token", "fingerprint"]
MemoryCheckKind: TypeAlias = Literal["none", "nvml"]
ServerKind: TypeAlias = Literal["vllm", "sglang", "llama.cpp", "ollama"]
Task: TypeAlias = Literal["generate", "embed", "pooling", "classify", "score", "transcription", "realtime", "speech", "image"]
PolicyName: TypeAlias = Literal["fifo", "gated_quantum", "pressure", "throughput"]
_Command: TypeAlias = Annotated[tuple[_Name, ...], Meta(min_length=1)]

LoadingNotice: TypeAlias = Literal["none", "comments", "events"]
DrainMode: TypeAlias = Literal["wait", "preempt", "abort"]

POLICY_PARAMETERS: Mapping[PolicyName, tuple[str, ...]] = {
    "fifo": (),
    "gated_quantum": ("quantum", "linger"),
    "pressure": ("quantum", "linger", "max_wait"),
    "throughput": ("linger", "max_wait"),
}
"""The settings that only some policies have."""

ROUTERS: tuple[ServerKind, ...] = ("llama.cpp", "ollama")
"""Kinds of servers of which one serves several models."""


class TimeoutsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Time limits of one model, in seconds."""

    request: Annotated[PositiveSeconds | None, Meta(description="Longest wait in the queue; null: the policy's.")] = None
    connect: Annotated[PositiveSeconds, Meta(description="Opening a connection to the server.")] = 5.0
    probe: Annotated[PositiveSeconds, Meta(description="One question to the server (is_sleeping, version).")] = 5.0
    sleep: Annotated[PositiveSeconds, Meta(description="Putting the model to sleep, confirmation included.")] = 120.0
    wake: Annotated[PositiveSeconds, Meta(description="Waking the model, reload of the weights included.")] = 300.0
    start: Annotated[PositiveSeconds, Meta(description="Starting the model's process, until it takes requests.")] = 900.0
    stop: Annotated[Seconds, Meta(description="From asking the model's process to end until it is killed.")] = 10.0
    read: Annotated[
        PositiveSeconds | None, Meta(description="Silence of the server in the middle of an answer; null: no limit.")
    ] = 600.0


class CostsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What switching one model takes, in seconds, until it was measured."""

    sleep: Annotated[Seconds | None, Meta(description="Putting the model to sleep; null: not known.")] = None
    wake: Annotated[Seconds | None, Meta(description="Waking the model until it serves; null: not known.")] = None


class HooksConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Commands that switch a server which has no sleep API. Each runs without a shell; exit status 0 is success.

    They find the model's name in the environment as `LLMUX_MODEL`, its URL as `LLMUX_URL`, and `sleep` the level as
    `LLMUX_SLEEP_LEVEL`.
    """

    wake: Annotated[_Command, Meta(description="Wakes the model; returns when it takes requests.")]
    sleep: Annotated[_Command, Meta(description="Puts the model to sleep; returns when it is out of memory.")]
    alive: Annotated[_Command, Meta(description="Exit status 0: awake, 1: asleep, anything else: not known.")]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model and the server that serves it: one that runs at `url`, or one that the gateway starts by `command`."""

    url: Annotated[
        _Name | None,
        Meta(description="Root of the server, http://host:port; without /v1. null: 127.0.0.1 and a free port, for `command`."),
    ] = None
    command: Annotated[
        _Command | None,
        Meta(description="Starts the server; {port} stands for the port. null: it is started by somebody else."),
    ] = None
    env: Annotated[dict[_Name, str], Meta(description="Environment of the command, beside the gateway's own.")] = {}
    cwd: Annotated[_Name | None, Meta(description="Working folder of the command; null: the gateway's.")] = None
    preload: Annotated[bool, Meta(description="Start or wake it with the gateway, not at its first request.")] = False
    server: Annotated[ServerKind, Meta(description="What kind of server it is.")] = "vllm"
    hooks: Annotated[HooksConfig | None, Meta(description="Commands that switch it, in place of its own API.")] = None
    served_name: Annotated[
        _Name | None, Meta(description="The name that the server knows the model by; null: the same name.")
    ] = None
    aliases: Annotated[tuple[_Name, ...], Meta(description="Further names that clients may use.")] = ()
    tasks: Annotated[
        Annotated[tuple[Task, ...], Meta(min_length=1)] | None,
        Meta(description="What the model can do; requests for anything else get a 404 and cause no switch. null: all."),
    ] = None
    parameters: Annotated[
        ModelParametersConfig | None,
        Meta(description="What becomes of parameters in the JSON of requests; null: they are passed on as they are."),
    ] = None
    sleep_level: Annotated[
        SleepLevel | None,
        Meta(description="1: weights kept in CPU memory, 2: discarded and reloaded, 3: process stopped; null: the policy's."),
    ] = None
    ttl: Annotated[
        PositiveSeconds | None, Meta(description="Time without a request after which it is put to sleep; null: never.")
    ] = None
    retry: Annotated[
        bool, Meta(description="Send a request once more if its server broke down before it had begun to answer.")
    ] = False
    probe: Annotated[
        ProbeKind,
        Meta(description="After each wake ask for one token, or compare a fingerprint, before a request is passed on."),
    ] = "none"
    warm_up: Annotated[
        WarmUpConfig | None, Meta(description="A request that it gets after each wake, before any other; null: none.")
    ] = None
    api_key: Annotated[
        SecretConfig | None,
        Meta(description="The server's API key, sent in place of the client's credentials; null: it gets those."),
    ] = None
    timeouts: TimeoutsConfig = msgspec.field(default_factory=TimeoutsConfig)
    costs: CostsConfig = msgspec.field(default_factory=CostsConfig)
    priority: Annotated[_Name | None, Meta(description="Class of requests that name none; null: none.")] = None
    max_waiting: Annotated[
        PositiveInt | None,
        Meta(description="How many requests may wait for this model; more get a 429. null: no limit."),
    ] = None

    def __post_init__(self) -> None:
        if self.url is not None:
            _check_url(self.url)
        if self.command is None:
            self._refuse_what_needs_a_command()
        elif self.url is None and not any("{port}" in each for each in (*self.command, *self.env.values())):
            raise _ValueConfigError("command", "has no {port}: write it where the port belongs, or say in url where it listens")
        elif self.url is not None and urlsplit(self.url).port is None:
            raise _ValueConfigError("url", f"{self.url!r} must name the port that the command listens on")
        if self.hooks is not None and self.command is not None:
            raise _ValueConfigError("hooks", "cannot be combined with command: let the hooks start and stop the server")

    @property
    def address(self) -> str:
        """The server's root without a slash at the end. Raises `ValueError` while the port of a command is open."""
        if self.url is None:
            raise ValueError("the port is not chosen yet")
        return self.url.rstrip("/")

    def _refuse_what_needs_a_command(self) -> None:
        if self.url is None:
            raise _ValueConfigError("url", "is missing: say where the server listens, or give a command that starts it")
        for key, given in (("env", self.env), ("cwd", self.cwd)):
            if given:
                raise _ValueConfigError(key, "has no effect without a command")
        if self.sleep_level == 3 and self.hooks is None:
            raise _ValueConfigError("sleep_level", "3 stops the server's process, which only one with a command has")


def _check_url(url: str) -> None:
    if not re.fullmatch(r"[!-~]+", url):  # urlsplit would silently drop some of these
        raise _ValueConfigError("url", f"{url!r} has blanks, or characters that are not ASCII: percent-encode them")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _ValueConfigError("url", f"{url!r} is not a URL such as http://127.0.0.1:8001")
    try:
        _ = parts.port
    except ValueError as exc:
        raise _ValueConfigError("url", f"{url!r}: {exc}") from None
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise _ValueConfigError("url", f"{url!r} must be scheme, host, port and path only")
    if "v1" in parts.path.split("/"):
        raise _ValueConfigError("url", f"{url!r} must be the server's root: leave out /v1 and what follows it")


class PolicyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to switch."""

    name: Annotated[PolicyName, Meta(description="The switch policy.")] = "gated_quantum"
    sleep_level: Annotated[SleepLevel, Meta(description="Sleep level of models that do not set their own.")] = 1
    request_timeout: Annotated[
        PositiveSeconds | None, Meta(description="Longest wait of a request for its model; null: no limit.")
    ] = 60.0
    min_active_duration: Annotated[
        Seconds | None,
        Meta(description="A woken model stays active for at least this long; null: 5 for fifo, else 0."),
    ] = None
    quantum: Annotated[
        Annotated[float, Meta(ge=0, le=1000)] | None,
        Meta(description="Length of a turn, as a multiple of what the switch costs; null: 4. For gated_quantum, pressure."),
    ] = None
    linger: Annotated[
        Seconds | None,
        Meta(description="Time until an idle model is left; null: 0.5. For gated_quantum, pressure, throughput."),
    ] = None
    max_wait: Annotated[
        Seconds | None,
        Meta(description="Wait from which a request comes first; null: 30. For pressure, throughput."),
    ] = None
    drain: Annotated[
        DrainMode | bool,
        Meta(
            description="Running requests of a model that has to make way. wait (or true): finish before it sleeps; preempt: "
            "are frozen, and go on at its next turn; abort (or false): are aborted."
        ),
    ] = "wait"
    drain_timeout: Annotated[
        Seconds | None,
        Meta(
            description="Longest drain; requests still running then are aborted, or frozen. null: no deadline; with preempt: "
            "no drain."
        ),
    ] = None
    max_freezes: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Times that one request may be frozen; after that it finishes first. null: 16. For drain: preempt."),
    ] = None
    max_frozen: Annotated[
        PositiveSeconds | None,
        Meta(description="Longest freeze; a request frozen for longer gets an error. null: 300. For drain: preempt."),
    ] = None
    estimates: Annotated[
        _Name | None, Meta(description="JSON file that keeps what sleep and wake were measured to take; null: none.")
    ] = None

    def __post_init__(self) -> None:
        if self.drain_timeout is not None and self.drain in ("abort", False):
            raise _ValueConfigError("drain_timeout", "has no effect when nothing is drained: leave one of them out")
        for key in ("max_freezes", "max_frozen"):
            if getattr(self, key) is not None and self.drain != "preempt":
                raise _ValueConfigError(key, "has no effect without drain: preempt")
        for key in ("quantum", "linger", "max_wait"):
            if getattr(self, key) is not None and key not in POLICY_PARAMETERS[self.name]:
                owners = ", ".join(name for name, keys in POLICY_PARAMETERS.items() if key in keys)
                raise _ValueConfigError(key, f"has no effect with the policy {self.name}: it belongs to {owners}")


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the gateway refuses, and how patient it is after a failed switch."""

    max_body: Annotated[int, Meta(gt=0, description="Largest request body in bytes; larger ones get a 413.")] = 32 * 1024 * 1024
    max_message: Annotated[
        int, Meta(gt=0, description="Largest WebSocket message in bytes, either way; a larger one closes it.")
    ] = 16 * 1024 * 1024
    websocket_idle: Annotated[
        PositiveSeconds, Meta(description="A WebSocket without a message for so long is closed: it keeps its model awake.")
    ] = 60.0
    backoff_initial: Annotated[Seconds, Meta(description="Pause after a model's first failed switch.")] = 1.0
    backoff_max: Annotated[Seconds, Meta(description="Longest pause; it doubles with each failure in a row.")] = 30.0
    health_interval: Annotated[
        PositiveSeconds | None,
        Meta(description="Pause between two looks at the active server while the lifespan runs; null: none."),
    ] = 5.0
    heartbeat: Annotated[
        PositiveSeconds, Meta(description="Pause between two signs of life in the stream of a request that waits or is frozen.")
    ] = 10.0
    max_waiting: Annotated[
        PositiveInt | None,
        Meta(description="How many requests may wait, for all models together; more get a 429. null: no limit."),
    ] = 1000
    max_headers: Annotated[
        int, Meta(ge=1024, description="Largest headers and query of a request, together, in bytes; larger ones get a 431.")
    ] = 64 * 1024
    max_buffered: Annotated[
        int, Meta(gt=0, description="Bytes of request bodies held at one time, of all requests; what exceeds it gets a 503.")
    ] = 1024 * 1024 * 1024
    body_timeout: Annotated[
        PositiveSeconds, Meta(description="Time in which a request's body has to arrive; slower ones get a 408.")
    ] = 60.0
    write_timeout: Annotated[
        PositiveSeconds,
        Meta(description="Longest time in which a client reads nothing of its answer; then it is dropped."),
    ] = 60.0
    shutdown: Annotated[Seconds, Meta(description="Time that running requests have to end in when the gateway stops.")] = 30.0

    def __post_init__(self) -> None:
        if self.backoff_initial > self.backoff_max:
            raise _ValueConfigError("backoff_max", f"must not be less than backoff_initial, which is {self.backoff_initial:g}")
        if self.max_buffered < self.max_body:
            raise _ValueConfigError("max_buffered", f"must not be less than max_body, which is {self.max_body}")


class MemoryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether a sleeping model has to have given its GPU memory back before another one is woken."""

    check: Annotated[MemoryCheckKind, Meta(description="nvml: read the GPU's used memory (needs the extra nvml).")] = "none"
    device: Annotated[int, Meta(ge=0, description="The GPU's index, as nvidia-smi shows it.")] = 0
    settle: Annotated[PositiveSeconds, Meta(description="Time that the driver may take to give memory back.")] = 5.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration of one gateway."""

    models: Annotated[
        dict[_Name, ModelConfig],
        Meta(description="Models by the name that clients use.", extra_json_schema={"minProperties": 1}),
    ]
    priorities: Annotated[
        dict[_Name, Seconds],
        Meta(description="Priority classes, each with its head start: the seconds that its requests count as having waited."),
    ] = {}
    policy: PolicyConfig = msgspec.field(default_factory=PolicyConfig)
    limits: LimitsConfig = msgspec.field(default_factory=LimitsConfig)
    memory: MemoryConfig = msgspec.field(default_factory=MemoryConfig)
    access: Annotated[AccessConfig | None, Meta(description="Who may use the gateway; null: everybody who reaches it.")] = None
    loading_notice: Annotated[
        LoadingNotice,
        Meta(
            description="What a request for a stream gets every limits.heartbeat while it waits. none: nothing; comments: SSE "
            "comments, which clients pass over; events: on chat and Anthropic's messages events that show how far things are."
        ),
    ] = "comments"
    admin: Annotated[AdminConfig | None, Meta(description="The admin API and its page; null: there are none.")] = None
    metrics: Annotated[MetricsConfig | None, Meta(description="The metrics for Prometheus; null: they are not served.")] = None
    request_log: Annotated[
        _Name | None, Meta(description="JSONL file that gets a line for each request that is over; null: none.")
    ] = None
    timing_headers: Annotated[
        bool,
        Meta(description="Whether answers tell in their headers how long the request waited: Server-Timing, x-llmux-*."),
    ] = False

    def __post_init__(self) -> None:
        if not self.models:
            raise _ValueConfigError("models", "name at least one model")
        for name, model in self.models.items():
            if model.priority is not None and model.priority not in self.priorities:
                known = f"one of {', '.join(self.priorities)}" if self.priorities else "none, for there are no priorities"
                raise _ValueConfigError(f"models.{name}.priority", f"{model.priority!r} must be {known}")
        if (
            self.admin is not None
            and self.metrics is not None
            and (self.metrics.path + "/").startswith(self.admin.prefix + "/")
        ):
            raise _ValueConfigError("admin.prefix", f"{self.admin.prefix!r} would hide the metrics at {self.metrics.path}")
        for name, key in self.access.keys.items() if self.access is not None else ():
            self.check_key(f"access.keys.{name}", key)
        servers: dict[tuple[str, str], str] = {}
        for name, model in self.models.items():
            if model.url is None:
                continue
            # The servers of some kinds have several models, each with a name of its own.
            inside = (model.served_name or name) if model.server in ROUTERS else ""
            if (other := servers.setdefault((model.url.rstrip("/"), inside), name)) != name:
                raise _ValueConfigError(f"models.{name}.url", f"{model.url!r} already is the server of the model {other!r}")
        if self.policy.sleep_level == 3:
            for name, model in self.models.items():
                if model.command is None and model.hooks is None and model.sleep_level is None:
                    message = "3 stops the server's process, which only one with a command has: give this model its own level"
                    raise _ValueConfigError("policy.sleep_level", f"{message} (models.{name}.sleep_level)")
        if self.policy.drain == "preempt":
            for name, model in self.models.items():
                self._require_freezing(name, model)
        owners = {name: name for name in self.models}
        for name, model in self.models.items():
            for index, alias in enumerate(model.aliases):
                if (owner := owners.setdefault(alias, name)) != name or alias == name:
                    raise _ValueConfigError(f"models.{name}.aliases[{index}]", f"{alias!r} already names the model {owner!r}")
            for alias in model.parameters.aliases if model.parameters is not None else ():
                if alias != name and alias not in model.aliases:
                    raise _ValueConfigError(f"models.{name}.parameters.aliases.{alias}", "is not one of the model's aliases")

    def check_key(self, where: str, key: KeyConfig) -> None:
        """Raise `ConfigError` if a client's key speaks of models or classes that there are not."""
        known = {*self.models, *self.aliases, "*"}
        for index, model in enumerate(key.models):
            if model not in known:
                raise _ValueConfigError(f"{where}.models[{index}]", f"{model!r} is no model, no alias and not '*'")
        if key.priority is not None and key.priority not in self.priorities:
            classes = f"one of {', '.join(self.priorities)}" if self.priorities else "none, for there are no priorities"
            raise _ValueConfigError(f"{where}.priority", f"{key.priority!r} must be {classes}")

    def _require_freezing(self, name: str, model: ModelConfig) -> None:
        """Refuse a model whose requests cannot be frozen, as far as that can be told without its server."""
        if model.hooks is not None or model.server != "vllm":
            kind = "switched by hooks" if model.hooks is not None else f"a server of the kind {model.server}"
            raise _ValueConfigError("policy.drain", f"preempt freezes requests in vLLM's way, and models.{name} is {kind}")
        if 3 in (model.sleep_level, self.policy.sleep_level) and model.sleep_level in (3, None):
            message = f"preempt keeps requests in the sleeping server, and the sleep level 3 of models.{name} ends it"
            raise _ValueConfigError("policy.drain", message)

    @property
    def aliases(self) -> dict[str, str]:
        """Every alias with the name of its model."""
        return {alias: name for name, model in self.models.items() for alias in model.aliases}
