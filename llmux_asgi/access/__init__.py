"""Access control: API keys or the host's own authentication, and what each client may use. Off unless configured."""

from __future__ import annotations

from ._control import SCOPE_GRANT, AccessControl, Grant, Identify
from ._credentials import find_credential
from ._identity import ANY_MODEL, Identity
from ._keys import KeyRing, hash_key, new_key

__all__ = [
    "ANY_MODEL",
    "SCOPE_GRANT",
    "AccessControl",
    "Grant",
    "Identify",
    "Identity",
    "KeyRing",
    "find_credential",
    "hash_key",
    "new_key",
]
