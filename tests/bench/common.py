"""What the benchmarks share: a Python with `requests`, what a program costs, and the table at the end.

Each of them prints a table that fits into a README and then, as its last line, the same figures as
JSON. They assert nothing: a figure is for a person to judge.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
TOOL = ROOT / "is_vm_in_maint.py"
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "install")]

import environment  # noqa: E402 - found through the line above
from metadata_service import MetadataService  # noqa: E402


def find_python() -> str:
    """Path of a Python with requests: that of tests/run.py, this one, or one that is made now."""
    tests_own = environment.interpreter_in(ROOT / ".venv")
    if environment.imports_requests(tests_own):
        return str(tests_own)
    try:
        return str(environment.find_or_make(ROOT / ".venv-bench"))
    except environment.CannotMake as error:
        sys.exit(str(error))


def parse(description: str | None, **numbers: tuple[float, str]) -> argparse.Namespace:
    """The command line of a benchmark: nothing but numbers, each with its default and a word of help.

    A number is whole if its default is.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    for name, (default, help_text) in numbers.items():
        kind = type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"{help_text} ({default})")
    options = parser.parse_args()
    for name in numbers:
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be more than 0")
    return options


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark; Ctrl-C ends it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)


class Cost(NamedTuple):
    """What a whole process took, with the children that it waited for."""

    cpu: float  # seconds, user and system
    memory: float  # MiB, at its peak


# The peak that the system keeps of a process is at first that of whoever forked it. So this small one
# forks, not the benchmark with its servers.
LAUNCHER = """
import os, sys
to_nothing = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=to_nothing)
_, status, used = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def cost(command: Sequence[str], folder: str | Path | None = None) -> Cost:
    """Runs a program in a folder and says what it took; ends the benchmark if it failed."""
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(launcher, cwd=folder, capture_output=True, text=True, check=False)
    status, cpu, peak = done.stdout.split() or ("127", "0", "0")
    if status != "0":
        sys.exit(f"{' '.join(command)}: ended with status {status}: {done.stderr}")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return Cost(float(cpu), int(peak) / unit)


def watched(pid: int) -> Cost:
    """What a process of this Linux has taken so far, without children: of CPU exactly, not in ticks."""
    process = Path("/proc", str(pid))
    nanoseconds = int((process / "schedstat").read_text().split()[0])
    return Cost(nanoseconds / 1e9, memory_of(pid, "VmHWM"))


def memory_of(pid: int, name: str) -> float:
    """A process's VmRSS or VmHWM (the most it ever was) in MiB. Linux."""
    lines = Path("/proc", str(pid), "status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def need_linux() -> None:
    if sys.platform != "linux":
        sys.exit("This needs Linux, where /proc tells what a running process takes.")


def install(python: str, home: Path) -> None:
    """Puts the tool into a folder, compiled."""
    shutil.copy(TOOL, home)
    subprocess.run([python, "-m", "compileall", "-q", str(home)], check=True)


def tool(python: str, service: MetadataService, home: Path, *arguments: str) -> list[str]:
    """The command that runs the installed tool as a cron line does, in its folder, with a state of its own.

    Not by its path: Python compiles a script anew each time, and keeps what it made of it in memory.
    """
    state = str(home / f"state-{service.provider}")
    options = ["--provider", service.provider, "--endpoint", service.url, "--state", state]
    return [python, "-m", "is_vm_in_maint", *options, *arguments]


def quiet_environment() -> dict[str, str]:
    """The environment without what tells the tool of a service manager."""
    foreign = ("STATE_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    return {name: value for name, value in os.environ.items() if name not in foreign}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a program, gently at first."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table in Markdown: the first column to the left, figures to the right."""
    lines = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    print(f"{title}\n")
    for line in (lines[0], rule, *lines[1:]):
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths))
        print("| " + " | ".join([first.strip().ljust(widths[0]), *others]) + " |")
    print(flush=True)


def finish(python: str, figures: dict[str, object]) -> None:
    """Prints the figures, with what they were measured on, as one line of JSON: the last."""
    code = "import platform, requests; print(platform.python_version(), requests.__version__)"
    answer = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    versions = dict(zip(("python", "requests"), answer.stdout.split()))
    print(json.dumps({**versions, "cpus": os.cpu_count(), **figures}))
