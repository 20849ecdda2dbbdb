"""One simulated GPU's memory, shared by processes through a file: who holds how much, and what happened when.

The ledger is a small JSON file guarded by `flock`; beside it, in `PATH.events.jsonl`, every event is appended with the
models that hold memory right after it. So a test can ask afterwards whether two models were ever awake at once.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

__all__ = ["GpuEvent", "GpuLedger", "GpuOutOfMemoryError"]


class GpuOutOfMemoryError(Exception):
    """The GPU has too little free memory. The message has vLLM's ring and the numbers in MiB."""


class GpuEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something a process did. `at` is monotonic seconds, comparable between processes of one machine."""

    event: str
    """`start`, `sleep_begin`, `sleep_end`, `wake_begin`, `wake_part`, `wake_end`, `wake_failed`, `reload`,
    `request_while_asleep`, `crash` or `exit`."""
    at: float
    wall: float
    pid: int
    model: str
    awake: tuple[str, ...]
    """Models whose weights or KV cache are on the GPU right after the event, sorted; half-woken ones too."""
    used_mib: int
    detail: str = ""


class _Holder(msgspec.Struct):
    model: str
    parts: dict[str, int]


class _Ledger(msgspec.Struct):
    processes: dict[int, _Holder] = {}

    def used(self) -> int:
        return sum(sum(holder.parts.values()) for holder in self.processes.values())


_CONTEXT = "context"
_decoder = msgspec.json.Decoder(_Ledger)
_event_decoder = msgspec.json.Decoder(GpuEvent)


def _alive(pid: int) -> bool:
    """Whether a process lives and is no zombie: a killed one frees its memory before its parent collects it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return not Path("/proc/self").exists()
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


class GpuLedger:
    """A GPU of `total_mib` MiB at `path`. `pid` and `model` say who writes; a reader needs neither.

    Every method takes the file's lock, for well under a millisecond, and forgets processes that are dead.
    """

    def __init__(self, path: str | Path, *, total_mib: int = 24576, model: str = "", pid: int | None = None) -> None:
        self._path = Path(path)
        self._events_path = Path(f"{path}.events.jsonl")
        self._total = total_mib
        self._model = model
        self._pid = os.getpid() if pid is None else pid

    @contextmanager
    def _locked(self) -> Iterator[_Ledger]:
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
            file.seek(0)
            raw = file.read()
            ledger = _decoder.decode(raw) if raw else _Ledger()
            ledger.processes = {pid: holder for pid, holder in ledger.processes.items() if _alive(pid)}
            yield ledger
            new = msgspec.json.encode(ledger)
            if new != raw:
                file.truncate(0)
                file.write(new)
                file.flush()

    def _append(self, ledger: _Ledger, event: str, detail: str) -> None:
        awake = {holder.model for holder in ledger.processes.values() if holder.parts.keys() - {_CONTEXT}}
        line = GpuEvent(
            event=event,
            at=time.monotonic(),
            wall=time.time(),
            pid=self._pid,
            model=self._model,
            awake=tuple(sorted(awake)),
            used_mib=ledger.used(),
            detail=detail,
        )
        with self._events_path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")

    def allocate(self, part: str, mib: int) -> None:
        """Take `mib` MiB as `part` (`context`, `weights`, `kv_cache`); nothing happens if it is already held.

        Raises `GpuOutOfMemoryError` and takes nothing when that much is not free.
        """
        with self._locked() as ledger:
            parts = ledger.processes.setdefault(self._pid, _Holder(self._model, {})).parts
            free = self._total - ledger.used()
            if part in parts:
                return
            if mib > free:
                raise GpuOutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {mib} MiB for {part}. GPU 0 has a total capacity of "
                    f"{self._total} MiB of which {free} MiB is free."
                )
            parts[part] = mib

    def release(self, *parts: str) -> None:
        """Give back parts; all that this process holds when none is named."""
        with self._locked() as ledger:
            if not parts:
                ledger.processes.pop(self._pid, None)
            elif self._pid in ledger.processes:
                for part in parts:
                    ledger.processes[self._pid].parts.pop(part, None)

    def record(self, event: str, detail: str = "") -> None:
        """Append an event, with who holds memory now."""
        with self._locked() as ledger:
            self._append(ledger, event, detail)

    def used_mib(self, pid: int | None = None) -> int:
        """Memory taken by living processes, or by the one of `pid`, in MiB."""
        with self._locked() as ledger:
            if pid is None:
                return ledger.used()
            holder = ledger.processes.get(pid)
            return sum(holder.parts.values()) if holder else 0

    def awake(self) -> tuple[str, ...]:
        """Names of the models whose weights or KV cache are on the GPU now, sorted."""
        with self._locked() as ledger:
            return tuple(sorted(h.model for h in ledger.processes.values() if h.parts.keys() - {_CONTEXT}))

    def events(self) -> list[GpuEvent]:
        """All events so far, oldest first."""
        try:
            lines = self._events_path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [_event_decoder.decode(line) for line in lines]

    def max_awake(self) -> int:
        """The largest number of models that ever held weights or KV cache at once."""
        return max((len(event.awake) for event in self.events()), default=0)
