"""What can be configured about access: keys of clients, of operators, and for the servers. None of it is a secret itself."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from ..exceptions import ConfigError
from ._values import Name, PositiveInt, ValueConfigError

__all__ = [
    "CLIENT_PATHS",
    "PREFIX",
    "AccessConfig",
    "AdminConfig",
    "AdminKeyConfig",
    "KeyConfig",
    "KeySource",
    "SecretConfig",
    "is_hash",
    "is_token",
    "read_secret",
]

_ENV = "Environment variable that holds it; null: none."
_MAKE_ONE = "`llmux-asgi hash-key` makes a key and its hash"


class SecretConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a secret is read from when the gateway starts."""

    env: Annotated[Name | None, Meta(description=_ENV)] = None
    file: Annotated[Name | None, Meta(description="File that holds it, blanks around it not counted; null: none.")] = None

    def __post_init__(self) -> None:
        if (self.env is None) == (self.file is None):
            raise ValueConfigError("env", "name either env or file")


class KeySource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an API key of the gateway's, or the key's hash, is read from."""

    hash: Annotated[str | None, Meta(description="SHA-256 of the key, sha256:… in hex; null: see env, file.")] = None
    env: Annotated[Name | None, Meta(description=_ENV)] = None
    file: Annotated[
        Name | None,
        Meta(description="File with the key or its hash, or several, one a line; read again when it changes; null: none."),
    ] = None

    def __post_init__(self) -> None:
        # What is in the wrong place may be a key: no message repeats it.
        if sum(each is not None for each in (self.hash, self.env, self.file)) != 1:
            raise ValueConfigError("hash", f"name one of hash, env, file ({_MAKE_ONE})")
        if self.hash is not None and not is_hash(self.hash):
            raise ValueConfigError("hash", f"is not sha256: and 64 hexadecimal digits ({_MAKE_ONE})")


class KeyConfig(KeySource, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One client: where its API key, or the key's hash, is read from, and what it may use."""

    models: Annotated[tuple[Name, ...], Meta(description="Names or aliases of the models that it may use; *: all.")] = ("*",)
    requests_per_minute: Annotated[PositiveInt | None, Meta(description="null: no limit.")] = None
    tokens_per_minute: Annotated[PositiveInt | None, Meta(description="Prompt and answer together; null: no limit.")] = None
    max_concurrent: Annotated[
        PositiveInt | None, Meta(description="Requests that may wait or run at once; null: no limit.")
    ] = None
    priority: Annotated[
        Name | None, Meta(description="Class of its requests, and the highest that they may ask for; null: any.")
    ] = None


class AccessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may use the gateway."""

    keys: Annotated[dict[Name, KeyConfig], Meta(description="Clients by name; spans and logs show the name.")] = {}
    keys_file: Annotated[
        Name | None, Meta(description="YAML, TOML or JSON file with more of them, read again when it changes; null: none.")
    ] = None


class AdminKeyConfig(KeySource, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One operator: where the key for the admin API, or its hash, is read from."""


class AdminConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The admin API and its page: what the gateway is doing, and what operators may do to it."""

    keys: Annotated[
        dict[Name, AdminKeyConfig],
        Meta(description="Operators by name; the log tells who did what.", extra_json_schema={"minProperties": 1}),
    ]
    prefix: Annotated[str, Meta(description="Path below the gateway's own mount point.")] = "/admin"

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueConfigError("keys", "name at least one key, or leave admin out: without a key nobody could use it")
        segments = self.prefix.split("/")
        if not PREFIX.fullmatch(self.prefix) or {".", ".."} & set(segments):
            raise ValueConfigError("prefix", f"{self.prefix!r} is not a path such as /admin: slashes, letters, digits, . _ ~ -")
        if segments[1] in CLIENT_PATHS:
            raise ValueConfigError("prefix", f"{self.prefix!r} would hide what clients ask for at /{segments[1]}")


CLIENT_PATHS = ("classify", "detokenize", "models", "pooling", "rerank", "score", "tokenize", "v1", "v2")
"""What the paths begin with that clients ask for."""

PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
"""What a path of the gateway's own looks like."""


def is_hash(text: str) -> bool:
    """Say whether a text is the SHA-256 of a key as it is written in a configuration."""
    digits = text.removeprefix("sha256:")
    return digits != text and len(digits) == 64 and set(digits) <= set("0123456789abcdef")


def read_secret(source: SecretConfig, where: str) -> str:
    """Return a secret. Raises `ConfigError`, which names the place and not what stands there."""
    if source.env is not None:
        text, place = os.environ.get(source.env, ""), f"the environment variable {source.env}"
    else:
        path = Path(source.file or "")
        place = f"the file {path}"
        try:
            text = path.read_text("ascii")
        except OSError as exc:
            raise ConfigError(f"{where}: {place} cannot be read: {exc.strerror or exc}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: {place} has characters that no key has") from None
    secret = text.strip()
    if not secret:
        raise ConfigError(f"{where}: {place} is empty")
    if not is_token(secret):
        raise ConfigError(f"{where}: {place} has characters that no key has")
    return secret


def is_token(text: str) -> bool:
    """Say whether a text can be sent as a bearer token: visible ASCII characters."""
    return all("!" <= each <= "~" for each in text)
