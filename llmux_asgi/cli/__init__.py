"""The command `llmux-asgi`. Each module adds its commands to `app`."""

from __future__ import annotations

import sys

__all__ = ["main"]

try:
    import rich  # noqa: F401 (of the extra `cli`, as typer and uvicorn are)

    from . import (  # noqa: F401 (they add their commands, in the order of the help)
        _check,
        _events,
        _hash_key,
        _import,
        _init,
        _inspect,
        _operate,
        _schema,
        _serve,
        _top,
        _validate,
    )
    from ._app import app as app
    from ._simulators import sim_vllm as sim_vllm
except ImportError as _error:
    _missing: ImportError | None = _error
else:
    _missing = None


def main() -> None:
    """Entry point of `llmux-asgi`."""
    if _missing is not None:
        sys.stderr.write(f"llmux-asgi: {_missing}: install it with its extra 'cli', in a checkout: pip install '.[cli]'\n")
        raise SystemExit(2)
    app()
