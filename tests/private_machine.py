"""This machine once more, for tests that install something on it.

In a mount namespace of its own everything is there, and whatever is written to /etc, /usr/local, /var,
/root, /srv or /run stays there and is gone with the test. A BootedMachine has in addition a systemd of its
own, the real one, with the fewest units that it can do with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import need

# What is installed from there is not trusted with root, or not seen by a service.
IN_TMP = any(parent.stat().st_mode & 0o002 for parent in Path(__file__).resolve().parents)
HOME = os.path.expanduser("~root")
OVERLAID = ("/etc", "/usr/local", "/var", HOME, "/srv")
# Large, or others are at work there at the same time.
OF_OTHERS = (
    f"{HOME}/[!.]*",
    f"{HOME}/.[!l]*",
    f"{HOME}/.local/[!ls]*",
    f"{HOME}/.local/share",
    "/usr/local/go",
    "/usr/local/lib/python*",
    "/usr/local/share",
    "/var/cache",
    "/var/lib/[!i]*",
    "/var/log",
    "/var/tmp",
)
UNSHARE = ("unshare", "--mount", "--propagation", "private", "sh", "-c")
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
"""
STAY = "exec sleep infinity"
# systemd needs a hierarchy of control groups, and takes the place that it is in for its root.
BOOT = """\
mkdir /mnt/cgroup /mnt/units
mount -t cgroup2 cgroup2 /mnt/cgroup
mkdir {cgroup}
echo $$ >{cgroup}/cgroup.procs
mount -t tmpfs -o mode=755 tmpfs /etc/systemd/system
for unit in {targets}; do printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' $unit >/mnt/units/$unit.target; done
printf 'AllowIsolate=yes\nWants=timers.target\n' >>/mnt/units/multi-user.target
exec unshare --pid --fork --kill-child --mount --mount-proc --cgroup --uts --ipc sh -c '
    umount --lazy /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    export container=test SYSTEMD_UNIT_PATH=/etc/systemd/system:/mnt/units
    exec {systemd} --system --unit=multi-user.target --log-target=null --show-status=no
'
"""
TARGETS = (
    "multi-user basic sysinit timers network-online shutdown umount final local-fs time-set time-sync paths sockets"
)


class PrivateMachine:
    """Use it as a context manager; needs root."""

    then = STAY

    def __init__(self) -> None:
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("this test installs something, in a mount namespace of its own, so it needs root on Linux")
        self._nsenter = need("nsenter", "util-linux")
        self._holder = subprocess.Popen(
            [*UNSHARE, SET_UP.format(overlaid=" ".join(OVERLAID)) + self.then],
            stdin=subprocess.DEVNULL,
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

    def namespaces(self) -> list[str]:
        """Of which process, as nsenter wants to know it."""
        return ["--target", str(self._holder.pid), "--mount"]

    def command(self, *words: str | Path) -> list[str]:
        """The command that runs another one there."""
        return [self._nsenter, *self.namespaces(), "--", *map(str, words)]

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

    def files(self) -> set[str]:
        """What `find` finds where something could be installed: path, kind, mode, owner, size, change.

        Of folders neither size nor time: they remember that something was in them for a while.
        """
        others = [word for path in OF_OTHERS for word in ("-path", path, "-prune", "-o")]
        form = "%p %y %m %u:%g %l"
        folders = ["-type", "d", "-printf", f"{form}\\n"]
        found = self.run("find", *OVERLAID, *others, *folders, "-o", "-printf", f"{form} %s %T@\\n")
        assert not found.stderr
        return set(found.stdout.splitlines())


class BootedMachine(PrivateMachine):
    """The same, with systemd as process 1 in a process namespace."""

    def __init__(self) -> None:
        systemd = "/usr/lib/systemd/systemd"
        if not os.access(systemd, os.X_OK):
            need("systemd", "systemd")
        self._group = f"/mnt/cgroup/is-vm-in-maint-test-{os.getpid()}"
        self.then = BOOT.format(cgroup=self._group, targets=TARGETS, systemd=systemd)
        self._systemd = 0
        super().__init__()
        deadline = time.monotonic() + 20
        while self._state() not in ("running", "degraded"):
            if self._holder.poll() is not None or time.monotonic() > deadline:
                self.close()
                pytest.skip("this machine does not let systemd start in namespaces of its own")
            time.sleep(0.05)

    def _state(self) -> str:
        """systemd's own word for how it is; empty while it does not listen."""
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        if not children:
            return ""
        self._systemd = int(children[0])
        return self.run("systemctl", "is-system-running").stdout.strip()

    def namespaces(self) -> list[str]:
        return ["--target", str(self._systemd), "--mount", "--pid"]

    def close(self) -> None:
        super().close()
        group = self._group.replace("/cgroup", "", 1)
        # The processes that were killed go one after another.
        again = f"for i in $(seq 50); do find {group} -depth -type d -delete && break; sleep 0.1; done"
        subprocess.run([*UNSHARE, f"mount -t cgroup2 cgroup2 /mnt; {again}"], stderr=subprocess.DEVNULL, check=False)
