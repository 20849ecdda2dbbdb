"""What a simulated server is told at start (`SimOptions`) and what it tells about itself (`SimState`)."""

from __future__ import annotations

import msgspec

from .faults import Fault

__all__ = ["SimOptions", "SimState"]


class SimOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one simulated vLLM server behaves. Times are in seconds, memory in MiB.

    Wake times: level 1 costs `wake_seconds` when the weights come back; level 2 costs `wake_l2_seconds` in
    `reload_weights`, where a real server reads them from disk.

    Raises `ValueError` for values that make no sense, with the field's name.
    """

    name: str
    """The served model's name."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 picks a free port; the ready line tells which."""
    version: str = "0.32.0"
    """What `/version` answers. Behaviour follows it: see `llmux_asgi.sim.version`."""
    dev_mode: bool = True
    """`VLLM_SERVER_DEV_MODE=1`: without it the sleep routes do not exist."""
    sleep_mode: bool = True
    """`--enable-sleep-mode`: without it `/sleep` answers 200 and frees nothing."""
    dummy_weights: bool = False
    """`--load-format dummy`: there is nothing on disk that `reload_weights` could read."""
    responses_store: bool = True
    """`VLLM_ENABLE_RESPONSES_API_STORE=1`: `/v1/responses/{id}` finds what was answered, `background` is possible."""
    tokens_per_second: float = 1000.0
    """Rate of each request, whatever runs beside it; 0 is as fast as possible."""
    prefill_seconds: float = 0.0
    """Time before a request's first token."""
    start_seconds: float = 0.02
    sleep_seconds: float = 0.02
    sleep_l2_seconds: float = 0.02
    wake_seconds: float = 0.02
    wake_l2_seconds: float = 0.02
    max_num_seqs: int = 1024
    """Requests that run at once; the others wait in the engine's queue."""
    max_model_len: int = 32768
    """Only told by `/v1/models` and `/tokenize`; nothing is refused for its length."""
    gpu: str | None = None
    """Path of the ledger that servers on one simulated GPU share (`llmux_asgi.sim.gpu`); None: memory is not counted."""
    gpu_memory_mib: int = 24576
    model_memory_mib: int = 12288
    """Weights. With the defaults two models awake at once do not fit one GPU."""
    kv_memory_mib: int = 8192
    context_memory_mib: int = 0
    """What the process holds as long as it lives, asleep too (a CUDA context and its graphs)."""
    start_asleep: int = 0
    """Sleep level the server is in when it says it is ready; 0: awake. Spares tests one start after the other."""
    crash_seconds: float = 0.5
    """Time from the engine's death, while `/health` says 503, to the end of the process."""
    faults: tuple[str, ...] = ()
    """Faults to commit, see `llmux_asgi.sim.faults`."""
    exit_with_stdin: bool = False
    """End when standard input does: a server started by a test does not outlive it, however that ended."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: must not be empty")
        if self.start_asleep not in (0, 1, 2):
            raise ValueError(f"start_asleep: must be 0, 1 or 2, not {self.start_asleep}")
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{field.name}: must not be negative, it is {value}")
        if self.max_num_seqs < 1:
            raise ValueError("max_num_seqs: must be at least 1")
        try:
            [int(part) for part in self.version.split(".")[:2]][1]
        except (ValueError, IndexError):
            raise ValueError(f"version: must look like 0.32.0, not {self.version!r}") from None
        for spec in self.faults:
            Fault.parse(spec)


class SimState(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot, answered by `GET /sim/state`. Counters run from the server's start."""

    name: str
    pid: int
    awake: bool
    """All memory resident and scheduling: requests run."""
    level: int
    """Sleep level; 0 when awake or merely paused."""
    asleep_tags: list[str]
    """Which of `weights` and `kv_cache` are out of the GPU's memory, as the engine believes."""
    pause: str
    """`unpaused`, `paused_new` or `paused_all`."""
    weights_valid: bool
    """False after a level-2 sleep until `reload_weights`: what is generated meanwhile is garbage."""
    dead: bool
    memory_mib: int
    """What the ledger says this process holds; 0 without a ledger."""
    in_flight: int
    """Generation requests in the server: running and waiting ones."""
    running: int
    waiting: int
    sleeps: int
    """Times the engine went to sleep (calls without effect are not counted)."""
    wakes: int
    """Times the engine became fully awake."""
    reloads: int
    requests: int
    """Generation requests that reached the engine."""
    requests_while_asleep: int
    """Of those, the ones that came while `is_sleeping` was true. A gateway keeps this at 0."""
    completed: int
    aborted: int
    """Ended early by `/sleep`, `/pause` or the engine's death."""
    disconnected: int
    """Stopped because the client left."""
    tokens: int
    """Tokens handed out."""
    control_calls: dict[str, int]
    """Calls of each path that is no inference (`/sleep`, `/docs`, `/metrics`, `/health`…), by whatever method."""
