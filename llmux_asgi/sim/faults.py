"""Faults on demand: `WHAT:NTH:ACTION`, for example `sleep:2:fail`, `wake:1:hang`, `request:*:delay=0.5`.

WHAT is a kind of call (`sleep`, `wake`, `reload`, `is_sleeping`, `health`, `request`), NTH which call of that kind,
counted from 1 since the fault was added (at start or by `POST /sim/faults`), or `*` for each. ACTION is one of

    fail, 503    answers 500, or that status; nothing happens
    hang         does nothing and never answers, until the client leaves
    delay=S      takes S seconds longer; sleep and wake in their turn, as an engine carries out one after the other
    die          the process ends at once, without a word
    crash        the engine dies: /health says 503, soon the process ends
    wither       (sleep, wake, is_sleeping) the engine dies over the call, which is never answered; soon nothing listens
                 any more, but the process does not end, nor does SIGTERM end it
    lie          (sleep, wake) answers 200 and does nothing
    leak         (sleep) sleeps, but its memory stays taken
    oom          (wake) runs out of memory after the weights: 500, left half-woken
    break=N      (request) the connection is cut after N tokens (3), or within the body
    stall=N      (request) sends N tokens (3), then nothing more, until the client leaves
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Fault", "FaultPlan"]

KINDS = ("sleep", "wake", "reload", "is_sleeping", "health", "request")
_EVERYWHERE = frozenset({"fail", "hang", "delay", "die", "crash"})
_ACTIONS = {
    "sleep": _EVERYWHERE | {"lie", "leak", "wither"},
    "wake": _EVERYWHERE | {"lie", "oom", "wither"},
    "is_sleeping": _EVERYWHERE | {"wither"},
    "request": _EVERYWHERE | {"break", "stall"},
}
_DEFAULT_VALUE = {"fail": 500.0, "delay": 1.0, "break": 3.0, "stall": 3.0}


@dataclass(frozen=True)
class Fault:
    """One fault. `nth` is None for every call; `value` is the status, the seconds or the number of tokens."""

    kind: str
    nth: int | None
    action: str
    value: float = 0.0

    @classmethod
    def parse(cls, spec: str) -> Fault:
        """Read `WHAT:NTH:ACTION`. Raises `ValueError`, saying what is wrong and what is possible."""
        parts = spec.split(":")
        if len(parts) != 3:
            raise ValueError(f"fault {spec!r}: must be WHAT:NTH:ACTION, such as sleep:2:fail")
        kind, nth, action = parts
        if kind not in KINDS:
            raise ValueError(f"fault {spec!r}: {kind!r} is none of {', '.join(KINDS)}")
        if nth != "*" and not (nth.isdecimal() and int(nth) > 0):
            raise ValueError(f"fault {spec!r}: {nth!r} is neither a number from 1 nor *")
        name, _, value = action.partition("=")
        if name.isdecimal() and 400 <= int(name) <= 599 and not value:
            name, value = "fail", name
        allowed = _ACTIONS.get(kind, _EVERYWHERE)
        if name not in allowed:
            raise ValueError(f"fault {spec!r}: {name!r} is none of {', '.join(sorted(allowed))} or a status from 400")
        try:
            number = float(value) if value else _DEFAULT_VALUE.get(name, 0.0)
        except ValueError:
            raise ValueError(f"fault {spec!r}: {value!r} is not a number") from None
        return cls(kind, None if nth == "*" else int(nth), name, number)


@dataclass
class FaultPlan:
    """The faults still to come, and how many calls of its kind each has seen."""

    _pending: list[tuple[Fault, int]] = field(default_factory=list)

    def add(self, fault: Fault) -> None:
        """From the next call of its kind on, `fault` counts."""
        self._pending.append((fault, 0))

    def clear(self) -> None:
        """Behave again."""
        self._pending.clear()

    def next(self, kind: str) -> Fault | None:
        """Count one call of `kind`, and tell the fault to commit in it, if any (the one added first)."""
        due: Fault | None = None
        remaining: list[tuple[Fault, int]] = []
        for fault, calls in self._pending:
            if fault.kind != kind:
                remaining.append((fault, calls))
                continue
            strikes = fault.nth is None or calls + 1 == fault.nth
            if strikes and due is None:
                due = fault
            if not strikes or fault.nth is None:
                remaining.append((fault, calls + 1))
        self._pending = remaining
        return due
