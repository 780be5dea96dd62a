"""The ready-made hooks: against a real nginx, a real HAProxy, and stand-ins for the clouds' programs.

A stand-in is a small sh script that comes first in PATH, records how it was called, and answers as
the cloud does. That the flags in those calls exist is asked of the real programs' own help.
"""

from __future__ import annotations

import http.client
import http.server
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import ROOT, SYSTEM_PATH, need

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the hooks are sh scripts")

HOOKS = ROOT / "install" / "hooks"
NAMES = sorted(path.name for path in HOOKS.iterdir() if not path.suffix)
CLOUD_HOOKS = {"azure-load-balancer": "az", "ec2-target-group": "aws", "gce-instance-group": "gcloud"}
DOCUMENT = json.dumps({"provider": "gce", "instance": {"id": "i-0abc", "name": "web-1"}})
# Settings that whoever runs the tests may have.
SETTINGS = ("HEALTH_WAIT", "DRAIN_WAIT", "HAPROXY_SOCKET", "HAPROXY_STATE")

Completed = subprocess.CompletedProcess  # of str
Calls = Callable[[], list[list[str]]]


class Bench:
    """A folder of stand-ins that comes first in PATH, and the hooks, run with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        # Hooks that wait a fixed time need not really wait. The haproxy hook gets the real one.
        self.sleeps = self.stand_in("sleep", "")

    def stand_in(self, program: str, script: str) -> Calls:
        """Puts a program in PATH; returns what tells the arguments of each of its calls so far."""
        record = self.folder / f"calls-of-{program}"
        path = self.bin / program
        path.write_text(
            "#!/bin/sh\n"
            f'{{ printf "%s\\037" "$@"; echo; }} >>{shlex.quote(str(record))}\n'
            f"cd {shlex.quote(str(self.folder))}\n{script}\n"
        )
        path.chmod(0o755)

        def calls() -> list[list[str]]:
            lines = record.read_text().splitlines() if record.exists() else []
            return [line.split("\x1f")[:-1] for line in lines]

        return calls

    def environment(self, **settings: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        return {**kept, "PATH": f"{self.bin}:{SYSTEM_PATH}", **settings}

    def run(
        self, hook: str, *words: str, stdin: str = DOCUMENT, cwd: Path | None = None, **settings: str
    ) -> Completed[str]:
        return subprocess.run(
            [str(HOOKS / hook), *words],
            input=stdin,
            env=self.environment(**settings),
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def succeed(self, hook: str, *words: str, stdin: str = DOCUMENT, **settings: str) -> str:
        """Runs a hook that must succeed; returns what it had to say all the same."""
        done = self.run(hook, *words, stdin=stdin, **settings)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def fail(self, hook: str, *words: str, stdin: str = DOCUMENT, **settings: str) -> str:
        """Runs a hook that must fail and end with its own words, in one line; returns them."""
        done = self.run(hook, *words, stdin=stdin, **settings)
        assert done.returncode == 1, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"{hook}: ")
        return last


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon in the foreground."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=20)


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no {what}; it said: {process.communicate()[1] or 'nothing'}")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def get(port: int, path: str = "/") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode().strip()
    finally:
        connection.close()


# All of them


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = need("shellcheck", "shellcheck")
    done = subprocess.run(
        [shellcheck, *(str(HOOKS / name) for name in NAMES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout + done.stderr == ""


def test_every_hook_is_in_the_readme_and_can_be_executed() -> None:
    readme = (HOOKS / "README.md").read_text()
    for name in NAMES:
        assert f"| `{name}` |" in readme
        assert os.access(HOOKS / name, os.X_OK)


def commands_of_example(bench: Bench, hook: str) -> tuple[dict[str, str], list[list[str]]]:
    """The crontab example in a hook's header: its settings, and the drain and restore commands.

    Read as cron does: NAME=value lines make the environment, and sh gets the rest of the line.
    """
    header = (HOOKS / hook).read_text().partition("\nset -eu\n")[0]
    lines = [line[4:] for line in header.partition("crontab -e):\n")[2].splitlines()]
    settings = dict(line.split("=", 1) for line in lines if not line.startswith("*"))
    settings["HOOK"] = settings["HOOK"].replace("/opt/is-vm-in-maint", str(ROOT))
    (command,) = (line.split(maxsplit=5)[5] for line in lines if line.startswith("*"))
    the_tool, rest = command.split(maxsplit=1)
    assert the_tool.endswith("/is_vm_in_maint.py")
    calls = bench.stand_in("the-tool", "")
    subprocess.run(["sh", "-c", f"the-tool {rest}"], env=bench.environment(**settings), check=True)
    ((drain, drain_command, restore, restore_command),) = calls()
    assert (drain, restore) == ("--drain", "--restore")
    return settings, [shlex.split(drain_command), shlex.split(restore_command)]


@pytest.mark.parametrize("hook", NAMES)
def test_the_crontab_example_in_the_header_calls_the_hook(bench: Bench, hook: str) -> None:
    _, (drain, restore) = commands_of_example(bench, hook)
    assert drain[:2] == [str(HOOKS / hook), "drain"]
    assert restore == [drain[0], "restore", *drain[2:]]


# What is typed, and what of it the answer must point at.
WRONG = [
    ("health-file", "What to do?"),
    ("health-file drian", "What to do?"),
    ("health-file drain drained", "'drained'"),
    ("health-file drain /run/", "'/run/'"),
    ("health-file drain /run/a /run/b", "drain /run/a /run/b"),
    ("HEALTH_WAIT=15s health-file drain", "HEALTH_WAIT is '15s'"),
    ("haproxy", "What to do?"),
    ("haproxy drain", "Which server?"),
    ("haproxy drain vm1", "'vm1'"),
    ("haproxy drain web/vm1 web/", "'web/'"),
    ("haproxy drain web/vm1/x", "'web/vm1/x'"),
    ("haproxy drain 'web/vm1;shutdown sessions server web/vm2'", "'web/vm1;shutdown"),
    ("haproxy drain 'web/vm1\nshow info'", "is not BACKEND/SERVER"),
    ("DRAIN_WAIT=1m haproxy drain web/vm1", "DRAIN_WAIT is '1m'"),
    ("HAPROXY_STATE=down haproxy drain web/vm1", "HAPROXY_STATE is 'down'"),
    ("azure-load-balancer", "What to do?"),
    ("azure-load-balancer drain", "'' is not GROUP/NIC/IPCONFIG"),
    ("azure-load-balancer drain group/nic lb/pool", "'group/nic'"),
    ("azure-load-balancer drain group/nic/ipconfig1", "Which pool?"),
    ("azure-load-balancer drain group/nic/ipconfig1 pool", "'pool'"),
    ("azure-load-balancer drain group/nic/ipconfig1 /subscriptions/s/lb", "'/subscriptions/s/lb'"),
    ("DRAIN_WAIT=-1 azure-load-balancer drain g/n/c lb/pool", "DRAIN_WAIT is '-1'"),
    ("gce-instance-group", "What to do?"),
    ("gce-instance-group drain", "Which group?"),
    ("gce-instance-group drain web-1", "Which group?"),
    ("gce-instance-group drain zone/group web-1 web-2", "'web-1' comes before 'web-2'"),
    ("gce-instance-group drain zone/group --zone=z", "'--zone=z'"),
    ("DRAIN_WAIT=010 gce-instance-group drain zone/group", "DRAIN_WAIT is '010'"),
    ("ec2-target-group", "What to do?"),
    ("ec2-target-group drain i-0abc", "Which target group?"),
    ("ec2-target-group drain arn:aws:s3:::bucket", "'arn:aws:s3:::bucket'"),
    ("ec2-target-group drain 'arn:aws:elasticloadbalancing:r:1:targetgroup/a/1 b'", "has a space"),
]


@pytest.mark.parametrize(("typed", "complaint"), WRONG)
def test_wrong_usage_is_told_what_is_wrong_and_what_is_right(bench: Bench, typed: str, complaint: str) -> None:
    programs = [bench.stand_in(program, "") for program in CLOUD_HOOKS.values()]
    words = shlex.split(typed)
    settings = dict([words.pop(0).split("=")]) if "=" in words[0] else {}
    done = bench.run(*words, **settings)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{words[0]}: ")
    assert complaint in done.stderr
    assert f" Usage: {words[0]} drain|restore " in done.stderr
    assert [calls() for calls in programs] == [[], [], []]


# health-file


def test_health_file_makes_the_mark_and_waits_for_the_balancer_to_notice(bench: Bench) -> None:
    mark = bench.folder / "health" / "drained"
    bench.succeed("health-file", "drain", str(mark))
    assert mark.is_file()
    assert bench.sleeps() == [["15"]]
    bench.succeed("health-file", "drain", str(mark), HEALTH_WAIT="75")
    assert mark.is_file()
    assert bench.sleeps() == [["15"], ["75"]]


def test_health_file_restores_without_waiting_also_when_never_drained(bench: Bench) -> None:
    mark = bench.folder / "health" / "drained"
    bench.succeed("health-file", "restore", str(mark))
    bench.succeed("health-file", "drain", str(mark), HEALTH_WAIT="0")
    for _ in range(2):
        bench.succeed("health-file", "restore", str(mark))
        assert not mark.exists()
    assert bench.sleeps() == [["0"]]


def test_health_file_lets_the_web_server_see_the_mark_whatever_the_umask(bench: Bench) -> None:
    mark = bench.folder / "health" / "drained"
    before = os.umask(0o077)
    try:
        bench.succeed("health-file", "drain", str(mark), HEALTH_WAIT="0")
    finally:
        os.umask(before)
    assert mark.stat().st_mode & 0o777 == 0o644
    assert mark.parent.stat().st_mode & 0o777 == 0o755


def test_health_file_refuses_a_folder_where_everybody_may_write(bench: Bench) -> None:
    folder = bench.folder / "open"
    folder.mkdir()
    folder.chmod(0o1777)
    link = bench.folder / "link"
    link.symlink_to(folder)
    for path in (folder, link):
        assert str(path) in bench.fail("health-file", "drain", str(path / "drained"))
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="needs root to give a folder away")
def test_health_file_refuses_a_folder_of_somebody_else(bench: Bench) -> None:
    folder = bench.folder / "foreign"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    assert str(folder) in bench.fail("health-file", "drain", str(folder / "drained"))
    assert list(folder.iterdir()) == []


def test_health_file_says_when_it_could_not_make_or_remove_the_mark(bench: Bench) -> None:
    (bench.folder / "file").touch()
    assert "cannot make" in bench.fail("health-file", "drain", str(bench.folder / "file" / "drained"))
    folder = bench.folder / "folder"
    folder.mkdir()
    assert "is no file" in bench.fail("health-file", "drain", str(folder))
    assert "cannot remove" in bench.fail("health-file", "restore", str(folder))
    assert bench.sleeps() == []


def test_nginx_fails_its_health_check_while_drained_and_serves_all_the_same(bench: Bench) -> None:
    nginx = need("nginx", "nginx-light")
    (snippet,) = re.findall(r"```nginx\n(.*?)```", (HOOKS / "README.md").read_text(), re.DOTALL)
    # Not in tmp_path, which is closed to others: nginx's workers must see the mark as nobody.
    with tempfile.TemporaryDirectory(prefix="nginx-") as name:
        folder, port = Path(name), free_port()
        folder.chmod(0o755)
        mark = folder / "health" / "drained"
        assert "/var/lib/vm-health/drained" in snippet
        temporary = "".join(
            f"{what}_temp_path {folder}/{what};\n" for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; pid {folder}/pid; error_log stderr;\n"
            + ("user nobody nogroup;\n" if os.geteuid() == 0 else "")
            + f"events {{}}\nhttp {{\naccess_log off;\n{temporary}"
            + "open_file_cache max=10 inactive=60s; open_file_cache_valid 60s;\n"
            + f"open_file_cache_errors on;\nserver {{\nlisten 127.0.0.1:{port};\n"
            + snippet.replace("/var/lib/vm-health/drained", str(mark))
            + 'location / { return 200 "page\\n"; }\n}\n}\n'
        )
        command = (nginx, "-e", "stderr", "-p", name, "-c", str(folder / "nginx.conf"))
        with running(*command) as process:
            wait_until(lambda: is_listening(port), process, "nginx")
            assert get(port, "/healthz") == (200, "ok")
            bench.succeed("health-file", "drain", str(mark))
            assert get(port, "/healthz") == (503, "drained")
            assert get(port) == (200, "page")
            bench.succeed("health-file", "restore", str(mark))
            assert get(port, "/healthz") == (200, "ok")


# haproxy


class WebServer:
    """One VM's web server. /slow is answered when `release` is set, the rest at once."""

    def __init__(self, name: str) -> None:
        self.release = threading.Event()
        self.slow_requests = 0
        web = self

        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/slow":
                    web.slow_requests += 1
                    web.release.wait(60)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(name.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


class HAProxy:
    """A real HAProxy before two web servers: in `web` everybody takes turns, in `stuck` nobody does."""

    CONFIG = """\
global
    stats socket {folder}/admin level admin
    stats socket {folder}/operator level operator
    stats socket ipv4@127.0.0.1:{admin} level admin
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen web
    bind 127.0.0.1:{web}
    balance roundrobin
    {servers}
listen stuck
    bind 127.0.0.1:{stuck}
    balance roundrobin
    stick-table type ip size 10
    stick on src
    {servers}
"""

    def __init__(self, folder: Path, servers: dict[str, WebServer]) -> None:
        self.folder = folder
        self.servers = servers
        self.web, self.stuck, self.admin = free_port(), free_port(), free_port()
        self.socket = str(folder / "admin")
        lines = [f"server {name} 127.0.0.1:{web.port}" for name, web in servers.items()]
        (folder / "haproxy.cfg").write_text(
            self.CONFIG.format(
                folder=folder,
                servers="\n    ".join(lines),
                web=self.web,
                stuck=self.stuck,
                admin=self.admin,
            )
        )

    def serving(self) -> set[str]:
        """Who serves new clients: each server has a turn in as many requests as there are servers."""
        return {get(self.web)[1] for _ in range(2 * len(self.servers))}

    def state(self, server: str) -> str:
        """DRAIN, MAINT or "no check", as HAProxy's own statistics call it."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.socket)
            connection.sendall(b"show stat\n")
            rows = connection.makefile().read().splitlines()
        backend, _, name = server.partition("/")
        (row,) = (row.split(",") for row in rows if row.startswith(f"{backend},{name},"))
        return row[17]


@pytest.fixture
def haproxy() -> Iterator[HAProxy]:
    program = need("haproxy", "haproxy")
    servers = {name: WebServer(name) for name in ("vm1", "vm2")}
    # Not in tmp_path: the path of a Unix socket may have 107 bytes, and pytest's folders are long.
    with tempfile.TemporaryDirectory(prefix="haproxy-") as folder:
        proxy = HAProxy(Path(folder), servers)
        try:
            with running(program, "-db", "-f", str(Path(folder) / "haproxy.cfg")) as process:
                wait_until(lambda: is_listening(proxy.stuck), process, "HAProxy")
                yield proxy
        finally:
            for web in servers.values():
                web.stop()


@pytest.fixture
def slow_clients(haproxy: HAProxy) -> Iterator[list[str]]:
    """Two clients, one at each server, whose requests stay open until the server's `release`."""
    served: list[str] = []
    clients = [threading.Thread(target=lambda: served.append(get(haproxy.web, "/slow")[1])) for _ in haproxy.servers]
    for client in clients:
        client.start()
    deadline = time.monotonic() + 20
    while not all(web.slow_requests for web in haproxy.servers.values()):
        assert time.monotonic() < deadline, "the slow requests do not arrive"
        time.sleep(0.02)
    yield served
    for web in haproxy.servers.values():
        web.release.set()
    for client in clients:
        client.join(60)


def test_haproxy_sends_new_clients_elsewhere_until_restored(bench: Bench, haproxy: HAProxy) -> None:
    where = {"HAPROXY_SOCKET": haproxy.socket}
    assert haproxy.serving() == {"vm1", "vm2"}
    bench.succeed("haproxy", "restore", "web/vm1", **where)  # never drained
    for _ in range(2):
        assert bench.succeed("haproxy", "drain", "web/vm1", **where) == ""
        assert haproxy.serving() == {"vm2"}
    for _ in range(2):
        assert bench.succeed("haproxy", "restore", "web/vm1", **where) == ""
        assert haproxy.serving() == {"vm1", "vm2"}
    assert bench.sleeps() == []


def test_haproxy_is_reached_over_tcp_too(bench: Bench, haproxy: HAProxy) -> None:
    where = {"HAPROXY_SOCKET": f"127.0.0.1:{haproxy.admin}"}
    bench.succeed("haproxy", "drain", "web/vm2", **where)
    assert haproxy.serving() == {"vm1"}
    bench.succeed("haproxy", "restore", "web/vm2", **where)
    assert haproxy.serving() == {"vm1", "vm2"}


def test_haproxy_drains_in_every_backend_that_is_named(bench: Bench, haproxy: HAProxy) -> None:
    words = ("web/vm1", "stuck/vm1")
    bench.succeed("haproxy", "drain", *words, HAPROXY_SOCKET=haproxy.socket)
    assert [haproxy.state(server) for server in words] == ["DRAIN", "DRAIN"]
    bench.succeed("haproxy", "restore", *words, HAPROXY_SOCKET=haproxy.socket)
    assert [haproxy.state(server) for server in words] == ["no check", "no check"]


def test_haproxy_waits_until_the_requests_of_that_server_have_ended(
    bench: Bench, haproxy: HAProxy, slow_clients: list[str]
) -> None:
    (bench.bin / "sleep").unlink()
    with subprocess.Popen(
        [str(HOOKS / "haproxy"), "drain", "web/vm1"],
        env=bench.environment(HAPROXY_SOCKET=haproxy.socket),
        stderr=subprocess.PIPE,
        text=True,
    ) as hook:
        wait_until(lambda: haproxy.state("web/vm1") == "DRAIN", hook, "drain")
        time.sleep(1.5)  # it looks once a second, and had the time to look twice
        assert hook.poll() is None
        haproxy.servers["vm1"].release.set()
        assert hook.communicate(timeout=60) == (None, "")
        assert hook.returncode == 0
    assert slow_clients == ["vm1"]  # and vm2's client was not waited for


def test_haproxy_counts_as_drained_when_requests_outlast_the_wait_but_says_so(
    bench: Bench, haproxy: HAProxy, slow_clients: list[str]
) -> None:
    words = bench.succeed("haproxy", "drain", "web/vm1", HAPROXY_SOCKET=haproxy.socket, DRAIN_WAIT="2")
    assert "still 1 open on web/vm1 after 2 s" in words
    assert bench.sleeps() == [["1"], ["1"]]
    assert haproxy.serving() == {"vm2"}
    assert slow_clients == []


def test_haproxy_state_maint_also_moves_the_clients_that_are_stuck(bench: Bench, haproxy: HAProxy) -> None:
    _, mine = get(haproxy.stuck)
    (other,) = haproxy.servers.keys() - {mine}
    bench.succeed("haproxy", "drain", f"stuck/{mine}", HAPROXY_SOCKET=haproxy.socket)
    assert get(haproxy.stuck) == (200, mine)  # which is why there is such a setting
    settings = {"HAPROXY_SOCKET": haproxy.socket, "HAPROXY_STATE": "maint"}
    bench.succeed("haproxy", "drain", f"stuck/{mine}", **settings)
    assert get(haproxy.stuck) == (200, other)
    bench.succeed("haproxy", "restore", f"stuck/{mine}", **settings)
    assert haproxy.state(f"stuck/{mine}") == "no check"


@pytest.mark.parametrize(("server", "reason"), [("web/vm3", "No such server."), ("api/vm1", "No such backend.")])
@pytest.mark.parametrize("action", ["drain", "restore"])
def test_haproxys_refusal_is_an_error_though_it_comes_like_an_answer(
    bench: Bench, haproxy: HAProxy, action: str, server: str, reason: str
) -> None:
    words = bench.fail("haproxy", action, server, HAPROXY_SOCKET=haproxy.socket)
    assert server in words
    assert reason in words
    assert haproxy.socket in words


def test_haproxy_socket_without_the_level_admin_is_an_error(bench: Bench, haproxy: HAProxy) -> None:
    operator = str(haproxy.folder / "operator")
    assert "Permission denied" in bench.fail("haproxy", "drain", "web/vm1", HAPROXY_SOCKET=operator)
    assert haproxy.serving() == {"vm1", "vm2"}


def test_haproxy_drains_in_those_that_answer_and_fails_if_one_does_not(bench: Bench, haproxy: HAProxy) -> None:
    where = {"HAPROXY_SOCKET": f"/nonexistent {haproxy.socket}"}
    assert "/nonexistent" in bench.fail("haproxy", "drain", "web/vm1", **where)
    assert haproxy.serving() == {"vm2"}
    assert "/nonexistent" in bench.fail("haproxy", "restore", "web/vm1", **where)
    assert haproxy.serving() == {"vm1", "vm2"}


@pytest.mark.parametrize("where", ["/nonexistent", "127.0.0.1:1", "127.0.0.1", "host:99999999", "x:y"])
def test_haproxy_that_cannot_be_asked_is_an_error(bench: Bench, where: str) -> None:
    words = bench.fail("haproxy", "drain", "web/vm1", HAPROXY_SOCKET=where)
    assert f"cannot ask HAProxy at {where}: " in words


def test_haproxy_hook_imports_nothing_from_the_folder_it_is_run_in(bench: Bench, haproxy: HAProxy) -> None:
    (bench.folder / "socket.py").write_text("raise SystemExit('somebody else is root now')")
    done = bench.run("haproxy", "drain", "web/vm1", cwd=bench.folder, HAPROXY_SOCKET=haproxy.socket)
    assert (done.returncode, done.stderr) == (0, "")


# The clouds

POOL = "/subscriptions/s/resourceGroups/{}/providers/Microsoft.Network/loadBalancers/{}/backendAddressPools/{}"
WEB_POOL = POOL.format("web-group", "web-lb", "web-pool")
OTHER_POOL = POOL.format("other-group", "lb", "pool")

# Each keeps what the cloud would know in files of the bench's folder. A file named fail-VERB makes
# that verb fail with what the file says.
FAIL = """
for word; do
    if [ -e "fail-$word" ]; then cat "fail-$word" >&2; exit 1; fi
done
"""
AZ = (
    FAIL
    + f"""
id=
for word; do
    case $previous in --ids | --address-pool) id=$word ;; --lb-name) lb=$word ;; --name) name=$word ;; esac
    previous=$word
done
case "$*" in
"account show"*) [ -e logged-in ] ;;
"login --identity"*) touch logged-in ;;
"network nic ip-config show"*) cat members ;;
"network lb address-pool show"*)
    [ -n "$id" ] || id="{POOL.format("web-group", "$lb", "$name")}"
    grep -ix -e "$id" pools || {{ echo "ERROR: (NotFound) $id" >&2; exit 3; }} ;;
*"address-pool remove"*) # and like az, says nothing if it is not there, as it is spelled
    grep -vx -e "$id" members >left; mv left members ;;
*"address-pool add"*) echo "$id" >>members ;;
*) exit 2 ;;
esac
"""
)
GCLOUD = (
    FAIL
    + """
for word; do case $word in --instances=*) vm=${word#*=} ;; esac; done
case $4 in
list-instances) cat members ;;
remove-instances)
    grep -qx -e "$vm" members || { echo "ERROR: $vm is not a member of $5" >&2; exit 1; }
    grep -vx -e "$vm" members >left; mv left members ;;
add-instances)
    if grep -qx -e "$vm" members; then echo "ERROR: $vm is already a member of $5" >&2; exit 1; fi
    echo "$vm" >>members ;;
*) exit 2 ;;
esac
"""
)
# The file "states" has what describe-target-health tells, one word a call; then InvalidTarget.
AWS = (
    FAIL
    + """
case $2 in
deregister-targets | register-targets) ;;
describe-target-health)
    if [ -s states ]; then
        head -n 1 states; tail -n +2 states >left; mv left states
    else
        echo "An error occurred (InvalidTarget) when calling DescribeTargetHealth" >&2; exit 254
    fi ;;
*) exit 2 ;;
esac
"""
)
STAND_INS = {"az": AZ, "gcloud": GCLOUD, "aws": AWS}
ARN = "arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/73e2d6bc24d8a067"
ARN2 = "arn:aws-cn:elasticloadbalancing:cn-north-1:123456789012:targetgroup/api/0123456789abcdef"
USUAL_WORDS = {
    "azure-load-balancer": ["web-group/web-1-nic/ipconfig1", "web-lb/web-pool"],
    "gce-instance-group": ["europe-west1-b/web-group"],
    "ec2-target-group": [ARN],
}


class CloudBench(Bench):
    """A bench with one cloud's stand-in, where this VM is in its pool."""

    def __init__(self, folder: Path, program: str) -> None:
        super().__init__(folder)
        self.calls = self.stand_in(program, STAND_INS[program])
        self.tell("pools", WEB_POOL, OTHER_POOL)
        self.tell("members", *([WEB_POOL] if program == "az" else ["web-1", "web-10"]))

    def tell(self, file: str, *lines: str) -> None:
        (self.folder / file).write_text("".join(f"{line}\n" for line in lines))

    def members(self) -> list[str]:
        return (self.folder / "members").read_text().splitlines()

    def changes(self) -> list[str]:
        """The verbs that were to change something, in order."""
        verbs = {"remove", "add", "remove-instances", "add-instances"}
        verbs |= {"deregister-targets", "register-targets", "login"}
        return [word for call in self.calls() for word in call if word in verbs]


@pytest.fixture
def azure(tmp_path: Path) -> CloudBench:
    bench = CloudBench(tmp_path, "az")
    bench.tell("logged-in")
    return bench


@pytest.fixture
def gce(tmp_path: Path) -> CloudBench:
    return CloudBench(tmp_path, "gcloud")


@pytest.fixture
def ec2(tmp_path: Path) -> CloudBench:
    return CloudBench(tmp_path, "aws")


@pytest.mark.parametrize(("hook", "program"), CLOUD_HOOKS.items())
def test_a_clouds_program_that_is_not_in_path_is_named(bench: Bench, hook: str, program: str) -> None:
    (bench.bin / "tr").symlink_to(str(shutil.which("tr")))
    words = bench.fail(hook, "drain", *USUAL_WORDS[hook], PATH=str(bench.bin))
    assert f"{program} is not in PATH ({bench.bin})" in words


def help_for(program: str, call: list[str], bench: Bench) -> str:
    """What the real program says of the command in a recorded call, without its typography."""
    package = {"az": "azure-cli", "aws": "awscli", "gcloud": "google-cloud-cli"}[program]
    command = call[: next(i for i, word in enumerate(call) if word.startswith("--"))]
    command = command[:-1] if program == "gcloud" else command  # without the group's name
    done = subprocess.run(
        [need(program, package), *command, "help" if program == "aws" else "--help"],
        env={
            **os.environ,
            # Nothing of ours into the administrator's settings or the makers' statistics.
            "AZURE_CONFIG_DIR": str(bench.folder / "azure"),
            "AZURE_CORE_COLLECT_TELEMETRY": "0",
            "CLOUDSDK_CONFIG": str(bench.folder / "gcloud"),
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "AWS_PAGER": "",
            "PAGER": "cat",
            "MANPAGER": "cat",
            # az is so much Python that compiling it for every command would take minutes.
            "PYTHONDONTWRITEBYTECODE": "",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{program} knows no {' '.join(command)}: {done.stderr}"
    return re.sub(r".\x08|\x1b\[[0-9;]*m", "", done.stdout)


@pytest.mark.parametrize(("hook", "program"), CLOUD_HOOKS.items())
def test_the_real_program_knows_every_command_and_flag_of_the_hooks(tmp_path: Path, hook: str, program: str) -> None:
    bench = CloudBench(tmp_path, program)
    settings, (drain, restore) = commands_of_example(bench, hook)
    for command in (drain, restore):
        bench.succeed(hook, *command[1:], **settings)
    if program == "az":
        bench.succeed(hook, "drain", drain[2], OTHER_POOL, **settings)  # with --ids
    if program == "aws":
        need("groff", "groff-base")  # aws typesets its help
    helps: dict[str, str] = {}
    flags_checked = 0
    for call in bench.calls():
        words = [word.partition("=")[0] for word in call]
        flags = [word for word in words if word.startswith("--")]
        command_line = " ".join(call[: words.index(flags[0])])
        if command_line not in helps:
            helps[command_line] = help_for(program, call, bench)
        for flag in flags:
            pattern = rf"(?<![\w-]){flag}(?![\w-])"
            assert re.search(pattern, helps[command_line]), f"{program} {command_line}: no {flag}"
            flags_checked += 1
    assert len(helps) >= 3
    assert flags_checked >= 9


@pytest.mark.parametrize("hook", CLOUD_HOOKS)
def test_a_cloud_hook_leaves_standard_input_to_nobody_else(tmp_path: Path, hook: str) -> None:
    """The clouds' programs ask questions when they can; a hook must not hang in one."""
    bench = CloudBench(tmp_path, CLOUD_HOOKS[hook])
    program = bench.bin / CLOUD_HOOKS[hook]
    heard = bench.folder / "heard"
    listen = f"\ncat >>{shlex.quote(str(heard))}\ncd "
    program.write_text(program.read_text().replace("\ncd ", listen, 1))
    this_vm = [] if hook == "azure-load-balancer" else ["web-1"]  # or the hook reads it itself
    bench.succeed(hook, "drain", *USUAL_WORDS[hook], *this_vm)
    assert bench.calls()
    assert heard.read_text() == ""


# azure-load-balancer


def test_azure_leaves_its_pool_and_comes_back(azure: CloudBench) -> None:
    words = USUAL_WORDS["azure-load-balancer"]
    azure.tell("members", OTHER_POOL, WEB_POOL)
    azure.succeed("azure-load-balancer", "drain", *words)
    assert azure.members() == [OTHER_POOL]
    azure.succeed("azure-load-balancer", "drain", *words)
    assert azure.members() == [OTHER_POOL]
    assert azure.sleeps() == [["60"], ["60"]]
    for _ in range(2):
        azure.succeed("azure-load-balancer", "restore", *words)
        assert azure.members() == [OTHER_POOL, WEB_POOL]
    assert azure.changes() == ["remove", "add"]
    assert len(azure.sleeps()) == 2
    (removal,) = (call for call in azure.calls() if "remove" in call)
    for flag, value in [
        ("--resource-group", "web-group"),
        ("--nic-name", "web-1-nic"),
        ("--ip-config-name", "ipconfig1"),
        ("--address-pool", WEB_POOL),
    ]:
        assert removal[removal.index(flag) + 1] == value


def test_azure_leaves_several_pools_one_of_them_by_its_id(azure: CloudBench) -> None:
    words = ["web-group/web-1-nic/ipconfig1", "web-lb/web-pool", OTHER_POOL]
    azure.tell("members", WEB_POOL, OTHER_POOL)
    azure.succeed("azure-load-balancer", "drain", *words)
    assert azure.members() == []
    azure.succeed("azure-load-balancer", "restore", *words)
    assert azure.members() == [WEB_POOL, OTHER_POOL]


def test_azure_leaves_its_pool_however_the_names_are_capitalised(azure: CloudBench) -> None:
    words = USUAL_WORDS["azure-load-balancer"]
    azure.tell("members", POOL.format("WEB-GROUP", "Web-LB", "web-pool"))
    azure.succeed("azure-load-balancer", "restore", *words)
    assert azure.changes() == []
    azure.succeed("azure-load-balancer", "drain", *words)
    assert azure.members() == []


def test_azure_logs_in_with_the_managed_identity_if_need_be(azure: CloudBench) -> None:
    (azure.folder / "logged-in").unlink()
    azure.succeed("azure-load-balancer", "drain", *USUAL_WORDS["azure-load-balancer"])
    assert azure.changes() == ["login", "remove"]


def test_azure_says_what_is_missing_when_there_is_no_identity(azure: CloudBench) -> None:
    (azure.folder / "logged-in").unlink()
    azure.tell("fail-login", "ERROR: Failed to connect to MSI.")
    words = azure.fail("azure-load-balancer", "drain", *USUAL_WORDS["azure-load-balancer"])
    assert "az vm identity assign" in words
    assert azure.members() == [WEB_POOL]


def test_azure_does_not_take_a_misspelled_pool_for_one_it_has_left(azure: CloudBench) -> None:
    words = ["web-group/web-1-nic/ipconfig1", "web-lb/web-pol", "web-lb/web-pool"]
    assert "cannot find the pool web-lb/web-pol;" in azure.fail("azure-load-balancer", "drain", *words)
    assert azure.members() == []  # the other one it left all the same
    assert azure.sleeps() == []


@pytest.mark.parametrize("verb", ["remove", "ip-config"])
def test_azure_fails_when_az_fails(azure: CloudBench, verb: str) -> None:
    azure.tell(f"fail-{verb}", "ERROR: (AuthorizationFailed) The client has no authorization.")
    words = azure.fail("azure-load-balancer", "drain", *USUAL_WORDS["azure-load-balancer"])
    assert "web-group/web-1-nic/ipconfig1" in words
    assert "Network Contributor" in words
    assert azure.members() == [WEB_POOL]
    assert azure.sleeps() == []


# gce-instance-group


def test_gce_leaves_its_group_and_comes_back(gce: CloudBench) -> None:
    for _ in range(2):
        gce.succeed("gce-instance-group", "drain", "europe-west1-b/web-group")
        assert gce.members() == ["web-10"]
    assert gce.sleeps() == [["60"], ["60"]]
    for _ in range(2):
        gce.succeed("gce-instance-group", "restore", "europe-west1-b/web-group")
        assert gce.members() == ["web-10", "web-1"]
    assert gce.changes() == ["remove-instances", "add-instances"]
    assert len(gce.sleeps()) == 2
    for call in gce.calls():
        assert call[:3] == ["compute", "instance-groups", "unmanaged"]
        assert call[4] == "web-group"
        assert {"--zone=europe-west1-b", "--quiet"} <= set(call)


def test_gce_goes_by_the_name_on_the_command_line_before_the_document(gce: CloudBench) -> None:
    gce.succeed("gce-instance-group", "drain", "z/a", "z/b", "web-10", stdin="", DRAIN_WAIT="5")
    assert gce.members() == ["web-1"]
    assert gce.sleeps() == [["5"]]
    assert [call[4] for call in gce.calls() if call[3] == "list-instances"] == ["a", "b"]


@pytest.mark.parametrize("stdin", ["", "{}", "[]", '{"instance": {"name": null, "id": null}}', "\x00"])
@pytest.mark.parametrize("hook", ["gce-instance-group", "ec2-target-group"])
def test_without_a_name_anywhere_the_hook_asks_for_one(tmp_path: Path, hook: str, stdin: str) -> None:
    bench = CloudBench(tmp_path, CLOUD_HOOKS[hook])
    assert "as the last word" in bench.fail(hook, "drain", *USUAL_WORDS[hook], stdin=stdin)
    assert bench.calls() == []


@pytest.mark.parametrize("verb", ["list-instances", "remove-instances"])
def test_gce_fails_when_gcloud_fails(gce: CloudBench, verb: str) -> None:
    gce.tell(f"fail-{verb}", "ERROR: Required 'compute.instanceGroups.update' permission")
    words = gce.fail("gce-instance-group", "drain", "europe-west1-b/web-group")
    assert "europe-west1-b/web-group" in words
    assert "service account" in words
    assert "web-1" in gce.members()
    assert gce.sleeps() == []


# ec2-target-group


def test_ec2_waits_until_the_group_has_let_go(ec2: CloudBench) -> None:
    ec2.tell("states", "healthy", "draining", "draining", "unused", "draining")
    assert ec2.succeed("ec2-target-group", "drain", ARN) == ""
    assert ec2.sleeps() == [["5"]] * 3
    assert ec2.changes() == ["deregister-targets"]
    for call in ec2.calls():
        assert call[call.index("--target-group-arn") + 1] == ARN
        assert call[call.index("--targets") + 1] == "Id=i-0abc"
        assert call[call.index("--region") + 1] == "eu-west-1"


def test_ec2_takes_a_target_that_aws_does_not_know_for_drained(ec2: CloudBench) -> None:
    for _ in range(2):
        assert ec2.succeed("ec2-target-group", "drain", ARN) == ""
    assert ec2.sleeps() == []


def test_ec2_restores_without_waiting(ec2: CloudBench) -> None:
    for _ in range(2):
        ec2.succeed("ec2-target-group", "restore", ARN)
    assert [call[1] for call in ec2.calls()] == ["register-targets"] * 2
    assert ec2.sleeps() == []


def test_ec2_takes_several_groups_and_a_target_in_awss_own_spelling(ec2: CloudBench) -> None:
    ec2.succeed("ec2-target-group", "drain", ARN, ARN2, "Id=10.0.0.5,Port=8080", stdin="")
    assert [
        (call[call.index("--region") + 1], call[call.index("--targets") + 1])
        for call in ec2.calls()
        if call[1] == "deregister-targets"
    ] == [("eu-west-1", "Id=10.0.0.5,Port=8080"), ("cn-north-1", "Id=10.0.0.5,Port=8080")]


def test_ec2_counts_as_drained_when_the_group_outlasts_the_wait_but_says_so(ec2: CloudBench) -> None:
    ec2.tell("states", *["draining"] * 100)
    words = ec2.succeed("ec2-target-group", "drain", ARN, DRAIN_WAIT="0")
    assert f"{ARN} has not let go of Id=i-0abc after 0 s" in words


@pytest.mark.parametrize("verb", ["deregister-targets", "describe-target-health"])
def test_ec2_fails_when_aws_fails(ec2: CloudBench, verb: str) -> None:
    ec2.tell(f"fail-{verb}", "An error occurred (AccessDenied) when calling the operation")
    words = ec2.fail("ec2-target-group", "drain", ARN)
    assert ARN in words
    assert "VM's role" in words
    assert ec2.sleeps() == []
