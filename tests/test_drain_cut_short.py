"""A drain that failed or was cut short may have had its effect: it is undone, or the VM would stay out for ever."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import TOOL
from metadata_service import MetadataService

pytestmark = [
    pytest.mark.wire,
    pytest.mark.skipif(sys.platform == "win32", reason="its hooks are sh scripts"),
]


def command(azure: MetadataService, folder: Path, drain: str, limit: str = "60") -> list[str]:
    """The tool, with a drain that takes effect (a file appears) before it does what it is told to."""
    bodies = {"drain": f"touch {folder}/out-of-service\n{drain}", "restore": f"rm -f {folder}/out-of-service"}
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    words = [sys.executable, str(TOOL), "--provider", "azure", "--endpoint", azure.url, "--log", "stderr"]
    words += ["--state", str(folder / "state"), "--hook-timeout", limit]
    return [*words, "--drain", str(folder / "drain"), "--restore", str(folder / "restore")]


@pytest.mark.parametrize("drain", ["sleep 30", "exit 1"], ids=["it took too long", "it said so"])
def test_a_drain_that_failed_is_undone_when_the_event_is_over(
    drain: str, service: Callable[..., MetadataService], tmp_path: Path
) -> None:
    azure = service("azure")
    event = azure.announce("Reboot", not_before=60)
    words = command(azure, tmp_path, drain, limit="1")
    assert subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 4
    assert (tmp_path / "out-of-service").exists()
    azure.end(event)
    assert subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert not (tmp_path / "out-of-service").exists()


def test_a_drain_cut_short_by_the_reboot_is_undone_after_it(
    service: Callable[..., MetadataService], tmp_path: Path
) -> None:
    azure = service("azure")
    event = azure.announce("Reboot", not_before=60)
    words = command(azure, tmp_path, "sleep 3")
    run = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out-of-service").exists():
        time.sleep(0.05)
    run.kill()
    run.wait()
    known = json.loads(subprocess.run([*words, "--json"], capture_output=True, check=True).stdout)
    assert known["drained"] is False  # only half, which nobody should rely on
    azure.end(event)
    assert subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert not (tmp_path / "out-of-service").exists()
