"""The file that keeps the cost estimates over restarts."""

from __future__ import annotations

import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread

from ._estimates import Estimates
from ._spawn import spawn

__all__ = ["EstimatesFile"]

logger = logging.getLogger(__name__)


class EstimatesFile:
    """A JSON file, replaced as a whole. What is wrong with it is a warning and no more: estimates can be measured again."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).absolute()
        self._latest: bytes | None = None
        self._saving = False
        self._failed = False
        self._saved = anyio.Event()

    def load_into(self, estimates: Estimates) -> None:
        """Take over what the file holds, if there is one. Reads it at once."""
        try:
            estimates.restore(self._path.read_bytes())
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as exc:
            logger.warning("the estimates in %s are ignored: %s", self._path, exc)

    def save(self, estimates: Estimates) -> None:
        """Have the estimates written as they are now, in a thread: a slow disk holds up nobody."""
        self._latest = estimates.dump()
        if not self._saving:
            self._saving = True
            self._saved = anyio.Event()
            spawn(self._save, "llmux_asgi estimates")

    async def wait(self, seconds: float) -> None:
        """Wait until all is written, at most `seconds`."""
        if self._saving:
            with anyio.move_on_after(seconds):
                await self._saved.wait()

    async def _save(self) -> None:
        try:
            while (data := self._latest) is not None:
                self._latest = None
                await anyio.to_thread.run_sync(self._write, data)
        finally:
            self._saving = False
            self._saved.set()

    def _write(self, data: bytes) -> None:
        try:
            # In the same folder, so that the rename is atomic.
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                Path(name).replace(self._path)
            except BaseException:
                with suppress(OSError):
                    Path(name).unlink()
                raise
        except OSError as exc:
            if not self._failed:  # once, and not at each switch
                logger.warning("the estimates cannot be written to %s: %s", self._path, exc)
            self._failed = True
        else:
            self._failed = False
