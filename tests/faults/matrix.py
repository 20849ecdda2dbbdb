"""The faults: what happens, what it does to clients, log and state, and how it is played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .stage import Setting, Stage

__all__ = ["FAULTS", "Fault", "fault"]


@dataclass(frozen=True)
class Fault:
    """One row of docs/faults.md."""

    name: str
    happens: str
    client: str
    told: str
    after: str
    setting: Setting
    play: Callable[[Stage], None]

    @property
    def row(self) -> str:
        """The row of the table."""
        return f"| {' | '.join((f'`{self.name}`', self.happens, self.client, self.told, self.after))} |"


FAULTS: dict[str, Fault] = {}


def fault(
    happens: str, client: str, told: str, after: str, setting: Setting | None = None
) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    """Register the function that plays a fault; its name is the fault's."""

    def register(play: Callable[[Stage], None]) -> Callable[[Stage], None]:
        name = play.__name__.strip("_").replace("_", "-")
        assert name not in FAULTS
        FAULTS[name] = Fault(name, happens, client, told, after, setting or Setting(), play)
        return play

    return register
