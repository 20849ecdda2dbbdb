"""Programs that tests need and Python's package index does not have: `python -m tests.support.debian PROGRAM PACKAGE`.

They are installed by apt-get if they are missing and this user may do so. Prints the program's path; in one line, with exit
status 1, why it cannot be had.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

__all__ = ["Unavailable", "program"]

_SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


class Unavailable(Exception):
    """It cannot be had here. The message says why."""


def program(name: str, package: str) -> str:
    """The path of the program `name`, from the Debian package `package` if it is missing. Raises `Unavailable`."""
    if found := shutil.which(name, path=_SEARCH):
        return found
    apt = shutil.which("apt-get")
    if apt is None:
        raise Unavailable(f"{name} is not installed, and there is no apt-get to install it with")
    if os.geteuid() != 0:
        raise Unavailable(f"{name} is not installed; as root: apt-get install {package}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", package]):
        done = subprocess.run([apt, "-q", *command], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"apt-get {' '.join(command)} failed: {' '.join(done.stderr.split())[-300:]}")
    if found := shutil.which(name, path=_SEARCH):
        return found
    raise Unavailable(f"apt-get installed {package}, but there is no {name}")


if __name__ == "__main__":
    try:
        path = program(*sys.argv[1:])
    except Unavailable as exc:
        sys.exit(str(exc))
    sys.stdout.write(f"{path}\n")
