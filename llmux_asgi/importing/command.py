"""The command `llmux-asgi import`: reads the file, writes YAML and the report. Needs PyYAML and rich (extra `cli`)."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from ._convert import Imported, Program, convert
from ._render import render
from .errors import ConfigImportError

__all__ = ["run"]

_DESCRIBED = {"llmux 0.3": "llmux 0.3 to 1.x", "llmux 2": "llmux 2.x", "llama-swap": "llama-swap"}
_WORDS = {"converted": "converted", "note": "with a note", "none": "no counterpart"}
_STYLES = {"converted": None, "note": "yellow", "none": "red"}


def run(path: Path, program: Program | None, output: Path | None, *, as_json: bool) -> None:
    """Import a file. YAML goes to `output` or standard output, the report to standard error; JSON with both to standard output.

    Raises `ConfigImportError`; nothing was written then.
    """
    if output is not None and output.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigImportError(f"{output}: the ending must be .yaml or .yml")
    try:
        imported = convert(_read(path), program, environment=os.environ)
    except ConfigImportError as exc:
        raise ConfigImportError(f"{path}: {exc}") from None
    described = _DESCRIBED[imported.format]
    text = render(imported.data, imported.findings, source=path.name, described=described)
    if output is not None:
        try:
            with output.open("x", encoding="utf-8") as file:  # an existing file may have been worked on
                file.write(text)
        except OSError as exc:
            raise ConfigImportError(f"{output}: {exc.strerror or exc}") from None
    if as_json:
        sys.stdout.buffer.write(_json(imported) + b"\n")
        return
    if output is None:
        sys.stdout.write(text)
    _print(imported, described, output)


def _read(path: Path) -> Any:
    try:
        data = path.read_bytes()
        return msgspec.json.decode(data) if path.suffix.lower() == ".json" else yaml.safe_load(data)
    except OSError as exc:
        raise ConfigImportError(exc.strerror or str(exc)) from None
    except (msgspec.DecodeError, yaml.YAMLError, ValueError, RecursionError) as exc:
        kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
        raise ConfigImportError(f"not valid {kind}: {' '.join(str(exc).split())}") from None


def _json(imported: Imported) -> bytes:
    report = {"format": imported.format, "config": imported.data, "fields": imported.findings}
    return msgspec.json.format(msgspec.json.encode(report))


def _print(imported: Imported, described: str, output: Path | None) -> None:
    # In a pipe nothing must be cut off either.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160, highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("field", "what became of it", "where it went, or what to do"):
        table.add_column(name, overflow="fold")
    for each in imported.findings:
        table.add_row(each.field, _WORDS[each.status], each.text, style=_STYLES[each.status])
    console.print(table)
    counts = Counter(_WORDS[each.status] for each in imported.findings)
    counted = ", ".join(f"{counts[word]} {word}" for word in _WORDS.values() if counts[word])
    written = f" Written to {output}." if output else ""
    console.print(f"{described}, {len(imported.data['models'])} models; fields: {counted}.{written}")
