"""What the import of another program's configuration raises on purpose."""

from __future__ import annotations

from ..exceptions import LLMuxError

__all__ = ["ConfigImportError"]


class ConfigImportError(LLMuxError):
    """The file cannot be imported: it is of neither program, or a value in it makes no sense. The message says which."""
