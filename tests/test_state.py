"""What is remembered between two runs: on the disk as a whole or not at all, private, locked, not trusted blindly."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

import pytest

import is_vm_in_maint
from conftest import FOREIGN_VARIABLES, TOOL
from is_vm_in_maint import Boot, State, Store

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
root_only = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def logged(self) -> list[str]:
        """The words that begin each log line."""
        return re.findall(r"^IsVmInMaint: ([A-Z][\w ]+):", self.err, re.MULTILINE)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def check(state, capsys, monkeypatch) -> Callable[..., Done]:
    """check(azure, "--drain", ...): one run of the tool in this process, which is quicker than as a program."""
    for name in FOREIGN_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(service, *options: str) -> Done:
        cloud = ("--provider", service.provider, "--endpoint", service.url)
        gc.collect()  # the lock of an earlier run goes with its objects, as it would with its process
        status = is_vm_in_maint.main(["--log", "stderr", "--state", str(state), *cloud, *options])
        return Done(status, *capsys.readouterr())

    return run


def program(service, state: Path, *options: str) -> list[str]:
    """The command that runs the tool as a program."""
    cloud = ("--provider", service.provider, "--endpoint", service.url)
    return [sys.executable, str(TOOL), "--log", "stderr", "--state", str(state), *cloud, *options]


def hook(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def until(condition: Callable[[], object], what: str, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.01)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- saved as a whole


def test_the_state_is_on_the_disk_before_it_replaces_the_old_one(state, monkeypatch) -> None:
    did: list[str] = []

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    def fsync(descriptor: int) -> None:
        really_fsync(descriptor)
        size = os.fstat(descriptor).st_size
        did.append(f"fsync {name_of(descriptor)} {'with' if size else 'without'} content")

    def replace(old: str, new: str) -> None:
        really_replace(old, new)
        did.append(f"rename {Path(old).name} {Path(new).name}")

    if not Path("/proc/self/fd").exists():
        pytest.skip("the names of open files are in /proc")
    really_fsync, really_replace = os.fsync, os.replace
    state.mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    Store(str(state)).save(State(boot="b1"))
    assert did == [
        "fsync state.json.new with content",
        "rename state.json.new state.json",
        "fsync state with content",  # the folder: the new name is on the disk as well
    ]


# Runs the tool, and kills it -9 just before the Nth time that it touches the state folder, fsync included.
KILLED = """
import os, runpy, signal, sys
left, folder = int(sys.argv[1]), sys.argv[2]
def touches(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "test.fsync") and folder in str(arguments[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
def fsync(descriptor, really=os.fsync):
    sys.audit("test.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
    really(descriptor)
os.fsync = fsync
sys.addaudithook(touches)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the names of open files are in /proc")
def test_killed_at_any_moment_the_state_is_whole_and_nothing_is_lost(service, check, state) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    moments = 0
    while True:
        command = [sys.executable, "-c", KILLED, str(moments), str(state), *program(gce, state)[1:]]
        killed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        first = Done(killed.returncode, "", killed.stderr).logged
        after = check(gce)
        again = check(gce)
        # It may be logged twice, when it was killed between doing and recording; never not at all.
        assert "Incoming VM Event" in first + after.logged
        assert set(after.logged) <= {"Incoming VM Event"}
        assert (after.status, again) == (0, Done(0, "", ""))
        moments += 1
        for file in state.iterdir():
            file.unlink()
    assert moments > 8  # two things are recorded, and each is written, flushed, renamed and flushed


@posix_only
def test_a_disk_that_fills_while_the_state_is_written_leaves_the_old_one(service, check, state) -> None:
    resource = pytest.importorskip("resource")
    gce = service("gce")
    gce.announce("PREEMPTED")
    check(gce)
    before = (state / "state.json").read_bytes()

    gce.announce("MIGRATE_ON_HOST_MAINTENANCE")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # half of the new file fits
    try:
        full = check(gce)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert (state / "state.json").read_bytes() == before
    assert full.status == 4
    assert full.logged == ["Incoming VM Event", "State problem"]
    assert str(state) in full.err
    after = check(gce)
    assert (after.status, after.logged) == (0, ["Incoming VM Event"])
    assert check(gce) == Done(0, "", "")


# ---- private


@posix_only
def test_the_state_is_private_whatever_the_umask(service, check, state) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    previous = os.umask(0)
    try:
        check(gce)
    finally:
        os.umask(previous)
    assert permissions(state) == 0o700
    assert {path.name: permissions(path) for path in state.iterdir()} == {"state.json": 0o600, "lock": 0o600}


@posix_only
def test_a_state_folder_that_others_may_write_is_not_used(service, check, state, tmp_path) -> None:
    azure = service("azure")
    azure.announce("Reboot", id="e1")
    state.mkdir()
    state.chmod(0o777)
    done = check(azure, "--drain", hook(tmp_path / "drain", f"touch {tmp_path}/drained"))
    assert done.status == 4
    assert f"{state} may be written by others" in done.err
    assert done.logged == ["State problem", "Incoming VM Event", "VM drained"]
    assert (tmp_path / "drained").exists()
    assert list(state.iterdir()) == []


@root_only
def test_a_state_folder_of_another_user_is_not_used(service, check, state) -> None:
    gce = service("gce")
    state.mkdir()
    os.chown(state, 65534, -1)
    done = check(gce)
    assert done.status == 4
    assert f"{state} belongs to another user" in done.err


@posix_only
def test_a_planted_link_is_not_followed_when_the_state_is_written(service, check, state, tmp_path) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    state.mkdir(0o700)
    (state / "state.json.new").symlink_to(precious)
    assert check(gce).status == 0
    assert precious.read_text() == "precious"
    assert check(gce) == Done(0, "", "")


# ---- cannot be written, cannot be read


@posix_only
def test_with_a_state_that_cannot_be_written_an_event_is_logged_and_acted_on(service, check, state, tmp_path) -> None:
    azure = service("azure")
    azure.announce("Reboot", id="e1")
    state.write_text("not a folder")
    done = check(azure, "--drain", hook(tmp_path / "drain", f"touch {tmp_path}/drained"))
    assert done.status == 4
    assert done.logged == ["State problem", "Incoming VM Event", "VM drained"]
    assert str(state) in done.err
    assert (tmp_path / "drained").exists()


@posix_only
def test_a_vm_is_restored_though_its_state_can_only_be_read(service, check, state, tmp_path) -> None:
    azure = service("azure")
    event = azure.announce("Reboot")
    hooks = ("--drain", hook(tmp_path / "drain", f"echo drain >>{tmp_path}/calls"))
    hooks += ("--restore", hook(tmp_path / "restore", f"echo restore >>{tmp_path}/calls"))
    check(azure, *hooks)
    before = (state / "state.json").read_bytes()
    (state / "lock").unlink()
    (state / "lock").mkdir()  # root may write on all but full disks and read-only ones; this serves as well
    assert check(azure, *hooks).logged == ["State problem"]
    azure.end(event)
    done = check(azure, *hooks)
    assert (done.status, done.logged) == (4, ["State problem", "VM Event over", "VM restored"])
    assert (tmp_path / "calls").read_text().split() == ["drain", "restore"]
    assert (state / "state.json").read_bytes() == before


@posix_only
def test_a_state_that_others_could_write_is_not_believed(service, check, state) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    check(gce)
    state.chmod(0o777)
    assert check(gce).logged == ["State problem", "Incoming VM Event"]


def saved_state(service, check, state: Path) -> dict:
    check(service)
    return json.loads((state / "state.json").read_text())


def of_another_shape() -> Iterator[bytes]:
    """State files that no version of the tool has written."""
    yield from (b"", b"{", b"null", b"[]", b"42", b'"state"', b"{}", b"\0" * 512, b"\xff\xfe\x80", b"[" * 100_000)
    event = {"provider": "gce", "id": "preempted/TRUE", "type": "PREEMPTED", "impact": "terminate"}
    event |= {"status": "started", "not_before": None, "duration_seconds": None, "source": None, "description": None}
    good = {"events": [], "finished": [], "drained_for": None, "approved": [], "unreachable": False, "boot": "b"}
    for key, wrong in (
        ("events", None),
        ("events", 7),
        ("events", ["preempted/TRUE"]),
        ("events", [{}]),
        ("events", [{**event, "resources": None}]),
        ("events", [{**event, "resources": [], "id": 5}]),
        ("events", [{**event, "resources": [None]}]),
        ("finished", 7),
        ("drained_for", "yes"),
        ("approved", None),
    ):
        yield json.dumps({**good, key: wrong}).encode()
    for key in good:
        yield json.dumps({other: value for other, value in good.items() if other != key}).encode()


@posix_only
@pytest.mark.parametrize("content", list(of_another_shape()), ids=lambda content: content[:60].decode("latin-1"))
def test_a_state_that_cannot_be_read_is_kept_aside_and_counts_as_empty(content, service, check, state) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    state.mkdir(0o700)
    (state / "state.json").write_bytes(content)
    done = check(gce)
    assert (done.status, done.logged) == (0, ["State problem", "Incoming VM Event"])
    (kept,) = (path for path in state.iterdir() if path.name not in ("state.json", "lock"))
    assert kept.read_bytes() == content
    assert str(kept) in done.err
    assert check(gce) == Done(0, "", "")  # it is repaired


@posix_only
def test_keys_of_another_version_are_ignored(service, check, state) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    document = saved_state(gce, check, state)
    document["history"] = [1, 2, 3]
    document["events"][0]["severity"] = "high"
    (state / "state.json").write_text(json.dumps(document))
    assert check(gce) == Done(0, "", "")


@posix_only
def test_a_state_that_is_a_folder_is_reported(service, check, state) -> None:
    gce = service("gce")
    gce.announce("PREEMPTED")
    (state / "state.json").mkdir(parents=True)
    state.chmod(0o700)
    done = check(gce)
    assert (done.status, done.logged) == (4, ["State problem", "Incoming VM Event"])


# ---- one run at a time


@contextmanager
def at_work(service, state: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of the tool, as a program, whose drain hook does not end before tmp_path/go is there."""
    body = f"echo $$ >{tmp_path}/began; until test -e {tmp_path}/go; do sleep 0.05; done"
    command = program(service, state, "--drain", hook(tmp_path / "slow", body))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            until((tmp_path / "began").exists, "the hook has begun")
            yield process
        finally:
            (tmp_path / "go").touch()
            process.communicate(timeout=30)


@posix_only
def test_a_second_run_that_finds_the_first_at_work_ends_at_once_and_says_nothing(
    service, tool, state, tmp_path
) -> None:
    azure = service("azure")
    azure.announce("Reboot", id="e1")
    with at_work(azure, state, tmp_path) as first:
        before = (state / "state.json").read_bytes()
        asked = len(azure.requests)
        second = tool("--drain", hook(tmp_path / "other", f"touch {tmp_path}/drained-twice"), service=azure)
        assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
        assert first.poll() is None
        assert len(azure.requests) == asked
        assert (state / "state.json").read_bytes() == before
    assert first.returncode == 0
    assert not (tmp_path / "drained-twice").exists()


@posix_only
def test_a_killed_run_holds_no_lock_though_its_hook_lives_on(service, tool, state, tmp_path) -> None:
    azure = service("azure")
    azure.announce("Reboot", id="e1")
    with at_work(azure, state, tmp_path) as first:
        first.kill()
        first.wait()
        second = tool("--drain", hook(tmp_path / "other", f"touch {tmp_path}/drained"), service=azure)
        assert (second.returncode, (tmp_path / "drained").exists()) == (0, True)


@posix_only
def test_a_run_waits_for_one_that_is_about_to_end(state, tmp_path) -> None:
    """In a crontab with `--watch 290` the next run begins while this one says its last words."""
    holder = "import sys, time, is_vm_in_maint; store = is_vm_in_maint.Store(sys.argv[1])"
    holder += "; store.lock(time.time() + 1, 0); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(state)], cwd=TOOL.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == b"\n"
        assert not Store(str(state)).lock(0.0, 0.0)  # a check does not wait
        os.truncate(state / "lock", 0)
        (state / "lock").write_text(str(time.time() + 3600))
        assert not Store(str(state)).lock(0.0, 30.0)  # of no use: the other one goes on for an hour
        (state / "lock").write_text(str(time.time() + 1))
        other.communicate(b"")
        assert Store(str(state)).lock(0.0, 30.0)


def test_the_lock_works_on_windows_too(tmp_path, monkeypatch) -> None:
    locked: set[int] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count, os.lseek(descriptor, 0, os.SEEK_CUR) > 1000) == (2, 1, True)
        if locked:
            raise OSError(errno.EACCES, "Permission denied")
        locked.add(descriptor)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    path = tmp_path / "lock"
    with path.open("w+") as first, path.open("r+") as second:
        assert is_vm_in_maint.lock_now(first)
        assert not is_vm_in_maint.lock_now(second)


# ---- after a reboot


@posix_only
@pytest.mark.parametrize("provider", ["azure", "azure-v1", "gce", "ec2"])
def test_the_first_check_after_the_reboot_restores(provider, service, check, tmp_path, monkeypatch) -> None:
    cloud = service(provider)
    hooks = ("--drain", hook(tmp_path / "drain", f"echo drain >>{tmp_path}/calls"))
    hooks += ("--restore", hook(tmp_path / "restore", f"echo restore >>{tmp_path}/calls"))
    now = datetime.now(timezone.utc)

    monkeypatch.setattr(is_vm_in_maint, "this_boot", lambda: Boot("boot-1", now - timedelta(days=1)))
    event = cloud.announce(not_before=60)
    assert check(cloud, *hooks).logged == ["Incoming VM Event", "VM drained"]
    cloud.end(event) if provider != "ec2" else None  # ec2 goes on to list it as active for some time
    monkeypatch.setattr(is_vm_in_maint, "this_boot", lambda: Boot("boot-2", now + timedelta(minutes=5)))
    monkeypatch.setattr(is_vm_in_maint, "utcnow", lambda: now + timedelta(minutes=6))

    assert check(cloud, *hooks).logged == ["VM Event over", "VM restored"]
    assert check(cloud, *hooks) == Done(0, "", "")
    assert (tmp_path / "calls").read_text().split() == ["drain", "restore"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_boot_is_known_by_the_kernels_own_identity() -> None:
    boot = is_vm_in_maint.this_boot()
    assert boot.id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert boot.at < datetime.now(timezone.utc)
    assert abs(boot.at - is_vm_in_maint.this_boot().at) < timedelta(minutes=1)


def test_where_the_kernel_gives_no_identity_a_boot_is_known_by_its_minute(monkeypatch) -> None:
    now = datetime(2026, 11, 22, 10, 0, 30, tzinfo=timezone.utc)
    with monkeypatch.context() as platform:
        platform.setattr(sys, "platform", "win32")
        platform.setattr(time, "monotonic", lambda: 3600.0)
        platform.setattr(is_vm_in_maint, "utcnow", lambda: now)
        assert is_vm_in_maint.this_boot() == Boot("2026-11-22T09:00", now - timedelta(hours=1))
