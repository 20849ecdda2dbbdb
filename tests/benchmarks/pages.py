"""What the pages of the benchmarks have in common: tables, places for them, figures in a file, colours of a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

__all__ = ["STYLE", "encode", "fill", "table"]

STYLE = """
.ground { fill: #ffffff } .ink { fill: #1b1b1b } .faint { fill: #5c5c5c } .line { stroke: #d0d0d0 } .mark { stroke: #1b1b1b }
@media (prefers-color-scheme: dark) {
.ground { fill: #1e2129 } .ink { fill: #f0f0f0 } .faint { fill: #b0b0b0 } .line { stroke: #41454f } .mark { stroke: #f0f0f0 } }
text { font: 12px system-ui, sans-serif } .title { font-size: 15px; font-weight: 600 } .small { font-size: 10.5px }
"""
"""Of a picture with a ground of its own, so that it is readable anywhere."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table; the first `left` columns are text, the others figures."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        places = enumerate(zip(cells, widths, strict=True))
        return " | ".join(cell.ljust(width) if place < left else cell.rjust(width) for place, (cell, width) in places)

    rule = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join(f"| {line(cells)} |" for cells in (head, rule, *rows))


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->`, for each block, by its text.

    Raises `ValueError` if the page lacks one.
    """
    for name, text in blocks.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        _, also_found, after = rest.partition(end)
        if not found or not also_found:
            raise ValueError(f"the page has no place for {name}")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def encode(report: msgspec.Struct, digits: int) -> bytes:
    """As JSON, readable; figures have so many digits after the point."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return round(value, digits)
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        return [rounded(each) for each in value] if isinstance(value, list) else value

    return msgspec.json.format(msgspec.json.encode(rounded(msgspec.to_builtins(report)))) + b"\n"
