"""install/systemd.py, with systemd itself: its analysis of the units, and a systemd that runs them."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import systemd
from conftest import ROOT, Syslogd, need
from metadata_service import MetadataService
from private_machine import IN_TMP, BootedMachine

SYSTEMD = ROOT / "install" / "systemd.py"
SERVICE, TIMER = systemd.SERVICE.name, systemd.TIMER.name
# Every character that systemd, the shell or argparse could take for its own.
NASTY = ["100%n", "it's", r"a\\b \x41 \n", 'say "x"', "$HOME ${HOME} `id`", ";", "größer 日本", "", "-x", "@a :b"]
Installer = Callable[..., "subprocess.CompletedProcess[str]"]


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"in {seconds:.0f} s not {what}"
        time.sleep(0.1)


# ---- What systemd-analyze says of the units ----------------------------------------------------------


@pytest.fixture
def analyze() -> str:
    return need("systemd-analyze", "systemd")


def written(folder: Path, *, timer: bool, timeout: float = 600) -> list[Path]:
    """The unit files, written to a folder; the command is one that exists."""
    parsed = argparse.Namespace(hook_timeout=timeout)
    options = argparse.Namespace(timer=timer, tool=["--drain", shlex.join(["hook", *NASTY])], parsed=parsed)
    paths = []
    for path, content in systemd.units(["/usr/bin/env", "python3"], options).items():
        paths.append(folder / path.name)
        paths[-1].write_text(content, encoding="utf-8")
    return paths


@pytest.mark.parametrize("timer", [False, True])
def test_systemd_analyze_finds_nothing_to_complain_of(analyze: str, tmp_path: Path, timer: bool) -> None:
    paths = written(tmp_path, timer=timer)
    verified = subprocess.run(
        [analyze, "verify", "--man=no", *map(str, paths)], capture_output=True, text=True, check=False
    )
    # Units of the system's own, which come along as dependencies, may have faults of theirs.
    said = [line for line in verified.stderr.splitlines() if "is-vm-in-maint" in line]
    assert (verified.returncode, said) == (0, [])


def test_systemd_analyze_would_find_a_misspelt_setting(analyze: str, tmp_path: Path) -> None:
    path = written(tmp_path, timer=False)[0]
    path.write_text(path.read_text(encoding="utf-8").replace("ProtectHome", "ProtectHouse"), encoding="utf-8")
    verified = subprocess.run([analyze, "verify", "--man=no", str(path)], capture_output=True, text=True, check=False)
    assert "ProtectHouse" in verified.stderr


@pytest.mark.parametrize("timer", [False, True])
def test_its_exposure_is_rated_two_or_lower(analyze: str, tmp_path: Path, timer: bool) -> None:
    path = written(tmp_path, timer=timer)[0]
    command = [analyze, "security", "--offline=true", "--no-pager", str(path)]
    rated = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in rated.stderr:
        pytest.skip("systemd-analyze before 250 cannot rate a file")
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", rated.stdout)
    assert found, rated.stderr
    assert float(found[1]) <= 2.0


def test_stopping_waits_longer_than_a_hook_may_take(tmp_path: Path) -> None:
    for timer in (False, True):
        unit = written(tmp_path, timer=timer, timeout=3600)[0].read_text(encoding="utf-8")
        limit = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
        assert limit
        assert int(limit[1]) > 3600


# ---- A systemd that runs them ------------------------------------------------------------------------


@pytest.fixture
def machine() -> Iterator[BootedMachine]:
    with BootedMachine() as machine:
        yield machine


@pytest.fixture
def on(machine: BootedMachine) -> Installer:
    """on("install", "--timer"): runs systemd.py on the machine."""
    return lambda *arguments: machine.run(sys.executable, SYSTEMD, *arguments)


@pytest.fixture
def azure(service: Callable[..., MetadataService]) -> MetadataService:
    return service("azure")


@pytest.fixture
def journal(machine: BootedMachine, syslogd: Syslogd) -> Syslogd:
    """A syslog daemon in journald's place, which is where /dev/log leads to in the service's confines."""
    place = "/run/systemd/journal/dev-log"
    machine.run("sh", "-c", f"mkdir -p /run/systemd/journal; touch {place}; mount --bind {syslogd.socket} {place}")
    return syslogd


class Hook:
    """A hook on the machine, which does something and then writes down its words."""

    calls = "/var/lib/calls"

    def __init__(self, machine: BootedMachine, path: str = "/srv/hook", does: str = "") -> None:
        self.machine, self.path = machine, path
        script = f'#!/bin/sh\nset -e\n{does}\nfor word; do printf "%s\\n" "$word"; done >>{self.calls}\n'
        machine.run("tee", path, input=script)
        machine.run("chmod", "755", path)

    def options(self, azure: MetadataService, *words: str) -> list[str]:
        """The tool's options that use it for draining and restoring."""
        hooks = [f"--{action}={shlex.join([self.path, action, *words])}" for action in ("drain", "restore")]
        return ["--provider", "azure", "--endpoint", azure.url, *hooks]

    def words(self) -> list[str]:
        return self.machine.run("cat", self.calls).stdout.splitlines()

    def called(self, action: str) -> Callable[[], bool]:
        return lambda: self.words()[-1:] == [action]


@pytest.fixture
def hook(machine: BootedMachine) -> Hook:
    return Hook(machine)


def property_of(machine: BootedMachine, unit: str, name: str) -> str:
    return machine.run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()


def test_the_service_masks_a_reboot_survives_its_death_and_uninstalls_without_a_trace(
    machine: BootedMachine, on: Installer, azure: MetadataService, journal: Syslogd
) -> None:
    hook = Hook(machine, "/srv/a hook")
    before = machine.files()
    installed = on("install", "--", *hook.options(azure, *NASTY))
    assert installed.returncode == 0, installed.stderr
    assert property_of(machine, SERVICE, "ActiveState") == "active"
    assert property_of(machine, SERVICE, "UnitFileState") == "enabled"

    event = azure.announce("Reboot", not_before=300)
    wait_for(lambda: hook.words() == ["drain", *NASTY], 20, "drained")
    first = property_of(machine, SERVICE, "MainPID")
    machine.run("systemctl", "kill", "--signal=KILL", SERVICE)
    azure.end(event)
    wait_for(lambda: hook.words()[-len(NASTY) - 1 :] == ["restore", *NASTY], 30, "started again and restored")
    assert property_of(machine, SERVICE, "MainPID") != first
    assert hook.words().count("drain") == 1
    said = [line.text.split(":")[0] for line in journal.lines(at_least=4)]
    assert said == ["Incoming VM Event", "VM drained", "VM Event over", "VM restored"]

    assert on("uninstall", "--purge").returncode == 0
    assert machine.files() == before
    assert property_of(machine, SERVICE, "LoadState") == "not-found"


def test_stopping_the_service_lets_a_hook_end_its_work(
    machine: BootedMachine, on: Installer, azure: MetadataService
) -> None:
    began = "/var/lib/hook-began"
    hook = Hook(machine, does=f"touch {began}\nsleep 2")
    on("install", "--", *hook.options(azure))
    azure.announce("Reboot", not_before=300)
    wait_for(lambda: machine.run("test", "-e", began).returncode == 0, 20, "draining")
    machine.run("systemctl", "stop", SERVICE)
    assert hook.words() == ["drain"]
    state = json.loads(machine.run("cat", "/var/lib/is-vm-in-maint/state.json").stdout)
    assert state["drained_for"]["type"] == "Reboot"
    assert property_of(machine, SERVICE, "Result") == "success"


def test_the_timer_has_the_service_check_at_once_and_every_five_minutes(
    machine: BootedMachine, on: Installer, azure: MetadataService, hook: Hook, journal: Syslogd
) -> None:
    before = machine.files()
    azure.announce("Reboot", not_before=300)
    assert on("install", "--timer", "--", *hook.options(azure)).returncode == 0
    wait_for(hook.called("drain"), 30, "drained ten seconds after boot")
    wait_for(lambda: property_of(machine, SERVICE, "ActiveState") == "inactive", 10, "done")
    assert property_of(machine, SERVICE, "Result") == "success"
    calendar = property_of(machine, TIMER, "TimersCalendar")
    assert "OnCalendar=*-*-* *:00/5:00" in calendar
    assert on("status").returncode == 0
    assert on("uninstall", "--purge").returncode == 0
    machine.run("rm", hook.calls)
    assert machine.files() == before


def test_a_metadata_service_that_does_not_answer_is_no_failure_of_the_timers_service(
    machine: BootedMachine, on: Installer, azure: MetadataService, hook: Hook, journal: Syslogd
) -> None:
    azure.fail(500)
    assert on("install", "--timer", "--", *hook.options(azure)).returncode == 0
    machine.run("systemctl", "start", SERVICE)
    assert property_of(machine, SERVICE, "ExecMainStatus") == "3"
    assert property_of(machine, SERVICE, "Result") == "success"


def test_installing_twice_changes_nothing_and_another_way_replaces_the_first(
    machine: BootedMachine, on: Installer, azure: MetadataService, hook: Hook
) -> None:
    options = hook.options(azure)
    on("install", "--", *options)
    files, process = machine.files(), property_of(machine, SERVICE, "MainPID")
    again = on("install", "--", *options)
    assert again.returncode == 0
    assert "Nothing to change" in again.stdout
    assert property_of(machine, SERVICE, "MainPID") == process
    assert machine.files() == files

    assert on("install", "--timer", "--", *options).returncode == 0
    assert property_of(machine, SERVICE, "Type") == "oneshot"
    assert property_of(machine, SERVICE, "MainPID") != process
    assert property_of(machine, SERVICE, "UnitFileState") == "static"
    assert property_of(machine, TIMER, "ActiveState") == "active"

    assert on("install", "--", *options).returncode == 0
    assert property_of(machine, TIMER, "LoadState") == "not-found"
    assert property_of(machine, SERVICE, "ActiveState") == "active"


def test_a_service_that_does_not_start_is_taken_back_whole(
    machine: BootedMachine, on: Installer, azure: MetadataService, hook: Hook
) -> None:
    machine.run("mkdir", systemd.DROP_IN.parent)
    machine.run("tee", systemd.DROP_IN, input="[Service]\nExecStartPre=/bin/false\n")
    before = machine.files()
    failed = on("install", "--", *hook.options(azure))
    assert failed.returncode == 1
    assert f"systemctl status {SERVICE}" in failed.stderr
    assert property_of(machine, SERVICE, "LoadState") == "not-found"
    # It has run for a moment, so systemd may have made its state directory.
    machine.run("rmdir", "/var/lib/is-vm-in-maint")
    assert machine.files() == before


def test_an_upgrade_that_does_not_start_leaves_the_old_one_running(
    machine: BootedMachine, on: Installer, azure: MetadataService, hook: Hook
) -> None:
    on("install", "--", *hook.options(azure))
    units = machine.run("cat", systemd.SERVICE).stdout
    machine.run("mkdir", systemd.DROP_IN.parent)
    # It lets the old options start, and no others.
    check = "[Service]\nExecStartPre=/bin/sh -c '! grep -q -- --lead /etc/systemd/system/is-vm-in-maint.service'\n"
    machine.run("tee", systemd.DROP_IN, input=check)
    assert on("install", "--", *hook.options(azure), "--lead", "5m").returncode == 1
    assert machine.run("cat", systemd.SERVICE).stdout == units
    assert property_of(machine, SERVICE, "ActiveState") == "active"
    azure.announce("Reboot", not_before=600)  # within the old lead
    wait_for(hook.called("drain"), 20, "drained by the old one")


def test_a_hook_that_needs_more_than_its_confines_gets_it_from_the_documented_drop_in(
    machine: BootedMachine, on: Installer, azure: MetadataService, journal: Syslogd
) -> None:
    machine.run("mkdir", "-p", "/etc/nginx")
    hook = Hook(machine, does="runuser -u nobody -- true\n: >/etc/nginx/drained")
    on("install", "--", *hook.options(azure))
    azure.announce("Reboot", not_before=300)
    failed = journal.lines(at_least=2)[1].text
    assert failed.startswith("VM drain failed")
    assert "Operation not permitted" in failed

    documented = re.findall(r"^#   (.+)$", machine.run("cat", systemd.SERVICE).stdout, re.MULTILINE)
    machine.run("mkdir", systemd.DROP_IN.parent)
    machine.run("tee", systemd.DROP_IN, input="\n".join(documented))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", SERVICE)
    wait_for(hook.called("drain"), 20, "drained with the drop-in")
    kept = on("uninstall")
    assert str(systemd.DROP_IN.parent) in kept.stdout
    assert machine.run("test", "-e", systemd.DROP_IN).returncode == 0
    assert on("uninstall", "--purge").returncode == 0
    assert machine.run("test", "-e", systemd.DROP_IN.parent).returncode == 1


@pytest.mark.skipif(IN_TMP, reason="this checkout is in /tmp, and the service has a /tmp of its own")
def test_a_ready_made_hook_works_in_the_confines_as_they_are(
    machine: BootedMachine, on: Installer, azure: MetadataService
) -> None:
    health = ROOT / "install" / "hooks" / "health-file"
    hooks = [f"--{action}=env HEALTH_WAIT=0 {shlex.join([str(health), action])}" for action in ("drain", "restore")]
    on("install", "--", "--provider=azure", f"--endpoint={azure.url}", *hooks)
    azure.announce("Reboot", not_before=300)
    drained = ("test", "-e", "/var/lib/vm-health/drained")
    wait_for(lambda: machine.run(*drained).returncode == 0, 20, "drained")


def test_a_hook_that_the_service_could_not_see_is_refused(machine: BootedMachine, on: Installer) -> None:
    before = machine.files()
    refused = on("install", "--", "--provider=azure", "--drain=/bin/sh /tmp/hook")
    assert refused.returncode == 1
    assert "/tmp/hook: the service has a /tmp of its own" in refused.stderr
    assert machine.files() == before


def test_where_systemd_does_not_run_it_is_made_ready_for_the_next_boot(
    machine: BootedMachine, on: Installer, azure: MetadataService, hook: Hook
) -> None:
    before = machine.files()
    machine.run("mv", "/run/systemd/system", "/run/systemd/private", "/var/tmp")
    installed = on("install", "--", *hook.options(azure))
    assert installed.returncode == 0, installed.stderr
    assert "at the next boot" in installed.stdout
    link = "/etc/systemd/system/multi-user.target.wants/is-vm-in-maint.service"
    assert machine.run("readlink", link).stdout.strip() == str(systemd.SERVICE)
    assert on("uninstall", "--purge").returncode == 0
    machine.run("mv", "/var/tmp/system", "/var/tmp/private", "/run/systemd")
    assert machine.files() == before


def test_dry_run_prints_every_file_and_command_and_does_nothing(
    machine: BootedMachine, on: Installer, azure: MetadataService, hook: Hook
) -> None:
    before = machine.files()
    said = on("install", "--dry-run", "--", *hook.options(azure))
    assert said.returncode == 0
    assert machine.files() == before
    done = on("install", "--", *hook.options(azure))
    steps = re.findall(r"^(?:Run|Write|Make): ([^\n(]+)", done.stdout, re.MULTILINE)
    assert steps
    for step in steps:
        assert step.removeprefix("the folder ").strip() in said.stdout
    for line in machine.run("cat", systemd.SERVICE).stdout.splitlines():
        assert line in said.stdout
    would = on("uninstall", "--dry-run")
    assert f"Would remove {systemd.SERVICE}" in would.stdout
    assert property_of(machine, SERVICE, "ActiveState") == "active"


@pytest.mark.parametrize("action", ["install", "uninstall", "status"])
def test_without_systemd_it_names_the_installer_for_cron(machine: BootedMachine, action: str) -> None:
    words = shlex.join([sys.executable, str(SYSTEMD), action])
    refused = machine.run("unshare", "--mount", "sh", "-c", f"mount --bind /dev/null /usr/bin/systemctl && {words}")
    assert refused.returncode == 1
    assert "no systemd on this machine" in refused.stderr
    assert "install/cron.py" in refused.stderr
