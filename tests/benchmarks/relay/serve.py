"""An app of `tests.benchmarks.relay.apps` over uvicorn: `python -m tests.benchmarks.relay.serve NAME PORT UPSTREAM_PORT`."""

from __future__ import annotations

import argparse
import importlib

import uvicorn

__all__ = ["main"]


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.relay.serve")
    parser.add_argument("name", help="of a module in tests.benchmarks.relay.apps")
    parser.add_argument("port", type=int)
    parser.add_argument("upstream_port", type=int)
    given = parser.parse_args()
    module = importlib.import_module(f"tests.benchmarks.relay.apps.{given.name}")
    uvicorn.run(
        module.build(f"http://127.0.0.1:{given.upstream_port}"),
        port=given.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        log_level="warning",
        access_log=False,
        date_header=False,  # the upstream sends both, and they are relayed
        server_header=False,
        backlog=4096,
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
