"""Imports configurations of llmux and of llama-swap: what has a counterpart is converted, of the rest it is said what to do.

`convert` is pure; the command is in `command`, the tables of fields are in `fields`.
"""

from __future__ import annotations

from ._convert import Imported, Program, convert, detect_format
from ._draft import Finding, Status
from .errors import ConfigImportError
from .fields import FIELDS, Field, Format

__all__ = [
    "FIELDS",
    "ConfigImportError",
    "Field",
    "Finding",
    "Format",
    "Imported",
    "Program",
    "Status",
    "convert",
    "detect_format",
]
