"""How many tokens a request takes: an estimate before, what the answer says after. Pure.

Servers end an answer, and a stream if they are asked to (`stream_options.include_usage`, or vLLM's
`--enable-force-include-usage`), with what was used: OpenAI's chat and completions as `prompt_tokens`, `completion_tokens` and
`total_tokens`, Responses and Anthropic's Messages as `input_tokens` and `output_tokens`. An answer that does not say it counts
as its estimate: a token for each four bytes of the request, and one for each event of the stream.
"""

from __future__ import annotations

import json
import re

import msgspec

__all__ = ["UsageMeter", "estimate"]

_BYTES_PER_TOKEN = 4
_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_LONGEST_KEY = 16
"""Bytes from the beginning of such a key to its value."""
_LONGEST_USAGE = 1024
"""Bytes of a usage object at most; vLLM's have less than 300."""
_decoder = json.JSONDecoder()


class _Limits(msgspec.Struct):
    max_tokens: object = None
    max_completion_tokens: object = None
    max_output_tokens: object = None


_limits = msgspec.json.Decoder(_Limits)


def estimate(body: bytes) -> tuple[float, float]:
    """Guess the tokens of a request's prompt, and of the longest answer that it allows (0 if it does not say).

    What is not JSON is a form with a file in it: its bytes say nothing about tokens, and it counts as none.
    """
    try:
        limits = _limits.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0.0, 0.0
    named = (limits.max_completion_tokens, limits.max_tokens, limits.max_output_tokens)
    longest = next((each for each in named if isinstance(each, int) and each > 0), 0)
    return len(body) / _BYTES_PER_TOKEN, float(longest)


class UsageMeter:
    """Reads along with one answer. `tokens` is what it has come to by now."""

    __slots__ = ("_events", "_input", "_known", "_output", "_prompt", "_tail", "_total")

    def __init__(self, prompt: float) -> None:
        self._prompt = prompt
        self._events = 0
        self._tail = b""
        self._known = False
        self._input = self._output = self._total = 0.0

    def feed(self, chunk: bytes) -> None:
        """Read a further part of the answer, cut anywhere."""
        self._events += chunk.count(b"data:")
        data = self._tail + chunk
        rest = max(0, len(data) - _LONGEST_KEY)
        # In the text of an answer quotes are escaped, so a model that writes of usage is not taken at its word.
        for found in _USAGE.finditer(data):
            try:
                usage, _ = _decoder.raw_decode(data[found.end() : found.end() + _LONGEST_USAGE].decode("latin-1"))
            except (ValueError, RecursionError):
                if len(data) - found.end() < _LONGEST_USAGE:  # not all of it is here yet
                    rest = min(rest, found.start())
            else:
                self._note(usage)
        self._tail = data[rest:]

    @property
    def tokens(self) -> float:
        """What was used: as the answer says, else the estimate."""
        if self._known:
            # Anthropic's streams say in the first event what the prompt took, in the last one what the answer took.
            return max(self._total, self._input + self._output)
        return self._prompt + self._events

    def _note(self, usage: dict[str, object]) -> None:
        for key, value in usage.items():
            # A server is not trusted to be right: a negative or endless number would give tokens away.
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
                continue
            if key in ("prompt_tokens", "input_tokens"):
                self._input, self._known = value, True
            elif key in ("completion_tokens", "output_tokens"):
                self._output, self._known = value, True
            elif key == "total_tokens":
                self._total, self._known = value, True
