"""The README's first command: what a newcomer sees, and what is left behind (nothing)."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """start(): the demo, in a copy of the project, so that demos can run side by side."""
    for name in ("install/demo.py", "install/environment.py", "tests/metadata_service.py", "is_vm_in_maint.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def run() -> subprocess.Popen[str]:
        command = [sys.executable, "-B", str(tmp_path / "install" / "demo.py")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return run


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("install", "tests", "is_vm_in_maint.py"))


def test_shows_the_life_of_an_event_and_cleans_up(start: Start, tmp_path: Path) -> None:
    demo = start()
    said, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, said
    for words in ("Incoming VM Event", "VM drained", "VM Event started", "VM Event over: outcome=ended", "VM restored"):
        assert said.count(f"syslog | {words}") == 1
    assert said.count("cron runs is_vm_in_maint.py") == 6
    pools = [line.rpartition(": ")[2] for line in said.splitlines() if "load balancer sends" in line]
    everybody, without_us = "web-1 web-2 web-3", "web-2 web-3"
    assert pools == [everybody, without_us, without_us, everybody]
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C of one process alone is POSIX")
def test_cleans_up_on_ctrl_c_too(start: Start, tmp_path: Path) -> None:
    demo = start()
    assert demo.stdout
    for line in demo.stdout:
        if "cron runs" in line:
            break
    assert left_behind(tmp_path) == [".demo"]
    demo.send_signal(signal.SIGINT)
    said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Stopped" in said
    assert left_behind(tmp_path) == []


def test_a_second_demo_at_the_same_time_is_told_so(start: Start, tmp_path: Path) -> None:
    (tmp_path / ".demo").mkdir()
    demo = start()
    said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "another demo" in said
    assert left_behind(tmp_path) == [".demo"]
