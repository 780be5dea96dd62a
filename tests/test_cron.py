"""install/cron.py, with the real cron daemon, crontab program and syslog daemon."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cron
import registration
from conftest import ROOT, Syslogd, need
from metadata_service import MetadataService
from private_machine import PrivateMachine

CRON = ROOT / "install" / "cron.py"
CRON_FILE = "/etc/cron.d/is-vm-in-maint"
RECORD = "/usr/local/lib/is-vm-in-maint/installation.json"
# Every character that some reader on the way could take for its own: cron, the shell, argparse.
NASTY = ["100%", r"50\%", "it's", r"a\\b", 'say "x"', "$HOME `id` ;&|<>*?#!~", "größer 日本", "", "-x", "a  b"]


@pytest.fixture
def machine() -> Iterator[PrivateMachine]:
    need("cron", "cron")
    with PrivateMachine() as machine:
        yield machine


@pytest.fixture
def on(machine: PrivateMachine) -> Callable[..., subprocess.CompletedProcess[str]]:
    """on("install", "--dry-run"): runs cron.py on the machine."""
    return lambda *arguments: machine.run(sys.executable, CRON, *arguments)


@pytest.fixture
def azure(service: Callable[..., MetadataService]) -> MetadataService:
    return service("azure")


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"in {seconds:.0f} s not {what}"
        time.sleep(0.2)


def content(machine: PrivateMachine, path: str) -> str:
    return machine.run("cat", path).stdout


# ---- The real thing ----------------------------------------------------------------------------------


def test_cron_alone_masks_a_reboot_and_uninstalling_leaves_nothing(
    machine: PrivateMachine,
    on: Callable[..., subprocess.CompletedProcess[str]],
    azure: MetadataService,
    syslogd: Syslogd,
    tmp_path: Path,
) -> None:
    """One test, because cron begins something only once a minute.

    The VM was drained and went down. cron's @reboot line restores it; then come a second notice and its
    end, which the regular lines find, and nobody else touches anything.
    """
    calls = tmp_path / "calls"
    hook = tmp_path / "a hook"
    hook.write_text(f'#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >>{calls}\necho >>{calls}\n')
    hook.chmod(0o755)
    options = ["--provider", "azure", "--endpoint", azure.url, "--log", "syslog", "--syslog", syslogd.socket]
    for action in ("drain", "restore"):
        options += [f"--{action}", shlex.join([str(hook), action, *NASTY])]

    def called(action: str, times: int) -> Callable[[], bool]:
        return lambda: calls.exists() and calls.read_text().splitlines().count(action) == times

    before = machine.files()
    installed = on("install", "--interval", "1", "--", *options)
    assert installed.returncode == 0, installed.stderr
    assert machine.run("stat", "-c", "%a %U", CRON_FILE).stdout == "644 root\n"

    first = azure.announce("Reboot", not_before=300)
    machine.run(*json.loads(content(machine, RECORD))["command"])
    assert called("drain", 1)()
    azure.end(first)

    daemon = subprocess.Popen(machine.command(need("cron", "cron"), "-f"), stdin=subprocess.DEVNULL)
    try:
        wait_for(called("restore", 1), 30, "restored by the @reboot line")
        locked = ("flock", "--nonblock", "/var/lib/is-vm-in-maint/lock", "true")
        wait_for(lambda: machine.run(*locked).returncode == 0, 60, "the end of the run of the @reboot line")
        second = azure.announce("Reboot", not_before=300)
        wait_for(called("drain", 2), 70, "drained by the regular line")
        azure.end(second)
        wait_for(called("restore", 2), 70, "restored by the regular line")
    finally:
        daemon.terminate()
        daemon.wait()

    assert [line.text.split(":")[0] for line in syslogd.lines(at_least=8)] == [
        *("Incoming VM Event", "VM drained", "VM Event over", "VM restored"),
        *("Incoming VM Event", "VM drained", "VM Event over", "VM restored"),
    ]
    one_call = ["drain", *NASTY, ""]
    assert calls.read_text().splitlines()[: len(one_call)] == one_call
    wait_for(lambda: machine.run(*locked).returncode == 0, 30, "the end of the last run")
    assert on("uninstall", "--purge").returncode == 0
    assert machine.files() == before


def test_installs_for_a_user_and_leaves_all_other_lines_of_the_crontab(
    machine: PrivateMachine, on: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    others = "# my own\nMAILTO=me@example.com\n\n0 4 * * *\t/usr/bin/backup  --to '50\\%'\n# größer\n"
    machine.run("crontab", "-", input=others)
    before = machine.files()
    assert on("install", "--user").returncode == 0
    crontab = machine.run("crontab", "-l").stdout
    assert crontab.startswith(others)
    assert re.findall(r"^(\*/5 \* \* \* \*|@reboot) /", crontab, re.MULTILINE) == ["*/5 * * * *", "@reboot"]
    again = on("install", "--user")
    assert "Nothing to change" in again.stdout
    assert machine.run("crontab", "-l").stdout == crontab
    assert on("status", "--user").returncode == 0
    assert on("uninstall", "--user").returncode == 0
    assert machine.run("crontab", "-l").stdout == others
    # crontab writes its file anew, so that alone has another time now.
    assert {re.sub(r" \S+$", "", line) for line in machine.files()} == {re.sub(r" \S+$", "", line) for line in before}


def test_a_user_who_had_no_crontab_has_none_afterwards(
    machine: PrivateMachine, on: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    before = machine.files()
    assert on("install", "--user").returncode == 0
    assert on("uninstall", "--user").returncode == 0
    assert machine.files() == before


def test_a_crontab_that_cron_refuses_leaves_the_old_one_and_no_copy_of_the_tool(
    machine: PrivateMachine, on: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    machine.run("crontab", "-", input="0 4 * * * /usr/bin/backup\n")
    # By hand, because crontab would not have let it in: since then the rules have become stricter, say.
    machine.run("sh", "-c", "echo 'every day' >>/var/spool/cron/crontabs/root")
    before = machine.files()
    refused = on("install", "--user")
    assert refused.returncode == 1
    assert "errors in crontab file, can't install" in refused.stderr
    assert machine.files() == before


def test_a_block_without_end_is_nobodys_to_replace(
    machine: PrivateMachine, on: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    machine.run("crontab", "-", input=f"{cron.BEGIN}\n0 4 * * * /usr/bin/backup\n")
    before = machine.files()
    for action in ("install", "uninstall"):
        refused = on(action, "--user")
        assert refused.returncode == 1
        assert "crontab -e" in refused.stderr
    assert machine.files() == before


def test_without_cron_it_names_the_installer_for_systemd(machine: PrivateMachine) -> None:
    before = machine.files()
    hide = "mount --bind /dev/null /usr/sbin/cron && mount --bind /dev/null /usr/bin/crontab"
    for user in ([], ["--user"]):
        words = shlex.join([sys.executable, str(CRON), "install", *user])
        refused = machine.run("unshare", "--mount", "sh", "-c", f"{hide} && {words}")
        assert refused.returncode == 1
        assert "no cron on this machine" in refused.stderr
        assert "install/systemd.py" in refused.stderr
    assert machine.files() == before


def test_says_when_cron_is_there_but_does_not_run(
    machine: PrivateMachine, on: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert "cron does not seem to run" in on("install").stderr
    daemon = subprocess.Popen(machine.command(need("cron", "cron"), "-f"), stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: "cron does not" not in on("status").stderr, 20, "that cron runs")
    finally:
        daemon.terminate()
        daemon.wait()


def test_is_not_registered_twice(machine: PrivateMachine, on: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    machine.run("touch", "/etc/systemd/system/is-vm-in-maint.service")
    before = machine.files()
    refused = on("install")
    assert refused.returncode == 1
    assert "install/systemd.py uninstall" in refused.stderr
    assert machine.files() == before


# ---- What it writes ----------------------------------------------------------------------------------


def options(interval: int = 5, no_gap: bool = False, tool: tuple[str, ...] = ()) -> argparse.Namespace:
    return argparse.Namespace(interval=interval, no_gap=no_gap, tool=list(tool))


@pytest.mark.parametrize(
    ("interval", "minutes"), [(1, range(60)), (5, range(0, 60, 5)), (20, (0, 20, 40)), (30, (0, 30)), (60, (0,))]
)
def test_the_interval_divides_the_hour_evenly(interval: int, minutes: range | tuple[int, ...]) -> None:
    field = cron.crontab_lines(["tool"], options(interval))[0].split(" ")[0]
    step = re.fullmatch(r"\*(?:/(\d+))?", field)
    fires = range(0, 60, int(step[1] or 1)) if step else [int(field)]
    assert list(fires) == list(minutes)


@pytest.mark.parametrize(("interval", "seconds"), [(1, 50), (5, 290), (60, 3590)])
def test_no_gap_watches_until_ten_seconds_before_the_next_run(interval: int, seconds: int) -> None:
    regular, at_boot = cron.crontab_lines(["tool"], options(interval, no_gap=True))
    assert regular.endswith(f" tool --watch {seconds}")
    assert at_boot == "@reboot tool --watch 30"


@pytest.mark.parametrize("interval", ["0", "7", "61", "-5", "five", "5.0"])
def test_an_interval_that_does_not_divide_the_hour_is_refused_in_words(interval: str) -> None:
    refused = subprocess.run(
        [sys.executable, CRON, "install", f"--interval={interval}"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "divisors of 60" in refused.stderr


def as_cron_reads_it(command: str, *, halves_backslashes: bool) -> str:
    """What /bin/sh gets: Vixie's cron drops a backslash before a backslash too, ISC's only before %."""
    special = r"\\([%\\])" if halves_backslashes else r"\\(%)"
    kept = re.sub(special, lambda match: "\0" if match[1] == "%" else "\\", command)
    assert "%" not in kept, "cron takes this percent sign for the end of the command"
    return kept.replace("\0", "%")


@pytest.mark.skipif(os.name == "nt", reason="needs /bin/sh")
@pytest.mark.parametrize("halves_backslashes", [True, False])
@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text(st.sampled_from("ab \\%'\"$`!*;#ü~-") | st.characters(min_codepoint=32, codec="utf-8"))))
def test_arguments_survive_every_cron_and_the_shell(halves_backslashes: bool, words: list[str]) -> None:
    command = cron.crontab_command(["printf", r"<%s>\n", *words])
    shell = as_cron_reads_it(command, halves_backslashes=halves_backslashes)
    printed = subprocess.run(["/bin/sh", "-c", shell], capture_output=True, check=True).stdout.decode()
    assert printed == "".join(f"<{word}>\n" for word in words or [""])


def test_a_command_too_long_for_cron_is_refused_in_words() -> None:
    with pytest.raises(registration.Trouble, match="998 bytes"):
        cron.crontab_command(["tool", "--drain", "x" * 1000])


def test_cron_itself_draws_the_line_there(machine: PrivateMachine) -> None:
    for length, accepted in ((cron.LONGEST_COMMAND, True), (cron.LONGEST_COMMAND + 1, False)):
        done = machine.run("crontab", "-", input=f"0 4 * * * {'x' * length}\n")
        assert (done.returncode == 0) == accepted
