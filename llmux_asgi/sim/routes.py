"""What a table of routes is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.types import Receive, Send

__all__ = ["Handler", "Query", "Table"]

Query = dict[str, list[str]]
"""The query's parameters, in their order."""
Handler = Callable[[Query, Receive, Send], Awaitable[None]]
Table = dict[tuple[str, str], Handler]
"""Handlers by method and path."""
