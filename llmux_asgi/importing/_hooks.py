"""Scripts that start and stop a server which has no API for that: `hooks` for what llama-swap ran by itself."""

from __future__ import annotations

import re
import shlex
import zlib
from collections.abc import Mapping
from typing import Any

__all__ = ["inline_hooks", "process_hooks"]


def process_hooks(
    name: str, words: list[str], *, env: Mapping[str, str], check: str | None, stop: list[str] | None
) -> dict[str, Any]:
    """Return hooks that run a command in the background, and end it. Its process group is kept in a file.

    `check` is the URL that answers 200 when the server is ready (`None`: it is not asked), `stop` a command that ends it
    (`None`: SIGTERM), in which `${PID}` stands for the process.
    """
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    if slug != name:  # another name may become the same
        slug += f"-{zlib.crc32(name.encode()):08x}"
    settings = [f"{key}={value}" for key, value in env.items()]
    command = shlex.join([*(["env", *settings] if settings else []), *words])
    ready = f"curl -fso /dev/null --max-time 5 {shlex.quote(check)}" if check else "true"
    # Not in /tmp, where others may put something in the way.
    file = f'pid="${{XDG_RUNTIME_DIR:-$HOME/.cache}}/llmux/{slug}.pid"'
    running = 'kill -s 0 -- "-$(cat "$pid" 2>/dev/null)" 2>/dev/null'
    ending = _with_pid(stop) if stop else 'kill -s TERM -- "-$(cat "$pid")"'
    wake = [
        file,
        f"{running} || {{",
        '  mkdir -p "${pid%/*}"',
        f'  setsid {command} >"${{pid%.pid}}.log" 2>&1 &',
        '  echo $! >"$pid"',
        "}",
        f"until {ready}; do",
        f"  sleep 0.2; {running} || exit 1",
        "done",
    ]
    sleep = [file, f"{running} || exit 0", ending, f"while {running}; do sleep 0.1; done"]
    alive = [file, f"{running} || exit 1", f"{ready} || exit 2"]
    return {key: _script(lines) for key, lines in (("wake", wake), ("sleep", sleep), ("alive", alive))}


def inline_hooks(wake: str, sleep: str, alive: str) -> dict[str, Any]:
    """Return hooks for llmux's scripts. There any exit status but 0 of `alive` means asleep; here that is 1 alone."""
    return {"wake": _script([wake]), "sleep": _script([sleep]), "alive": _script([f"(\n{alive.strip()}\n) || exit 1"])}


def _with_pid(words: list[str]) -> str:
    quoted = (shlex.quote(word) if "${PID}" not in word else word.replace("${PID}", '"$(cat "$pid")"') for word in words)
    return " ".join(quoted)


def _script(lines: list[str]) -> list[str]:
    text = "\n".join(lines).strip()
    return ["sh", "-c", text + "\n" if "\n" in text else text]
