"""What to do about a configuration that is refused: the message says where and what, this adds how to mend it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import inspect

from ..config import Config
from ..exceptions import ConfigError
from ._findings import Finding, Kind

__all__ = ["explain"]

_DOCS = "docs/configuration.md explains every key; `llmux-asgi schema` lets an editor complete them"

# The first that is found in the message counts. {0}, {1} … are its groups.
_RULES: list[tuple[str, Kind, str]] = [
    (r"No such file or directory", "missing-file", "Correct the path, or write a first configuration: llmux-asgi init"),
    (r"Is a directory|Permission denied", "unreadable-file", "Name a file that this user may read"),
    (r"the file's ending", "file-ending", "Rename the file after what is in it"),
    (r"needs PyYAML", "no-yaml", "pip install pyyaml, or write the configuration as TOML or JSON"),
    (
        r"not valid YAML: .*line (\d+), column (\d+)",
        "syntax",
        "Look at line {0}, column {1}: indent with blanks only, and put quotes around a text that has ': ', '#' or a bracket",
    ),
    (r"not valid (YAML|TOML|JSON)", "syntax", "Correct the file: it has to be {0}, as its ending says"),
    (r"is there twice", "duplicate-key", "Keep one of the two, or give it another name"),
    (r"missing required field `(\w+)`", "missing-key", "Add the key {0}"),
    (r"xpected `object`, got", "wrong-type", "Write keys and values below it, indented"),
    (r"xpected `([^`]+)`, got `([^`]+)`", "wrong-type", "Write a value of the kind {0}"),
    (r"xpected (`[^`]+` .*)", "out-of-range", "Write a value of the kind {0}"),
    (r"invalid enum value", "unknown-value", "Write one of the values that are named"),
    (r"('[^']*?)/v1\b.* leave out /v1", "url-with-v1", "Write {0}'"),
    (
        r"must name the port",
        "url-without-port",
        "Write the port in the URL, or leave url out and use {{port}} in the command",
    ),
    (
        r"is not a URL|has blanks|scheme, host, port and path|Port (out of|could not)",
        "bad-url",
        "Write it as in http://127.0.0.1:8001",
    ),
    (
        r"already is the server of the model '(.*)'",
        "duplicate-server",
        "Give each model a server of its own. A second name for the model {0} is an alias: models.{0}.aliases",
    ),
    (r"already names the model '(.*)'", "alias-clash", "Remove it here or at the model {0}: a name belongs to one model"),
    (r"has no \{port\}", "command-without-port", 'Add what your server takes its port by, such as: --port, "{{port}}"'),
    (r"say where the server listens", "no-server", "Add url: http://127.0.0.1:8001, or a command"),
    (
        r"'(.*)' must be (?:one of|none, for)",
        "unknown-priority",
        "Add it to the classes, priorities: {{{0}: 10}}, or leave it out here",
    ),
    (r"preempt (freezes|keeps)", "preempt-impossible", "Write policy.drain: wait, or take this model out"),
    (r"stops the server's process", "level-without-command", "Write 1 or 2, or let the gateway start the server by a command"),
    (r"has no effect|cannot be combined", "no-effect", "Leave one of them out"),
    (r"name at least one model", "no-models", "Add a model below models: its name, and below that its url"),
    (r"must not be less", "contradiction", "Raise the one or lower the other"),
]


def explain(error: ConfigError, path: Path) -> Finding:
    """Say what is wrong with the configuration in the file at `path`, and how to mend it."""
    message = str(error).removeprefix(f"{path}: ").removeprefix(f"{path.absolute()}: ")
    where, fault = "$", message
    if found := re.fullmatch(r"(\$.*?): (.*)", message, re.DOTALL):
        where, fault = found[1], found[2]
    elif str(path) not in message:
        fault = f"{path}: {message}"
    if found := re.search(r"unknown field `(.*)`", fault):
        return Finding(kind="unknown-key", where=where, fault=f"there is no key {found[1]!r}", mend=_known_key(found[1], where))
    for pattern, kind, mend in _RULES:
        if found := re.search(pattern, fault, re.DOTALL):
            return Finding(kind=kind, where=where, fault=fault, mend=mend.format(*found.groups()))
    return Finding(kind="invalid", where=where, fault=fault, mend=f"Correct the value. {_DOCS}")


def _known_key(key: str, where: str) -> str:
    """How to mend a key that there is not: by one that is spelled like it, or by the place where it belongs."""
    keys = list(_keys(inspect.type_info(Config), ""))
    here = _generic(where)
    if close := difflib.get_close_matches(key, [name for name, place in keys if place == here], 1):
        return f"Write {close[0]!r}"
    for name, place in keys:
        if name == key:
            return f"Write it below {place}" if place else "Write it at the top, outside of everything else"
    return f"Remove it. {_DOCS}"


def _generic(where: str) -> str:
    """`$.models.qwen.timeouts` → `models.NAME.timeouts`. A model's name may have dots in it."""
    path = where.removeprefix("$").removeprefix(".")
    return re.sub(r"^models\..+?(?=(\.(timeouts|costs|hooks))?$)", "models.NAME", path)


def _keys(kind: inspect.Type, at: str) -> Iterator[tuple[str, str]]:
    """Every key of the configuration, with the path of what it belongs to."""
    match kind:
        case inspect.StructType():
            for field in kind.fields:
                yield field.encode_name, at
                yield from _keys(field.type, f"{at}.{field.encode_name}".removeprefix("."))
        case inspect.DictType():
            yield from _keys(kind.value_type, f"{at}.NAME")
        case inspect.UnionType():
            for each in kind.types:
                yield from _keys(each, at)
        case inspect.Metadata():
            yield from _keys(kind.type, at)
