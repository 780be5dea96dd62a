"""What does a check cost that finds nothing? And how often does it raise a false alarm?

    python3 tests/bench/check.py            20 rounds, under two minutes

Beside `requests.get` alone, which is the least that a Python program with requests can cost, and
beside the pipeline of 2015. All take turns, so that what else the machine does hits them alike.
The figures are of whole processes: CPU time, user and system, and peak memory; medians.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from statistics import median

import common

from metadata_service import MetadataService

KEY = {"azure-v1": "/metadata/v1/maintenance", "gce": "/computeMetadata/v1/instance/maintenance-event"}
BASELINE, BY_PATH, SEED = "requests.get alone", "is_vm_in_maint.py by its path", "bash, curl, grep as in 2015"
GET = 'import requests; requests.get({url!r}, headers={{"Metadata-Flavor": "Google"}})'

# As the pipeline of 2015 did it, its fault included: without quotes the test is true for nothing as well.
SHELL = """\
result=$(curl -s "$1" | grep -i EventID)
if [ -n $result ]; then
    logger --socket "$2" --tag IsVmInMaint "Incoming VM Event $result"
fi
"""
FALSE_ALARM_RUNS = 5


def ways(python: str, service: MetadataService, home: Path) -> dict[str, list[str]]:
    """The commands to compare. They run in `home`, which holds the tool, compiled."""
    key = service.url + KEY[service.provider]
    installed = common.tool(python, service, home, "--syslog", str(home / "log"))
    options = installed[3:]
    commands = {
        BASELINE: [python, "-c", GET.format(url=key)],
        BY_PATH: [python, str(home / common.TOOL.name), *options],
        "the same as installed (-m)": installed,
    }
    if service.provider == "azure-v1" and all(map(shutil.which, ("bash", "curl", "grep", "logger"))):
        commands[SEED] = ["bash", "-c", SHELL, "bash", key, str(home / "log")]
    return commands


def drained(log: socket.socket) -> int:
    """Empties the syslog socket, so that nobody has to wait for room in it; the number of lines."""
    lines = 0
    with suppress(BlockingIOError):
        while log.recv(65536, socket.MSG_DONTWAIT):
            lines += 1
    return lines


def measure(commands: dict[str, list[str]], home: Path, log: socket.socket, rounds: int) -> dict[str, common.Cost]:
    """The median cost of each command, run in turns."""
    costs: dict[str, list[common.Cost]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            found = common.cost(command, home)
            drained(log)
            if turn:  # the first round warms up: it makes the state and fills the file caches
                costs[name].append(found)
    return {name: common.Cost(*map(median, zip(*found))) for name, found in costs.items()}


def lines_logged(command: list[str], home: Path, log: socket.socket) -> int:
    """How many lines some runs send to syslog."""
    count = 0
    for _ in range(FALSE_ALARM_RUNS):
        subprocess.run(command, cwd=home, stdout=subprocess.DEVNULL, check=True)
        count += drained(log)
    return count


def show(service: MetadataService, costs: dict[str, common.Cost]) -> None:
    base = costs[BASELINE]
    rows = [
        (name, f"{cpu * 1000:.0f} ms", f"{cpu / base.cpu:.2f}", f"{memory:.1f} MiB", f"{memory / base.memory:.2f}")
        for name, (cpu, memory) in costs.items()
    ]
    title = f"{service.provider}, nothing planned, {len(service.requests)} requests served"
    common.show(title, ("a check", "CPU", "times", "peak memory", "times"), rows)


def main() -> None:
    options = common.parse(__doc__, rounds=(20, "rounds to take the median of"))
    python = common.find_python()
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        home = Path(folder)
        common.install(python, home)
        log.bind(str(home / "log"))
        for provider in KEY:
            with MetadataService(provider) as service:
                commands = ways(python, service, home)
                costs = measure(commands, home, log, options.rounds)
                figures[provider] = {name: dict(found._asdict()) for name, found in costs.items()}
                show(service, costs)
                if provider == "azure-v1":
                    run = {name: command for name, command in commands.items() if name in (BY_PATH, SEED)}
                    alarms = {name: lines_logged(command, home, log) for name, command in run.items()}
        figures["false_alarms"] = {"runs": FALSE_ALARM_RUNS, "lines": alarms}
        common.show(f"{FALSE_ALARM_RUNS} runs, nothing planned", ("", "log lines"), alarms.items())
    common.finish(python, figures)


if __name__ == "__main__":
    common.run(main)
