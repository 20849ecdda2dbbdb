"""Deterministic "generation": the same model and prompt give the same text, another model another one."""

from __future__ import annotations

import random
from hashlib import blake2b

import msgspec

__all__ = ["JSON_TOKENS", "TOKENS", "detokenize", "sample", "tokenize", "vector"]

_WORDS = (  # noqa: SIM905 (a sentence reads better than sixty literals)
    "the a model sleeps wakes on one GPU and then another answers while weights move to memory cache tokens stream "
    "quickly over wires until every request is done so that nobody waits longer than needed because switching costs "
    "time but idle silicon more ok yes no maybe here there quick brown fox jumps lazy dog naïve café 模型 🦙"
).split()
_GARBAGE = ("\u0000", "!!!!", "�", " Ã", "\u0011", "%%", " ö́", "@@")

TOKENS = tuple(f" {word}" for word in _WORDS) + _GARBAGE
"""Every token there is, as text; the last ones only come from lost weights."""
JSON_TOKENS = tuple(msgspec.json.encode(token) for token in TOKENS)
"""The same as JSON strings, quotes included: streaming does no encoding."""


def _seed(model: str, prompt: str) -> int:
    return int.from_bytes(blake2b(f"{model}\0{prompt}".encode("utf-8", "surrogatepass"), digest_size=8).digest())


def sample(model: str, prompt: str, count: int, *, weights_valid: bool = True) -> list[int]:
    """`count` indices into `TOKENS`. A longer sample begins with the shorter one."""
    generator = random.Random(_seed(model, prompt))
    span = (0, len(_WORDS)) if weights_valid else (len(_WORDS), len(TOKENS))
    return generator.choices(range(*span), k=count)


def tokenize(text: str) -> list[int]:
    """The UTF-8 bytes as token ids, so that `detokenize` inverts it."""
    return list(text.encode("utf-8", "surrogatepass"))


def detokenize(ids: list[int]) -> str:
    """The inverse of `tokenize`; ids that are no byte are dropped."""
    return bytes(token for token in ids if 0 <= token < 256).decode("utf-8", "replace")


def vector(model: str, text: str, size: int = 8) -> list[float]:
    """`size` numbers in [-1, 1), for embeddings and scores."""
    generator = random.Random(_seed(model, text))
    return [generator.uniform(-1, 1) for _ in range(size)]
