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
from pathlib import Path
from statistics import median

import common
from metadata_service import MetadataService

KEY = {"azure-v1": "/metadata/v1/maintenance", "gce": "/computeMetadata/v1/instance/maintenance-event"}
BASELINE = "requests.get alone"
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
    options = ["--provider", service.provider, "--endpoint", service.url]
    options += ["--state", str(home / f"state-{service.provider}"), "--syslog", str(home / "log")]
    compiled = next(home.glob("__pycache__/is_vm_in_maint.*.pyc"))
    commands = {
        BASELINE: [python, "-c", GET.format(url=key)],
        "is_vm_in_maint.py by its path": [python, str(home / "is_vm_in_maint.py"), *options],
        "-m is_vm_in_maint": [python, "-m", "is_vm_in_maint", *options],
        "-E -s -m is_vm_in_maint": [python, "-E", "-s", "-m", "is_vm_in_maint", *options],
        "-I .../is_vm_in_maint.pyc": [python, "-I", str(compiled), *options],
    }
    if service.provider == "azure-v1" and all(map(shutil.which, ("bash", "curl", "grep", "logger"))):
        commands["bash, curl, grep as in 2015"] = ["bash", "-c", SHELL, "bash", key, str(home / "log")]
    return commands


def measure(commands: dict[str, list[str]], home: Path, rounds: int) -> dict[str, common.Cost]:
    """The median cost of each command, run in turns."""
    costs: dict[str, list[common.Cost]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            found = common.cost(command, home)
            if turn:  # the first round warms up: it makes the state and fills the file caches
                costs[name].append(found)
    return {name: common.Cost(*map(median, zip(*found))) for name, found in costs.items()}


def lines_logged(command: list[str], home: Path, log: socket.socket) -> int:
    """How many lines some runs send to syslog."""
    log.setblocking(False)
    count = 0
    for _ in range(FALSE_ALARM_RUNS):
        subprocess.run(command, cwd=home, stdout=subprocess.DEVNULL, check=True)
        try:
            while log.recv(65536):
                count += 1
        except BlockingIOError:
            pass
    return count


def main() -> None:
    options = common.parse(__doc__, rounds=(20, "rounds to take the median of"))
    python = common.find_python()
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        home = Path(folder)
        shutil.copy(common.TOOL, home)
        subprocess.run([python, "-m", "compileall", "-q", str(home)], check=True)
        log.bind(str(home / "log"))
        for provider in KEY:
            with MetadataService(provider) as service:
                commands = ways(python, service, home)
                costs = measure(commands, home, options.rounds)
                base = costs[BASELINE]
                figures[provider] = {name: dict(found._asdict()) for name, found in costs.items()}
                rows = [
                    (
                        name,
                        f"{cpu * 1000:.0f} ms",
                        f"{cpu / base.cpu:.2f}",
                        f"{mem:.1f} MiB",
                        f"{mem / base.memory:.2f}",
                    )
                    for name, (cpu, mem) in costs.items()
                ]
                title = f"{provider}, nothing planned, {len(service.requests)} requests served"
                common.show(title, ("a check", "CPU", "times", "peak memory", "times"), rows)
                if provider == "azure-v1":
                    alarms = {name: lines_logged(commands[name], home, log) for name in list(commands)[1::4]}
                    figures["false_alarms"] = {"runs": FALSE_ALARM_RUNS, "lines": alarms}
                    rows = [(name, f"{lines} log lines") for name, lines in alarms.items()]
                    common.show(f"{FALSE_ALARM_RUNS} runs, nothing planned", ("", "logged"), rows)
    common.finish(figures)


if __name__ == "__main__":
    main()
