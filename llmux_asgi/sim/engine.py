"""The simulated engine: scheduler, sleep state and memory of one vLLM server, without HTTP.

It mirrors vLLM's `EngineCore` (v1/engine/core.py, 0.32) where a gateway can tell the difference:

- the scheduler's pause and the executor's sleeping tags are two things: `/resume` clears the first alone, and a wake
  that finds nothing asleep still clears the pause;
- `mode=wait` leaves a callback behind that puts the executor to sleep when the last request is done, whatever has been
  called since;
- `/sleep` looks only at the tag `weights`: a half-woken engine still has it, so `/sleep` does nothing.

One asyncio event loop; nothing here is thread-safe.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections import Counter, deque
from collections.abc import Awaitable, Callable

from . import text
from .gpu import GpuLedger, GpuOutOfMemoryError
from .metrics import Histogram
from .options import SimOptions, SimState
from .sequence import PauseState, Sequence
from .version import Behaviour

__all__ = ["Engine", "EngineDeadError"]

_TAGS = ("weights", "kv_cache")
_ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"


class EngineDeadError(Exception):
    """The engine has died; the process will end soon."""


class Engine:
    """The engine of one server. Must be built inside the event loop that runs it."""

    def __init__(self, options: SimOptions, ledger: GpuLedger | None) -> None:
        self.options = options
        self.behaviour = Behaviour.of(options.version)
        self.count: Counter[str] = Counter()
        self.control_calls: Counter[str] = Counter()
        self.first_token, self.latency = Histogram(), Histogram()
        self.dead = False
        self.withered = False
        self.stop_listening: Callable[[], None] = lambda: None
        """Closes the server's sockets; set by who serves."""
        self._loop = asyncio.get_running_loop()
        self._ledger = ledger
        self._control = asyncio.Lock()  # a real engine core handles one control call at a time
        self._pause = PauseState.UNPAUSED
        self._asleep: set[str] = set()
        self._level = 0
        self._reported: int | None = None  # the level that the metric tells, None: awake
        self._executor_busy = False
        self._weights_valid = True
        self._frozen_at = 0.0
        self._running: set[Sequence] = set()
        self._waiting: deque[Sequence] = deque()
        self._when_idle: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    # Requests

    def submit(self, prompt: str, total: int) -> Sequence:
        """Take a request in. It runs when the scheduler lets it. Raises `EngineDeadError`."""
        self.count["requests"] += 1
        if self.sleeping:
            self.count["requests_while_asleep"] += 1
            self.record("request_while_asleep", f"{self._pause.value} {sorted(self._asleep)}")
            if self._asleep and not self.behaviour.survives_requests_asleep:
                self.crash("a request reached the sleeping engine")
        if self.dead:
            raise EngineDeadError
        sequence = Sequence(prompt, total)
        sequence.arrived = self._loop.time()
        self._waiting.append(sequence)
        self._admit()
        if self.dead:
            raise EngineDeadError
        return sequence

    async def produced(self, sequence: Sequence, at_least: int) -> int:
        """Wait until `at_least` tokens exist or the sequence has ended; return how many there are."""
        rate = self.options.tokens_per_second
        while sequence.finish is None:
            timer = None
            if sequence.started is not None and self._pause is not PauseState.PAUSED_ALL:
                due = self._due(sequence)
                if at_least <= due < sequence.total:
                    return due
                if rate and at_least < sequence.total:  # the last token comes with the sequence's own timer
                    # Rounded up to whole milliseconds, uvloop's resolution: a timer too early would spin.
                    delay = sequence.started + at_least / rate - self._loop.time()
                    timer = self._loop.call_later(math.ceil(delay * 1000) / 1000, sequence.notify)
            sequence.changed = self._loop.create_future()
            try:
                await sequence.changed
            finally:
                sequence.changed = None
                if timer is not None:
                    timer.cancel()
        return sequence.ready

    def drop(self, sequence: Sequence) -> None:
        """Stop generating: the client is gone."""
        if sequence.finish is None:
            self.count["disconnected"] += 1
            self._end(sequence, "gone")

    def _due(self, sequence: Sequence) -> int:
        if sequence.started is None:
            return 0
        now = self._frozen_at if self._pause is PauseState.PAUSED_ALL else self._loop.time()
        elapsed = now - sequence.started
        if elapsed < 0:
            return 0
        rate = self.options.tokens_per_second
        # The clock may call a timer a hair early; without the addend that would cost a turn of the loop each time.
        return min(sequence.total, int(elapsed * rate + 1e-6) if rate else sequence.total)

    def _admit(self) -> None:
        if self._executor_busy or self._pause is not PauseState.UNPAUSED:
            return
        if self._waiting and self._unmapped():
            self.crash(_ILLEGAL_ACCESS)
        while self._waiting and len(self._running) < self.options.max_num_seqs:
            sequence = self._waiting.popleft()
            model, count = self.options.name, sequence.total
            sequence.tokens = text.sample(model, sequence.prompt, count, weights_valid=self._weights_valid)
            sequence.started = self._loop.time() + self.options.prefill_seconds
            self._running.add(sequence)
            self._arm(sequence)

    def _arm(self, sequence: Sequence) -> None:
        rate = self.options.tokens_per_second
        if sequence.started is not None:
            end = sequence.started + (sequence.total / rate if rate else 0.0)
            sequence.timer = self._loop.call_at(end, self._end, sequence, "length")

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.ready = sequence.total if reason == "length" else self._due(sequence)
        sequence.finish = reason
        if sequence.timer is not None:
            sequence.timer.cancel()
            sequence.timer = None
        self.count["tokens"] += sequence.ready
        self.count["ended_" + reason] += 1
        if sequence.started is not None and sequence.ready:
            rate = self.options.tokens_per_second
            self.count["prompt_tokens"] += len(sequence.prompt.encode("utf-8", "surrogatepass"))
            self.first_token.observe(sequence.started + (1 / rate if rate else 0.0) - sequence.arrived)
            self.latency.observe(self._loop.time() - sequence.arrived)
        if reason == "length":
            self.count["completed"] += 1
        if sequence in self._running:
            self._running.discard(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        sequence.notify()
        self._admit()
        self._run_idle_callbacks()

    # Sleep and wake

    @property
    def sleeping(self) -> bool:
        """What `/is_sleeping` tells; true when merely paused, from 0.17 on."""
        return bool(self._asleep) or (self.behaviour.has_modes and self.paused)

    @property
    def paused(self) -> bool:
        """What `/is_paused` tells."""
        return self._pause is not PauseState.UNPAUSED

    async def is_sleeping(self) -> bool:
        """As `sleeping`, in its turn: while the executor is busy, a real engine answers nothing."""
        async with self._control:
            return self.sleeping

    async def sleep(self, level: int, mode: str, *, leak: bool = False, extra: float = 0.0) -> None:
        """Pause as `mode` says, then put the executor to sleep; `leak` leaves its memory taken, `extra` seconds are added."""
        done: asyncio.Future[None] = self._loop.create_future()

        def when_paused() -> None:
            self._spawn(self._sleep_when_paused(level, leak, extra, done))

        await self._pause_scheduler(mode, when_paused if level else lambda: done.set_result(None))
        await done
        self._reported = level

    async def pause(self, mode: str) -> None:
        """Pause as `mode` says, and wait until that is so."""
        done: asyncio.Future[None] = self._loop.create_future()
        await self._pause_scheduler(mode, lambda: done.set_result(None))
        await done

    def resume(self) -> None:
        """Let the scheduler go on, even above memory that is asleep: the trap of `/resume`."""
        self._set_pause(PauseState.UNPAUSED)
        if self._running and self._unmapped():
            self.crash(_ILLEGAL_ACCESS)
        self._admit()

    async def wake_up(self, tags: list[str] | None, *, oom: bool = False, extra: float = 0.0) -> bool:
        """Bring back the memory of `tags` (None: of all), `extra` seconds later; tell whether the engine is fully awake.

        Raises `GpuOutOfMemoryError` and leaves the engine half-woken when the GPU has too little memory left.
        """
        async with self._control:
            was_asleep = bool(self._asleep)
            wanted = None if tags is None else [tag for tag in tags if tag != "scheduling"]
            if wanted is None or wanted:
                self._executor_busy = True
                try:
                    await asyncio.sleep(extra)
                    await self._executor_wake(wanted, oom)
                finally:
                    self._executor_busy = False
            awake = not self._asleep
            if awake or (self.behaviour.partial_wake_resumes and self._asleep != set(_TAGS)):
                self.resume()
            if awake:
                self._level, self._reported = 0, None
                if was_asleep:
                    self.count["wakes"] += 1
                    self.record("wake_end")
            return awake

    async def reload_weights(self) -> None:
        """Read the weights from disk. Raises `RuntimeError` if there are none, or no memory to put them in."""
        async with self._control:
            if self.options.dummy_weights:
                raise RuntimeError("Cannot find any model weights with the dummy load format")
            if "weights" in self._asleep and self._unmapped():
                raise RuntimeError(_ILLEGAL_ACCESS)
            await asyncio.sleep(self.options.wake_l2_seconds)
            self._weights_valid = True
            self.count["reloads"] += 1
            self.record("reload")

    def boot(self) -> None:
        """Take the memory that a starting server needs. Raises `GpuOutOfMemoryError`."""
        self._allocate("context", self.options.context_memory_mib)
        level = self.options.start_asleep
        if level:
            self._asleep, self._level, self._reported = set(_TAGS), level, level
            self._pause, self._weights_valid = PauseState.PAUSED_NEW, level < 2
        else:
            self._allocate("weights", self.options.model_memory_mib)
            self._allocate("kv_cache", self.options.kv_memory_mib)
        self.record("start")

    def _set_pause(self, pause: PauseState) -> None:
        was_frozen, freezes = self._pause is PauseState.PAUSED_ALL, pause is PauseState.PAUSED_ALL
        self._pause = pause
        now = self._loop.time()
        if freezes and not was_frozen:
            self._frozen_at = now
            for sequence in self._running:
                if sequence.timer is not None:
                    sequence.timer.cancel()
        elif was_frozen and not freezes:
            for sequence in self._running:
                if sequence.started is not None:
                    sequence.started += now - self._frozen_at
                self._arm(sequence)
                sequence.notify()

    def _unmapped(self) -> bool:
        """Whether running the model now would touch memory that is not there."""
        return bool(self._asleep) and self.options.sleep_mode

    async def _pause_scheduler(self, mode: str, when_paused: Callable[[], None]) -> None:
        async with self._control:
            if not self.behaviour.has_modes:
                mode = "abort"
            if mode == "abort":
                self.abort_all("abort")
            self._set_pause(PauseState.PAUSED_ALL if mode == "keep" else PauseState.PAUSED_NEW)
            self._when_idle.append(when_paused)
            self._run_idle_callbacks()

    def _run_idle_callbacks(self) -> None:
        if self._running and self._pause is not PauseState.PAUSED_ALL and not self.dead:
            return
        callbacks, self._when_idle = self._when_idle, []
        for callback in callbacks:
            callback()

    async def _sleep_when_paused(self, level: int, leak: bool, extra: float, done: asyncio.Future[None]) -> None:
        async with self._control:
            self._executor_busy = True
            try:
                await self._executor_sleep(level, leak, extra)
            finally:
                self._executor_busy = False
            self._admit()
        done.set_result(None)

    async def _executor_sleep(self, level: int, leak: bool, extra: float) -> None:
        if "weights" in self._asleep or self.dead:
            return  # vLLM: "Executor is already sleeping."
        self.record("sleep_begin", f"level {level}")
        await asyncio.sleep(extra + (self.options.sleep_seconds if level == 1 else self.options.sleep_l2_seconds))
        self._asleep = set(_TAGS)
        self._level = level
        if self.options.sleep_mode:
            self._weights_valid = self._weights_valid and level < 2
            if not leak and self._ledger is not None:
                self._ledger.release(*(_TAGS if self.behaviour.frees_weights else ("kv_cache",)))
        self.count["sleeps"] += 1
        self.record("sleep_end", f"level {level}")

    async def _executor_wake(self, tags: list[str] | None, oom: bool) -> None:
        if not self._asleep or (tags is not None and not self._asleep.issuperset(tags)):
            return  # vLLM only logs a warning
        woken = self._asleep if tags is None else set(tags)
        self.record("wake_begin", ",".join(sorted(woken)))
        try:
            if "weights" in woken:
                self._allocate("weights", self.options.model_memory_mib)
                await asyncio.sleep(self.options.wake_seconds if self._level < 2 else 0)
            if oom:
                raise GpuOutOfMemoryError("CUDA out of memory (on demand)")
            if "kv_cache" in woken:
                self._allocate("kv_cache", self.options.kv_memory_mib)
        except GpuOutOfMemoryError:
            self.record("wake_failed")
            raise
        self._asleep = self._asleep - woken
        if self._asleep:
            self.record("wake_part", ",".join(sorted(woken)))

    def _allocate(self, part: str, mib: int) -> None:
        if self._ledger is not None:
            self._ledger.allocate(part, mib)

    # Life and death

    def crash(self, reason: str) -> None:
        """The engine dies: every request ends in an error, `/health` says 503, soon the process ends."""
        if self.dead:
            return
        self.dead = True
        self.record("crash", reason)
        self.abort_all("error")
        self._loop.call_later(self.options.crash_seconds, os._exit, 1)

    def wither(self) -> None:
        """The engine dies over a control call, as vLLM's does: it is never answered, soon nothing listens, the process stays.

        Every control call from now on hangs, `/health` still says 200 while there is somebody to say it, SIGTERM does nothing.
        """
        if self.dead:
            return
        self.dead = self.withered = True
        self.record("crash", "over a control call")
        self.abort_all("error")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._loop.call_later(self.options.crash_seconds, self.stop_listening)

    def close(self) -> None:
        """Give all memory back: the process ends in order."""
        if self._ledger is not None:
            self._ledger.release()
        self.record("exit")

    def record(self, event: str, detail: str = "") -> None:
        """Append an event to the ledger's history, if there is a ledger."""
        if self._ledger is not None:
            self._ledger.record(event, detail)

    def sleep_metric(self) -> tuple[int, int, int]:
        """The three values of `vllm:engine_sleep_state`: awake, weights_offloaded, discard_all.

        As in vLLM they follow the calls, not the truth: `/sleep?level=2` on a level-1 sleeper shows discard_all.
        """
        return int(self._reported is None), int(self._reported == 1), int(self._reported == 2)

    def running_and_waiting(self) -> tuple[int, int]:
        """How many requests run, and how many wait for their turn."""
        return len(self._running), len(self._waiting)

    def state(self) -> SimState:
        """A snapshot."""
        count = self.count
        return SimState(
            name=self.options.name,
            pid=os.getpid(),
            awake=not self._asleep and not self.paused and not self.dead,
            level=self._level,
            asleep_tags=sorted(self._asleep),
            pause=self._pause.value,
            weights_valid=self._weights_valid,
            dead=self.dead,
            memory_mib=self._ledger.used_mib(os.getpid()) if self._ledger is not None else 0,
            in_flight=len(self._running) + len(self._waiting),
            running=len(self._running),
            waiting=len(self._waiting),
            sleeps=count["sleeps"],
            wakes=count["wakes"],
            reloads=count["reloads"],
            requests=count["requests"],
            requests_while_asleep=count["requests_while_asleep"],
            completed=count["completed"],
            aborted=count["aborted"],
            disconnected=count["disconnected"],
            tokens=count["tokens"],
            control_calls=dict(self.control_calls),
        )

    def abort_all(self, reason: str = "abort") -> int:
        """End every request, with what it has; tell how many there were."""
        sequences = [*self._running, *self._waiting]
        self._waiting.clear()
        self.count["aborted"] += len(sequences)
        for sequence in sequences:
            self._end(sequence, reason)
        return len(sequences)

    def _spawn(self, work: Awaitable[None]) -> None:
        async def run() -> None:
            await work

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
