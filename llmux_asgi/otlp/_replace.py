"""A function of a library's with something of ours in it."""

from __future__ import annotations

from types import FunctionType
from typing import Any

__all__ = ["with_names"]


def with_names(function: Any, **names: object) -> Any:
    """Return a function with the same code that sees these names in place of those of its module.

    A later version that does not look for them there does without, and nothing is lost but time.
    """
    closure, defaults = function.__closure__, function.__defaults__
    replaced = FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, defaults, closure)
    replaced.__kwdefaults__ = function.__kwdefaults__
    return replaced
