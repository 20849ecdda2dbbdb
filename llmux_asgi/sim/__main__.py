"""`python -m llmux_asgi.sim '{"name": "qwen"}'`: run a simulated server with `SimOptions` given as JSON."""

from __future__ import annotations

import sys

import msgspec

from .gpu import GpuOutOfMemoryError
from .options import SimOptions
from .vllm import serve


def main() -> int:
    """Run until told to stop; return the exit status."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m llmux_asgi.sim OPTIONS_AS_JSON\n")
        return 2
    try:
        options = msgspec.json.decode(sys.argv[1], type=SimOptions)
    except msgspec.DecodeError as error:
        sys.stderr.write(f"sim-vllm: {error}\n")
        return 2
    try:
        serve(options)
    except (OSError, GpuOutOfMemoryError) as error:
        sys.stderr.write(f"sim-vllm {options.name}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
