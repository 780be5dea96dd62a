"""Finds or makes a Python that can import `requests`, the one thing the tool needs.

    python3 install/environment.py DIR

prints the path of such a Python: the one it was started with, or else that of a virtual environment
that it makes in DIR. The other programs here and tests/run.py call it as a module. It needs nothing
but the standard library.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Written first and, when all is installed, a last time: what the environment in this folder is made
# of. A folder without this file is somebody else's, and one that says UNFINISHED is made again.
MARK = "made-by-is-vm-in-maint.txt"
UNFINISHED = "unfinished\n"


class CannotMake(Exception):
    """There is no such environment and it cannot be made; the text says why and what to do."""


def find_or_make(directory: Path) -> Path:
    """Path of a Python that can import `requests`.

    This one if it can, and otherwise one in a virtual environment in `directory`. That is made, or
    made again if it no longer works (the system's Python was upgraded, say).

    Raises:
        CannotMake: there is none, and none can be made.
    """
    this = Path(sys.executable)
    if imports_requests(this):
        return this
    python = make(directory)
    if not imports_requests(python):
        (directory / MARK).write_text(UNFINISHED, encoding="utf-8")
        python = make(directory)
    return python


def make(directory: Path, packages: Sequence[str] = ("requests",), python: str | Path = sys.executable) -> Path:
    """Path of the Python in a virtual environment in `directory` with `packages` installed.

    One that is there already, of the same Python version and packages, is used as it is. Anything
    else that we made there, whole or half, is replaced; what others made is never touched.

    Args:
        directory: need not exist, nor its parents.
        packages: as pip takes them: "requests", "requests==2.25.1".
        python: the interpreter that the environment is made of.

    Raises:
        CannotMake: with the reason. Nothing is left in `directory` then.
    """
    directory = directory.absolute()
    interpreter = interpreter_in(directory)
    version = version_of(python)
    if not version:
        raise CannotMake(f"{python} is not a Python that runs; name another, or install it again.")
    recipe = "\n".join([version, *packages, ""])
    if mark_of(directory) == recipe and version_of(interpreter) == version:
        return interpreter
    if Path(python).absolute().parent == interpreter.parent:
        raise CannotMake(f"{python} cannot replace itself; start this with another Python.")
    check_modules(python)
    clear(directory)
    try:
        create(directory, python)
        install(interpreter, packages)
        (directory / MARK).write_text(recipe, encoding="utf-8")
    except BaseException:  # Ctrl-C as well: it must not leave a hundred megabytes behind
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return interpreter


def interpreter_in(directory: Path) -> Path:
    """Where venv puts the interpreter of an environment in `directory`."""
    if os.name == "nt":
        return directory / "Scripts" / "python.exe"
    return directory / "bin" / "python"


def imports_requests(python: Path) -> bool:
    """Whether `python` can import requests by itself.

    Isolated (-I): cron and the Task Scheduler have neither this folder nor our PYTHONPATH.
    """
    return run(python, "-I", "-c", "import requests").returncode == 0


def version_of(python: str | Path) -> str:
    """The full version of an interpreter, on one line; empty if it does not run."""
    answer = run(python, "-I", "-c", "import sys; print(' '.join(sys.version.split()))")
    return answer.stdout.strip() if answer.returncode == 0 else ""


def mark_of(directory: Path) -> str:
    """What `directory` says it is made of; empty if it is not ours."""
    try:
        return (directory / MARK).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return ""


def check_modules(python: str | Path) -> None:
    """Raises CannotMake if `python` lacks what makes virtual environments, as Debian's does."""
    code = "import ensurepip, sys, venv; print(sys.version_info[1])"
    if run(python, "-I", "-c", code).returncode == 0:
        return
    raise CannotMake(
        f"{python} cannot make virtual environments, because its modules venv and ensurepip are "
        f"missing; {remedy(python)}."
    )


def remedy(python: str | Path) -> str:
    """How to get venv and ensurepip for `python`."""
    if not shutil.which("apt-get"):
        return "install your system's package for them, or the Python of python.org"
    code = "import os, sys; print(os.path.realpath(sys.executable), *sys.version_info[:2])"
    path, _, version = run(python, "-I", "-c", code).stdout.strip().partition(" ")
    if path == os.path.realpath("/usr/bin/python3"):
        return "install them with: apt-get install python3-venv"
    return f"install them with: apt-get install python{version.replace(' ', '.')}-venv"


def clear(directory: Path) -> None:
    """Makes `directory` an empty folder of ours, marked unfinished."""
    mark = directory / MARK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        entries = list(directory.iterdir())
        if entries and mark not in entries:
            raise CannotMake(
                f"{directory} holds files that this program did not make, so it stays as it is; "
                "name another folder, or move it away."
            )
        # The mark is first to come and last to go, so that whatever is killed in between is known
        # to be ours.
        mark.write_text(UNFINISHED, encoding="utf-8")
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != mark:
                entry.unlink()
    except OSError as error:
        raise CannotMake(
            f"cannot write {directory} ({error.strerror}); name a folder that you may write, or "
            "run this as an administrator."
        ) from error


def create(directory: Path, python: str | Path) -> None:
    """Makes the virtual environment, with pip and nothing else in it."""
    answer = run(python, "-I", "-m", "venv", str(directory))
    if answer.returncode != 0:
        raise CannotMake(f"{python} could not make a virtual environment in {directory}: {last_line(answer)}")


def install(interpreter: Path, packages: Sequence[str]) -> None:
    """Has pip install `packages`; it takes proxies and index from its own settings, as always."""
    quietly = ("--quiet", "--disable-pip-version-check", "--no-input")
    answer = run(interpreter, "-I", "-m", "pip", "install", *quietly, *packages)
    if answer.returncode != 0:
        raise CannotMake(
            f"pip could not install {', '.join(packages)}: {last_line(answer)} (Does this machine "
            "reach the package index? pip's proxy and index are set with pip config.)"
        )


def last_line(answer: subprocess.CompletedProcess[str]) -> str:
    """What a program said last, which is where Python programs say what was wrong."""
    lines = [line.strip() for line in (answer.stdout + "\n" + answer.stderr).splitlines()]
    said = [line for line in lines if line]
    errors = [line for line in said if line.startswith("ERROR:")]
    return (errors or said or [f"it ended with status {answer.returncode} and said nothing"])[-1]


def run(program: str | Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The outcome of a program; one that cannot be started counts as failed, with the reason."""
    command = [str(program), *arguments]
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", f"{program}: {error.strerror}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Print the path of a Python that can import requests; make one if need be."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to make it if this Python cannot")
    directory = parser.parse_args(argv).directory
    try:
        print(find_or_make(directory))
    except CannotMake as error:
        print(f"environment.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
