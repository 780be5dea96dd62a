"""This machine once more, for tests that install something on it.

In a mount namespace of its own everything is there, and whatever is written to /etc, /usr/local, /var,
/root or /run stays there and is gone with the test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import need

OVERLAID = ("/etc", "/usr/local", "/var", "/root")
SET_UP = """\
set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
for folder in {overlaid}; do
    mkdir -p /mnt/upper$folder /mnt/work$folder
    chmod --reference=$folder /mnt/upper$folder
    mount -t overlay -o lowerdir=$folder,upperdir=/mnt/upper$folder,workdir=/mnt/work$folder overlay $folder
done
mount -t tmpfs -o mode=755 tmpfs /run
echo ready
exec sleep infinity
"""


class PrivateMachine:
    """Use it as a context manager; needs root."""

    def __init__(self) -> None:
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("this test installs something, in a mount namespace of its own, so it needs root on Linux")
        self._nsenter = need("nsenter", "util-linux")
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", SET_UP.format(overlaid=" ".join(OVERLAID))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._holder.stdout
        answer = self._holder.stdout.readline()
        if answer != "ready\n":
            self.close()
            pytest.skip(f"this machine allows no mount namespace with overlays: {answer}")

    def __enter__(self) -> PrivateMachine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()

    def command(self, *words: str | Path) -> list[str]:
        """The command that runs another one there."""
        return [self._nsenter, "--target", str(self._holder.pid), "--mount", "--", *map(str, words)]

    def run(
        self, *words: str | Path, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program there and waits for its end."""
        return subprocess.run(
            self.command(*words),
            env={**os.environ, **(env or {})},
            stdin=None if "input" in options else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )

    def files(self, *except_for: str) -> set[str]:
        """All files and folders there: path, kind, mode, owner, size, time of the last change.

        Of folders neither size nor time: they remember that something was in them for a while.
        """
        where = [*OVERLAID, "/run"]
        prune = [word for path in except_for for word in ("-path", path, "-prune", "-o")]
        form = "%p %y %m %u:%g %l"
        found = self.run("find", *where, *prune, "-type", "d", "-printf", f"{form}\\n", "-o", "-printf", f"{form} %s %T@\\n")
        assert not found.stderr
        return set(found.stdout.splitlines())
