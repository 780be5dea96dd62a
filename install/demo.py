"""See the whole thing work on any machine: `python3 install/demo.py`. No cloud, no root, under 20 seconds.

It starts a simulated Azure metadata service, runs the real tool against it as cron would, and shows what
reaches syslog and the load balancer while a reboot is announced, begins and is over. Everything it makes
is in the folder `.demo` of this project, and gone when it ends, also on Ctrl-C.
"""

from __future__ import annotations

import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo"
POOL = FOLDER / "pool.txt"
# What an administrator's hook would do with a load balancer, done with a text file.
HOOK = """
import pathlib, sys
pool = pathlib.Path(sys.argv[2])
others = [vm for vm in pool.read_text().split() if vm != "web-1"]
pool.write_text(" ".join(others if sys.argv[1] == "drain" else ["web-1", *others]))
"""

sys.path[:0] = [str(ROOT / "install"), str(ROOT / "tests")]

import environment  # noqa: E402 - found through the line above
from metadata_service import MetadataService  # noqa: E402


class Syslog:
    """A syslog daemon in miniature: keeps the lines that arrive over UDP."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.receive, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.socket.getsockname()[1]}"

    def receive(self) -> None:
        while True:
            self.lines.put(self.socket.recv(65536).decode())

    def new_lines(self) -> list[str]:
        """Return what has arrived since the last call."""
        time.sleep(0.2)
        return [self.lines.get() for _ in range(self.lines.qsize())]


def say(text: str = "", pause: float = 0.7) -> None:
    print(text, flush=True)
    time.sleep(pause)


class Demo:
    """One VM called web-1, one of three behind a load balancer."""

    def __init__(self, python: Path) -> None:
        self.syslog = Syslog()
        self.azure = MetadataService("azure", vm="web-1")
        self.azure.start()
        hook = FOLDER / "hook.py"
        hook.write_text(HOOK, encoding="utf-8")
        POOL.write_text("web-1 web-2 web-3", encoding="utf-8")
        join = subprocess.list2cmdline if os.name == "nt" else shlex.join
        words = [join([sys.executable, str(hook), verb, str(POOL)]) for verb in ("drain", "restore")]
        self.command = [str(python), str(ROOT / "is_vm_in_maint.py"), "--provider", "azure"]
        self.command += ["--endpoint", self.azure.url, "--state", str(FOLDER / "state")]
        self.command += ["--syslog", self.syslog.address, "--log", "syslog"]
        self.command += ["--drain", words[0], "--restore", words[1]]

    def checks(self, times: int) -> None:
        """Run the tool as cron does, every five minutes, and show what came of it."""
        for number in range(1, times + 1):
            say(f"   cron runs is_vm_in_maint.py{f'   (check {number} of {times})' if times > 1 else ''}", 0.1)
            done = subprocess.run(self.command, capture_output=True, text=True, timeout=60, check=False)
            if done.returncode or done.stderr:
                sys.exit(f"The tool ended with status {done.returncode} and said: {done.stderr}")
            lines = self.syslog.new_lines()
            for line in lines:
                say(f"   syslog | {line.partition('IsVmInMaint')[2].partition(': ')[2]}", 0.2)
            if not lines:
                say("   syslog | (nothing new)", 0.1)
        say(f"   the load balancer sends clients to: {POOL.read_text(encoding='utf-8')}\n")

    def show(self) -> None:
        """Go through the life of one event."""
        say("1. Nothing is planned for this VM. So nothing is logged, and nothing changes.")
        self.checks(1)
        say("2. Azure announces a reboot in ten minutes. It is logged once, though three checks run,")
        say("   and the VM leaves the load balancer before the blow.")
        about = "Host server is undergoing maintenance."
        event = self.azure.announce("Reboot", not_before=600, description=about)
        self.checks(3)
        say("3. The work starts.")
        self.azure.begin(event)
        self.checks(1)
        say("4. The work is done. The VM is put back.")
        self.azure.end(event)
        self.checks(1)
        say("That is all: its clients never met a VM that was rebooting. On a real VM the metadata service")
        say("is the cloud's own, syslog is yours, and the two commands are yours too. See README.md.")


def be_the_owner() -> None:
    """Under sudo, go on as the owner of this folder: root is not needed, and refuses others' folders."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        owner = ROOT.stat()
        if owner.st_uid != 0:
            os.setgroups([])
            os.setgid(owner.st_gid)
            os.setuid(owner.st_uid)


def stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, stop)
    if sys.argv[1:]:
        print(__doc__)
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    be_the_owner()
    try:
        FOLDER.mkdir(mode=0o700)
    except OSError as error:
        print(f"Cannot make {FOLDER}: {error.strerror}. Is another demo running? Else remove it and try again.")
        return 1
    try:
        say("Getting ready: a Python that has requests ...", 0)
        python = environment.find_or_make(FOLDER / "venv")
        say("Ready.\n", 0)
        Demo(python).show()
    except environment.CannotMake as error:
        print(error)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Everything this made is removed.")
        return 130
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
