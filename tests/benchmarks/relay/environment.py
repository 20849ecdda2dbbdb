"""What the candidates need that the tests do not have: nginx, vllm-router, and this project as its users get it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from tests.real.environment import cache_root, locked
from tests.support.debian import Unavailable, program

__all__ = ["ROUTER_VERSION", "Unavailable", "nginx", "users_python", "vllm_router"]

ROUTER_VERSION = "0.1.17"
_ROOT = Path(__file__).resolve().parents[3]


def nginx() -> str:
    """The path of nginx; installed by apt if it is missing and this user may do so. Raises `Unavailable`."""
    return program("nginx", "nginx-light")


def vllm_router() -> str:
    """The path of the program, in a virtual environment in the user's cache folder. Raises `Unavailable`."""
    name = f"vllm-router-{ROUTER_VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    return str(_environment(name, [f"vllm-router=={ROUTER_VERSION}"], ROUTER_VERSION) / "vllm-router")


def users_python() -> str:
    """An interpreter that has this project with its server and nothing else. Raises `Unavailable`.

    Libraries import what they find: with the packages of the tests (trio, h2, rich) the gateway is 10 MB larger.
    """
    recipe = hashlib.sha256(f"{_ROOT}\n{(_ROOT / 'pyproject.toml').read_text()}".encode()).hexdigest()
    name = f"relay-benchmark-py{sys.version_info.major}.{sys.version_info.minor}"
    return str(_environment(name, ["--editable", f"{_ROOT}[server,otlp]"], recipe) / "python")


def _environment(name: str, requirement: list[str], recipe: str) -> Path:
    """The programs of a virtual environment in the user's cache folder, built if it is missing or of another recipe."""
    folder = cache_root() / name
    stamp = folder / "llmux-asgi-complete"
    with locked(folder.with_name(folder.name + ".lock")) as lock:
        if not stamp.exists() or stamp.read_text() != recipe:
            if folder.exists():
                shutil.rmtree(folder)
            _build(folder, requirement, lock)
            stamp.write_text(recipe)  # last: a build that was interrupted has none
    return folder / "bin"


def _build(folder: Path, requirement: list[str], lock: int) -> None:
    what = requirement[-1]
    sys.stderr.write(f"installing {what} into {folder}\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, "install", *requirement]):
        done = subprocess.run(command, pass_fds=[lock], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{what} cannot be installed: {done.stderr[-300:].strip()}")
