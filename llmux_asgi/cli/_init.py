"""`llmux-asgi init`: a first configuration, by a few questions or by options."""

from __future__ import annotations

import json as json_module
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..config import load_config
from ..exceptions import ConfigError
from ._app import FAILED, SETUP, UNUSABLE, app, fail, print_json

__all__ = ["init"]

_DEFAULTS = ("qwen=http://127.0.0.1:8001", "llama=http://127.0.0.1:8002")


@app.command(rich_help_panel=SETUP)
def init(
    path: Annotated[Path, typer.Argument(help="The file to write, .yaml or .yml.")] = Path("llmux.yaml"),
    model: Annotated[
        list[str] | None,
        typer.Option(help="NAME=URL, or NAME=COMMAND of a server that the gateway starts, with {port}; may be repeated."),
    ] = None,
    sleep_level: Annotated[int | None, typer.Option(min=1, max=2, help="1: weights wait in CPU memory, 2: discarded.")] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Longest wait of a request for its model, seconds.")] = None,
    request_log: Annotated[str | None, typer.Option(help="JSONL file with a line for each request.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take the options, and defaults for the rest.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON about what was written; asks nothing.")] = False,
) -> None:
    """Write a commented configuration, which `check --offline` accepts. Asks for what no option says, on a terminal.

    Exit status: 0 it is written; 1 it cannot be written; 2 the file is there already, or an answer cannot be used.
    """
    if path.suffix.lower() not in (".yaml", ".yml"):
        fail(f"init: {path}: the ending has to be .yaml or .yml", UNUSABLE)
    if path.exists() and not force:
        fail(f"init: {path} is there already; --force overwrites it", UNUSABLE)
    ask = sys.stdin.isatty() and not yes and not json
    models = model or (_ask_for_models() if ask else list(_DEFAULTS))
    if sleep_level is None and ask:
        question = "Sleep level: 1, weights wait in CPU memory; 2, they are read from disk again"
        sleep_level = typer.prompt(question, 1, type=int, err=True)
    if request_timeout is None and ask:
        request_timeout = typer.prompt("Longest wait of a request for its model, in seconds", 60.0, type=float, err=True)
    try:
        sections = [_model(each) for each in models]
    except ValueError as error:
        fail(f"init: {error}", UNUSABLE)
    text = _TEMPLATE.format(
        models="\n".join(section for _, section in sections),
        sleep_level=sleep_level or 1,
        request_timeout=f"{60 if request_timeout is None else request_timeout:g}",
        request_log="null" if request_log is None else _quoted(request_log),
    )
    draft = path.with_name(f".{path.name}.draft.yaml")
    try:
        draft.write_text(text, encoding="utf-8")
        try:
            load_config(draft)
        except ConfigError as error:
            fail(f"init: {str(error).removeprefix(f'{draft}: ')}", UNUSABLE)
        else:
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        fail(f"init: {path}: {error.strerror or error}", FAILED)
    names = [name for name, _ in sections]
    if json:
        print_json({"path": str(path), "models": names})
    else:
        sys.stdout.write(f"{path} has {', '.join(names)}. Next: llmux-asgi check {path}\n")


def _ask_for_models() -> list[str]:
    models: list[str] = []
    while True:
        question = "Name of a model, as clients write it" if not models else "Name of the next model; empty: that is all"
        name = typer.prompt(question, "" if models else "qwen", show_default=not models, err=True)
        if not name:
            return models
        url = typer.prompt(
            "Its server's URL, without /v1, or the command that starts it, with {port}",
            f"http://127.0.0.1:{8001 + len(models)}",
            err=True,
        )
        models.append(f"{name}={url}")


def _model(given: str) -> tuple[str, str]:
    """The name, and the section of the file. Raises `ValueError`."""
    name, equals, server = (part.strip() for part in given.partition("="))
    if not name or not equals or not server:
        raise ValueError(f"--model {given}: write NAME=URL or NAME=COMMAND")
    if "://" in server.split()[0]:
        return name, _REMOTE.format(name=_quoted(name), url=_quoted(server))
    command = ", ".join(_quoted(word) for word in server.split())
    return name, _MANAGED.format(name=_quoted(name), command=command)


def _quoted(text: str) -> str:
    """A text as YAML has it: as it is if that cannot be taken for anything else."""
    plain = re.fullmatch(r"[A-Za-z/.][\w./-]*|https?://[\w.:/-]+", text, re.ASCII)
    if plain and text.lower() not in ("y", "n", "yes", "no", "on", "off", "true", "false", "null") and not text.startswith("."):
        return text
    return json_module.dumps(text)


_REMOTE = """\
  {name}:  # the name that clients use
    url: {url}  # root of its vLLM server, without /v1
    # served_name: org/name  # the name that vLLM serves it under; default: the name above
    # aliases: [gpt-4o]  # further names for clients
"""

_MANAGED = """\
  {name}:  # the name that clients use
    command: [{command}]  # starts its server; {{port}} is a free port
    # served_name: org/name  # the name that the server knows it by; default: the name above
    # aliases: [gpt-4o]  # further names for clients
"""

_TEMPLATE = """\
# Models that take turns on one GPU. Durations are in seconds; unknown keys are errors.
# All keys: docs/configuration.md, or `llmux-asgi schema > llmux.schema.json` for an editor.
# After a change: `llmux-asgi check` says what is wrong, here and with the servers.

models:
{models}
policy:
  name: gated_quantum  # turns; the model that has waited longest is next
  sleep_level: {sleep_level}  # 1: weights wait in CPU memory; 2: discarded, read from disk again
  request_timeout: {request_timeout}  # longest wait of a request for its model; then 504
  # quantum: 4  # a busy model's turn is this many times as long as the switch to the next one
  # linger: 0.5  # an idle model makes way after this time, if others are asked for
  # drain: wait  # running requests finish before their model sleeps; or preempt: they are frozen; or abort

# limits:
#   max_waiting: 1000  # how many requests may wait in all; further ones get a 429

request_log: {request_log}  # JSONL file: a line for each request, which `llmux-asgi simulate` reads; null: none
"""
