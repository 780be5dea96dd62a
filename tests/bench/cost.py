"""What does an hour of watching cost?

    python3 tests/bench/cost.py             three minutes

The tool's --watch, on gce and on azure, beside a bare loop over `requests` that asks the same
questions at the same pace over one connection. All four run at the same time; a minute after their
start their work is weighed, for so many seconds, and an hour's is reckoned from it. Linux only.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import common

from metadata_service import MetadataService

GCE_LOOP = """
import sys, time, requests
session = requests.Session()
session.headers["Metadata-Flavor"] = "Google"
base = sys.argv[1] + "/computeMetadata/v1/instance/"
etag, upcoming_at = "0", 0.0
while True:
    query = {"wait_for_change": "true", "last_etag": etag, "timeout_sec": "4"}
    etag = session.get(base + "maintenance-event", params=query, timeout=10).headers["ETag"]
    session.get(base + "preempted", timeout=10)
    if time.monotonic() >= upcoming_at:
        session.get(base + "upcoming-maintenance?alt=json", timeout=10)
        upcoming_at = time.monotonic() + 60
"""

AZURE_LOOP = """
import sys, time, requests
session = requests.Session()
url = sys.argv[1] + "/metadata/scheduledevents?api-version=2020-07-01"
while True:
    session.get(url, headers={"Metadata": "true"}, timeout=130).json()
    time.sleep(1)
"""

LOOPS = {"gce": GCE_LOOP, "azure": AZURE_LOOP}


class Run(NamedTuple):
    """A program that watches a service of its own."""

    name: str
    service: MetadataService
    pid: int


class Weighed(NamedTuple):
    cpu: float  # seconds since the process began
    requests: int
    at: float  # monotonic
    memory: float  # MiB, the most so far


@contextmanager
def running(name: str, provider: str, python: str, home: Path) -> Iterator[Run]:
    with MetadataService(provider) as service:
        command = common.tool(python, service, home, "--watch", "--log", "none")
        if name != "--watch":
            command = [python, "-c", LOOPS[provider], service.url]
        process = subprocess.Popen(command, cwd=home, env=common.quiet_environment())
        try:
            yield Run(name, service, process.pid)
        finally:
            common.stop(process)


def weigh(run: Run) -> Weighed:
    cpu, memory = common.watched(run.pid)
    return Weighed(cpu, len(run.service.requests), time.monotonic(), memory)


def main() -> None:
    options = common.parse(
        __doc__,
        seconds=(120, "how long to weigh"),
        warmup=(60, "seconds of watching before it"),
    )
    common.need_linux()
    python = common.find_python()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home = Path(folder)
        common.install(python, home)
        kinds = [(name, provider) for provider in LOOPS for name in ("bare loop", "--watch")]
        runs = [stack.enter_context(running(*kind, python, home)) for kind in kinds]
        time.sleep(options.warmup)
        before = [weigh(run) for run in runs]
        time.sleep(options.seconds)
        after = [weigh(run) for run in runs]
    figures: dict[str, object] = {}
    rows = []
    bare_cpu = bare_memory = 1.0
    for run, first, last in zip(runs, before, after):
        seconds, requests = last.at - first.at, last.requests - first.requests
        cpu = max(1e-9, last.cpu - first.cpu) / seconds  # of one core; in a short time it can be nothing at all
        if run.name == "bare loop":
            bare_cpu, bare_memory = cpu, last.memory
        figures[f"{run.service.provider} {run.name}"] = {
            "requests": requests,
            "seconds": round(seconds, 1),
            "cpu_seconds_an_hour": round(cpu * 3600, 3),
            "cpu_ms_a_request": round(cpu * seconds / max(1, requests) * 1000, 3),
            "cpu_times": round(cpu / bare_cpu, 3),
            "peak_mib": round(last.memory, 2),
            "memory_times": round(last.memory / bare_memory, 3),
        }
        rows.append(
            (
                f"{run.service.provider}, {run.name}",
                f"{requests / seconds * 3600:.0f}",
                f"{cpu * 3600:.2f} s",
                f"{cpu:.3%}",
                f"{cpu / bare_cpu:.2f}",
                f"{last.memory:.1f} MiB",
                f"{last.memory / bare_memory:.2f}",
            )
        )
    headings = ("", "requests an hour", "CPU an hour", "of one core", "times", "peak memory", "times")
    common.show(f"An hour of watching, from {options.seconds} s", headings, rows)
    common.finish(python, figures)


if __name__ == "__main__":
    common.run(main)
