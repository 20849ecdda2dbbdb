"""A terminal with bash in it, for what a person types into one: prompts, foreground processes, Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import selectors
import shlex
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

__all__ = ["Terminal", "commands", "pattern"]

_PROMPT = re.compile(r"<prompt (\d+)>")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COLUMNS = 120
_SHELL = ["setsid", "--ctty", "--wait", "bash", "--noprofile", "--norc", "--noediting", "-i"]


class Terminal:
    """bash on a pseudo-terminal of its own, in `folder`, with `environment` and nothing else. Use it as a context manager."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._near, far = pty.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 40, _COLUMNS, 0, 0))
        settings = termios.tcgetattr(far)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(far, termios.TCSANOW, settings)
        # The prompt tells the exit status of what was typed before.
        environment = {**environment, "TERM": "xterm", "PS1": "<prompt $?>\n", "PS2": ""}
        self._shell = subprocess.Popen(_SHELL, cwd=folder, env=environment, stdin=far, stdout=far, stderr=far)
        os.close(far)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._near, selectors.EVENT_READ)
        self._written = b""
        self.mark = 0
        """Where in what was written the last thing typed begins."""

    def __enter__(self) -> Self:
        self.wait_for_prompt(10)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the window: bash and what runs in it get SIGHUP."""
        os.close(self._near)
        try:
            self._shell.wait(20)
        except subprocess.TimeoutExpired:
            self._shell.send_signal(signal.SIGKILL)
            self._shell.wait()

    @property
    def text(self) -> str:
        """What the terminal has shown so far, without control sequences."""
        shown = self._written.decode(errors="replace").replace("\r", "")
        return _ESCAPES.sub("", shown)

    def type(self, text: str) -> None:
        """Type a line, or a command of several lines, and wait for nothing."""
        self.mark = len(self.text)
        os.write(self._near, text.encode())

    def wait_for(self, expected: str, seconds: float, *, since: int | None = None) -> None:
        """Wait until what was shown since the last thing typed, or since `since`, has the lines of `expected`, in order."""
        wanted = re.compile(pattern(expected), re.MULTILINE | re.DOTALL)
        start = self.mark if since is None else since
        self._wait(lambda: wanted.search(self.text[start:]) is not None, seconds, f"lines like\n{expected}", start)

    def wait_for_prompt(self, seconds: float) -> int:
        """Wait until the command has ended; returns its exit status."""
        start = self.mark
        self._wait(lambda: _PROMPT.search(self.text[start:]) is not None, seconds, "the prompt", start)
        return int(_PROMPT.findall(self.text[start:])[-1])

    def _wait(self, done: Callable[[], bool], seconds: float, what: str, start: int) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"after {seconds:g} s there is not {what}\nbut\n{self.text[start:]}")

    def _read(self, seconds: float) -> bool:
        """Take in what comes; false if nothing does."""
        if not self._selector.select(seconds):
            return False
        try:
            part = os.read(self._near, 65536)
        except OSError:  # EIO: the other end is closed
            return False
        self._written += part
        return bool(part)


def commands(lines: str) -> list[str]:
    """The commands of a box, each with its line break; one may go over several lines, by a backslash or within quotes."""
    found, rest = [], ""
    for line in lines.splitlines(keepends=True):
        rest += line
        try:
            shlex.split(rest, comments=True)
        except ValueError:  # within quotes
            continue
        if not rest.endswith("\\\n"):
            found.append(rest)
            rest = ""
    assert not rest, f"it does not end: {rest}"
    return found


def pattern(shown: str) -> str:
    """The lines of a page as a regular expression: `…` is anything, numbers are any numbers, and lines may be between them."""
    lines = [line.strip() for line in shown.splitlines() if line.strip(" …")]
    return ".*?".join(rf"^[ \t]*{_line(line)}[ \t]*$" for line in lines)


def _line(line: str) -> str:
    words = [re.sub(r"\d+", r"\\d+", re.escape(word)).replace("…", r"[^\n]*") for word in re.split(r"\s+", line)]
    return r"[ \t]+".join(re.sub("─+", "─+", word) for word in words)
