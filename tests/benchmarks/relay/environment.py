"""What the candidates need that is no Python package of this project: nginx from Debian, vllm-router from PyPI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.real.environment import cache_root, locked

__all__ = ["ROUTER_VERSION", "Unavailable", "nginx", "vllm_router"]

ROUTER_VERSION = "0.1.17"


class Unavailable(Exception):
    """A candidate cannot be had here. The message says why."""


def nginx() -> str:
    """The path of nginx; installed by apt if it is missing and this user may do so. Raises `Unavailable`."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
    if found := shutil.which("nginx", path=search):
        return found
    apt = shutil.which("apt-get")
    if apt is None:
        raise Unavailable("nginx is not installed, and there is no apt-get to install it with")
    if os.geteuid() != 0:
        raise Unavailable("nginx is not installed; as root: apt-get install nginx-light")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "nginx-light"]):
        done = subprocess.run([apt, "-q", *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"apt-get {' '.join(command)} failed: {done.stderr[-300:].strip()}")
    if found := shutil.which("nginx", path=search):
        return found
    raise Unavailable("apt-get installed nginx-light, but there is no nginx")


def vllm_router() -> str:
    """The path of the program, in a virtual environment in the user's cache folder. Raises `Unavailable`."""
    folder = cache_root() / f"vllm-router-{ROUTER_VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    program, stamp = folder / "bin" / "vllm-router", folder / "llmux-asgi-complete"
    with locked(folder.with_name(folder.name + ".lock")) as lock:
        if not (stamp.exists() and program.exists()):
            if folder.exists():
                shutil.rmtree(folder)
            _build(folder, f"vllm-router=={ROUTER_VERSION}", lock)
            stamp.touch()  # last: a build that was interrupted has none
    return str(program)


def _build(folder: Path, requirement: str, lock: int) -> None:
    sys.stderr.write(f"installing {requirement} into {folder}\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, "install", requirement]):
        done = subprocess.run(command, pass_fds=[lock], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"{requirement} cannot be installed: {done.stderr[-300:].strip()}")
