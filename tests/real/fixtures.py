"""Pytest fixtures that lend real vLLM servers to the tests marked `vllm`.

They are session-scoped and lazy: the first test that asks for one waits for the environment to be built (minutes, once
a machine) and for the servers to start (about a minute); a test run without such a test pays nothing.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.real.environment import EnvironmentBuildError, cache_root, ensure_environment
from tests.real.server import RealServer, RealServerError
from tests.real.tiny_model import ModelBuildError, ensure_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

__all__ = ["RealServers", "real_server", "real_servers"]


_TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
"""Without a parser vLLM refuses requests that demand a tool."""


class RealServers(NamedTuple):
    """Two running servers whose models answer differently. Each one's `name` is the name of the field."""

    alpha: RealServer
    beta: RealServer


@pytest.fixture(scope="session")
def real_servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServers]:
    """Two real vLLM servers, both awake at the start of the session; they are stopped at its end.

    The servers are shared by all tests: one that puts a server to sleep, kills it or stops it has to bring it back.
    """
    started = time.monotonic()
    folder = tmp_path_factory.mktemp("real-vllm")
    with contextlib.ExitStack() as stack:
        try:
            # Shown at once, not captured: it takes long enough to make one wonder.
            with _uncaptured(request.config):
                _say(request.config, "preparing the environment and the models")
                interpreter = ensure_environment()
                servers = RealServers(
                    *(
                        RealServer(
                            name,
                            ensure_model(interpreter, cache_root() / "models", seed),
                            interpreter,
                            folder / f"{name}.log",
                            _TOOLS,
                        )
                        for seed, name in enumerate(RealServers._fields, start=1)
                    )
                )
                _say(request.config, f"starting two servers, output in {folder}")
                for server in servers:
                    stack.callback(server.stop)
                    server.start()
                for server in servers:
                    server.wait_ready()
                    _say(request.config, f"{server.name} is ready at {server.url} ({time.monotonic() - started:.0f} s)")
        except (EnvironmentBuildError, ModelBuildError, RealServerError) as error:
            # Not a skip: who asks for these tests must not take their absence for success. Not `pytest.fail`: it would
            # quote the original error as well.
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        yield servers


@pytest.fixture(scope="session")
def real_server(real_servers: RealServers) -> RealServer:
    """The first of the two real servers, "alpha"."""
    return real_servers.alpha


def _uncaptured(config: pytest.Config) -> AbstractContextManager[None]:
    manager = config.pluginmanager.getplugin("capturemanager")
    if manager is None:
        return contextlib.nullcontext()
    disabled: AbstractContextManager[None] = manager.global_and_fixture_disabled()
    return disabled


def _say(config: pytest.Config, message: str) -> None:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"[real vLLM] {message}")
