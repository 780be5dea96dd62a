"""Checks everything, with one command, on a fresh machine:

    python3 tests/run.py                      all checks below
    python3 tests/run.py tests/test_plan.py   pytest with these arguments, and nothing else
    python3 tests/run.py -k drain -x

All checks are: ruff (lint and format), mypy, vermin (nothing newer than Python 3.9), all tests with
the newest `requests`, of which pyproject.toml demands a coverage of branches, and the tests over
real HTTP (marked "wire") once more with the oldest `requests` that we support. With arguments there
is no such limit. What it needs it installs in .venv and .venv-oldest in the project's folder, once,
and again when its lists of packages change.

It goes on after a failure, and its status is 0 only if nothing failed. Where a program that a test
needs is missing (rsyslogd, wine), that test is skipped; with CI=true in the environment it fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "install"))

import environment  # noqa: E402 - it lives in install/, which is no package

NEWEST = (
    "requests",
    "types-requests",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "coverage>=7.10",  # the first that measures programs which tests start
    "ruff==0.17.*",  # the next one may format otherwise
    "mypy",
    "vermin",
    # Clients of the metadata services that others wrote: the simulated ones must satisfy them.
    "google-auth",
    'botocore; python_version >= "3.10"',  # for older ones it wants an urllib3 that types-requests refuses
    "ec2-metadata",
)
# RHEL 9 and Amazon Linux 2023 have these.
OLDEST = ("requests==2.25.1", "urllib3==1.26.*", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis")

# One worker a core; tests that share something of the machine's are kept together by xdist_group.
IN_PARALLEL = ("-n", "auto", "--dist", "loadgroup")
# Some of the tool is for Linux only, and so are the programs that test it there.
LIMIT = () if sys.platform == "linux" else ("--fail-under=0",)


class Step(NamedTuple):
    """One check: what it is called, and what does it; that gives whether it passed."""

    name: str
    check: Callable[[], bool]


class Outcome(NamedTuple):
    name: str
    passed: bool
    seconds: float


def succeeds(python: Path, *arguments: str) -> bool:
    """Runs an environment's Python in the project's folder; whether it ended with status 0."""
    return subprocess.run([str(python), *arguments], cwd=ROOT, check=False).returncode == 0


def checks(python: Path) -> list[Step]:
    """The checks of the first environment, quickest first."""

    def run(*arguments: str) -> Callable[[], bool]:
        return lambda: succeeds(python, *arguments)

    def tests() -> bool:
        succeeds(python, "-m", "coverage", "erase")
        return succeeds(python, "-m", "coverage", "run", "-m", "pytest", *IN_PARALLEL)

    def coverage() -> bool:
        combined = succeeds(python, "-m", "coverage", "combine", "--quiet")
        return combined and succeeds(python, "-m", "coverage", "report", *LIMIT)

    sources = ("is_vm_in_maint.py", "install")
    vermin = ("-c", "import vermin; vermin.main()", "-t=3.9-", "--violations", "--no-tips")
    return [
        Step("lint", run("-m", "ruff", "check", ".")),
        Step("format", run("-m", "ruff", "format", "--check", ".")),
        Step("types", run("-m", "mypy", "--strict", *sources)),
        Step("Python 3.9", run(*vermin, *sources)),
        Step("tests", tests),
        Step("coverage", coverage),
    ]


def wire_tests() -> bool:
    """Whether the tests over real HTTP pass with the oldest requests (on Python 3.9 if we can)."""
    python = environment.make(ROOT / ".venv-oldest", OLDEST, oldest_python())
    return succeeds(python, "-m", "pytest", "-m", "wire", *IN_PARALLEL)


def oldest_python() -> str:
    """Path of a Python 3.9; of the one that runs this if there is none."""
    found = shutil.which("python3.9")
    if found:
        # It may be pyenv's shim, which runs only what is asked for by name.
        answer = subprocess.run(
            [found, "-c", "import sys; print(sys.executable)"],
            env={**os.environ, "PYENV_VERSION": "3.9"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.returncode == 0:
            return answer.stdout.strip()
    return sys.executable


def perform(step: Step) -> Outcome:
    """Runs a step under a heading of its own. A step that cannot be run has failed."""
    print(f"\n== {step.name}", flush=True)
    began = time.monotonic()
    try:
        passed = step.check()
    except environment.CannotMake as error:
        print(error)
        passed = False
    outcome = Outcome(step.name, passed, time.monotonic() - began)
    print(f"{'passed' if passed else 'FAILED'} in {outcome.seconds:.1f} s", flush=True)
    return outcome


def summary(outcomes: Sequence[Outcome]) -> str:
    """What is printed last: a line for each step, and one for all."""
    lines = [f"{'passed' if passed else 'FAILED'} {seconds:7.1f} s  {name}" for name, passed, seconds in outcomes]
    failed = sum(not outcome.passed for outcome in outcomes)
    total = f"{failed} of {len(outcomes)} steps failed" if failed else "everything passed"
    return "\n".join(["", "== summary", *lines, total])


def everything() -> int:
    """Runs all steps and gives the exit status."""
    directory = ROOT / ".venv"
    outcomes = [perform(Step("set up", lambda: bool(environment.make(directory, NEWEST))))]
    if outcomes[0].passed:
        outcomes += map(perform, checks(environment.interpreter_in(directory)))
    outcomes.append(perform(Step("wire tests, oldest requests", wire_tests)))
    print(summary(outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def only_pytest(arguments: Sequence[str]) -> int:
    """Runs pytest with these arguments, for a person at work on one test."""
    try:
        python = environment.make(ROOT / ".venv", NEWEST)
    except environment.CannotMake as error:
        print(error, file=sys.stderr)
        return 1
    command = [str(python), "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    if set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return 0
    try:
        return only_pytest(arguments) if arguments else everything()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
