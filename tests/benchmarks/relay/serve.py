"""An app of `tests.benchmarks.relay.apps` over uvicorn: `python -m tests.benchmarks.relay.serve NAME PORT UPSTREAM_PORT`.

With `--stacks FILE` the process looks at itself from SIGUSR1 on: every few milliseconds of its CPU time it notes what it is
doing. At its end it writes these stacks, a line each: `function (file:line);…;function (file:line) COUNT`, the innermost last.
A profiler from outside has to stop the process, and finds it in a system call more often than it is in one.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import TypeAlias

import uvicorn

from llmux_asgi.serving import GatheringProtocol, tune_garbage_collection

__all__ = ["main"]

_SAMPLE_SECONDS = 0.001
_Stack: TypeAlias = tuple[tuple[CodeType, int], ...]


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay.serve")
    parser.add_argument("name", help="of a module in tests.benchmarks.relay.apps")
    parser.add_argument("port", type=int)
    parser.add_argument("upstream_port", type=int)
    parser.add_argument("--stacks", type=Path, help="where the profile goes")
    given = parser.parse_args()
    module = importlib.import_module(f"tests.benchmarks.relay.apps.{given.name}")
    app = module.build(f"http://127.0.0.1:{given.upstream_port}")
    # uvicorn ends the process by the signal that it caught; like this it comes to its end instead.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if given.name.startswith("gateway"):  # as `llmux-asgi serve` does
        tune_garbage_collection()
    stacks: Counter[_Stack] = Counter()
    if given.stacks is not None:
        _sample(stacks)
    try:
        uvicorn.run(
            app,
            port=given.port,
            loop="uvloop",
            http=GatheringProtocol if given.name.startswith("gateway") else "httptools",
            proxy_headers=False,
            ws="none",
            log_level="warning",
            access_log=False,
            date_header=False,  # the upstream sends both, and they are relayed
            server_header=False,
            backlog=4096,
            timeout_graceful_shutdown=1,
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if given.stacks is not None:
            given.stacks.write_text("".join(f"{_folded(stack)} {count}\n" for stack, count in stacks.items()))


def _sample(stacks: Counter[_Stack]) -> None:
    def look(number: int, frame: FrameType | None) -> None:
        found = []
        while frame is not None:
            found.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        stacks[tuple(found)] += 1

    signal.signal(signal.SIGPROF, look)
    signal.signal(signal.SIGUSR1, lambda *_: signal.setitimer(signal.ITIMER_PROF, _SAMPLE_SECONDS, _SAMPLE_SECONDS) and None)


def _folded(stack: _Stack) -> str:
    return ";".join(f"{code.co_qualname} ({code.co_filename}:{line})" for code, line in reversed(stack))


if __name__ == "__main__":
    main()
