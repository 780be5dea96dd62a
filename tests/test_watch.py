"""--watch: sees everything at once, costs no busy loop, hands over to the next run, and ends when it is told to.

Every test here runs the tool as a program, as cron, systemd or a person at a terminal would.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import is_vm_in_maint
from conftest import FOREIGN_VARIABLES, TOOL
from metadata_service import MetadataService

pytestmark = [pytest.mark.wire, pytest.mark.skipif(os.name != "posix", reason="signals, sh and ptys")]

DEADLINE = 45.0  # seconds; a test that waits so long has failed

Service = Callable[..., MetadataService]


def until(condition: Callable[[], object], what: str) -> None:
    """Waits for a condition, or fails the test."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


class Watch:
    """The tool at work: `--watch` and whatever else was given."""

    def __init__(self, command: list[str], environment: Mapping[str, str], state: Path) -> None:
        self.state = state
        self.lines: list[str] = []  # of the journal, without the tag
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n").removeprefix("IsVmInMaint: "))

    @property
    def words(self) -> list[str]:
        """The words that begin each line."""
        return [line.partition(":")[0] for line in self.lines]

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def logs(self, *words: str) -> None:
        """Waits until just these lines are logged, in this order."""
        until(lambda: len(self.words) >= len(words) or not self.runs, f"{words}; there are {self.lines}")
        assert self.words == list(words), self.lines

    def until_first_check(self) -> None:
        """Waits until it has asked, acted and written down for the first time."""
        until((self.state / "state.json").exists, "the state")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits for its end; its status."""
        status = self.process.wait(DEADLINE)
        self._reader.join()
        return status

    def remembered(self) -> Any:
        return json.loads((self.state / "state.json").read_text())

    def drained(self) -> bool:
        """Whether the state says so; a drain that is still under way does not count."""
        document = self.remembered()
        return document["drained_for"] is not None and not document.get("draining")


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watch]]:
    """watch(service, "--drain", ...): starts `--watch`; watch(service, "--watch", "3") says for how long."""
    with ExitStack() as cleaning:

        def start(
            service: MetadataService, *options: str | Path, env: Mapping[str, str] | None = None, state: str = "state"
        ) -> Watch:
            command = [sys.executable, str(TOOL), "--provider", service.provider, "--endpoint", service.url]
            command += ["--state", str(tmp_path / state), "--log", "stderr", *map(str, options)]
            command += [] if "--watch" in options or "--once" in options else ["--watch"]
            command = [word for word in command if word != "--once"]
            environment = {k: v for k, v in os.environ.items() if k not in FOREIGN_VARIABLES}
            started = Watch(command, {**environment, **(env or {})}, tmp_path / state)
            cleaning.callback(started.process.wait)
            cleaning.callback(started.process.kill)
            return started

        yield start


class Hooks:
    """Executables that record their calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, body: str = "") -> Path:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\ncd {self.folder}\necho {name} >>calls\n{body}\n")
        path.chmod(0o755)
        return path

    @property
    def options(self) -> tuple[str | Path, ...]:
        return ("--drain", self.write("drain"), "--restore", self.write("restore"))

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def hooks(tmp_path: Path) -> Hooks:
    return Hooks(tmp_path)


def polls(service: MetadataService) -> list[str]:
    """The long polls that a gce service has been asked for."""
    return [request.path for request in list(service.requests) if "wait_for_change" in request.path]


def until_it_polls(service: MetadataService, times: int = 1) -> None:
    """Waits until so many long polls have begun after this call."""
    goal = len(polls(service)) + times
    until(lambda: len(polls(service)) >= goal, f"{times} long polls")


def until_asked(service: MetadataService, times: int) -> None:
    """Waits for so many more requests."""
    goal = len(service.requests) + times
    until(lambda: len(service.requests) >= goal, f"{times} requests")


# ---- it sees everything


def test_drains_for_an_event_and_restores_when_it_is_over_on_every_cloud(service: Service, watch, tmp_path) -> None:
    types = {"azure": "Reboot", "azure-v1": "Maintenance", "gce": "TERMINATE_ON_HOST_MAINTENANCE", "ec2": "spot-stop"}
    clouds = {kind: service(provider) for provider, kind in types.items()}
    clouds["PREEMPTED"] = service("gce")
    tools, hooks = {}, {}
    for kind, cloud in clouds.items():
        (tmp_path / kind).mkdir()
        hooks[kind] = Hooks(tmp_path / kind)
        tools[kind] = watch(cloud, *hooks[kind].options, state=f"state of {kind}")
    for tool in tools.values():
        tool.until_first_check()
    events = {kind: cloud.announce(kind) for kind, cloud in clouds.items()}
    for tool in tools.values():
        tool.logs("Incoming VM Event", "VM drained")
    for kind, cloud in clouds.items():
        cloud.forget(events[kind])
    for kind, tool in tools.items():
        tool.logs("Incoming VM Event", "VM drained", "VM Event over", "VM restored")
        assert hooks[kind].calls == ["drain", "restore"]
    times = [asked.at for asked in clouds["Maintenance"].requests if asked.path.endswith("/maintenance")]
    assert all(later - earlier > 4.5 for earlier, later in zip(times, times[1:]))  # azure-v1 is asked every 5 s


def test_sees_what_is_planned_days_ahead_on_gce(service: Service, watch) -> None:
    gce = service("gce")
    gce.announce("UPCOMING_MAINTENANCE", not_before=200_000)
    tool = watch(gce)
    until_it_polls(gce, 2)
    tool.logs("Incoming VM Event")
    assert "type=UPCOMING_MAINTENANCE" in tool.lines[0]


def test_logs_an_event_once_however_often_it_reads_it(service: Service, watch) -> None:
    azure = service("azure")
    azure.announce("Reboot", not_before=3000)
    tool = watch(azure)
    until_asked(azure, 4)
    tool.logs("Incoming VM Event")


def test_an_event_becomes_imminent_at_its_time_though_nothing_arrives(service: Service, watch, hooks) -> None:
    reached, lost = service("azure"), service("azure")
    drain = hooks.write("drain", "echo $MAINT_SECONDS_LEFT >>left")
    tools = [watch(cloud, "--lead", "4s", "--drain", drain, state=cloud.url[-5:]) for cloud in (reached, lost)]
    for tool in tools:
        tool.until_first_check()
    for cloud in (reached, lost):
        cloud.announce("Reboot", not_before=10)
    for tool in tools:
        tool.logs("Incoming VM Event")
    lost.fail("refuse")
    tools[1].logs("Incoming VM Event", "Metadata service unreachable")
    assert hooks.calls == []
    tools[0].logs("Incoming VM Event", "VM drained")
    tools[1].logs("Incoming VM Event", "Metadata service unreachable", "VM drained")
    assert all(int(word) <= 4 for word in (hooks.folder / "left").read_text().split())


# ---- it ends by itself


def test_watch_with_a_time_ends_by_itself(service: Service, watch) -> None:
    azure = service("azure")
    tool = watch(azure, "--watch", "2")
    assert tool.end() == 0
    assert tool.lines == []
    assert len(azure.requests) >= 2


def test_watch_with_a_time_ends_with_the_status_of_the_check(service: Service, watch, hooks) -> None:
    azure = service("azure")
    azure.fail(503)
    assert watch(azure, "--watch", "1", state="failing").end() == 3
    azure.heal()
    azure.announce("Reboot", not_before=300)
    assert watch(azure, "--watch", "1", "--drain", hooks.write("drain", "exit 1"), state="undrained").end() == 4


# ---- it hands over


def test_the_next_run_goes_on_where_the_one_before_ends(service: Service, watch, hooks) -> None:
    first_service = service("azure")
    second_service = service("azure", cloud=first_service.cloud)
    first = watch(first_service, "--watch", "4", *hooks.options)
    until_asked(first_service, 1)
    second = watch(second_service, "--watch", "25", *hooks.options)
    event = first_service.announce("Reboot", not_before=300)
    first.logs("Incoming VM Event", "VM drained")
    assert first.end() == 0
    first_service.begin(event)
    second.logs("VM Event started")
    first_service.end(event)
    second.logs("VM Event started", "VM Event over", "VM restored")
    assert hooks.calls == ["drain", "restore"]
    assert first_service.requests[-1].at < second_service.requests[0].at  # one after the other, never both


def test_the_next_run_gives_up_at_once_when_the_first_goes_on_for_ever(service: Service, watch) -> None:
    first_service = service("azure")
    second_service = service("azure", cloud=first_service.cloud)
    first = watch(first_service)
    until_asked(first_service, 1)
    second = watch(second_service, "--watch", "290")
    assert second.process.wait(25) == 0  # a run that hopes for the lock waits for 30 s
    assert (second_service.requests, second.lines) == ([], [])
    assert first.runs


def test_a_plain_check_ends_at_once_when_another_run_is_at_work(service: Service, watch) -> None:
    first_service = service("azure")
    second_service = service("azure", cloud=first_service.cloud)
    first = watch(first_service, "--watch", "20")
    until_asked(first_service, 1)
    check = watch(second_service, "--once")
    assert check.end() == 0
    assert (second_service.requests, check.lines) == ([], [])
    assert first.runs


def test_the_next_run_takes_over_from_one_that_was_killed(service: Service, watch, hooks) -> None:
    azure = service("azure")
    event = azure.announce("Reboot", not_before=300)
    first = watch(azure, *hooks.options)
    first.logs("Incoming VM Event", "VM drained")
    until(first.drained, "the drain on record")
    first.process.kill()
    first.end()
    second = watch(azure, *hooks.options)
    until_asked(azure, 2)
    azure.end(event)
    second.logs("VM Event over", "VM restored")
    assert hooks.calls == ["drain", "restore"]


# ---- it asks as little as it can


def test_gce_is_asked_with_a_long_poll_and_the_etag_of_the_last_answer(service: Service, watch) -> None:
    gce = service("gce")
    tool = watch(gce)
    until_it_polls(gce)
    quiet = polls(gce)[-1]
    gce.announce("MIGRATE_ON_HOST_MAINTENANCE")
    tool.logs("Incoming VM Event")
    until_it_polls(gce)
    migrating = polls(gce)[-1]
    pattern = r".*/maintenance-event\?wait_for_change=true&last_etag=([0-9a-f]+)&timeout_sec=(\d+)"
    before, after = (re.fullmatch(pattern, poll) for poll in (quiet, migrating))
    assert before
    assert after
    assert before[1] != after[1]
    # Preempted is read once after each poll, and must be read at least every 5 s.
    assert all(1 <= int(poll[2]) < 5 for poll in (before, after))


def test_preempted_is_read_between_any_two_long_polls(service: Service, watch) -> None:
    gce = service("gce")
    watch(gce)
    until_it_polls(gce, 2)
    paths = [request.path.rpartition("/")[2].partition("?") for request in list(gce.requests)]
    keys = [key for key, _, query in paths if key == "preempted" or "wait_for_change" in query]
    assert keys[-3:] == ["maintenance-event", "preempted", "maintenance-event"]
    # The key that tells of things days ahead is not worth a request every few seconds.
    assert [key for key, _, _ in paths].count("upcoming-maintenance") <= 2
    assert gce.connections == 1


def test_a_503_in_a_long_poll_is_no_outage(service: Service, watch) -> None:
    gce = service("gce")
    gce.fail(503, path="wait_for_change", times=1)
    tool = watch(gce)
    until_it_polls(gce, 2)
    gce.announce("MIGRATE_ON_HOST_MAINTENANCE")
    tool.logs("Incoming VM Event")


def test_azure_is_asked_no_more_than_once_a_second_over_one_connection(service: Service, watch) -> None:
    azure = service("azure")
    watch(azure)
    until_asked(azure, 4)
    times = [request.at for request in azure.requests]
    assert times[3] - times[0] > 2.5  # on a slow machine it can only be more
    assert azure.connections == 1


def test_an_answer_of_azure_that_has_not_changed_is_not_parsed(service: Service, monkeypatch) -> None:
    azure = service("azure")
    azure.announce("Reboot", not_before=3000)
    provider = is_vm_in_maint.Azure(azure.url)
    parsed = []
    parse = is_vm_in_maint.Reply.json
    monkeypatch.setattr(is_vm_in_maint.Reply, "json", lambda *args: parsed.append(args) or parse(*args))
    first = provider.events()
    parsed_once = len(parsed)
    assert provider.events() == first
    assert len(parsed) == parsed_once > 0
    azure.announce("Freeze", not_before=3000)
    assert len(provider.events().events) == 2


# ---- it bears a metadata service that fails


def test_an_outage_is_logged_once_when_it_begins_and_once_when_it_ends(service: Service, watch, tmp_path) -> None:
    outages = ("refuse", "reset", "truncate", "500", "html", "no-flavor")
    clouds = {how: service("gce" if how == "no-flavor" else "azure") for how in outages}
    tools, hooks = {}, {}
    events = {how: cloud.announce() for how, cloud in clouds.items()}
    for how, cloud in clouds.items():
        (tmp_path / how).mkdir()
        hooks[how] = Hooks(tmp_path / how)
        tools[how] = watch(cloud, *hooks[how].options, state=f"state of {how}")
    for how, tool in tools.items():
        tool.logs("Incoming VM Event", "VM drained")
        clouds[how].fail(int(how) if how.isdecimal() else how)
    lines = ["Incoming VM Event", "VM drained", "Metadata service unreachable"]
    for how, tool in tools.items():
        tool.logs(*lines)
        if how != "refuse":  # then nobody hears it ask
            until_asked(clouds[how], 1)
            tool.logs(*lines)
        assert hooks[how].calls == ["drain"]  # not knowing is never "it is over"
        clouds[how].forget(events[how])
        clouds[how].heal()
    for how, tool in tools.items():
        tool.logs(*lines, "Metadata service reachable again", "VM Event over", "VM restored")
        assert hooks[how].calls == ["drain", "restore"]


def test_a_long_poll_that_hangs_is_given_up(service: Service, watch) -> None:
    """A live migration can leave a connection hanging for ever (WIRE, gce)."""
    clouds = {how: service("gce") for how in ("hang", "hang-mid-body")}
    for how, cloud in clouds.items():
        cloud.fail(how, path="wait_for_change", times=1)
    tools = [watch(cloud, state=f"state of {how}") for how, cloud in clouds.items()]
    for tool in tools:
        tool.logs("Metadata service unreachable", "Metadata service reachable again")
        assert "no whole answer within" in tool.lines[0]


def test_an_outage_is_no_busy_loop(service: Service, watch) -> None:
    clouds = {how: service("azure") for how in ("reset", "truncate", "html", "429")}
    for how, cloud in clouds.items():
        cloud.fail(int(how) if how.isdecimal() else how)
    tools = [watch(cloud, state=f"state of {how}") for how, cloud in clouds.items()]
    for tool, cloud in zip(tools, clouds.values()):
        until(lambda cloud=cloud: len(cloud.requests) >= 4, "four requests")
        tool.logs("Metadata service unreachable")
        times = [request.at for request in cloud.requests]
        # Half to once 1, 2 and 4 seconds lie between the four. On a slow machine it can only be more.
        assert times[3] - times[0] > 3.0


def test_an_outage_from_the_start_hides_no_event_that_comes_with_its_end(service: Service, watch) -> None:
    azure = service("azure")
    azure.fail("refuse")
    tool = watch(azure)
    tool.logs("Metadata service unreachable")
    azure.announce("Reboot", not_before=3000)
    azure.heal()
    tool.logs("Metadata service unreachable", "Metadata service reachable again", "Incoming VM Event")


# ---- it ends when it is told to

both_signals = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@both_signals
def test_a_signal_ends_it_in_the_middle_of_a_long_poll(service: Service, watch, number) -> None:
    gce = service("gce")
    event = gce.announce("MIGRATE_ON_HOST_MAINTENANCE")
    gce.fail("hang", path="wait_for_change")  # it would be seven seconds, and an outage on record
    tool = watch(gce)
    tool.logs("Incoming VM Event")
    until(lambda: polls(gce), "a long poll")
    tool.send(number)
    assert tool.end() == 0
    assert tool.words == ["Incoming VM Event"]
    assert "wait_for_change" in gce.requests[-1].path
    assert [known["type"] for known in tool.remembered()["events"]] == ["MIGRATE_ON_HOST_MAINTENANCE"]

    gce.heal()
    gce.end(event)
    assert watch(gce, "--once").end() == 0  # and the next run knows what this one has logged


@both_signals
def test_a_signal_ends_it_while_it_backs_off(service: Service, watch, number) -> None:
    azure = service("azure")
    azure.fail("reset")
    tool = watch(azure)
    until_asked(azure, 3)  # now a pause of two seconds at least has begun
    tool.logs("Metadata service unreachable")
    asked = len(azure.requests)
    tool.send(number)
    assert tool.end() == 0
    assert len(azure.requests) == asked
    assert tool.remembered()["unreachable"] is True


def test_a_signal_ends_it_while_azure_is_switching_its_service_on(service: Service, watch) -> None:
    azure = service("azure", first_delay=120.0)
    tool = watch(azure)
    until_asked(azure, 1)
    tool.send(signal.SIGTERM)
    assert tool.end() == 0
    assert tool.lines == []


def test_a_signal_ends_it_while_it_waits_for_the_run_before(service: Service, watch) -> None:
    azure = service("azure")
    first = watch(azure, "--watch", "25")
    until_asked(azure, 1)
    asked = service("azure")
    second = watch(asked, "--watch", "25", env={"PYTHONUNBUFFERED": "1"})
    until(lambda: holds_open(second.process.pid, first.state / "lock"), "the second run at the lock")
    second.send(signal.SIGTERM)
    assert second.end() == 0
    assert asked.requests == []
    assert first.runs


def holds_open(pid: int, path: Path) -> bool:
    try:
        return any(link.resolve() == path for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


LONG_HOOK = "until [ -e go ]; do sleep 0.05; done; echo done >>calls"


@both_signals
def test_a_hook_that_runs_is_given_its_time(service: Service, watch, hooks, number) -> None:
    azure = service("azure")
    azure.announce("Reboot", not_before=300)
    tool = watch(azure, "--drain", hooks.write("drain", LONG_HOOK))
    until(lambda: hooks.calls == ["drain"], "the hook")
    tool.send(number)
    tool.send(number)  # nor does impatience help
    (hooks.folder / "go").touch()
    assert tool.end() == 0
    assert hooks.calls == ["drain", "done"]
    assert tool.words == ["Incoming VM Event", "VM drained"]
    assert tool.drained()


def test_a_hook_that_outlasts_its_time_is_killed_with_its_group(service: Service, watch, hooks) -> None:
    azure = service("azure")
    azure.announce("Reboot", not_before=300)
    child = "sh -c 'trap \"\" TERM; echo $$ >child; while :; do sleep 0.05; done' &\nwait"
    tool = watch(azure, "--hook-timeout", "2s", "--drain", hooks.write("drain", child))
    written = hooks.folder / "child"
    until(lambda: written.exists() and written.read_text(), "the hook's child")
    tool.send(signal.SIGTERM)
    assert tool.end() == 0
    assert tool.words == ["Incoming VM Event", "VM drain failed"]
    assert not tool.drained()
    pid = int(written.read_text())
    until(lambda: is_dead(pid), "the end of the hook's child")


def is_dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return sys.platform == "linux" and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_sighup_is_ignored(service: Service, watch) -> None:
    azure = service("azure")
    tool = watch(azure)
    until_asked(azure, 1)
    tool.send(signal.SIGHUP)
    azure.announce("Reboot", not_before=3000)
    tool.logs("Incoming VM Event")
    assert tool.runs


def test_what_was_logged_before_the_signal_is_not_logged_again(service: Service, watch) -> None:
    azure = service("azure")
    azure.announce("Reboot", not_before=3000)
    first = watch(azure)
    first.logs("Incoming VM Event")
    first.send(signal.SIGTERM)
    assert first.end() == 0
    second = watch(azure, "--watch", "1")
    assert second.end() == 0
    assert second.lines == []


# ---- systemd


class ServiceManager:
    """Systemd's side of sd_notify(3): a datagram socket, and what was said to it."""

    def __init__(self, address: str) -> None:
        self.environment = {"NOTIFY_SOCKET": address.replace("\0", "@", 1)}
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(DEADLINE)

    def next(self) -> dict[str, str]:
        """The next message; each of its lines is NAME=VALUE."""
        return dict(line.split("=", 1) for line in self.socket.recv(65536).decode().splitlines())

    def until(self, name: str, pattern: str) -> str:
        """Waits for a message with such a value, and returns it."""
        while True:
            value = self.next().get(name, "")
            if re.search(pattern, value):
                return value

    def forget(self) -> None:
        """Whatever was said before this call is not looked at."""
        while select.select([self.socket], [], [], 0)[0]:
            self.socket.recv(65536)


@pytest.fixture
def systemd(request: pytest.FixtureRequest) -> Iterator[ServiceManager]:
    kind = getattr(request, "param", "path")
    if kind == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets are Linux's")
    # Not in tmp_path: the path of a Unix socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="notify-") as folder:
        manager = ServiceManager(f"{folder}/socket" if kind == "path" else f"\0{folder}")
        with manager.socket:
            yield manager


@pytest.mark.parametrize("systemd", ["path", "abstract"], indirect=True)
def test_systemd_is_told_that_it_is_ready_what_it_waits_for_and_that_it_lives(service: Service, watch, systemd) -> None:
    azure = service("azure")
    tool = watch(azure, env=systemd.environment)
    first = systemd.next()
    assert first["READY"] == "1"
    assert "metadata service" in first["STATUS"]
    systemd.until("STATUS", r"^No maintenance is announced for this VM \(azure, web-1, .*\)\.$")
    assert systemd.next()["WATCHDOG"] == "1"
    assert systemd.next()["WATCHDOG"] == "1"
    azure.announce("Reboot", not_before=3000, description="Host server is undergoing maintenance.")
    systemd.until("STATUS", r"^Reboot in \d+ min \d+ s: Host server is undergoing maintenance\. \(azure, web-1")
    tool.send(signal.SIGTERM)
    systemd.until("STOPPING", "1")
    assert tool.end() == 0


def test_systemd_hears_that_it_lives_while_a_hook_runs(service: Service, watch, hooks, systemd) -> None:
    azure = service("azure")
    azure.announce("Reboot", not_before=300)
    body = f"env >environment\n{LONG_HOOK}"
    tool = watch(azure, "--drain", hooks.write("drain", body), env=systemd.environment)
    until(lambda: hooks.calls == ["drain"], "the hook")
    systemd.forget()
    for _ in range(3):
        assert systemd.next() == {"WATCHDOG": "1"}
    assert hooks.calls == ["drain"]
    (hooks.folder / "go").touch()
    tool.logs("Incoming VM Event", "VM drained")
    # A hook that is itself a service's child must not speak for us.
    assert "NOTIFY_SOCKET" not in (hooks.folder / "environment").read_text()


def test_systemd_hears_of_an_outage_and_that_it_lives_all_the_same(service: Service, watch, systemd) -> None:
    azure = service("azure")
    azure.fail("refuse")
    watch(azure, env=systemd.environment)
    systemd.until("STATUS", "^Cannot tell whether maintenance is coming: .*refused")
    assert systemd.next()["WATCHDOG"] == "1"


def test_a_run_that_finds_another_at_work_is_not_ready(service: Service, watch, systemd) -> None:
    azure = service("azure")
    watch(azure)
    until_asked(azure, 1)
    second = watch(azure, env=systemd.environment)
    assert second.end() == 0
    assert systemd.next() == {"STOPPING": "1"}


# ---- on a terminal


class Terminal:
    """A pseudo terminal with the tool's stdout, and all that was shown on it."""

    def __init__(self, columns: int) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.ours, self.its = pty.openpty()
        fcntl.ioctl(self.its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown = ""

    def read(self) -> bool:
        """Reads what is there; False when nobody can write any more."""
        try:
            if select.select([self.ours], [], [], 0)[0]:
                self.shown += os.read(self.ours, 65536).decode()
        except OSError:  # Linux's way to say that the other side is closed
            return False
        return True

    def until(self, pattern: str) -> re.Match[str]:
        """Waits until this is shown, and returns the latest occurrence."""
        found: list[re.Match[str]] = []

        def look() -> list[re.Match[str]]:
            self.read()
            found[:] = re.finditer(pattern, self.shown)
            return found

        until(look, f"{pattern!r} in {self.shown!r}")
        return found[-1]

    @property
    def lines(self) -> list[str]:
        """The states of the one line, each of which wipes out the one before."""
        return self.shown.split("\r\x1b[K")[1:]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    shown = Terminal(columns=80)
    yield shown
    for side in (shown.ours, shown.its):
        os.close(side)


def watch_on(terminal: Terminal, service: MetadataService, state: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(TOOL), "--provider", service.provider, "--endpoint", service.url, "--log", "none"]
    environment = {k: v for k, v in os.environ.items() if k not in FOREIGN_VARIABLES}
    return subprocess.Popen([*command, "--state", str(state), *options], env=environment, stdout=terminal.its)


def test_a_terminal_shows_one_line_that_changes_in_place(service: Service, terminal, tmp_path) -> None:
    azure = service("azure", vm="web-7")
    process = watch_on(terminal, azure, tmp_path / "state", "--watch")
    try:
        shown = r"azure web-7, watched (\d+) s\. "
        first = terminal.until(shown + "No maintenance is announced")
        azure.announce("Reboot", not_before=3000, description="Host server is undergoing maintenance.")
        second = terminal.until(shown + r"Reboot in (\d+ min \d+ s): Host server")
        assert int(second[1]) > int(first[1])
        countdown = second[2]
        until(lambda: terminal.until(shown + r"Reboot in (\d+ min \d+ s)")[2] != countdown, "the countdown to go on")
        assert "\n" not in terminal.shown
        assert all(len(line) < 80 for line in terminal.lines)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
        terminal.until("\n$")  # so that the shell's prompt does not stand behind it
    finally:
        process.kill()
        process.wait()


def test_a_terminal_shows_an_outage(service: Service, terminal, tmp_path) -> None:
    gce = service("gce")
    gce.fail("refuse")
    process = watch_on(terminal, gce, tmp_path / "state", "--watch", "1")
    assert process.wait(DEADLINE) == 3
    terminal.until(r"gce, watched \d+ s\. Cannot tell whether maintenance is coming")
