"""What is done at the end of the event loop's turn."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import anyio.lowlevel
import pytest

from llmux_asgi._turn import Turn

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)]


async def next_turn() -> None:
    await anyio.lowlevel.checkpoint()


async def test_functions_are_called_in_a_row_when_all_else_is_done() -> None:
    loop, order = asyncio.get_running_loop(), []
    turn = Turn.of(loop)

    def work(name: str) -> None:
        order.append(f"work of {name}")
        turn.at_end(lambda: order.append(f"end of {name}"))

    for name in "abc":
        loop.call_soon(work, name)
    await next_turn()
    await next_turn()
    assert order == ["work of a", "work of b", "work of c", "end of a", "end of b", "end of c"]


async def test_one_that_fails_does_not_keep_the_others_from_being_called() -> None:
    loop, reported, called = asyncio.get_running_loop(), list[dict[str, Any]](), []
    loop.set_exception_handler(lambda _, context: reported.append(context))

    def fail() -> None:
        raise KeyError("x")

    turn = Turn.of(loop)
    turn.at_end(fail)
    turn.at_end(lambda: called.append(1))
    await next_turn()
    assert called == [1]
    assert isinstance(reported[0]["exception"], KeyError)


async def test_who_has_been_alone_for_a_while_is_alone_until_another_one_comes() -> None:
    turn, alone = Turn(asyncio.get_running_loop()), list[bool]()
    for functions in (*(1 for _ in range(9)), 2, 1):
        for _ in range(functions):
            turn.at_end(lambda: None)
            alone.append(turn.alone)
        await next_turn()
    assert alone == [False] * 8 + [True] + [True, False] + [False]


async def test_nothing_is_kept_of_a_loop_that_has_ended() -> None:
    loop = asyncio.new_event_loop()
    Turn.of(loop)
    loop.close()
    ended = weakref.ref(loop)
    del loop
    gc.collect()
    assert ended() is None


async def test_a_loop_has_one() -> None:
    loop = asyncio.get_running_loop()
    assert Turn.of(loop) is Turn.of(loop)
