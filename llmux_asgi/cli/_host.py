"""What of a configuration the machine itself must have: commands, folders, files, a GPU that can be read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from .._memory import NvmlGauge
from ..config import Config, ModelConfig
from ..exceptions import ConfigError
from ._findings import Finding

__all__ = ["look_at_host"]


def look_at_host(config: Config) -> list[Finding]:
    """Look for what the configuration names on this machine. Nothing is started, and nothing written."""
    found: list[Finding] = []
    for name, model in config.models.items():
        found += _commands(f"$.models.{name}", model)
    found += _files(config)
    if config.memory.check == "nvml":
        try:
            NvmlGauge(config.memory.device)
        except ConfigError as error:
            where, _, fault = str(error).partition(": ")
            mend = "Install the extra nvml and name a device that nvidia-smi shows, or write memory.check: none"
            found.append(Finding(kind="no-gpu", where=where, fault=fault, mend=mend))
    if config.metrics is not None:
        try:
            import_module("llmux_asgi.exposition")
        except ImportError as error:
            mend = "pip install 'llmux-asgi[prometheus]', or leave metrics out"
            found.append(Finding(kind="no-prometheus", where="$.metrics", fault=str(error), mend=mend))
    return found


def _commands(where: str, model: ModelConfig) -> Iterator[Finding]:
    if model.command is not None:
        if model.cwd is not None and not Path(model.cwd).is_dir():
            fault = f"{model.cwd}: no such folder" if not Path(model.cwd).exists() else f"{model.cwd}: not a folder"
            yield Finding(kind="no-folder", where=f"{where}.cwd", fault=fault, mend="Make the folder, or name another one")
        else:
            yield from _program(f"{where}.command", model.command, {**os.environ, **model.env}, model.cwd)
    if model.hooks is not None:
        for hook in ("wake", "sleep", "alive"):
            yield from _program(f"{where}.hooks.{hook}", getattr(model.hooks, hook), os.environ, None)


def _program(where: str, command: tuple[str, ...], environment: Mapping[str, str], folder: str | None) -> Iterator[Finding]:
    """Look for the program of a command, as the system will when it is run."""
    program = command[0]
    path = Path(folder or ".", program) if "/" in program else None
    if path is None and shutil.which(program, path=environment.get("PATH")):
        return
    if path is not None and path.is_file():
        if not os.access(path, os.X_OK):
            mend = f"chmod +x {path}, or name the interpreter first"
            yield Finding(kind="not-executable", where=where, fault=f"{path}: cannot be executed", mend=mend)
        return
    fault = f"{path or program}: no such program" + ("" if path else " in PATH")
    mend = "Install it, or write its whole path"
    if " " in program:
        mend = f"Write each word of the command by itself: [{', '.join(program.split())}, …]"
    yield Finding(kind="no-program", where=where, fault=fault, mend=mend)


def _files(config: Config) -> Iterator[Finding]:
    """The gateway takes these for no reason to stop: it would go on with a warning, and without them."""
    for where, name in (("$.policy.estimates", config.policy.estimates), ("$.request_log", config.request_log)):
        if name is None:
            continue
        path = Path(name).absolute()
        fault, mend = "", "Let the user that runs the gateway write there, or name another place"
        if path.is_dir():
            fault, mend = f"{path}: is a folder", "Name a file"
        elif not path.parent.is_dir():
            fault, mend = f"{path.parent}: no such folder", f"mkdir -p {path.parent}"
        elif not os.access(path.parent if where == "$.policy.estimates" or not path.exists() else path, os.W_OK):
            fault = f"{path}: cannot be written"
        if fault:
            yield Finding(kind="unwritable", where=where, fault=fault, mend=mend)
