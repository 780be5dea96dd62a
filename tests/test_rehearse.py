"""--rehearse: the fire drill goes through log, drain and restore, and leaves nothing behind."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest

import is_vm_in_maint
from conftest import FOREIGN_VARIABLES, TOOL

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the hooks here are sh scripts")


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        """What was found of each step. A line that has no seconds is no verdict."""
        found = re.findall(r"^(ok|FAILED) +(\w+) +\d+\.\d s$", self.out, re.MULTILINE)
        return [(step, verdict) for verdict, step in found]


class Hooks:
    """A drain and a restore hook that record their calls; a test changes what else they do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("drain", "restore"):
            self.write(name, "")

    def write(self, name: str, body: str) -> None:
        path = self.folder / name
        record = f"echo {name} >>{self.folder}/calls; env >{self.folder}/{name}.env; cat >{self.folder}/{name}.json"
        path.write_text(f"#!/bin/sh\n{record}\n{body}\n")
        path.chmod(0o755)

    @property
    def options(self) -> tuple[str, ...]:
        return ("--drain", str(self.folder / "drain"), "--restore", str(self.folder / "restore"))

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def hooks(tmp_path: Path) -> Hooks:
    folder = tmp_path / "hooks"
    folder.mkdir(0o755)
    return Hooks(folder)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def run(state, capsys, monkeypatch) -> Iterator[Callable[..., Done]]:
    """run(azure, "--rehearse", ...): one run of the tool in this process, without the pause for people."""
    for name in FOREIGN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(is_vm_in_maint, "REHEARSAL_PAUSE", 0.0)
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(service, *options: str) -> Done:
        gc.collect()  # the lock of an earlier run goes with its objects, as it would with its process
        return Done(is_vm_in_maint.main(arguments(service, state, *options)), *capsys.readouterr())

    yield run
    for number, action in signals.items():
        signal.signal(number, action)


def arguments(service, state: Path, *options: str) -> list[str]:
    return [
        "--log",
        "stderr",
        "--state",
        str(state),
        "--provider",
        service.provider,
        "--endpoint",
        service.url,
        *options,
    ]


ALL_WELL = [("metadata", "ok"), ("log", "ok"), ("drain", "ok"), ("wait", "ok"), ("restore", "ok")]


def test_it_goes_through_log_drain_wait_and_restore_and_says_how_long_each_took(service, run, hooks) -> None:
    done = run(service("azure"), "--rehearse", *hooks.options)
    assert done.status == 0
    assert done.verdicts == ALL_WELL
    assert hooks.calls == ["drain", "restore"]
    assert done.out.splitlines()[-1] == "The rehearsal went well."


def test_every_line_and_every_hook_is_told_that_it_is_a_rehearsal(service, run, hooks) -> None:
    done = run(service("azure"), "--rehearse", *hooks.options)
    lines = done.err.splitlines()
    words = [line.partition(": ")[2].partition(":")[0] for line in lines]
    assert words == ["Incoming VM Event", "VM drained", "VM restored"]
    assert [line for line in lines if not ("type=Rehearsal" in line and "REHEARSAL" in line)] == []
    for name in ("drain", "restore"):
        assert "MAINT_REHEARSAL=1" in (hooks.folder / f"{name}.env").read_text().splitlines()
        assert f"MAINT_ACTION={name}" in (hooks.folder / f"{name}.env").read_text().splitlines()
    (event,) = json.loads((hooks.folder / "drain.json").read_text())["events"]
    assert (event["type"], event["source"], event["impact"]) == ("Rehearsal", "rehearsal", "reboot")


def test_it_touches_no_state_and_approves_nothing(service, run, hooks, state) -> None:
    azure = service("azure")
    done = run(azure, "--rehearse", "--approve", *hooks.options)
    assert (done.status, done.verdicts) == (0, ALL_WELL)
    assert not state.exists()
    assert {request.method for request in azure.requests} == {"GET"}

    azure.announce("Freeze")
    run(azure, *hooks.options)
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    run(azure, "--rehearse", "--approve", *hooks.options)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before


@pytest.mark.parametrize("body", ["echo no such backend >&2; exit 1", "kill -9 $$"])
def test_a_drain_that_fails_is_restored_all_the_same(body, service, run, hooks) -> None:
    hooks.write("drain", body)
    done = run(service("azure"), "--rehearse", *hooks.options)
    assert done.status == 4
    assert done.verdicts == [(step, "FAILED" if step == "drain" else verdict) for step, verdict in ALL_WELL]
    assert hooks.calls == ["drain", "restore"]
    assert "VM drain failed" in done.err
    assert done.out.splitlines()[-1] == "The rehearsal found something to mend."


def test_a_restore_that_fails_is_found(service, run, hooks) -> None:
    hooks.write("restore", "exit 1")
    done = run(service("azure"), "--rehearse", *hooks.options)
    assert (done.status, done.verdicts[-1]) == (4, ("restore", "FAILED"))
    assert done.out.splitlines()[-1] == "The rehearsal found something to mend."


def test_a_missing_hook_is_found(service, run, hooks) -> None:
    (hooks.folder / "drain").unlink()
    done = run(service("azure"), "--rehearse", *hooks.options)
    assert (done.status, done.verdicts[2]) == (4, ("drain", "FAILED"))
    assert f"{hooks.folder}/drain: not found" in done.err


def test_a_journal_that_takes_nothing_is_found(service, run, hooks, tmp_path) -> None:
    options = ("--log", "syslog", "--syslog", str(tmp_path / "nobody"))
    done = run(service("azure"), "--rehearse", *hooks.options, *options)
    assert (done.status, done.verdicts[1]) == (4, ("log", "FAILED"))
    assert hooks.calls == ["drain", "restore"]


def test_a_metadata_service_that_does_not_answer_is_found_and_the_rest_rehearsed(service, run, hooks) -> None:
    azure = service("azure")
    azure.fail("refuse")
    done = run(azure, "--rehearse", *hooks.options)
    assert done.status == 3
    assert done.verdicts == [("metadata", "FAILED"), *ALL_WELL[1:]]
    assert hooks.calls == ["drain", "restore"]
    assert azure.url in done.err


def test_it_is_refused_while_the_vm_is_drained_for_real(service, run, hooks) -> None:
    azure = service("azure")
    azure.announce("Reboot")
    run(azure, *hooks.options)
    done = run(azure, "--rehearse", *hooks.options)
    assert done.status == 4
    assert done.verdicts == []
    assert "drained" in done.out
    assert hooks.calls == ["drain"]


def test_a_vm_drained_for_real_in_the_meantime_stays_drained(service, run, hooks, state) -> None:
    azure = service("azure")
    azure.announce("Reboot")
    # While the rehearsal drains, the check of every five minutes comes and drains for the real event.
    (hooks.folder / "real-drain").write_text("#!/bin/sh\n")
    (hooks.folder / "real-drain").chmod(0o755)
    check = [sys.executable, str(TOOL), *arguments(azure, state, "--drain", str(hooks.folder / "real-drain"))]
    hooks.write("drain", " ".join(f"'{word}'" for word in check))
    done = run(azure, "--rehearse", *hooks.options)
    assert hooks.calls == ["drain"]
    assert "stays drained" in done.out


def test_the_webhook_is_rehearsed_too(service, run, hooks) -> None:
    texts = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/"
        done = run(service("azure"), "--rehearse", *hooks.options, "--notify", url)
    finally:
        server.shutdown()
        server.server_close()
    assert (done.status, done.verdicts) == (0, [*ALL_WELL, ("notify", "ok")])
    assert [text for text in texts if "REHEARSAL" not in text] == []
    assert len(texts) == 3


def test_without_hooks_it_rehearses_what_there_is(service, run) -> None:
    done = run(service("gce"), "--rehearse")
    assert (done.status, done.verdicts) == (0, ALL_WELL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["while it drains", "while it waits"])
def test_cut_short_it_restores_the_vm(number, moment, service, hooks, state) -> None:
    """By Ctrl-C, by kill, or because the connection of whoever rehearses is lost."""
    azure = service("azure")
    after = hooks.folder / "drain-went-on"
    pid = hooks.folder / "pid"
    if moment == "while it drains":
        hooks.write("drain", f"echo $$ >{pid}.new; mv {pid}.new {pid}; sleep 120; touch {after}")
    command = [sys.executable, "-u", str(TOOL), *arguments(azure, state, "--rehearse", *hooks.options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        if moment == "while it drains":
            deadline = time.monotonic() + 30
            while not pid.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            began = ""
        else:
            began = "".join(iter_until(process.stdout, "drain"))
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert hooks.calls == ["drain", "restore"]
    assert ("restore", "ok") in Done(process.returncode, began + out, err).verdicts
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not after.exists()
    assert not pid.exists() or not Path(f"/proc/{pid.read_text().strip()}").exists()  # the drain does not go on
    assert not state.exists()


def iter_until(lines: Iterator[str], word: str) -> Iterator[str]:
    """The lines up to the first that contains a word."""
    for line in lines:
        yield line
        if word in line:
            return
