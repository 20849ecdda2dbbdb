"""docs/tutorial.md, word for word, as somebody does it who has an empty folder and a clone."""

from __future__ import annotations

import re
import shutil
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import ROOT
from .terminal import Terminal, commands, pattern

pytestmark = pytest.mark.packaging

PAGE = ROOT / "docs" / "tutorial.md"
INSTALLING = 400.0
SECONDS = 60.0
"""For each step but the installation, on a machine that is busy."""
TEN_MINUTES = 600.0


@dataclass(frozen=True)
class Step:
    """Something that the page has somebody do or see in one of the terminals."""

    kind: str  # type, see, interrupt
    terminal: str
    text: str = ""


def steps(page: str) -> list[Step]:
    """Boxes of commands, what is seen after them (in the same terminal unless it is named), and Ctrl-C."""
    found: list[Step] = []
    each = r'^```(sh|text)(?: title="Terminal (\d)")?\n(.*?)^```$|[Ii]n terminal (\d), press \+\+ctrl\+c\+\+'
    for match in re.finditer(each, page, re.MULTILINE | re.DOTALL):
        language, terminal, text, interrupted = match.groups()
        if interrupted:
            found.append(Step("interrupt", interrupted))
        elif language == "sh":
            assert terminal, f"a command without a terminal: {text}"
            found.append(Step("type", terminal, text))
        else:
            found.append(Step("see", terminal or found[-1].terminal, text))
    return found


def test_the_tutorial_works_word_for_word_in_under_ten_minutes(clone: Path, bare: dict[str, str], tmp_path: Path) -> None:
    for port in (8000, 8001, 8002):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)), f"something listens on port {port}, which the tutorial needs"
    shutil.copytree(clone, tmp_path / "llmux_asgi")
    todo = steps(PAGE.read_text())
    began, began_at = time.monotonic(), dict[str, int]()
    with ExitStack() as stack:
        terminals = {
            number: stack.enter_context(Terminal(tmp_path, bare)) for number in sorted({step.terminal for step in todo})
        }
        for number, step in enumerate(todo):
            terminal = terminals[step.terminal]
            if step.kind == "type":
                began_at[step.terminal] = len(terminal.text)
                *first, last = commands(step.text)
                for command in first:
                    terminal.type(command)
                    assert terminal.wait_for_prompt(INSTALLING) == 0, terminal.text
                terminal.type(last)
                if todo[number + 1].kind != "see":
                    assert terminal.wait_for_prompt(SECONDS) == 0, terminal.text
            elif step.kind == "see":
                terminal.wait_for(step.text, SECONDS, since=began_at[step.terminal])
            else:
                terminal.type("\x03")
                assert terminal.wait_for_prompt(SECONDS) in (0, 130), terminal.text
        for terminal in terminals.values():
            assert re.findall(r"<prompt (?!0>|130>)", terminal.text) == [], terminal.text
        assert "Traceback" not in "".join(terminal.text for terminal in terminals.values())
    assert time.monotonic() - began < TEN_MINUTES
    assert {path.name for path in tmp_path.iterdir()} >= {"tutorial", "llmux.yaml", "requests.jsonl"}


def test_every_box_of_the_tutorial_is_a_step() -> None:
    page = PAGE.read_text()
    found = steps(page)
    assert len(found) > 25
    boxes = len(re.findall(r"^```", page, re.MULTILINE)) // 2 - page.count("```python")
    assert [step.kind in ("type", "see") for step in found].count(True) == boxes
    assert [step.kind for step in found].count("interrupt") == page.count("++ctrl+c++")


@pytest.mark.parametrize(
    ("shown", "written", "same"),
    [
        ("took 2.03 s", "took 1.99 s", True),
        ("a\n…\nb", "a\nx\ny\nb", True),
        ("a\nb", "b\na", False),
        ('{"id":"…","model":"qwen",…', '{"id":"x-1","model":"qwen","n":1}', True),
        ('{"id":"…","model":"qwen",…', '{"id":"x-1","model":"llama","n":1}', False),
        ("all is well", "not all is well", False),
        ("all is well", "all is well, but", False),
    ],
)
def test_what_is_seen_is_compared_line_by_line(shown: str, written: str, same: bool) -> None:
    assert bool(re.search(pattern(shown), written, re.MULTILINE | re.DOTALL)) == same
