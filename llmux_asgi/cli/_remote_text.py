"""What a gateway's state and events are in words. Pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from ._remote_status import GatewayStatus, SwitchStatus

__all__ = ["changes", "clock", "described", "doing", "duration", "printable", "switching"]


def printable(text: str) -> str:
    """A text from elsewhere, without what a terminal would obey."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text.replace("\n", " "))


def clock(seconds: float) -> str:
    """The time of day here, of a time in seconds since 1970."""
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def duration(seconds: float | None) -> str:
    """`3.2 s`, `4 min 5 s`, `2 h 0 min`; `-` if it is not known."""
    if seconds is None:
        return "-"
    seconds = max(seconds, 0.0)
    if seconds < 99.95:
        return f"{seconds:.1f} s" if seconds >= 0.095 or seconds == 0 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def switching(switch: SwitchStatus, time: float) -> str:
    """The switch under way, at a time of the gateway's clock."""
    aim = f"to {switch.target}" if switch.target is not None else f"away from {switch.source}"
    return printable(f"switching {aim}: {switch.phase}, {duration(time - switch.phase_since)}")


def doing(status: GatewayStatus) -> str:
    """What the gateway is doing, in a few words."""
    if status.switch is not None:
        what = switching(status.switch, status.time)
    elif status.active is not None:
        what = f"{printable(status.active)} is active"
    else:
        what = "no model is active" if status.mode == "idle" else "not known yet which model is active"
    counts = [(status.in_flight, "in flight"), (status.waiting, "waiting"), (status.frozen, "frozen")]
    parts = [what, *(f"{number} {word}" for number, word in counts if number)]
    if status.pinned is not None:
        parts.append(f"{printable(status.pinned)} is pinned")
    if status.draining:
        parts.append("drained" if status.drained else "draining")
    return ", ".join(parts)


def described(kind: str, data: Mapping[str, Any]) -> str:
    """An event, in a line."""
    return printable(_described(kind, data))


def _described(kind: str, data: Mapping[str, Any]) -> str:
    get = data.get
    match kind:
        case "switch":
            return f"switch {get('switch')} {_way(data)} begins: {get('waiting', 0)} waiting, {get('in_flight', 0)} in flight"
        case "phase":
            return f"switch {get('switch')}: {get('phase')} {get('model') or ''}".rstrip()
        case "switched":
            phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in (get("phases") or {}).items())
            ended = f"switch {get('switch')} {_way(data)} {get('outcome')} after {duration(get('duration'))}"
            return f"{ended} ({phases})" if phases else ended
        case "model":
            return f"{get('model')} is {get('state')}"
        case "error":
            of = f" of {get('model')}" if get("model") else ""
            return f"error{of}: {get('kind')}: {get('message')}"
        case "pin":
            return f"{get('model')} is pinned" if get("model") else "no model is pinned any more"
        case "drain":
            return "draining: new requests are refused" if get("draining") else "requests are taken again"
        case "config":
            return changes(data)
        case "reset":
            return "events before this are not kept, or the gateway was started again"
        case _:
            rest = {name: value for name, value in data.items() if name != "time"}
            return f"{kind} {msgspec.json.encode(rest).decode()}"


def changes(data: Mapping[str, Any]) -> str:
    """What a new configuration has brought: models added, changed, removed, and other settings that are not as before."""
    told = [f"{word} {', '.join(data[word])}" for word in ("added", "changed", "removed", "settings") if data.get(word)]
    return f"new configuration: {'; '.join(told) or 'nothing has changed'}"


def _way(data: Mapping[str, Any]) -> str:
    names = [data.get("from"), data.get("to")]
    if names[1] is None:
        return f"away from {names[0]}"
    return f"to {names[1]}" if names[0] is None else f"{names[0]} → {names[1]}"
