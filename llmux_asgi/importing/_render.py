"""A configuration as YAML, with comments. Needs PyYAML (extra `yaml`)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ._draft import Finding

__all__ = ["render"]

_WIDTH = 120
_TITLES = {"note": "Converted, with something to know", "none": "No counterpart, left out"}


class _Dumper(yaml.SafeDumper):
    """Lists of short texts in one line, scripts as blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    short = all("\n" not in str(each) for each in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=short)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)


def render(config: Mapping[str, Any], findings: Iterable[Finding], *, source: str, described: str) -> str:
    """Return the file's text. What is to be known of a model stands above it, the rest at the top."""
    findings = list(findings)
    lines = _comment(f"Imported from {source} ({described}) by `llmux-asgi import`.", "# ")
    models: Mapping[str, Any] = config["models"]
    # Names may have dots: the longest that fits is the one.
    owner = {
        each: max((name for name in models if each.field.startswith(f"models.{name}.")), key=len, default=None)
        for each in findings
    }
    for status, title in _TITLES.items():
        here = [each for each in findings if each.status == status and owner[each] is None]
        if here:
            lines += ["#", f"# {title}:"]
            for each in here:
                lines += _comment(f"{each.field}: {each.text}", "# ")
    lines += ["", "models:"]
    for name, model in models.items():
        for each in findings:
            if owner[each] == name and each.status != "converted":
                what = each.field.removeprefix(f"models.{name}.")
                lines += _comment(f"{what}: {'left out: ' if each.status == 'none' else ''}{each.text}", "  # ")
        lines += [textwrap.indent(_dump({name: model}), "  "), ""]
    for key, value in config.items():
        if key != "models":
            lines += [_dump({key: value}), ""]
    return "\n".join(lines)


def _comment(text: str, start: str) -> list[str]:
    # A line break in a name would end the comment, and YAML has no other control characters either.
    plain = "".join(each if each.isprintable() else " " for each in text)
    return textwrap.wrap(
        plain, _WIDTH, initial_indent=start, subsequent_indent=start + "  ", break_long_words=False, break_on_hyphens=False
    )


def _dump(value: Mapping[str, Any]) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=_WIDTH, allow_unicode=True)
    return text.rstrip("\n")
