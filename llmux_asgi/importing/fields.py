"""The fields that llmux and llama-swap know, and what becomes of each. Reports come from here, docs are checked against it.

Sources: llmux 0.3.1 README.md and src/config.rs, llmux 2.4.0 src/config.rs (github.com/doublewordai/llmux);
llama-swap docs/configuration.md, config.example.yaml and config-schema.json (github.com/mostlygeek/llama-swap).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec

from ._draft import Status

__all__ = ["FIELDS", "Field", "Format"]

Format: TypeAlias = Literal["llmux 0.3", "llmux 2", "llama-swap"]


class Field(msgspec.Struct, frozen=True):
    """A field of the source. In `key`, `NAME` stands for any name. `text`: where it goes, or what to do instead."""

    key: str
    status: Status
    text: str


_SERVE = "where the gateway listens is said by what serves it: `llmux-asgi serve`, uvicorn"
_OWN_METRICS = "`metrics: {}` has the gateway's at `/metrics`, for Prometheus"
_LOGS = "logging is the host's: loggers `llmux_asgi` and `llmux_asgi.vllm`"
_LISTING = "`/v1/models` does not tell it"
_GPU = "the gateway has no checkpoints: such a model's process is ended, and started again"
_ALONE = "in a gateway one model is awake at a time: give models that stay awake a gateway of their own, or none"
_PARAMETERS = "without `model` and `stream`, which are not the configuration's to change"
_UI = "there is no such page"
_FIXED_LIMITS = "fixed in the gateway"

_POLICY: tuple[Field, ...] = (
    Field("policy.request_timeout_secs", "converted", "`policy.request_timeout`"),
    Field("policy.drain_before_switch", "converted", "`policy.drain`: true is `wait`, false is `abort`"),
    Field("policy.min_active_secs", "converted", "`policy.min_active_duration`"),
)

_LLMUX_0: tuple[Field, ...] = (
    Field("models.NAME.model_path", "converted", "the model in `command`, and `served_name`"),
    Field("models.NAME.port", "converted", "`url`; the command has `{port}`"),
    Field(
        "models.NAME.sleep_level",
        "converted",
        "`sleep_level`: 1 and 2 are the same; 3 and above end the process, which is 3. llmux's default is to end it too",
    ),
    Field("models.NAME.gpu_memory_utilization", "converted", "`--gpu-memory-utilization` in `command`"),
    Field("models.NAME.tensor_parallel_size", "converted", "`--tensor-parallel-size` in `command`"),
    Field("models.NAME.dtype", "converted", "`--dtype` in `command`"),
    Field("models.NAME.extra_args", "converted", "the end of `command`"),
    Field(
        "models.NAME.eviction",
        "note",
        "`sleep_level`: a process that keeps running is 1 (`offload`) or 2 (`discard`), any other is 3",
    ),
    Field("models.NAME.checkpoint_path", "none", _GPU),
    Field("policy.policy_type", "converted", "`policy.name`"),
    *_POLICY,
    Field("policy.sleep_level", "note", "`sleep_level` of the models that have none"),
    Field("policy.eviction", "note", "`sleep_level` of the models that have no `eviction`"),
    Field("policy.coalesce_window_ms", "none", "`policy.linger` is the nearest: how long a model is idle before it is left"),
    Field("policy.amortization_factor", "none", "`policy.quantum` is the nearest: the turn as a multiple of the switch's cost"),
    Field("policy.max_wait_secs", "converted", "`policy.max_wait`, where the policy has it"),
    Field("policy.tick_interval_ms", "none", "there are no ticks: the policy is asked when something changes"),
    Field("policy.min_quantum_ms", "note", "`policy.min_active_duration`, the longer of the two"),
    Field("port", "none", _SERVE),
    Field("metrics_port", "none", _OWN_METRICS),
    Field("admin_port", "none", _SERVE),
    Field("vllm_command", "converted", "the first word of `command`"),
    Field("vllm_logging", "none", "always on, in the logger `llmux_asgi.vllm` at level INFO"),
    Field("checkpoint", "none", _GPU),
)

_LLMUX_2: tuple[Field, ...] = (
    Field("models.NAME.port", "converted", "`url`"),
    Field("models.NAME.wake", "converted", "`hooks.wake`, run by `sh -c`"),
    Field("models.NAME.sleep", "converted", "`hooks.sleep`, run by `sh -c`"),
    Field(
        "models.NAME.alive",
        "note",
        "`hooks.alive`: failing in any way counts as asleep, as in llmux. Better let it exit with 1 if the model holds no "
        "memory, and with 2 if it cannot tell",
    ),
    *_POLICY,
    Field("port", "none", _SERVE),
)

_LLAMA_SWAP: tuple[Field, ...] = (
    Field("models.NAME.cmd", "converted", "`command`, or `hooks` for servers that the gateway does not know"),
    Field("models.NAME.cmdStop", "none", "the process group gets SIGTERM, after `timeouts.stop` SIGKILL; in `hooks`: `sleep`"),
    Field("models.NAME.proxy", "converted", "`url`; none where the port is the gateway's to choose"),
    Field("models.NAME.env", "converted", "`env`"),
    Field("models.NAME.macros", "converted", "replaced where they are used"),
    Field("models.NAME.aliases", "converted", "`aliases`"),
    Field("models.NAME.useModelName", "converted", "`served_name`"),
    Field("models.NAME.checkEndpoint", "none", "vLLM and llama.cpp are asked for their state; in `hooks`: `wake` and `alive`"),
    Field("models.NAME.ttl", "converted", "`ttl`; 0, never, is none"),
    Field("models.NAME.unloadTimeout", "converted", "`timeouts.stop`"),
    Field("models.NAME.timeouts.connect", "converted", "`timeouts.connect`"),
    Field("models.NAME.timeouts.responseHeader", "note", "`timeouts.read`: silence in the middle of an answer counts too"),
    Field("models.NAME.timeouts.keepalive", "none", _FIXED_LIMITS),
    Field("models.NAME.timeouts.tlsHandshake", "none", _FIXED_LIMITS),
    Field("models.NAME.timeouts.expectContinue", "none", _FIXED_LIMITS),
    Field("models.NAME.timeouts.idleConn", "none", _FIXED_LIMITS),
    Field("models.NAME.filters.stripParams", "converted", f"`parameters.strip`, {_PARAMETERS}"),
    Field("models.NAME.filters.setParams", "converted", f"`parameters.forced`, {_PARAMETERS}"),
    Field("models.NAME.filters.setParamsByID", "converted", "`aliases`, and `parameters.aliases`"),
    Field("models.NAME.concurrencyLimit", "none", "set vLLM's `--max-num-seqs`; `max_waiting` bounds the requests that wait"),
    Field("models.NAME.name", "none", _LISTING),
    Field("models.NAME.description", "none", _LISTING),
    Field("models.NAME.metadata", "none", _LISTING),
    Field("models.NAME.capabilities", "none", "`tasks` is the nearest: what a model may be asked for"),
    Field("models.NAME.unlisted", "none", "all models are listed"),
    Field(
        "models.NAME.sendLoadingState", "none", "`loading_notice` is for all models: `events` if llama-swap sends it for any"
    ),
    Field("models.NAME.compat", "none", "there are no such exceptions"),
    Field("macros", "converted", "replaced where they are used; `${PORT}` is `{port}`"),
    Field("startPort", "note", "first port for servers that need a fixed one; others get a free port"),
    Field("healthCheckTimeout", "converted", "`timeouts.start`, and `timeouts.wake` where waking is loading"),
    Field("unloadTimeout", "converted", "`timeouts.stop` of each model"),
    Field("globalTTL", "converted", "`ttl` of each model that has none"),
    Field("hooks.on_startup.preload", "converted", "`preload`"),
    Field("hooks.on_startup.profile", "none", "there are no profiles: use `aliases`"),
    Field("profiles", "none", "there are no profiles: use `aliases`"),
    Field("selectors", "none", "a name belongs to one model: use `aliases`"),
    Field("groups", "none", _ALONE),
    Field("matrix", "none", _ALONE),
    Field("routing.router.use", "none", _ALONE),
    Field("routing.router.settings.groups", "none", _ALONE),
    Field("routing.router.settings.matrix", "none", _ALONE),
    Field("routing.scheduler.use", "note", "the policy `gated_quantum`, which switches less; `fifo` is there too"),
    Field(
        "routing.scheduler.settings.fifo.priority",
        "note",
        "`priorities` and `priority`: a head start of 30 s a step, not an absolute order, so that nobody starves",
    ),
    Field("peers", "none", "the gateway serves what it can put to sleep: route other hosts' models around it"),
    Field("apiKeys", "converted", "`access.keys`: a hash of each key, or the name of its environment variable"),
    Field("logLevel", "none", _LOGS),
    Field("logTimeFormat", "none", _LOGS),
    Field("logToStdout", "none", _LOGS),
    Field(
        "sendLoadingState",
        "converted",
        "`loading_notice: events` with a `limits.heartbeat` of 1 s; else comments, which nobody sees",
    ),
    Field("includeAliasesInList", "none", "`/v1/models` lists models, not their aliases"),
    Field("metricsMaxInMemory", "none", _OWN_METRICS),
    Field("captureBuffer", "none", "bodies are never kept; `request_log` keeps times and status"),
    Field("store", "none", "`request_log` is a file with a line for each request"),
    Field("performance", "none", _OWN_METRICS),
    Field("upstream", "none", "there is no way through to a server's own pages"),
    Field("ui", "none", _UI),
)

FIELDS: Mapping[Format, tuple[Field, ...]] = {"llmux 0.3": _LLMUX_0, "llmux 2": _LLMUX_2, "llama-swap": _LLAMA_SWAP}
"""Every documented field by the source's format. `llmux 0.3` is the form up to 1.x, in which llmux ran vLLM itself."""
