"""What hypothesis makes attributes and contexts from."""

from __future__ import annotations

from hypothesis import strategies as st
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import SpanContext, TraceFlags, TraceState

__all__ = ["ATTRIBUTES", "CONTEXTS", "SIMPLE_ATTRIBUTES", "Ids"]

CONTEXTS = st.builds(
    SpanContext,
    st.integers(1, (1 << 128) - 1),
    st.integers(1, (1 << 64) - 1),
    st.booleans(),
    st.just(TraceFlags(1)),
    st.sampled_from([TraceState(), TraceState([("a", "b"), ("c", "d")])]),
)
TEXT = st.text(st.characters(), max_size=300)  # half surrogates, too
SIMPLE = st.one_of(TEXT, st.booleans(), st.integers(-(1 << 65), 1 << 65), st.floats())
VALUES = st.one_of(
    SIMPLE, st.none(), st.binary(max_size=9), st.lists(SIMPLE, max_size=3), st.dictionaries(TEXT, SIMPLE, max_size=2)
)
ATTRIBUTES = st.dictionaries(st.text(min_size=1, max_size=9), VALUES, max_size=6)
SIMPLE_ATTRIBUTES = st.dictionaries(st.text(min_size=1, max_size=9), SIMPLE, max_size=6)


class Ids(IdGenerator):
    """Not random: that would be unknown to hypothesis. From small numbers, with zeros before them, to the largest."""

    def __init__(self) -> None:
        self._made = 0

    def generate_span_id(self) -> int:
        self._made += 1
        return self._made if self._made % 2 else (1 << 64) - self._made

    def generate_trace_id(self) -> int:
        self._made += 1
        return self._made if self._made % 2 else (1 << 128) - self._made
