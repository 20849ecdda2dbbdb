"""API keys, by their hashes, from configuration, environment and files.

Only the SHA-256 of a key is kept. That is enough for keys that nobody can guess, such as `llmux-asgi hash-key` makes (256
random bits): a slow hash is for passwords, which can be guessed. A key is found by its hash in a dict, and compared in constant
time. How long that takes depends on the hash of what a client sent, which it cannot steer towards one that is known.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..config import KeyConfig, KeySource, SecretConfig, is_hash, is_token, read_secret
from ..exceptions import ConfigError
from ._identity import Identity

__all__ = ["KeyRing", "hash_key", "new_key"]

logger = logging.getLogger("llmux_asgi.access")

_SHORTEST_KEY = 16
"""Characters. What is shorter may be guessed, and its hash be undone."""
_CHECK_INTERVAL = 1.0
"""Seconds from one look at the files to the next."""

_Signature = tuple[int, int, int] | None


def hash_key(key: str) -> str:
    """Return the hash of an API key as it is written in a configuration."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """Return a random API key of 256 bits."""
    return "llmux-" + secrets.token_urlsafe(32)


class KeyRing:
    """Knows the keys. Reads them when it is made, and raises `ConfigError` if it cannot.

    `named` are keys by name, which stand in the configuration at `where`; `load` reads more of them from `keys_file`.
    """

    def __init__(
        self,
        where: str,
        named: Mapping[str, KeySource],
        keys_file: str | None = None,
        load: Callable[[Path], Mapping[str, KeySource]] | None = None,
    ) -> None:
        self._where = where
        self._named = named
        self._keys_file = keys_file
        self._load = load
        self._folder = Path.cwd()
        self._watched: dict[Path, _Signature] = {}
        self._looked = 0.0
        self._keys: dict[bytes, tuple[bytes, Identity]] = {}
        self.reload()

    def reload(self) -> None:
        """Read all keys anew. Raises `ConfigError`, and goes on with those that it had."""
        watched: dict[Path, _Signature] = {}
        try:
            self._keys = self._read(watched)
        finally:
            self._watched = watched

    def refresh(self, now: float) -> None:
        """Read the keys anew if a file has changed; looks at most once a second. A broken file is logged, and the keys stay."""
        if now - self._looked < _CHECK_INTERVAL:
            return
        self._looked = now
        if all(_signature(path) == seen for path, seen in self._watched.items()):
            return
        try:
            self.reload()
        except ConfigError as exc:
            logger.error("the API keys were not read anew, those known before stay valid: %s", exc)
        else:
            logger.info("the API keys were read anew: %d", len(self._keys))

    def find(self, key: str) -> Identity | None:
        """Return whose key it is, `None` if it is nobody's."""
        digest = hashlib.sha256(key.encode()).digest()
        known = self._keys.get(digest)
        return known[1] if known is not None and hmac.compare_digest(known[0], digest) else None

    def _read(self, watched: dict[Path, _Signature]) -> dict[bytes, tuple[bytes, Identity]]:
        named = {f"{self._where}.{name}": (name, key) for name, key in self._named.items()}
        if self._keys_file is not None and self._load is not None:
            path = self._folder / self._keys_file
            watched[path] = _signature(path)  # before it is read: what changes meanwhile is seen at the next look
            for name, key in self._load(path).items():
                if name in self._named:
                    raise ConfigError(f"{path}: $.{name}: is in {self._where} too")
                named[f"{path}: $.{name}"] = name, key
        keys: dict[bytes, tuple[bytes, Identity]] = {}
        for where, (name, key) in named.items():
            for digest in self._digests(where, key, watched):
                if digest in keys:
                    raise ConfigError(f"{where}: has the same key as {keys[digest][1].name!r}")
                keys[digest] = digest, _identity(name, key)
        return keys

    def _digests(self, where: str, key: KeySource, watched: dict[Path, _Signature]) -> Iterator[bytes]:
        if key.hash is not None:
            yield _digest(where, key.hash)
        elif key.env is not None:
            yield _digest(where, read_secret(SecretConfig(env=key.env), where))
        elif key.file is not None:
            path = self._folder / key.file
            watched[path] = _signature(path)
            try:
                lines = path.read_text("ascii").split()
            except OSError as exc:
                raise ConfigError(f"{where}.file: {path} cannot be read: {exc.strerror or exc}") from None
            except UnicodeDecodeError:
                raise ConfigError(f"{where}.file: {path} has characters that no key has") from None
            if not lines:
                raise ConfigError(f"{where}.file: {path} is empty")
            for line in lines:
                yield _digest(f"{where}.file", line)


def _digest(where: str, text: str) -> bytes:
    if is_hash(text):
        return bytes.fromhex(text.removeprefix("sha256:"))
    if text.startswith("sha256:"):
        raise ConfigError(f"{where}: what begins with sha256: is not a hash of 64 hexadecimal digits")
    if len(text) < _SHORTEST_KEY or not is_token(text):
        raise ConfigError(
            f"{where}: a key has {_SHORTEST_KEY} or more visible ASCII characters (`llmux-asgi hash-key` makes one)"
        )
    return hashlib.sha256(text.encode()).digest()


def _identity(name: str, key: KeySource) -> Identity:
    if not isinstance(key, KeyConfig):
        return Identity(name)
    return Identity(name, key.models, key.requests_per_minute, key.tokens_per_minute, key.max_concurrent, key.priority)


def _signature(path: Path) -> _Signature:
    try:
        status = os.stat(path)  # noqa: PTH116 - once a second and file: the plain call
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
