"""What reaches the journal: read back from a real rsyslogd, and from a stand-in for Windows' eventcreate."""

from __future__ import annotations

import gc
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import is_vm_in_maint
import windows_command_line
from conftest import Line
from is_vm_in_maint import Journal

posix_only = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are sh scripts")
HOUR = timedelta(hours=1)


def notice(text: str) -> Line:
    return Line("user", "notice", "IsVmInMaint", text)


def script(path: Path, body: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def whole_second(delta: timedelta) -> datetime:
    return (datetime.now(timezone.utc) + delta).replace(microsecond=0)


# ---- syslog


@pytest.mark.wire
@posix_only
def test_the_life_of_an_event_is_these_lines_in_syslog(service, tool, syslogd, tmp_path) -> None:
    azure = service("azure")
    options = ("--log", "syslog", "--syslog", syslogd.socket)
    options += ("--drain", script(tmp_path / "drain", "exit 0"), "--restore", script(tmp_path / "restore", "exit 0"))
    far, near = whole_second(24 * HOUR), whole_second(timedelta(minutes=5))

    azure.announce("Reboot", id="e1", not_before=far)
    commands = [
        lambda: azure.move("e1", near),
        lambda: azure.begin("e1"),
        lambda: azure.end("e1"),
        lambda: None,
    ]
    for command in commands:
        tool(*options, service=azure)
        command()
    done = tool(*options, service=azure)

    def event(status: str, when: datetime | None) -> str:
        not_before = f"not_before={when:%Y-%m-%dT%H:%M:%SZ} " if when else ""
        description = 'description="Host server is undergoing maintenance."'
        return (
            f"impact=reboot type=Reboot status={status} {not_before}provider=azure id=e1 source=Platform {description}"
        )

    assert syslogd.lines() == [
        notice("Incoming VM Event: " + event("scheduled", far)),
        notice("VM Event moved: " + event("scheduled", near)),
        notice("VM drained: " + event("scheduled", near)),
        notice("VM Event started: " + event("started", None)),
        notice("VM Event over: outcome=ended " + event("started", None)),
        notice("VM restored: " + event("scheduled", near)),
    ]
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.wire
@posix_only
def test_what_is_wrong_has_its_severity_in_syslog(service, tool, syslogd, tmp_path) -> None:
    gce = service("gce")
    options = ("--log", "syslog", "--syslog", syslogd.socket)
    hooks = ("--drain", script(tmp_path / "drain", "exit 1"))

    gce.fail("refuse")
    tool(*options, service=gce)
    gce.heal()
    tool(*options, service=gce)
    (tmp_path / "state" / "state.json").write_text("not JSON")
    tool(*options, service=gce)
    gce.announce("PREEMPTED")
    tool(*options, *hooks, service=gce)

    seen = [(line.facility, line.severity, line.tag, line.text.partition(":")[0]) for line in syslogd.lines()]
    assert seen == [
        ("user", "warning", "IsVmInMaint", "Metadata service unreachable"),
        ("user", "notice", "IsVmInMaint", "Metadata service reachable again"),
        ("user", "warning", "IsVmInMaint", "State problem"),
        ("user", "notice", "IsVmInMaint", "Incoming VM Event"),
        ("user", "err", "IsVmInMaint", "VM drain failed"),
    ]


# The documents that WIRE.md prints, byte for byte, and the lines that DESIGN.md promises. An id in <> is one
# that the tool made, because the cloud has none.
DOCUMENTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "azure-v1": (
        {
            "/metadata/v1/maintenance": r'{"EventID": "6f0a13a3-dc0d-4bbe-ab24-df710a3917e6", '
            r'"EventCreationTime": "9\/15\/2015 6:42:51 AM"}',
            "/metadata/v1/InstanceInfo": '{"ID": "_samplevm1", "UD": "0", "FD": "0"}',
        },
        [
            (
                "impact=reboot type=Maintenance status=scheduled not_before=2015-09-15T06:42:51Z provider=azure-v1 "
                "id=6f0a13a3-dc0d-4bbe-ab24-df710a3917e6"
            )
        ],
    ),
    "gce": (
        {
            "/computeMetadata/v1/instance/maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE",
            "/computeMetadata/v1/instance/preempted": "TRUE",
            "/computeMetadata/v1/instance/upcoming-maintenance": '{"can_reschedule": "true", '
            '"latest_window_start_time": "2024-12-01T19:00:01Z",\n "maintenance_reasons": ["PLANNED_UPDATE"], '
            '"maintenance_status": "PENDING", "type": "SCHEDULED",\n '
            '"window_end_time": "2024-12-01T21:00:01Z", "window_start_time": "2024-12-01T19:00:01Z"}',
        },
        [
            "impact=migrate type=MIGRATE_ON_HOST_MAINTENANCE status=scheduled provider=gce id=<>",
            "impact=terminate type=PREEMPTED status=started provider=gce id=<>",
            (
                "impact=stop type=UPCOMING_MAINTENANCE status=scheduled not_before=2024-12-01T19:00:01Z provider=gce "
                'id=<> description="SCHEDULED PLANNED_UPDATE"'
            ),
        ],
    ),
    "azure": (
        {
            "/metadata/scheduledevents": '{"DocumentIncarnation": 2, "Events": [{\n'
            '"EventId": "C7061BAC-AFDC-4513-B24B-AA5F13A16123", "EventStatus": "Scheduled", "EventType": "Freeze",\n'
            '"ResourceType": "VirtualMachine", "Resources": ["WestNO_0", "WestNO_1"],\n'
            '"NotBefore": "Mon, 11 Apr 2026 22:26:58 GMT",\n"Description": "Virtual machine is being paused because '
            'of a memory-preserving Live Migration operation.",\n'
            '"EventSource": "Platform", "DurationInSeconds": 5}]}'
        },
        [
            (
                "impact=freeze type=Freeze status=scheduled not_before=2026-04-11T22:26:58Z provider=azure "
                "id=C7061BAC-AFDC-4513-B24B-AA5F13A16123 source=Platform description="
                '"Virtual machine is being paused because of a memory-preserving Live Migration operation."'
            )
        ],
    ),
    "ec2": (
        {
            "/latest/meta-data/events/maintenance/scheduled": '[{"NotBefore": "21 Jan 2019 09:00:43 GMT", '
            '"Code": "system-reboot", "Description": "scheduled reboot",\n'
            '"EventId": "instance-event-0d59937288b749b32", "NotAfter": "21 Jan 2019 09:17:23 GMT", '
            '"State": "active"}]',
            "/latest/meta-data/spot/instance-action": '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}',
            "/latest/meta-data/events/recommendations/rebalance": '{"noticeTime": "2020-10-27T08:22:00Z"}',
            "/latest/meta-data/autoscaling/target-lifecycle-state": "Terminated",
        },
        [
            (
                "impact=reboot type=system-reboot status=scheduled not_before=2019-01-21T09:00:43Z provider=ec2 "
                'id=instance-event-0d59937288b749b32 description="scheduled reboot"'
            ),
            "impact=terminate type=spot-terminate status=scheduled not_before=2017-09-18T08:22:00Z provider=ec2 id=<>",
            (
                "impact=rebalance type=rebalance-recommendation status=scheduled not_before=2020-10-27T08:22:00Z "
                "provider=ec2 id=<>"
            ),
            "impact=terminate type=asg-terminated status=scheduled provider=ec2 id=<>",
        ],
    ),
}


@pytest.fixture
def check(tool, tmp_path, capsys) -> Callable[..., tuple[int, str, str]]:
    """check(gce, "--log", ...): one check, and what it gave: status, stdout, stderr."""

    def run(cloud, *options: str) -> tuple[int, str, str]:
        if cloud.provider in ("azure-v1", "gce"):
            done = tool(*options, service=cloud)
            return done.returncode, done.stdout, done.stderr
        # For the rest a run in this process will do, in a tenth of the time: only the provider is another.
        gc.collect()  # the lock of an earlier run goes with its objects, as it would with its process
        here = ("--provider", cloud.provider, "--endpoint", cloud.url, "--state", str(tmp_path / "state"))
        status = is_vm_in_maint.main([*here, *options])
        return (status, *capsys.readouterr())

    return run


@pytest.mark.wire
@posix_only
@pytest.mark.parametrize("provider", DOCUMENTS)
def test_the_manuals_documents_are_logged_once_through_twenty_checks(provider, service, check, syslogd) -> None:
    documents, events = DOCUMENTS[provider]
    cloud = service(provider, vm="WestNO_0")
    for path, document in documents.items():
        cloud.serve(path, document)
    options = ("--log", "syslog", "--syslog", syslogd.socket)

    finished = [check(cloud, *options) for _ in range(20)]
    announced = syslogd.lines()
    cloud.heal()  # now nothing is planned
    finished += [check(cloud, *options) for _ in range(2)]

    assert set(finished) == {(0, "", "")}
    incoming = [f"Incoming VM Event: {event}" for event in events]
    over = [f"VM Event over: outcome=ended {event}" for event in events]  # the time of each had come
    assert without_made_up_ids(announced, events) == list(map(notice, incoming))
    assert without_made_up_ids(syslogd.lines(), events) == list(map(notice, incoming + over))


def without_made_up_ids(lines: list[Line], events: list[str]) -> list[Line]:
    """The lines as they would be if ids that are in none of the documents were <>."""
    given_ids = {re.search(r" id=(\S+)", event)[1] for event in events}
    return [
        line._replace(text=re.sub(r" id=(\S+)", lambda id: id[0] if id[1] in given_ids else " id=<>", line.text))
        for line in lines
    ]


@pytest.mark.wire
@posix_only
def test_syslog_may_be_a_host_and_port(service, tool, syslogd) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    done = tool("--log", "syslog", "--syslog", f"127.0.0.1:{syslogd.port}", service=gce)
    (line,) = syslogd.lines(at_least=1)
    assert line[:3] == ("user", "notice", "IsVmInMaint")
    assert line.text.startswith("Incoming VM Event: impact=terminate type=PREEMPTED status=started provider=gce id=")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.wire
@posix_only
def test_the_systems_own_log_is_syslog(service, tool, syslogd) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    tool("--log", "auto", "--syslog", syslogd.socket, service=gce)
    assert [line.text.partition(":")[0] for line in syslogd.lines()] == ["Incoming VM Event"]


def no_socket(path: Path) -> None:
    """There is nothing at all."""


def deserted_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))


def not_a_socket(path: Path) -> None:
    path.touch()


@pytest.mark.wire
@posix_only
@pytest.mark.parametrize("make", [no_socket, deserted_socket, not_a_socket])
def test_a_line_that_syslog_does_not_take_is_mailed_by_cron(make, service, tool, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket may have 107 bytes
    make(Path("log"))
    drained = tmp_path / "drained"
    azure = service("azure")
    azure.announce("Reboot", id="e1")
    options = ("--log", "syslog", "--syslog", "./log", "--drain", script(tmp_path / "drain", f"touch {drained}"))

    first = tool(*options, service=azure)
    second = tool(*options, service=azure)

    assert first.returncode == 4
    assert "IsVmInMaint: cannot write to the syslog" in first.stderr
    assert "IsVmInMaint: Incoming VM Event: impact=reboot type=Reboot" in first.stderr
    assert drained.exists()
    assert (second.returncode, second.stderr) == (0, "")  # nothing new, so nothing to be written


# What an attacker, or a careless program, could put into a field; and what a log line makes of it.
HOSTILE = {
    "two\nlines\r\nthree": '"two lines  three"',
    "<14>Jan  1 00:00:00 host sshd[1]: Accepted": '"<14>Jan  1 00:00:00 host sshd[1]: Accepted"',
    "nul \0 bell \a escape \x1b[31m": '"nul   bell   escape  [31m"',
    'say "no"': '"say \\"no\\""',
    "C:\\new\\": '"C:\\\\new\\\\"',
    "lone \ud800 surrogate": '"lone   surrogate"',
    "line \u2028 separator, next \x85 line": '"line   separator, next   line"',
    "right-to-left \u202e override": '"right-to-left   override"',
    "a=b": '"a=b"',
    "Größe Ω 雪 😀": '"Größe Ω 雪 😀"',
    "ABC" * 1000: ("ABC" * 1000)[:256],
    "%s %n %1 {0}": '"%s %n %1 {0}"',
}


@pytest.mark.wire
@posix_only
def test_whatever_the_cloud_writes_makes_one_clean_line(service, tool, syslogd) -> None:
    azure = service("azure")
    for number, text in enumerate(HOSTILE):
        azure.announce("Freeze", id=f"e{number}", description=text)
    done = tool("--log", "syslog", "--syslog", syslogd.socket, service=azure)
    start = "Incoming VM Event: impact=freeze type=Freeze status=scheduled provider=azure"
    assert syslogd.lines() == [
        notice(f"{start} id=e{number} source=Platform description={written}")
        for number, written in enumerate(HOSTILE.values())
    ]
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.wire
@posix_only
def test_every_field_is_cleaned(service, tool, syslogd) -> None:
    azure = service("azure")
    evil = 'x\nVM restored: "y\x1b\ud800'
    event = {"EventId": evil, "EventType": evil, "EventStatus": evil, "Resources": ["web-1", evil], "NotBefore": evil}
    event |= {"Description": evil, "EventSource": evil, "DurationInSeconds": evil}
    azure.serve("/metadata/scheduledevents", json.dumps({"DocumentIncarnation": 1, "Events": [event]}))
    tool("--log", "syslog", "--syslog", syslogd.socket, service=azure)
    written = '"x VM restored: \\"y"'
    assert syslogd.lines() == [
        notice(
            f"Incoming VM Event: impact=unknown type={written} status=scheduled provider=azure id={written} "
            f"source={written} description={written}"
        )
    ]


# ---- stderr and none


@pytest.mark.wire
def test_log_stderr_writes_each_line_once_there(service, tool) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    done = tool("--log", "stderr", service=gce)
    line = r"IsVmInMaint: Incoming VM Event: impact=terminate type=PREEMPTED status=started provider=gce id=\S+\n"
    assert re.fullmatch(line, done.stderr)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.wire
def test_log_none_writes_nothing_but_what_is_wrong(service, tool) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    quiet = tool("--log", "none", service=gce)
    gce.fail("refuse")
    wrong = tool("--log", "none", service=gce)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert wrong.returncode == 3
    assert wrong.stderr.startswith("IsVmInMaint: Metadata service unreachable: ")


# ---- the Windows Event Log


class Eventcreate:
    """A stand-in for eventcreate.exe: a real program at the place where Windows has it; it records its calls."""

    def __init__(self, system_root: Path) -> None:
        self.system_root = system_root
        self.path = system_root / "System32" / "eventcreate.exe"
        self.record = system_root / "calls"

    def install(self, end: str = "exit 0") -> None:
        script(self.path, f"printf '%s\\0' \"$@\" >>'{self.record}'; printf '\\n' >>'{self.record}'\n{end}")

    @property
    def environment(self) -> dict[str, str]:
        return {"SystemRoot": str(self.system_root)}

    def calls(self) -> list[list[str]]:
        """The arguments of each call."""
        written = self.record.read_text(encoding="utf-8") if self.record.exists() else ""
        return [call.split("\0") for call in written.split("\0\n")[:-1]]


@pytest.fixture
def eventcreate(tmp_path: Path) -> Eventcreate:
    return Eventcreate(tmp_path / "Windows")


@pytest.mark.wire
@posix_only
def test_log_eventlog_calls_eventcreate_with_exactly_these_arguments(service, tool, eventcreate) -> None:
    eventcreate.install()
    azure = service("azure")
    azure.announce("Reboot", id="e1", description='Say "no" \\ & | %PATH% Größe\n/ID 99\\')
    done = tool("--log", "eventlog", service=azure, env=eventcreate.environment)
    line = (
        "Incoming VM Event: impact=reboot type=Reboot status=scheduled provider=azure id=e1 source=Platform "
        r'description="Say \"no\" \\ & | %PATH% Größe /ID 99\\"'
    )
    arguments = ["/L", "APPLICATION", "/SO", "IsVmInMaint", "/ID", "1", "/T", "INFORMATION", "/D", line]
    assert eventcreate.calls() == [arguments]
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert windows_command_line.split(subprocess.list2cmdline(["eventcreate.exe", *arguments]))[1:] == arguments


@posix_only
@pytest.mark.parametrize(
    ("verb", "number", "type"),
    [
        ("announced", "1", "INFORMATION"),
        ("started", "2", "INFORMATION"),
        ("moved", "3", "INFORMATION"),
        ("over", "4", "INFORMATION"),
        ("drain", "5", "INFORMATION"),
        ("restore", "6", "INFORMATION"),
        ("drain failed", "20", "ERROR"),
        ("restore failed", "20", "ERROR"),
        ("unreachable", "30", "WARNING"),
        ("reachable", "31", "INFORMATION"),
        ("state", "40", "WARNING"),
    ],
)
def test_each_kind_of_line_has_its_event_id(verb, number, type, eventcreate, monkeypatch) -> None:
    eventcreate.install()
    monkeypatch.setenv("SystemRoot", str(eventcreate.system_root))
    line = Journal("eventlog", "").write(verb, {"id": "e1"})
    assert eventcreate.calls() == [["/L", "APPLICATION", "/SO", "IsVmInMaint", "/ID", number, "/T", type, "/D", line]]


def arguments_of_eventcreate(fields: dict[str, Any], monkeypatch) -> list[str]:
    """What Windows would be asked to start, program included, to log an event with these fields."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, b"", b"")

    with monkeypatch.context() as platform:
        platform.setattr(subprocess, "run", run)
        Journal("eventlog", "").write("announced", fields)
    return calls[0]


@given(text=st.text() | st.text(alphabet='\\" \t=ab'))
def test_any_description_survives_windows_command_line(text: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = arguments_of_eventcreate({"description": text}, monkeypatch)
    assert windows_command_line.split(subprocess.list2cmdline(arguments)) == arguments
    assert is_vm_in_maint.logfmt({"description": text}) in arguments[-1]


@pytest.mark.parametrize(
    ("line", "arguments"),
    [  # Microsoft's own examples
        (r'"a b c" d e', ["a b c", "d", "e"]),
        (r'"ab\"c" "\\" d', ['ab"c', "\\", "d"]),
        (r'a\\\b d"e f"g h', [r"a\\\b", "de fg", "h"]),
        (r"a\\\"b c d", [r"a\"b", "c", "d"]),
        (r'a\\\\"b c" d e', [r"a\\b c", "d", "e"]),
        (r'a"b"" c d', ['ab" c d']),
        ('"" \t x', ["", "x"]),
    ],
)
def test_our_parser_splits_as_microsoft_documents(line: str, arguments: list[str]) -> None:
    assert windows_command_line.split(f"x.exe {line}") == ["x.exe", *arguments]
    assert windows_command_line.split(f'"C:\\Program Files\\x.exe" {line}') == [r"C:\Program Files\x.exe", *arguments]


@pytest.mark.wire
@posix_only
def test_not_elevated_the_line_goes_to_stderr(service, tool, eventcreate) -> None:
    eventcreate.install('echo "ERROR: Access is denied." >&2; exit 1')
    gce = service("gce")
    gce.announce("PREEMPTED")
    done = tool("--log", "eventlog", service=gce, env=eventcreate.environment)
    assert done.returncode == 4
    assert "Access is denied." in done.stderr
    assert "elevated" in done.stderr
    assert "IsVmInMaint: Incoming VM Event: impact=terminate" in done.stderr


@pytest.mark.wire
@posix_only
def test_without_eventcreate_the_line_goes_to_stderr(service, tool, eventcreate) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    done = tool("--log", "eventlog", service=gce, env=eventcreate.environment)
    assert done.returncode == 4
    assert "eventcreate.exe" in done.stderr
    assert "IsVmInMaint: Incoming VM Event: impact=terminate" in done.stderr


def test_an_eventcreate_that_never_ends_is_given_up(monkeypatch, capsys) -> None:
    def run(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    journal = Journal("eventlog", "")
    line = journal.write("announced", {"id": "e1"})
    assert journal.failed
    assert f"IsVmInMaint: {line}\n" in capsys.readouterr().err


def test_on_windows_the_systems_own_log_is_the_event_log(monkeypatch) -> None:
    with monkeypatch.context() as platform:
        platform.setattr(os, "name", "nt")
        journal = Journal("auto", "/dev/log")
    assert journal.where == "eventlog"
