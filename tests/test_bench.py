"""The benchmarks run, and print a table and JSON with the figures that the README names.

With parameters so small that it takes seconds: the figures themselves are for a person to judge, on a
quiet machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent / "bench"
on_posix = pytest.mark.skipif(os.name != "posix", reason="the kernel of a Unix does the measuring")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc does the measuring")


def bench(name: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Runs a benchmark as a user does; what it prints before the JSON, and the JSON."""
    command = [sys.executable, str(BENCH / name), *arguments]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    tables, _, last = done.stdout.rstrip("\n").rpartition("\n")
    figures: dict[str, Any] = json.loads(last)
    assert {"python", "requests", "cpus"} <= figures.keys()
    return tables, figures


def columns(tables: str) -> set[int]:
    """How many columns the rows of a Markdown table have: one number, if it is in order."""
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    assert rows
    return {len(re.findall(r" \|", row)) for row in rows}


@on_posix
def test_check_compares_a_check_with_bare_requests_and_the_pipeline_of_2015() -> None:
    tables, figures = bench("check.py", "--rounds", "1")
    assert "requests.get alone" in tables
    for provider in ("azure-v1", "gce"):
        names = ["requests.get alone", "is_vm_in_maint.py by its path", "the same as installed (-m)"]
        assert all(figures[provider][name].keys() == {"cpu", "memory"} for name in names)
        assert all(figures[provider][name]["memory"] > 0 for name in names)
    assert figures["false_alarms"]["runs"] == 5
    assert figures["false_alarms"]["lines"]["is_vm_in_maint.py by its path"] == 0


@on_linux
def test_cost_compares_an_hour_of_watching_with_a_bare_loop() -> None:
    tables, figures = bench("cost.py", "--warmup", "2", "--seconds", "2")
    assert columns(tables) == {7}
    for name in ("gce --watch", "gce bare loop", "azure --watch", "azure bare loop"):
        keys = {"requests", "seconds", "cpu_seconds_an_hour", "cpu_ms_a_request", "cpu_times"}
        assert figures[name].keys() == keys | {"peak_mib", "memory_times"}


@on_posix
def test_latency_compares_watch_with_a_long_poll_and_with_polling() -> None:
    tables, figures = bench("latency.py", "--events", "1", "--every", "1")
    assert columns(tables) == {5}
    for name in ("gce --watch", "gce long-poll loop", "gce poll every 1 s", "azure --watch", "azure poll every 1 s"):
        assert figures[name]["events"] == 1
        assert {"median", "worst"} <= figures[name].keys()


def test_coverage_counts_what_each_way_of_running_sees() -> None:
    tables, figures = bench("coverage.py", "--events", "4")
    assert columns(tables) == {4}
    for notice in ("30 s", "60 s", "5 min", "15 min"):
        for way in ("check every 5 min", "--watch 290 from cron", "--watch"):
            assert figures[f"{notice}, {way}"].keys() == {"seen", "median_seconds_left"}
            assert 0 <= figures[f"{notice}, {way}"]["seen"] <= 1


@on_linux
def test_soak_notes_memory_files_and_state_on_the_way() -> None:
    tables, figures = bench("soak.py", "--events", "41")
    assert "memory" in tables
    assert figures["events"] == 41
    assert [sample["events"] for sample in figures["samples"]] == [20, 40, 41]
    assert all({"memory", "files", "state"} <= sample.keys() for sample in figures["samples"])
    assert figures["log_lines"]["announced"] == figures["log_lines"]["over"] == 41
    assert figures["exit_status"] == 0


def test_a_parameter_that_is_nonsense_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "coverage.py"), "--events", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--events must be more than 0" in done.stderr
