"""Drain and restore: when the hooks run, what they are given, and what becomes of them when they go wrong."""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import is_vm_in_maint
from conftest import FOREIGN_VARIABLES, TOOL

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the hooks here are sh scripts")
root_only = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root refuses such a hook")

NAMES = "ACTION PROVIDER EVENT_ID TYPE IMPACT STATUS NOT_BEFORE SECONDS_LEFT SOURCE DESCRIPTION RESOURCES REHEARSAL"


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def logged(self) -> list[str]:
        """The words that begin each log line."""
        return re.findall(r"^IsVmInMaint: ([A-Z][\w ]+):", self.err, re.MULTILINE)


class Hooks:
    """A drain and a restore hook that record how they were called; a test changes what else they do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {}  # of the latest call
        for name in ("drain", "restore"):
            self.write(name, "")

    def write(self, name: str, body: str) -> Path:
        path = self.folder / name
        record = (
            f"echo {name} >>{self.folder}/calls\n"
            f"env >{self.folder}/{name}.environment\n"
            f"printf '%s\\n' \"$@\" >{self.folder}/{name}.arguments\n"
            f"cat >{self.folder}/{name}.json\n"
        )
        path.write_text(f"#!/bin/sh\n{record}{body}\n")
        path.chmod(0o755)
        return path

    @property
    def options(self) -> tuple[str, ...]:
        return ("--drain", str(self.folder / "drain"), "--restore", str(self.folder / "restore"))

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().split() if path.exists() else []

    def variables(self, name: str) -> dict[str, str]:
        """The variables that begin with MAINT_, without it."""
        lines = (self.folder / f"{name}.environment").read_text(encoding="utf-8").splitlines()
        return dict(line[len("MAINT_") :].split("=", 1) for line in lines if line.startswith("MAINT_"))

    def document(self, name: str) -> Any:
        """What the hook read on its standard input."""
        return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture
def hooks(tmp_path: Path) -> Hooks:
    folder = tmp_path / "hooks"
    folder.mkdir(0o755)
    return Hooks(folder)


@pytest.fixture
def check(tmp_path, capsys, monkeypatch) -> Callable[..., Done]:
    """check(azure, "--drain", ...): one run of the tool in this process, which is quicker than as a program."""
    for name in FOREIGN_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(service, *options: str) -> Done:
        gc.collect()  # the lock of an earlier run goes with its objects, as it would with its process
        status = is_vm_in_maint.main(program(service, tmp_path, *options)[2:])
        return Done(status, *capsys.readouterr())

    return run


def program(service, tmp_path: Path, *options: str) -> list[str]:
    """The command that runs the tool as a program."""
    cloud = ("--provider", service.provider, "--endpoint", service.url)
    return [sys.executable, str(TOOL), "--log", "stderr", "--state", str(tmp_path / "state"), *cloud, *options]


def until(condition: Callable[[], object], what: str, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet buried does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False


def is_dead(path: Path) -> bool:
    """Whether the process whose id a hook wrote down is dead."""
    return not runs(int(path.read_text()))


# ---- what a hook gets


def test_a_hook_gets_the_variables_of_the_design(service, check, hooks) -> None:
    azure = service("azure")
    begins = (datetime.now(timezone.utc) + timedelta(seconds=300)).replace(microsecond=0)
    azure.announce("Redeploy", id="E1", not_before=begins, vms=["web-1", "web-2"], description="It's $HOME; `id`")
    assert check(azure, *hooks.options).status == 0
    variables = hooks.variables("drain")
    assert sorted(variables) == sorted(NAMES.split())
    assert 0 < int(variables.pop("SECONDS_LEFT")) <= 300
    assert variables == {
        "ACTION": "drain",
        "PROVIDER": "azure",
        "EVENT_ID": "E1",
        "TYPE": "Redeploy",
        "IMPACT": "redeploy",
        "STATUS": "scheduled",
        "NOT_BEFORE": begins.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "SOURCE": "Platform",
        "DESCRIPTION": "It's $HOME; `id`",
        "RESOURCES": "web-1,web-2",
        "REHEARSAL": "",
    }


def test_what_the_cloud_does_not_say_is_an_empty_variable(service, check, hooks) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    check(gce, *hooks.options)
    variables = hooks.variables("drain")
    assert variables.pop("EVENT_ID")
    empty = dict.fromkeys(("NOT_BEFORE", "SECONDS_LEFT", "SOURCE", "DESCRIPTION", "RESOURCES", "REHEARSAL"), "")
    known = {"ACTION": "drain", "PROVIDER": "gce", "TYPE": "PREEMPTED", "IMPACT": "terminate", "STATUS": "started"}
    assert variables == {**known, **empty}


def test_no_seconds_are_left_when_the_time_has_come(service, check, hooks) -> None:
    ec2 = service("ec2")
    ec2.announce("instance-stop", not_before=-100)
    check(ec2, *hooks.options)
    assert hooks.variables("drain")["SECONDS_LEFT"] == "0"


def test_a_hook_reads_the_json_document(service, check, hooks) -> None:
    azure = service("azure")
    event = azure.announce("Reboot", not_before=300, duration=9)
    check(azure, *hooks.options)
    shown = json.loads(check(azure, "--json").out)
    azure.end(event)
    check(azure, *hooks.options)

    drain, restore = hooks.document("drain"), hooks.document("restore")
    for document in (drain, shown, restore):
        assert datetime.strptime(document.pop("checked_at"), "%Y-%m-%dT%H:%M:%SZ")
    assert drain == {**shown, "drained": False}
    assert restore == {**shown, "events": [], "in_maintenance": False}
    assert shown["drained"] is True
    assert [listed["duration_seconds"] for listed in drain["events"]] == [9]


def test_restore_is_told_for_what_the_vm_was_drained(service, check, hooks) -> None:
    azure = service("azure")
    event = azure.announce("Reboot", id="E1", not_before=300)
    check(azure, *hooks.options)
    azure.end(event)
    check(azure, *hooks.options)
    variables = hooks.variables("restore")
    assert (variables["ACTION"], variables["EVENT_ID"], variables["TYPE"]) == ("restore", "E1", "Reboot")
    assert sorted(variables) == sorted(NAMES.split())


def test_there_is_no_shell(service, check, hooks, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["two words", "$HOME", "*", "~", ";", "touch", "pwned", "|", ">", "pwned", "&&", "`id`", "$(id)", "#", "\\"]
    gce = service("gce")
    gce.announce("PREEMPTED")
    assert check(gce, "--drain", shlex.join([str(hooks.folder / "drain"), *words])).status == 0
    assert (hooks.folder / "drain.arguments").read_text().splitlines() == words
    assert not Path("pwned").exists()


def test_a_command_is_split_like_a_shell_would(service, check, hooks) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    check(gce, "--drain", f"""{hooks.folder}/drain  'a "b"'  "c 'd'" e\\ f --g="h i" '' """)
    assert (hooks.folder / "drain.arguments").read_text().split("\n") == ['a "b"', "c 'd'", "e f", "--g=h i", "", ""]


def test_a_hook_is_found_in_path(service, check, hooks, monkeypatch) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    monkeypatch.setenv("PATH", f"{hooks.folder}:{os.environ['PATH']}")
    assert check(gce, "--drain", "drain").status == 0
    assert hooks.calls == ["drain"]


def test_a_hook_has_the_tools_environment_but_not_systemds_ear(service, check, hooks, tmp_path, monkeypatch) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    monkeypatch.setenv("MY_SETTING", "mine")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    check(gce, *hooks.options)
    environment = (hooks.folder / "drain.environment").read_text()
    assert "\nMY_SETTING=mine\n" in "\n" + environment
    assert "NOTIFY_SOCKET" not in environment


def test_a_hook_leads_a_session_and_process_group_of_its_own(service, check, hooks) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    hooks.write("drain", f"cat /proc/$$/stat >{hooks.folder}/stat || ps -o pid= >{hooks.folder}/stat")
    check(gce, *hooks.options)
    pid, rest = re.fullmatch(r"(\d+) \(.*\) (.*)", (hooks.folder / "stat").read_text().strip()).groups()
    _, _, group, session, *_ = rest.split()
    assert (group, session) == (pid, pid)


def test_what_a_successful_hook_says_is_not_repeated(service, check, hooks) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    hooks.write("drain", "echo all is well; echo really >&2")
    done = check(gce, "--log", "none", *hooks.options)
    assert done == Done(0, "", "")


# ---- what goes wrong


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo no such backend >&2; exit 3", r"status 3\b.*no such backend"),
        ("echo out of memory; kill -SEGV $$", r"-11\b.*out of memory"),
        ("kill -KILL $$", r"-9\b"),
    ],
)
def test_a_hook_that_fails_is_logged_and_tried_again(body, reason, service, check, hooks) -> None:
    azure = service("azure")
    azure.announce("Reboot", id="E1")
    hooks.write("drain", body)
    first = check(azure, *hooks.options)
    second = check(azure, *hooks.options)
    hooks.write("drain", "")
    third = check(azure, *hooks.options)
    fourth = check(azure, *hooks.options)

    assert (first.status, first.logged) == (4, ["Incoming VM Event", "VM drain failed"])
    assert (second.status, second.logged) == (4, ["VM drain failed"])
    assert re.search(f"{hooks.folder}/drain.*{reason}", first.err)
    assert "id=E1" in second.err
    assert (third.status, third.logged) == (0, ["VM drained"])
    assert fourth == Done(0, "", "")


def test_a_restore_that_fails_is_tried_again(service, check, hooks) -> None:
    azure = service("azure")
    event = azure.announce("Reboot")
    check(azure, *hooks.options)
    azure.end(event)
    hooks.write("restore", "exit 1")
    first = check(azure, *hooks.options)
    second = check(azure, *hooks.options)
    hooks.write("restore", "")
    third = check(azure, *hooks.options)
    assert (first.status, first.logged) == (4, ["VM Event over", "VM restore failed"])
    assert (second.status, second.logged) == (4, ["VM restore failed"])
    assert (third.status, third.logged) == (0, ["VM restored"])
    assert hooks.calls == ["drain", "restore", "restore", "restore"]


def test_a_drain_that_failed_and_is_no_longer_wanted_is_undone_not_tried_again(service, check, hooks) -> None:
    azure = service("azure")
    event = azure.announce("Reboot")
    hooks.write("drain", "exit 1")
    check(azure, *hooks.options)
    azure.cancel(event)
    done = check(azure, *hooks.options)
    assert (done.status, done.logged) == (0, ["VM Event over", "VM restored"])
    assert hooks.calls == ["drain", "restore"]


def test_the_end_of_a_failed_hooks_output_is_in_one_clean_line(service, check, hooks) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    body = r"""seq 1 10000; printf 'err\377or:\033[31m "disk\\full"\r\n the\000end\n' >&2; exit 1"""
    hooks.write("drain", body)
    (line,) = [line for line in check(gce, *hooks.options).err.splitlines() if "drain failed" in line]
    assert r"10000 err�or: [31m \"disk\\full\"   the end" in line
    assert "4321" not in line  # long ago
    assert line.isprintable()


@pytest.mark.parametrize("leader_ignores", ["", "trap '' TERM"], ids=["the leader ends", "the leader ignores it too"])
def test_a_hook_that_takes_too_long_is_killed_with_all_its_children(leader_ignores, service, check, hooks) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    child = hooks.folder / "child"
    body = f"""echo $$ >{hooks.folder}/leader
        sh -c 'trap "" TERM; echo $$ >{child}.new; mv {child}.new {child}; exec sleep 120' &
        until test -e {child}; do sleep 0.02; done
        echo busy with it
        {leader_ignores}
        sleep 120"""
    hooks.write("drain", body)
    done = check(gce, *hooks.options, "--hook-timeout", "2s")
    assert (done.status, done.logged) == (4, ["Incoming VM Event", "VM drain failed"])
    assert re.search(r"killed after 2 s \(--hook-timeout\).*busy with it", done.err)
    until(lambda: is_dead(hooks.folder / "leader") and is_dead(child), "both are dead")


def missing(path: Path) -> None:
    path.unlink()


def not_executable(path: Path) -> None:
    path.chmod(0o644)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def no_program(path: Path) -> None:
    path.write_text("neither a program nor #! at its beginning\n")


def no_interpreter(path: Path) -> None:
    path.write_text("#!/no/such/interpreter\n")


@pytest.mark.parametrize("spoil", [missing, not_executable, folder, no_program, no_interpreter])
def test_a_hook_that_cannot_be_run_is_logged_and_tried_again(spoil, service, check, hooks) -> None:
    azure = service("azure")
    azure.announce("Reboot")
    spoil(hooks.folder / "drain")
    first = check(azure, *hooks.options)
    second = check(azure, *hooks.options)
    assert (first.status, first.logged) == (4, ["Incoming VM Event", "VM drain failed"])
    assert (second.status, second.logged) == (4, ["VM drain failed"])
    assert f"{hooks.folder}/drain: " in first.err
    assert hooks.calls == []


def test_after_ctrl_c_no_hook_goes_on(service, hooks, tmp_path) -> None:
    azure = service("azure")
    azure.announce("Reboot")
    pid = hooks.folder / "pid"
    hooks.write("drain", f"echo $$ >{pid}.new; mv {pid}.new {pid}; sleep 120")
    command = program(azure, tmp_path, *hooks.options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(pid.exists, "the hook has begun")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert is_dead(pid)


def test_a_daemon_that_a_hook_leaves_behind_does_not_hang_the_check(service, check, hooks) -> None:
    azure = service("azure")
    event = azure.announce("Reboot")
    daemon = hooks.folder / "daemon"
    hooks.write("drain", f"sleep 120 &\necho $! >{daemon}; exit 0")  # it keeps our output open
    try:
        done = check(azure, *hooks.options)
        assert (done.status, done.logged) == (0, ["Incoming VM Event", "VM drained"])
        assert not is_dead(daemon)
        azure.end(event)
        assert check(azure, *hooks.options).logged == ["VM Event over", "VM restored"]
        assert not is_dead(daemon)
    finally:
        os.kill(int(daemon.read_text()), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's files in memory")
def test_on_a_full_disk_the_vm_is_drained_all_the_same(service, check, hooks, tmp_path, monkeypatch) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")  # what tempfile makes of full disks
    (tmp_path / "state").touch()
    done = check(gce, *hooks.options)
    assert (done.status, done.logged) == (4, ["State problem", "Incoming VM Event", "VM drained"])
    assert hooks.document("drain")["provider"] == "gce"


def test_where_no_file_can_be_written_at_all_a_hook_fails_with_a_sentence(service, hooks, tmp_path) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    # Not one byte may be written to any file; pipes, such as our stderr, are not files.
    command = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *program(gce, tmp_path, *hooks.options)]
    # Nor could its coverage be.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4
    logged = Done(4, "", done.stderr).logged
    assert logged == ["State problem", "Incoming VM Event", "VM drain failed"]
    assert "Traceback" not in done.stderr


# ---- root and the hooks of others


def anybody_may_write_it(path: Path) -> str:
    path.chmod(0o757)
    return f"{path} may be written by others (chmod go-w {path})"


def a_group_may_write_it(path: Path) -> str:
    path.chmod(0o775)
    return f"{path} may be written by others (chmod go-w {path})"


def anybody_may_replace_it(path: Path) -> str:
    path.parent.chmod(0o777)
    return f"{path.parent} may be written by others (chmod go-w {path.parent})"


def another_owns_it(path: Path) -> str:
    os.chown(path, 65534, -1)
    return f"{path} belongs to another user (chown root {path})"


def another_owns_its_folder(path: Path) -> str:
    os.chown(path.parent, 65534, -1)
    return f"{path.parent} belongs to another user (chown root {path.parent})"


@root_only
@pytest.mark.parametrize(
    "spoil",
    [anybody_may_write_it, a_group_may_write_it, anybody_may_replace_it, another_owns_it, another_owns_its_folder],
)
def test_root_refuses_a_hook_that_others_can_change_and_says_why(spoil, service, check, hooks) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    why = spoil(hooks.folder / "drain")
    done = check(gce, *hooks.options)
    assert (done.status, done.logged) == (4, ["Incoming VM Event", "VM drain failed"])
    assert f"{hooks.folder}/drain is refused" in done.err
    assert why in done.err
    assert hooks.calls == []


@root_only
def test_root_refuses_a_link_to_a_hook_that_others_can_change(service, check, hooks, tmp_path) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    (tmp_path / "link").symlink_to(hooks.folder / "drain")
    why = anybody_may_write_it(hooks.folder / "drain")
    done = check(gce, "--drain", str(tmp_path / "link"))
    assert done.status == 4
    assert why in done.err
    assert hooks.calls == []


@root_only
def test_root_runs_a_hook_in_a_folder_with_the_sticky_bit(service, check, hooks) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    hooks.folder.chmod(0o1777)
    assert check(gce, *hooks.options).status == 0
    assert hooks.calls == ["drain"]


# ---- when the hooks run


def test_overlapping_events_drain_once_and_restore_after_the_last(service, check, hooks) -> None:
    azure = service("azure")
    first = azure.announce("Reboot", not_before=300)
    check(azure, *hooks.options)
    second = azure.announce("Redeploy", not_before=600)
    check(azure, *hooks.options)
    azure.end(first)
    check(azure, *hooks.options)
    assert hooks.calls == ["drain"]
    azure.end(second)
    done = check(azure, *hooks.options)
    assert done.logged == ["VM Event over", "VM restored"]
    assert check(azure, *hooks.options) == Done(0, "", "")
    assert hooks.calls == ["drain", "restore"]


def test_killed_while_it_drains_the_tool_drains_again_at_the_next_run(service, check, hooks, tmp_path) -> None:
    azure = service("azure")
    azure.announce("Reboot")
    hooks.write("drain", "kill -9 $PPID")
    killed = subprocess.run(program(azure, tmp_path, *hooks.options), capture_output=True, timeout=60, check=False)
    hooks.write("drain", "")
    second = check(azure, *hooks.options)
    third = check(azure, *hooks.options)
    assert killed.returncode == -signal.SIGKILL
    assert (second.status, second.logged) == (0, ["VM drained"])  # it was announced, and that was recorded
    assert third == Done(0, "", "")
    assert hooks.calls == ["drain", "drain"]


def test_killed_while_it_restores_the_tool_restores_again_at_the_next_run(service, check, hooks, tmp_path) -> None:
    azure = service("azure")
    event = azure.announce("Reboot")
    check(azure, *hooks.options)
    azure.end(event)
    hooks.write("restore", "kill -9 $PPID")
    subprocess.run(program(azure, tmp_path, *hooks.options), capture_output=True, timeout=60, check=False)
    hooks.write("restore", "")
    assert check(azure, *hooks.options).logged == ["VM restored"]
    assert check(azure, *hooks.options) == Done(0, "", "")
    assert hooks.calls == ["drain", "restore", "restore"]


def test_an_unreachable_metadata_service_changes_nothing(service, check, hooks) -> None:
    azure = service("azure")
    event = azure.announce("Reboot", not_before=300)
    check(azure, *hooks.options)
    azure.fail("refuse")
    azure.end(event)
    done = check(azure, *hooks.options)
    assert (done.status, done.logged) == (3, ["Metadata service unreachable"])
    assert hooks.calls == ["drain"]
    azure.heal()
    done = check(azure, *hooks.options)
    assert (done.status, done.logged) == (0, ["Metadata service reachable again", "VM Event over", "VM restored"])


@pytest.mark.parametrize(
    "case",
    [
        ("Freeze", [], False),
        ("Freeze", ["--ignore", ""], True),
        ("Reboot", [], True),
        ("Reboot", ["--ignore", "freeze,reboot"], False),
        ("Something-New", [], True),
    ],
)
def test_only_impacts_that_are_not_ignored_drain(case, service, check, hooks) -> None:
    type, options, drains = case
    azure = service("azure")
    azure.announce(type)
    assert check(azure, *hooks.options, *options).logged[0] == "Incoming VM Event"
    assert hooks.calls == (["drain"] if drains else [])


@pytest.mark.parametrize(
    "case",
    [(14, [], True), (20, [], False), (20, ["--lead", "30m"], True), (14, ["--lead", "5m"], False)],
)
def test_the_vm_is_drained_as_soon_as_the_lead_begins(case, service, check, hooks) -> None:
    minutes, options, drains = case
    azure = service("azure")
    azure.announce("Reboot", not_before=minutes * 60)
    assert check(azure, *hooks.options, *options).logged[0] == "Incoming VM Event"
    assert hooks.calls == (["drain"] if drains else [])


def test_another_vms_event_drains_nothing(service, check, hooks) -> None:
    azure = service("azure")
    azure.announce("Reboot", vms=["web-2"])
    assert check(azure, *hooks.options) == Done(0, "", "")
    assert hooks.calls == []


def test_a_check_by_hand_without_hooks_leaves_the_restore_to_those_who_have_them(service, check, hooks) -> None:
    azure = service("azure")
    event = azure.announce("Reboot")
    check(azure, *hooks.options)
    azure.end(event)
    assert check(azure).logged == ["VM Event over"]
    assert hooks.calls == ["drain"]
    assert check(azure, *hooks.options).logged == ["VM restored"]
    assert hooks.calls == ["drain", "restore"]


def test_without_a_restore_hook_the_vm_counts_as_restored(service, check, hooks) -> None:
    azure = service("azure")
    event = azure.announce("Reboot")
    check(azure, "--drain", str(hooks.folder / "drain"))
    azure.end(event)
    assert check(azure, "--drain", str(hooks.folder / "drain")).logged == ["VM Event over", "VM restored"]


# ---- approval


def posts(service) -> list[dict]:
    """What was posted to Azure."""
    return [json.loads(request.body) for request in service.requests if request.method == "POST"]


@contextmanager
def draining(service, hooks: Hooks, tmp_path: Path) -> Iterator[list[Done]]:
    """The tool as a program, with --approve, while its drain hook is at work; its end is in the list afterwards."""
    began, go = hooks.folder / "began", hooks.folder / "go"
    hooks.write("drain", f"touch {began}; until test -e {go}; do sleep 0.05; done")
    command = program(service, tmp_path, *hooks.options, "--approve")
    done: list[Done] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(began.exists, "the hook has begun")
            yield done
        finally:
            go.touch()
            out, err = process.communicate(timeout=30)
            done.append(Done(process.returncode, out, err))


def test_the_event_is_approved_after_the_drain_and_once(service, hooks, check, tmp_path) -> None:
    azure = service("azure")
    azure.announce("Reboot", id="E1", not_before=300)
    with draining(azure, hooks, tmp_path) as done:
        assert posts(azure) == []
    assert (done[0].status, done[0].logged) == (0, ["Incoming VM Event", "VM drained", "VM Event approved"])
    assert (posts(azure), azure.approvals) == ([{"StartRequests": [{"EventId": "E1"}]}], ["E1"])
    assert check(azure, *hooks.options, "--approve").logged == ["VM Event started"]
    assert azure.approvals == ["E1"]


def test_a_failed_drain_approves_nothing(service, check, hooks) -> None:
    azure = service("azure")
    azure.announce("Reboot", id="E1", not_before=300)
    hooks.write("drain", "exit 1")
    assert check(azure, *hooks.options, "--approve").status == 4
    assert posts(azure) == []
    hooks.write("drain", "")
    assert check(azure, *hooks.options, "--approve").status == 0
    assert azure.approvals == ["E1"]


@pytest.mark.parametrize(
    ("event", "options"),
    [
        ({"vms": ["web-1", "web-2"]}, ["--approve"]),
        ({"vms": ["web-2"]}, ["--approve"]),
        ({"not_before": 3600}, ["--approve"]),
        ({"type": "Freeze"}, ["--approve"]),
        ({"status": "Started"}, ["--approve"]),
        ({}, []),
    ],
    ids=["hits another as well", "hits another", "is far", "is ignored", "has started", "nobody asked for it"],
)
def test_no_event_is_approved_that(event, options, service, check, hooks) -> None:
    azure = service("azure")
    azure.announce(**{"type": "Reboot", "not_before": 300, **event})
    assert check(azure, *hooks.options, *options).status == 0
    assert posts(azure) == []


@pytest.mark.parametrize("how", [400, 503, "refuse"])
def test_an_approval_that_fails_is_logged_and_tried_again(how, service, check, hooks, tmp_path) -> None:
    azure = service("azure")
    azure.announce("Reboot", id="E1", not_before=300)
    with draining(azure, hooks, tmp_path) as done:
        azure.fail(how)
    azure.heal()
    second = check(azure, *hooks.options, "--approve")
    assert (done[0].status, done[0].logged) == (4, ["Incoming VM Event", "VM drained", "VM Event approval failed"])
    assert (second.status, second.logged, azure.approvals) == (0, ["VM Event approved"], ["E1"])
    assert hooks.calls == ["drain"]


# ---- Windows


def test_on_windows_a_hooks_process_tree_is_killed_by_taskkill(monkeypatch) -> None:
    calls = []
    with monkeypatch.context() as platform:
        platform.setenv("SystemRoot", "C:\\Windows")
        platform.setattr(os, "name", "nt")
        platform.setattr(subprocess, "run", lambda command, **_: calls.append(command))
        is_vm_in_maint.kill_group(type("Process", (), {"pid": 42}))
    program = os.path.join("C:\\Windows", "System32", "taskkill.exe")
    assert calls == [[program, "/T", "/F", "/PID", "42"]]
