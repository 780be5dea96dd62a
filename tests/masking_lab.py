"""The laboratory of the second promise: three VMs behind a load balancer, clients, and a reboot of VM1.

Everything is real but the machines and the cloud: HAProxy with `balance source` before three VMs, each
a small web server, in one set-up with nginx before it; clients with addresses of their own that keep
asking and never ask twice; the tool with its ready-made hook on every VM. A VM is a group of programs
that are killed together, without a word, and a folder that outlives them. The cloud is Azure's as
metadata_service.py simulates it, where each VM sees the events of all three.

tests/test_masking.py asserts what comes of it, tests/bench/masking.py does it longer and prints it.
Needs the standard library only, and an address of 127.0.0.0/8 for everybody, which only Linux has.

As a program it is the small web server: python3 masking_lab.py NAME ADDRESS PORT
"""

from __future__ import annotations

import http.client
import os
import re
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "is_vm_in_maint.py"
HOOKS = ROOT / "install" / "hooks"

SLOW = 0.5  # seconds that the slow page takes
VMS = {"vm1": "127.0.0.11", "vm2": "127.0.0.12", "vm3": "127.0.0.13"}
BALANCER = "127.0.0.1"
CLIENTS = [f"127.0.0.{number}" for number in range(101, 110)]  # `balance source` gives each VM three of nine
# What the tool or a hook would read from the environment of whoever runs this.
FOREIGN_VARIABLES = ("STATE_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "HAPROXY_STATE")


class Pace(NamedTuple):
    """How fast things go, in seconds."""

    probe: float  # between two health probes; HAProxy believes the third that fails, the second that does not
    health_wait: int  # HEALTH_WAIT of the hook health-file: more than three probes and a slow page
    lead: int  # of the tool
    out: float  # VM1 is down
    pause: float  # of a client between two fast pages; slow ones it wants one after the other


class Programs(NamedTuple):
    """Paths of the programs that play themselves."""

    haproxy: str
    nginx: str
    python: str  # can import requests


class Trouble(Exception):
    """The laboratory does not work, so nothing can be said about the tool; with what its programs said."""


# ---------------------------------------------------------------- the web server of a VM


class Page(BaseHTTPRequestHandler):
    """Says its VM's name, twice: /slow in two halves, as a page that is being made."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for an answer that comes at once
    disable_nagle_algorithm = True
    vm: ClassVar[bytes]

    def do_GET(self) -> None:
        pause = SLOW / 2 if self.path == "/slow" else 0.0
        time.sleep(pause)
        self.send_response(200)
        self.send_header("Content-Length", str(2 * len(self.vm)))
        self.end_headers()
        self.wfile.write(self.vm)
        if pause:
            self.wfile.flush()
            time.sleep(pause)
        self.wfile.write(self.vm)

    def log_message(self, *_: object) -> None:
        pass


class WebServer(socketserver.ThreadingTCPServer):
    """A thread for each connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A health probe hangs up when it has seen enough. What else goes wrong ought to be seen."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def serve(vm: str, address: str, port: str) -> None:
    Page.vm = f"{vm}\n".encode()
    WebServer((address, int(port)), Page).serve_forever()


# ---------------------------------------------------------------- programs


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def is_listening(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def start(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Starts a program, with its children a process group of its own; what it says is added to `log`."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}
    with log.open("ab") as words:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            env={**kept, **environment},
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a program and its children as a power cut does."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class VM:
    """A small web server, and the tool. HAProxy knows that it is well if it takes a connection."""

    hook = "haproxy"
    probe = ""  # what HAProxy is told besides "check"

    def __init__(self, name: str, folder: Path, pace: Pace, programs: Programs) -> None:
        self.name = name
        self.address = VMS[name]
        self.port = free_port(self.address)  # where HAProxy finds it
        self.folder = folder / name
        self.folder.mkdir()
        # A copy, as an administrator has one: if this is root's run and the checkout is somebody
        # else's, the tool rightly refuses to run what is in it.
        self.hook_path = str(shutil.copy(HOOKS / self.hook, self.folder))
        self.pace = pace
        self.programs = programs
        self.running: list[subprocess.Popen[bytes]] = []
        self.tool: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, port: int) -> None:
        """Starts a program of this VM and waits until it listens."""
        process = start(command, self.folder / "web.log")
        self.running.append(process)
        wait_until(
            lambda: is_listening(self.address, port) or process.poll() is not None,
            f"{self.name} listens",
            self.folder.parent,
        )

    def boot(self) -> None:
        self.serve_pages(self.port)

    def serve_pages(self, port: int) -> None:
        # Isolated and without site-packages: it starts sooner.
        python = (self.programs.python, "-I", "-S")
        self.run(*python, __file__, self.name, self.address, str(port), port=port)

    def start_tool(self, metadata_service: str) -> None:
        def hook(action: str) -> str:
            return shlex.join([self.hook_path, action, self.hook_word()])

        command = (self.programs.python, str(TOOL), "--watch", "--provider", "azure", "--log", "stderr")
        options = {
            "--endpoint": metadata_service,
            "--state": str(self.folder / "state"),
            "--lead": str(self.pace.lead),
            "--drain": hook("drain"),
            "--restore": hook("restore"),
        }
        words = [word for option in options.items() for word in option]
        self.tool = start([*command, *words], self.folder / "journal.log", **self.hook_settings())

    def hook_word(self) -> str:
        return f"web/{self.name}"

    def hook_settings(self) -> dict[str, str]:
        return {"HAPROXY_SOCKET": str(self.folder.parent / "admin.sock"), "DRAIN_WAIT": "20"}

    def journal(self) -> list[str]:
        """What the tool has logged so far."""
        log = self.folder / "journal.log"
        return log.read_text(errors="replace").splitlines() if log.exists() else []

    def power_cut(self) -> None:
        """Everything at once; the folder stays."""
        running, self.running = [*self.running, *filter(None, [self.tool])], []
        self.tool = None
        for process in running:
            kill(process)

    def stop_tool(self) -> None:
        """Lets the tool finish what it does, so that no hook is left behind."""
        tool, self.tool = self.tool, None
        if tool:
            tool.terminate()
            with suppress(subprocess.TimeoutExpired):
                tool.wait(30)
            kill(tool)


class NginxVM(VM):
    """A small web server behind an nginx that answers health probes as install/hooks/README.md says."""

    hook = "health-file"
    probe = "option httpchk GET /healthz"
    CONFIG = """\
daemon off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/client_body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen {address}:{port};
        {healthz}
        location / {{ proxy_pass http://{address}:{pages}; }}
    }}
}}
"""

    def boot(self) -> None:
        pages = free_port(self.address)
        self.serve_pages(pages)
        (healthz,) = re.findall(r"```nginx\n(.*?)```", (HOOKS / "README.md").read_text(), re.DOTALL)
        config = self.folder / "nginx.conf"
        config.write_text(
            self.CONFIG.format(
                folder=self.folder,
                address=self.address,
                port=self.port,
                pages=pages,
                healthz=healthz.replace("/var/lib/vm-health/drained", self.hook_word()),
            )
        )
        arguments = ("-e", "stderr", "-p", str(self.folder), "-c", str(config))
        self.run(self.programs.nginx, *arguments, port=self.port)

    def hook_word(self) -> str:
        return str(self.folder / "health" / "drained")

    def hook_settings(self) -> dict[str, str]:
        return {"HEALTH_WAIT": str(self.pace.health_wait)}


SET_UPS: dict[str, type[VM]] = {"haproxy": VM, "nginx": NginxVM}


# ---------------------------------------------------------------- clients


class Client(NamedTuple):
    """Somebody who asks for one page again and again."""

    address: str
    page: str
    keeps_alive: bool  # or makes a connection for each request


class Answer(NamedTuple):
    """What became of one request."""

    client: Client
    began: float  # monotonic seconds
    seconds: float
    vm: str  # that answered; empty if none did, in whole and with status 200
    failure: str


class Moment(NamedTuple):
    """Of a Crowd."""

    answers: int  # so many there were
    at: float  # monotonic seconds


def ask(connection: http.client.HTTPConnection, client: Client) -> tuple[str, str]:
    """Asks once: the name of the VM that answered, or what went wrong."""
    try:
        connection.request("GET", client.page, headers={} if client.keeps_alive else {"Connection": "close"})
        answer = connection.getresponse()
        body = answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        connection.close()  # the next request makes another
        return "", f"{type(error).__name__}: {error}"
    return ("", f"status {answer.status}") if answer.status != 200 else (body.split()[0], "")


class Crowd:
    """All clients: at each address four, who want the fast page or the slow one, and keep alive or not."""

    def __init__(self, port: int, pause: float) -> None:
        self.port = port
        self.pause = pause
        self.answers: list[Answer] = []
        self.clients = [
            Client(address, page, keeps_alive)
            for address in CLIENTS
            for page in ("/fast", "/slow")
            for keeps_alive in (False, True)
        ]
        self._stopped = threading.Event()
        # Not in step: a VM that is killed between two of their requests would hurt nobody.
        delays = [SLOW * number / len(self.clients) for number in range(len(self.clients))]
        self._threads = [
            threading.Thread(target=self._keep_asking, args=each, daemon=True) for each in zip(self.clients, delays)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _keep_asking(self, client: Client, delay: float) -> None:
        self._stopped.wait(delay)
        pause = 0 if client.page == "/slow" else self.pause
        connection = http.client.HTTPConnection(BALANCER, self.port, timeout=60, source_address=(client.address, 0))
        while not self._stopped.is_set():
            began = time.monotonic()
            vm, failure = ask(connection, client)
            self.answers.append(Answer(client, began, time.monotonic() - began, vm, failure))
            self._stopped.wait(pause)
        connection.close()

    def now(self) -> Moment:
        return Moment(len(self.answers), time.monotonic())

    def since(self, moment: Moment) -> list[Answer]:
        """Answers so far to the requests that began after this moment."""
        return [answer for answer in self.answers[moment.answers :] if answer.began >= moment.at]


Served = dict[str, set[str]]  # by each VM: addresses of clients


def served(answers: Sequence[Answer]) -> Served:
    return {vm: {answer.client.address for answer in answers if answer.vm == vm} for vm in VMS}


# ---------------------------------------------------------------- the laboratory


class Outcome(NamedTuple):
    """What the clients noticed of one reboot of VM1."""

    requests: int
    failures: list[str]
    longest: float  # seconds that a client waited for an answer
    out: float  # seconds without an answer of VM1
    before: Served
    meanwhile: Served  # while VM1 was down
    after: Served
    journals: dict[str, list[str]]  # of the tool on each VM


def wait_until(is_so: Callable[[], bool], what: str, folder: Path, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        if time.monotonic() > deadline:
            logs = (
                f"{log.relative_to(folder)}:\n{log.read_text(errors='replace')[-4000:]}"
                for log in folder.rglob("*.log")
            )
            raise Trouble("\n".join([f"it is not so after {timeout:.0f} s: {what}", *logs]))
        time.sleep(0.02)


class Lab:
    """HAProxy, three VMs, and clients that keep asking for as long as it is open."""

    CONFIG = """\
global
    stats socket {folder}/admin.sock mode 600 level admin
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option redispatch
listen web
    bind {address}:{port}
    balance source
    {probe}
    default-server check inter {inter}ms
    {servers}
"""

    def __init__(self, set_up: str, pace: Pace, programs: Programs) -> None:
        self.kind = SET_UPS[set_up]
        self.pace = pace
        self.programs = programs
        self._running = ExitStack()

    def __enter__(self) -> Lab:
        with ExitStack() as running:
            # Short, for the path of a Unix socket may have 107 bytes, and open to nginx's workers.
            self.folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="masking-")))
            self.folder.chmod(0o755)
            self.vms = {name: self.kind(name, self.folder, self.pace, self.programs) for name in VMS}
            for vm in self.vms.values():
                running.callback(vm.power_cut)
                running.callback(vm.stop_tool)
                vm.boot()
            port = self._start_haproxy(running)
            self._start_cloud(running)
            self.crowd = Crowd(port, self.pace.pause)
            running.callback(self.crowd.stop)
            self.crowd.start()
            self._running = running.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def _start_haproxy(self, running: ExitStack) -> int:
        port = free_port(BALANCER)
        config = self.folder / "haproxy.cfg"
        config.write_text(
            self.CONFIG.format(
                folder=self.folder,
                address=BALANCER,
                port=port,
                probe=self.kind.probe,
                inter=int(self.pace.probe * 1000),
                servers="\n    ".join(f"server {vm.name} {vm.address}:{vm.port}" for vm in self.vms.values()),
            )
        )
        process = start([self.programs.haproxy, "-db", "-f", str(config)], self.folder / "haproxy.log")
        running.callback(kill, process)
        self._wait_until(lambda: is_listening(BALANCER, port), "HAProxy listens")
        return port

    def _start_cloud(self, running: ExitStack) -> None:
        from metadata_service import Cloud, MetadataService

        cloud = Cloud("azure")
        services = {name: MetadataService("azure", vm=name, cloud=cloud) for name in VMS}
        self.services = {name: running.enter_context(service) for name, service in services.items()}

    def _wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        wait_until(is_so, what, self.folder)

    def reboot(self, *, with_tool: bool, notice: float) -> Outcome:
        """The life of VM1 through one reboot by its cloud, until it serves clients again.

        Args:
            with_tool: whether the VMs run the tool.
            notice: seconds from the announcement to "not before", when VM1 is killed.
        """
        first = len(self.crowd.answers)
        read = {name: len(vm.journal()) for name, vm in self.vms.items()}
        if with_tool:
            self._start_tools()
        vm1, cloud = self.vms["vm1"], self.services["vm1"]
        before = self._round()
        event = cloud.announce("Reboot", not_before=notice)
        time.sleep(notice)

        cloud.begin(event)
        vm1.power_cut()
        down = self.crowd.now()
        time.sleep(self.pace.out)
        meanwhile = served(self.crowd.since(down))

        up = self.crowd.now()
        vm1.boot()
        if with_tool:
            vm1.start_tool(cloud.url)
        cloud.end(event)
        self._wait_until(lambda: bool(served(self.crowd.since(up))["vm1"]), "VM1 serves clients again")
        after = self._round()
        for vm in self.vms.values():
            vm.stop_tool()

        answers = self.crowd.answers[first:]
        return Outcome(
            requests=len(answers),
            failures=[f"{answer.client}: {answer.failure}" for answer in answers if answer.failure],
            longest=max(answer.seconds for answer in answers),
            out=longest_silence([answer for answer in answers if answer.vm == "vm1"]),
            before=before,
            meanwhile=meanwhile,
            after=after,
            journals={name: vm.journal()[read[name] :] for name, vm in self.vms.items()},
        )

    def _start_tools(self) -> None:
        """On every VM; each has asked its cloud when this returns."""
        asked = {name: len(service.requests) for name, service in self.services.items()}
        for name, vm in self.vms.items():
            vm.start_tool(self.services[name].url)
        self._wait_until(
            lambda: all(len(service.requests) > asked[name] for name, service in self.services.items()),
            "the tool on every VM has asked",
        )

    def _round(self) -> Served:
        """Who is served by whom, once every client has asked anew and been answered."""
        begin = self.crowd.now()
        everybody = set(self.crowd.clients)
        self._wait_until(
            lambda: {answer.client for answer in self.crowd.since(begin)} == everybody, "every client is answered"
        )
        return served(self.crowd.since(begin))


def longest_silence(answers: Sequence[Answer]) -> float:
    """Seconds between one answer and the next, at most."""
    times = sorted(answer.began + answer.seconds for answer in answers)
    return max(after - before for before, after in zip(times, times[1:]))


if __name__ == "__main__":
    serve(*sys.argv[1:])
