"""The journal: bounded, numbered, followed by those who wait."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest

from llmux_asgi import ErrorRecord, Journal


def numbers(journal: Journal, after: int) -> tuple[list[int], bool]:
    entries, complete = journal.since(after)
    return [entry.id for entry in entries], complete


def test_entries_are_numbered_from_one_and_dropped_when_there_are_too_many() -> None:
    journal = Journal(3, clock=lambda: 5.0)
    assert (journal.last_id, numbers(journal, 0), journal.started) == (0, ([], True), 5.0)
    for _ in range(5):
        journal.write("pin", model="a")
    assert journal.last_id == 5
    assert numbers(journal, 5) == ([], True)
    assert numbers(journal, 3) == ([4, 5], True)
    assert numbers(journal, 2) == ([3, 4, 5], True)
    assert numbers(journal, 1) == ([3, 4, 5], False)
    assert numbers(journal, 6) == ([3, 4, 5], False), "an id of another process"
    (entry, *_), _ = journal.since(4)
    assert (entry.time, entry.kind, entry.data) == (5.0, "pin", {"model": "a"})


def test_two_processes_are_told_apart() -> None:
    assert Journal().epoch != Journal().epoch


def test_errors_are_kept_apart_and_tell_no_address() -> None:
    journal = Journal(2, clock=lambda: 5.0)
    journal.error("a", "BackendError", "http://10.0.0.1:8001: it ended:\nsecret line")
    for number in range(25):
        journal.error(None, "E", str(number))
    assert journal.last_errors == {"a": ErrorRecord(5.0, "a", "BackendError", "the server: it ended are in the gateway's log.")}
    assert [error.message for error in journal.errors] == [str(number) for number in range(24, 4, -1)]
    assert journal.since(24)[0][0].data == {"model": None, "kind": "E", "message": "23"}


@pytest.mark.anyio
async def test_who_waits_is_woken_by_the_next_entry() -> None:
    journal = Journal()
    journal.write("pin", model="a")
    woken: list[int] = []

    async def follow(after: int) -> None:
        await journal.wait(after)
        woken.append(after)

    with anyio.fail_after(5):
        await journal.wait(0)
        async with anyio.create_task_group() as tasks:
            for after in (1, 1, 2):
                tasks.start_soon(follow, after)
            await anyio.wait_all_tasks_blocked()
            journal.write("pin", model=None)
            await anyio.wait_all_tasks_blocked()
            assert woken == [1, 1]
            journal.write("pin", model="b")
    assert woken == [1, 1, 2]
