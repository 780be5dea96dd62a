"""What the tests share: simulated clouds, the tool as a program, and a real syslog daemon.

Nothing here stands in for the real thing: the tool runs as its own process and talks HTTP to the
simulated metadata service, and what it logs is read back from rsyslogd's file.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from metadata_service import MetadataService

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOOL = ROOT / "is_vm_in_maint.py"

# Daemons live where a user's PATH does not look.
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
# What the tool would read from the environment of whoever runs the tests.
FOREIGN_VARIABLES = ("STATE_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


def need(program: str, package: str) -> str:
    """Absolute path of a program that a test cannot do without; where it is missing, skip the test.

    With CI=true fail it instead, so that nobody takes a run that skipped it for a run that passed.
    Windows is let off: the programs are Linux's.
    """
    path = shutil.which(program, path=SYSTEM_PATH)
    if path:
        return str(Path(path).absolute())
    missing = f"this test needs {program}: apt-get install {package}"
    if os.environ.get("CI") == "true" and sys.platform == "linux":
        pytest.fail(missing, pytrace=False)
    pytest.skip(missing)


@pytest.fixture
def service() -> Iterator[Callable[..., MetadataService]]:
    """service("gce", vm="web-2", ...): a simulated metadata service, stopped when the test ends."""
    from metadata_service import MetadataService

    with ExitStack() as running:

        def start(provider: str, **options: object) -> MetadataService:
            return running.enter_context(MetadataService(provider, **options))

        yield start


@pytest.fixture
def tool(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """tool("--test", service=gce): runs the tool as a program and waits for its end.

    It keeps its state in tmp_path/state, so that a second run finds the first one's, and logs to
    stderr; arguments that say otherwise win. `env` is added to the environment; None removes.
    """

    def run(
        *arguments: str | Path,
        provider: str | None = None,
        service: MetadataService | None = None,
        env: Mapping[str, str | None] | None = None,
        stdin: str | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), "--state", str(tmp_path / "state"), "--log", "stderr"]
        if service:
            command += ["--provider", service.provider, "--endpoint", service.url]
        if provider:
            command += ["--provider", provider]
        changes = {**dict.fromkeys(FOREIGN_VARIABLES), **(env or {})}
        environment = {k: v for k, v in {**os.environ, **changes}.items() if v is not None}
        return subprocess.run(
            [*command, *map(str, arguments)],
            env=environment,
            input=stdin or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


class Line(NamedTuple):
    """One line that rsyslogd wrote, in rsyslogd's words: user, notice, IsVmInMaint."""

    facility: str
    severity: str
    tag: str  # without [pid] and colon
    text: str


class Syslogd:
    """A real rsyslogd that listens on a Unix datagram socket and on a UDP port of 127.0.0.1."""

    MARK = "conftest-mark"
    CONFIG = """\
global(workDirectory="{folder}" net.enableDNS="off")
module(load="imuxsock" SysSock.Use="off")
module(load="imudp")
input(type="imuxsock" Socket="{socket}")
input(type="imudp" address="127.0.0.1" port="{port}")
template(name="fields" type="list") {{
  property(name="syslogfacility-text") constant(value="\\t")
  property(name="syslogseverity-text") constant(value="\\t")
  property(name="programname") constant(value="\\t")
  property(name="msg") constant(value="\\n")
}}
action(type="omfile" file="{output}" template="fields")
"""

    def __init__(self, program: str, folder: Path) -> None:
        self.socket = str(folder / "log")
        self.port = free_udp_port()
        self.output = folder / "output"
        self._marks = 0
        self._words = folder / "words-of-rsyslogd"
        config = folder / "rsyslog.conf"
        config.write_text(self.CONFIG.format(folder=folder, socket=self.socket, port=self.port, output=self.output))
        # Ubuntu's AppArmor keeps /usr/sbin/rsyslogd to its own files. It goes by the path.
        copy = shutil.copy(program, folder / "rsyslogd")
        with self._words.open("wb") as words:
            self._process = subprocess.Popen(
                [copy, "-n", "-f", str(config), "-i", str(folder / "pid")],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
            )

    def wait_until_ready(self, timeout: float = 20) -> None:
        deadline = time.monotonic() + timeout
        while not Path(self.socket).exists():
            self._check(deadline, "has not made its socket")
        # Its UDP port is open a moment later, and what is sent there before is lost: ask until it answers.
        while not any(line.text.startswith("udp ") for line in self._written()):
            self._send_marks()
            self._check(deadline, "has not opened its UDP port")
        self.lines(timeout=timeout)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def lines(self, at_least: int = 0, timeout: float = 20) -> list[Line]:
        """All lines so far, in order; waits until there are `at_least`, or fails the test.

        Whatever was sent before this call is in the answer: we send a mark after it, both ways, and
        wait for both. So an empty list means that nothing was logged, not that it is on its way.
        """
        deadline = time.monotonic() + timeout
        marks = self._send_marks()
        while True:
            written = self._written()
            texts = {line.text for line in written if line.tag == self.MARK}
            lines = [line for line in written if line.tag != self.MARK]
            if marks <= texts and len(lines) >= at_least:
                return lines
            self._check(deadline, f"has {len(lines)} lines, not {at_least}: {lines}")

    def _written(self) -> list[Line]:
        if not self.output.exists():
            return []
        complete = self.output.read_bytes().rpartition(b"\n")[0]
        lines = []
        for raw in complete.decode("utf-8", "replace").split("\n") if complete else []:
            facility, severity, tag, text = raw.split("\t", 3)
            lines.append(Line(facility, severity, tag, text.removeprefix(" ")))
        return lines

    def _send_marks(self) -> set[str]:
        self._marks += 1
        texts = {f"{way} {self._marks}" for way in ("unix", "udp")}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.sendto(f"<14>{self.MARK}: unix {self._marks}".encode(), self.socket)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.sendto(f"<14>{self.MARK}: udp {self._marks}".encode(), ("127.0.0.1", self.port))
        return texts

    def _check(self, deadline: float, complaint: str) -> None:
        ended = self._process.poll() is not None
        if ended or time.monotonic() > deadline:
            words = self._words.read_text(errors="replace")
            complaint = f"ended with {self._process.returncode}" if ended else complaint
            pytest.fail(f"rsyslogd {complaint}; it said: {words or 'nothing'}")
        time.sleep(0.01)


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def syslogd() -> Iterator[Syslogd]:
    """A real rsyslogd: give the tool --log syslog --syslog syslogd.socket, then read .lines()."""
    program = need("rsyslogd", "rsyslog")
    # Not in tmp_path: the path of a Unix socket may have 107 bytes, and pytest's folders are long.
    with tempfile.TemporaryDirectory(prefix="syslogd-") as folder:
        daemon = Syslogd(program, Path(folder))
        try:
            daemon.wait_until_ready()
            yield daemon
        finally:
            daemon.stop()
