"""The command line: options, exit statuses, and what is printed for a person, for cron and for programs."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import pytest

import is_vm_in_maint
from conftest import FOREIGN_VARIABLES, ROOT, TOOL
from is_vm_in_maint import Store

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def run(state, capsys, monkeypatch) -> Callable[..., Done]:
    """run(azure, "--test", ...): one run of the tool in this process, which is quicker than as a program."""
    for name in FOREIGN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "1000")  # argparse breaks no lines

    def run(service, *options: str) -> Done:
        gc.collect()  # the lock of an earlier run goes with its objects, as it would with its process
        cloud = ("--provider", service.provider, "--endpoint", service.url) if service else ()
        try:
            status = is_vm_in_maint.main(["--log", "none", "--state", str(state), *cloud, *options])
        except SystemExit as end:  # argparse
            status = end.code
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def terminal(state) -> Callable[..., Done]:
    """terminal(azure, ...): the tool as a program whose standard output is a real terminal."""

    def run(service, *options: str) -> Done:
        keyboard, screen = os.openpty()
        cloud = ("--provider", service.provider, "--endpoint", service.url)
        command = [sys.executable, str(TOOL), "--log", "none", "--state", str(state), *cloud, *options]
        with subprocess.Popen(command, stdin=screen, stdout=screen, stderr=subprocess.PIPE, text=True) as process:
            os.close(screen)
            shown = b""
            try:
                while piece := os.read(keyboard, 65536):
                    shown += piece
            except OSError:  # EIO: the program has ended
                pass
            os.close(keyboard)
            err = process.stderr.read()
        return Done(process.returncode, shown.decode().replace("\r\n", "\n"), err)

    return run


def hook(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


# ---- --test


@pytest.mark.parametrize(
    ("event", "options", "status"),
    [
        (None, [], 1),
        ({"type": "Reboot", "not_before": 600}, [], 0),
        ({"type": "Reboot", "not_before": 3600}, [], 1),
        ({"type": "Reboot", "not_before": 3600}, ["--lead", "2h"], 0),
        ({"type": "Reboot", "status": "Started"}, [], 0),
        ({"type": "Freeze"}, [], 0),  # ignored events count here
        ({"type": "Reboot", "vms": ["web-2"]}, [], 1),
        ({"type": "Reboot", "vms": ["web-2"]}, ["--vm-name", "WEB-2"], 0),
    ],
)
def test_test_says_by_its_status_whether_the_vm_is_in_maintenance(event, options, status, service, run) -> None:
    azure = service("azure")
    if event:
        azure.announce(**event)
    assert run(azure, "--test", *options) == (status, "", "")


def test_test_that_cannot_tell_is_3(service, run) -> None:
    gce = service("gce")
    gce.fail("html")
    done = run(gce, "--test")
    assert (done.status, done.out) == (3, "")
    assert gce.url in done.err


def test_test_as_a_program_prints_and_changes_nothing(service, tool, state) -> None:
    gce = service("gce")
    done = tool("--test", service=gce)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    gce.announce("PREEMPTED")
    done = tool("--test", service=gce)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not state.exists()


# ---- --json


def document_of(done: Done) -> dict:
    document = json.loads(done.out)
    checked_at = datetime.strptime(document.pop("checked_at"), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert abs(datetime.now(timezone.utc) - checked_at) < timedelta(minutes=5)
    return document


def test_json_is_the_document_of_the_design(service, run, state) -> None:
    azure = service("azure")
    begins = (datetime.now(timezone.utc) + timedelta(minutes=10)).replace(microsecond=0)
    azure.announce("Reboot", id="E1", not_before=begins, duration=9, vms=["web-1", "web-2"])
    done = run(azure, "--json")
    document = document_of(done)
    vm_id = document["instance"].pop("id")
    assert re.fullmatch(r"[0-9a-f-]{36}", vm_id)
    assert document == {
        "provider": "azure",
        "instance": {"name": "web-1", "update_domain": "0", "fault_domain": "0", "location": "westeurope"},
        "in_maintenance": True,
        "drained": False,
        "events": [
            {
                "provider": "azure",
                "id": "E1",
                "type": "Reboot",
                "impact": "reboot",
                "status": "scheduled",
                "not_before": begins.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "duration_seconds": 9,
                "source": "Platform",
                "description": "Host server is undergoing maintenance.",
                "resources": ["web-1", "web-2"],
            }
        ],
    }
    assert (done.status, done.err) == (0, "")
    assert not state.exists()


def test_json_of_a_vm_with_nothing_planned(service, run) -> None:
    gce = service("gce")
    document = document_of(run(gce, "--json"))
    assert document.pop("instance")["name"] == "web-1"
    assert document == {"provider": "gce", "in_maintenance": False, "drained": False, "events": []}


def test_in_json_what_is_not_known_is_null(service, run) -> None:
    ec2 = service("ec2")
    ec2.announce("asg-terminated")
    document = document_of(run(ec2, "--json"))
    unknown = {"name": None, "update_domain": None, "fault_domain": None}
    assert document["instance"] == {**unknown, "id": document["instance"]["id"], "location": "eu-west-1a"}
    (event,) = document["events"]
    assert {key for key, value in event.items() if value is None} == {
        "not_before",
        "duration_seconds",
        "source",
        "description",
    }


def test_json_when_the_metadata_service_cannot_be_reached(service, run) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    run(gce)
    gce.fail("refuse")
    done = run(gce, "--json")
    document = document_of(done)
    assert done.status == 3
    assert gce.url in done.err
    assert document["in_maintenance"] is None
    assert set(document["instance"].values()) == {None}
    assert [event["type"] for event in document["events"]] == ["PREEMPTED"]  # as last known


def test_json_checks_nothing_off(service, run, state) -> None:
    gce = service("gce")
    run(gce)
    gce.announce("PREEMPTED")
    before = (state / "state.json").read_bytes()
    run(gce, "--json")
    assert (state / "state.json").read_bytes() == before
    assert "Incoming VM Event" in run(gce, "--log", "stderr").err


def test_a_state_that_cannot_be_read_is_only_mentioned_by_those_who_look(service, run, state) -> None:
    gce = service("gce")
    state.mkdir(0o700)
    (state / "state.json").write_text("not JSON")
    done = run(gce, "--test")
    assert (done.status, done.out) == (1, "")
    assert str(state / "state.json") in done.err
    assert (state / "state.json").read_text() == "not JSON"


# ---- --dry-run


@posix_only
def test_dry_run_says_what_would_be_done_and_does_nothing(service, run, state, tmp_path) -> None:
    azure = service("azure")
    azure.announce("Reboot", id="E1", not_before=600)
    drain, restore = hook(tmp_path / "drain", f"touch {tmp_path}/ran"), hook(tmp_path / "restore", "")
    options = ("--log", "stderr", "--drain", f"{drain} now", "--restore", restore, "--approve")
    done = run(azure, "--dry-run", *options, "--notify", azure.url)
    assert (done.status, done.err) == (0, "")
    would = [line.partition(": ")[0] for line in done.out.splitlines() if line.startswith("Would ")]
    assert would == ["Would log 'Incoming VM Event'", "Would drain", "Would approve"]
    assert f"To drain: {drain}\nTo restore: {restore}\n" in done.out
    assert not (tmp_path / "ran").exists()
    assert not state.exists()
    assert {request.method for request in azure.requests} == {"GET"}


@posix_only
def test_dry_run_finds_a_hook_that_does_not_exist(service, run, tmp_path) -> None:
    azure = service("azure")
    missing = tmp_path / "no such hook"
    done = run(azure, "--dry-run", "--drain", f"'{missing}'", "--restore", hook(tmp_path / "restore", ""))
    assert done.status == 4
    assert done.err == f"IsVmInMaint: --drain: {missing}: not found, or not executable (chmod +x)\n"
    assert f"To restore: {tmp_path}/restore" in done.out


def test_dry_run_without_a_metadata_service_is_3(service, run) -> None:
    gce = service("gce")
    gce.fail("refuse")
    done = run(gce, "--dry-run")
    assert done.status == 3
    assert f"Cannot tell whether maintenance is coming: GET {gce.url}" in done.out


def test_dry_run_wins_over_watch_and_rehearse(service, run) -> None:
    gce = service("gce")
    for mode in ("--watch", "--rehearse"):
        assert run(gce, "--dry-run", mode).out.startswith("No maintenance is announced for this VM")


# ---- for a person at a terminal


@posix_only
def test_on_a_terminal_nothing_planned_is_one_plain_sentence(service, terminal) -> None:
    sentence = "No maintenance is announced for this VM (gce, web-1, zone europe-west1-b).\n"
    assert terminal(service("gce")) == (0, sentence, "")


@posix_only
def test_on_a_terminal_an_event_is_one_plain_sentence(service, terminal) -> None:
    azure = service("azure")
    azure.announce("Reboot", not_before=275)
    done = terminal(azure)
    who = r"\(azure, web-1, location westeurope, update domain 0, fault domain 0\)"
    assert re.fullmatch(rf"Reboot in 4 min \d+ s: Host server is undergoing maintenance\. {who}\n", done.out)
    assert terminal(azure).out != ""  # also when it is no news to the journal


@posix_only
def test_on_a_terminal_a_failing_metadata_service_is_said_at_each_run(service, terminal) -> None:
    azure = service("azure")
    azure.fail(500)
    for _ in range(2):
        done = terminal(azure)
        assert done.status == 3
        assert done.out.startswith(f"Cannot tell whether maintenance is coming: GET {azure.url}/metadata/")


NOW = datetime(2026, 11, 22, 9, 45, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("event", "begins"),
    [
        ({"not_before": NOW + timedelta(minutes=4, seconds=12)}, "Reboot in 4 min 12 s: "),
        ({"not_before": NOW + timedelta(seconds=40)}, "Reboot in 40 s: "),
        ({"not_before": NOW + timedelta(hours=3)}, "Reboot in 3 h: "),
        ({"not_before": NOW + timedelta(days=2, hours=4, minutes=30)}, "Reboot in 2 days 4 h: "),
        ({"not_before": NOW - timedelta(seconds=1)}, "Reboot may begin at any moment: "),
        ({}, "Reboot may begin at any moment: "),
        ({"status": "Started"}, "Reboot has started: "),
        ({"type": "Redeploy", "status": "Started"}, "Redeploy has started: Redeploy (azure, "),
        ({"type": "Novelty", "status": "Started"}, "Maintenance has started: Novelty (azure, "),
    ],
)
def test_a_person_reads_when_it_begins(event, begins, service, run, monkeypatch) -> None:
    monkeypatch.setattr(is_vm_in_maint, "utcnow", lambda: NOW)
    azure = service("azure")
    azure.announce(**{"type": "Reboot", **event})
    assert run(azure, "-v").out.startswith(begins)


@pytest.mark.parametrize(
    ("provider", "who"),
    [
        ("azure", r"azure, id [0-9a-f-]{36}, web-1, location westeurope, update domain 0, fault domain 0"),
        ("azure-v1", r"azure-v1, id _web-1, web-1, update domain 0, fault domain 0"),
        ("gce", r"gce, id \d+, web-1, zone europe-west1-b"),
        ("ec2", r"ec2, id i-[0-9a-f]{17}, zone eu-west-1a"),
    ],
)
def test_verbose_says_who_the_vm_is_wherever_it_prints(provider, who, service, run) -> None:
    done = run(service(provider), "--verbose")
    assert re.fullmatch(rf"No maintenance is announced for this VM \({who}\)\.\n", done.out)


@posix_only
def test_a_person_is_told_that_another_run_is_at_work(service, run, state) -> None:
    other = Store(str(state))
    assert other.lock(0.0, 0.0)
    assert run(service("gce")) == (0, "", "")
    assert run(service("gce"), "-v") == (0, "Another run is still at work, so this one has nothing to do.\n", "")


# ---- for cron, which mails what is printed


def test_cron_reads_nothing_when_all_is_well(service, tool) -> None:
    azure = service("azure")
    event = azure.announce("Reboot")
    for command in (lambda: None, lambda: azure.begin(event), lambda: azure.end(event)):
        command()
        done = tool("--log", "none", service=azure)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_cron_reads_once_that_the_metadata_service_fails(service, run) -> None:
    gce = service("gce")
    gce.fail("refuse")
    first, second = run(gce), run(gce)
    gce.heal()
    third = run(gce)
    gce.fail("refuse")
    fourth = run(gce)
    assert (first.status, first.out) == (3, "")
    assert re.fullmatch(r"IsVmInMaint: Metadata service unreachable: .*\n", first.err)
    assert second == (3, "", "")
    assert third == (0, "", "")
    assert fourth == first


@posix_only
def test_a_journal_on_a_full_disk_stops_no_drain(service, state, tmp_path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    gce = service("gce")
    gce.announce("PREEMPTED")
    command = [sys.executable, str(TOOL), "--provider", "gce", "--endpoint", gce.url, "--state", str(state)]
    command += ["--log", "stderr", "--drain", hook(tmp_path / "drain", f"touch {tmp_path}/drained")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, timeout=60, check=False)
    assert done.returncode == 4
    assert (tmp_path / "drained").exists()


# ---- without requests


@pytest.fixture
def without_requests(tmp_path: Path) -> dict[str, str]:
    """An environment in which `import requests` fails as where it is not installed."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "requests.py").write_text("raise ModuleNotFoundError(\"No module named 'requests'\")\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("mode", ["", "--test", "--json", "--watch", "--rehearse", "--dry-run"])
def test_without_requests_one_line_says_how_to_get_it(mode, tool, without_requests, state) -> None:
    done = tool("--provider", "gce", *mode.split(), env=without_requests)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    for word in ("requests", "apt-get install python3-requests", "Debian", "Ubuntu", "RHEL", "Windows"):
        assert word in line
    assert "dnf install python3-requests" in line
    assert "pip install requests" in line
    assert not state.exists()


def test_without_requests_there_is_still_help(tool, without_requests) -> None:
    version = tool("--version", env=without_requests)
    assert (version.returncode, version.stdout, version.stderr) == (0, f"is_vm_in_maint {version_of_the_tool()}\n", "")
    help = tool("--help", env=without_requests)
    assert (help.returncode, help.stderr) == (0, "")
    assert "--rehearse" in help.stdout
    wrong = tool("--lead", "soon", env=without_requests)
    assert wrong.returncode == 2
    assert "'soon'" in wrong.stderr


def test_a_bare_python_says_the_same() -> None:
    """No stand-in: -S leaves out the folders in which modules are installed."""
    bare = [sys.executable, "-I", "-S", str(TOOL)]
    done = subprocess.run([*bare, "--test"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "apt-get install python3-requests" in done.stderr
    done = subprocess.run([*bare, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0


# ---- options


TIME = "is not a time such as 90, 90s, 15m or 2h"
WRONG: list[tuple] = [
    (["--lead", "soon"], "--lead", "'soon'", TIME),
    (["--lead", "1.5h"], "--lead", "'1.5h'", TIME),
    (["--lead", ""], "--lead", "''", TIME),
    (["--lead", "90 s"], "--lead", TIME),
    (["--hook-timeout=-5"], "--hook-timeout", "'-5'", TIME),
    (["--watch", "ever"], "--watch", "'ever'", TIME),
    (["--ignore", "freeze,reboots"], "--ignore", "'reboots'", "freeze, migrate, reboot, redeploy, stop, terminate"),
    (["--drain", ""], "--drain", "empty command"),
    (["--drain", "echo 'x"], "--drain", "quotation"),
    (["--drain", "true", "--restore", "  "], "--restore", "empty command"),
    (["--endpoint", "169.254.169.254"], "--endpoint", "http://HOST[:PORT]"),
    (["--endpoint", "https://169.254.169.254"], "--endpoint", "http://HOST[:PORT]"),
    (["--endpoint", "http://host/latest"], "--endpoint", "the paths are the provider's"),
    (["--endpoint", "http://host:99999"], "--endpoint", "http://HOST[:PORT]"),
    (["--endpoint", "http://host:port"], "--endpoint", "http://HOST[:PORT]"),
    (["--endpoint", "http://[::1"], "--endpoint", "http://HOST[:PORT]"),
    (["--endpoint", "http://user@host"], "--endpoint", "http://HOST[:PORT]"),
    (["--notify", "chat.example/hook"], "--notify", "an http:// or https:// URL"),
    (["--notify", "http://["], "--notify", "an http:// or https:// URL"),
    (["--syslog", "nonsense"], "--syslog", "the path of a socket or HOST:PORT"),
    (["--syslog", "host:port"], "--syslog", "the path of a socket or HOST:PORT"),
    (["--syslog", "host:99999"], "--syslog", "the path of a socket or HOST:PORT"),
    (["--syslog", "host:0"], "--syslog", "the path of a socket or HOST:PORT"),
    (["--log", "file"], "--log", "file", "eventlog"),
    (["--provider", "other"], "--provider", "other", "azure-v1"),
    (["--restore", "true"], "--restore", "need --drain"),
    (["--approve"], "--approve", "need --drain"),
    (["--test", "--json"], "--test", "--json"),
    (["--rehearse", "--watch"], "--rehearse", "--watch"),
    (["--prov", "gce"], "--prov"),  # an option added later must not change what a crontab means
    (["now"], "now"),
    (["--vm-name"], "--vm-name", "expected one argument"),
]


@pytest.mark.parametrize("usage", WRONG, ids=lambda usage: " ".join(usage[0]))
def test_wrong_usage_is_said_in_plain_words(usage, run) -> None:
    options, *words = usage
    done = run(None, *options)
    assert (done.status, done.out) == (2, "")
    said = done.err.splitlines()[-1]
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize("options", [["--lead", "90"], ["--lead", "90s"], ["--lead", "15m"], ["--lead", "2h"]])
def test_times_are_seconds_minutes_or_hours(options, service, run) -> None:
    seconds = {"90": 90, "90s": 90, "15m": 900, "2h": 7200}[options[1]]
    azure = service("azure")
    azure.announce("Reboot", not_before=seconds + 60)
    assert run(azure, "--test", *options).status == 1
    azure.announce("Reboot", not_before=seconds - 30)
    assert run(azure, "--test", *options).status == 0


@posix_only
def test_on_windows_a_backslash_in_a_command_is_only_a_backslash(service, run, monkeypatch) -> None:
    gce = service("gce")
    paths = []

    def find_hook(words: list[str]) -> str:
        paths.append(words)
        return words[0]

    monkeypatch.setattr(is_vm_in_maint, "find_hook", find_hook)
    with monkeypatch.context() as platform:
        platform.setattr(os, "name", "nt")
        run(gce, "--dry-run", "--drain", r'"C:\Program Files\lb\drain.exe" C:\new\table its')
    assert paths == [[r"C:\Program Files\lb\drain.exe", r"C:\new\table", "its"]]


OPTIONS = {
    "--provider": "",
    "--endpoint": "",
    "--vm-name": "",
    "--drain": "",
    "--restore": "",
    "--hook-timeout": "(10m)",
    "--lead": "(15m)",
    "--ignore": "(freeze,rebalance)",
    "--approve": "",
    "--notify": "",
    "--log": "",
    "--syslog": "(/dev/log)",
    "--state": "",
    "--dry-run": "",
    "--verbose": "",
    "--version": "",
    "--help": "",
    "--watch": "",
    "--test": "",
    "--json": "",
    "--rehearse": "",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_help_tells_every_option_with_its_default(option, run) -> None:
    done = run(None, "--help")
    assert (done.status, done.err) == (0, "")
    (line,) = [line for line in done.out.splitlines() if re.match(rf"  (-\w, )?{option}\b", line)]
    assert OPTIONS[option] in line


def test_help_tells_the_values_and_the_exit_statuses(run) -> None:
    text = run(None, "-h").out
    assert "{auto,azure,azure-v1,gce,ec2}" in text
    assert "{auto,syslog,eventlog,stderr,none}" in text
    assert re.search(r"Exit status: 0 .*; 1 .*; 2 .*; 3 .*; 4 ", text)


def version_of_the_tool() -> str:
    return re.search(r'^__version__ = "(\d+\.\d+\.\d+)"$', TOOL.read_text(encoding="utf-8"), re.MULTILINE)[1]


# ---- where the state is


def state_in_help(run) -> str:
    return re.search(r"--state DIR +the state directory \((.*)\)", run(None, "--help").out)[1]


@posix_only
@pytest.mark.parametrize(
    ("user", "environment", "folder"),
    [
        (0, {}, "/var/lib/is-vm-in-maint"),
        (0, {"XDG_STATE_HOME": "/elsewhere"}, "/var/lib/is-vm-in-maint"),
        (1000, {"XDG_STATE_HOME": "/elsewhere"}, "/elsewhere/is-vm-in-maint"),
        (1000, {"XDG_STATE_HOME": "", "HOME": "/home/ann"}, "/home/ann/.local/state/is-vm-in-maint"),
        (0, {"STATE_DIRECTORY": "/var/lib/unit"}, "/var/lib/unit"),
        (1000, {"STATE_DIRECTORY": "/var/lib/unit:/var/lib/other"}, "/var/lib/unit"),
    ],
)
def test_the_state_is_where_this_user_may_write(user, environment, folder, run, monkeypatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert state_in_help(run) == folder


def test_on_windows_the_state_is_in_program_data(run, monkeypatch) -> None:
    monkeypatch.setenv("ProgramData", r"D:\Data")
    with monkeypatch.context() as platform:
        platform.setattr(os, "name", "nt")
        shown = state_in_help(run)
    assert shown == os.path.join(r"D:\Data", "IsVmInMaint")


@posix_only
def test_under_systemd_the_state_is_in_the_units_directory(service, tmp_path, monkeypatch) -> None:
    gce = service("gce")
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path}/unit:{tmp_path}/other")
    cloud = ["--provider", "gce", "--endpoint", gce.url, "--log", "none"]
    assert is_vm_in_maint.main(cloud) == 0
    assert (tmp_path / "unit" / "state.json").exists()


# ---- which cloud


@posix_only
def test_off_the_known_clouds_it_says_how_to_name_one(run, tmp_path, monkeypatch) -> None:
    firmware = tmp_path / "dmi"
    firmware.mkdir()
    (firmware / "sys_vendor").write_text("LENOVO\n")
    monkeypatch.setattr(is_vm_in_maint, "DMI", f"{firmware}/")
    monkeypatch.setattr(is_vm_in_maint, "XEN_UUID", f"{firmware}/none")
    for mode in ("--test", "--json", "--rehearse", "--watch"):
        done = run(None, mode)
        assert (done.status, done.out) == (3, "")
        assert "LENOVO" in done.err
        assert "--provider azure|azure-v1|gce|ec2" in done.err


# ---- what the packages promise


def test_pyproject_names_a_command_that_is_there() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    module, function = re.search(r'^is-vm-in-maint = "(\w+):(\w+)"$', project, re.MULTILINE).groups()
    assert getattr(importlib.import_module(module), function) is is_vm_in_maint.main
    attribute = re.search(r'^version = \{ attr = "is_vm_in_maint\.(\w+)" \}$', project, re.MULTILINE)[1]
    assert getattr(is_vm_in_maint, attribute) == version_of_the_tool()


def test_the_tools_own_metadata_say_the_same_as_pyproject() -> None:
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", TOOL.read_text(encoding="utf-8"), re.MULTILINE)[1]
    inside = "".join(line[2:] + "\n" for line in block.splitlines())
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for key in ("requires-python", "dependencies"):
        line = re.search(rf"^{key} = .*$", inside, re.MULTILINE)[0]
        assert line in project.splitlines()
