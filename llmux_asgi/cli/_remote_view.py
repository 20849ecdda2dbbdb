"""How the models of a gateway are shown: tables that fit narrow terminals."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from ._remote_status import GatewayStatus, ModelStatus
from ._remote_text import duration, printable

__all__ = ["load_table", "models_table", "summary"]

WIDE, MIDDLE = 76, 46
"""Columns of characters from which on all is shown, and what matters most."""

_STATES = {"awake": "green", "asleep": "blue", "stopped": "dim", "unreachable": "bold red", "unknown": "yellow"}


class _Column(NamedTuple):
    title: str
    value: Callable[[ModelStatus], str | Text]
    right: bool = False
    least: int = 0
    """Left out where there are fewer columns of characters."""


def _state(model: ModelStatus) -> Text:
    return Text(model.state, _STATES.get(model.state, ""))


def _name(model: ModelStatus) -> Text:
    return Text(printable(model.name), "bold" if model.active else "")


def _remarks(model: ModelStatus) -> Text:
    remarks = []
    if model.active:
        remarks.append("active")
    if model.pinned:
        remarks.append("pinned")
    if model.retry_in is not None:
        remarks.append(f"tried again in {duration(model.retry_in)}")
    return Text(", ".join(remarks))


_LOAD = [
    _Column("model", _name),
    _Column("state", _state),
    _Column("in flight", lambda model: _count(model.in_flight), right=True, least=MIDDLE),
    _Column("waiting", lambda model: _count(model.waiting), right=True),
    _Column("frozen", lambda model: _count(model.frozen), right=True, least=WIDE),
    _Column("longest wait", lambda model: duration(model.oldest_wait), right=True, least=WIDE),
    _Column("", _remarks, least=WIDE),
]

_MODELS = [
    _Column("model", _name),
    _Column("state", _state),
    _Column("aliases", lambda model: printable(", ".join(model.aliases)), least=WIDE),
    _Column("server", lambda model: model.server + (", managed" if model.managed else ""), least=WIDE),
    _Column("level", lambda model: "-" if model.sleep_level is None else str(model.sleep_level), right=True, least=MIDDLE),
    _Column("sleep", lambda model: duration(model.estimates.sleep), right=True),
    _Column("wake", lambda model: duration(model.estimates.wake), right=True),
    _Column("", _remarks, least=WIDE),
]


def load_table(models: list[ModelStatus], width: int) -> Table:
    """What each model has to do."""
    return _table(_LOAD, models, width)


def models_table(models: list[ModelStatus], width: int) -> Table:
    """What each model is."""
    return _table(_MODELS, models, width)


def _table(columns: list[_Column], models: list[ModelStatus], width: int) -> Table:
    shown = [each for each in columns if width >= each.least]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown:
        table.add_column(
            column.title, justify="right" if column.right else "left", overflow="fold", no_wrap=column.title != "model"
        )
    for model in models:
        table.add_row(*(column.value(model) for column in shown))
    return table


def _count(number: int) -> str:
    return str(number) if number else "-"


def summary(status: GatewayStatus) -> str:
    """Totals since the start."""
    totals, shares = status.totals, status.shares
    parts = [f"{totals.switches} switch{'' if totals.switches == 1 else 'es'}"]
    parts += [f"{number} {word}" for number, word in ((totals.abandoned, "abandoned"), (totals.failures, "failed")) if number]
    spent = shares.serving + shares.switching + shares.idle
    if spent > 0:
        parts += [f"{name} {getattr(shares, name) / spent:.0%}" for name in ("serving", "switching", "idle")]
    parts += [status.policy] if status.policy else []
    return printable(f"{', '.join(parts)}; up for {duration(status.time - status.started)}")
