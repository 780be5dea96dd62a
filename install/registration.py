"""What the installers cron.py, systemd.py and task_scheduler.py have in common.

It copies the tool to a folder that only root (or the user) can write, finds a Python for it, tries it
once with the administrator's options, and takes everything back if a step fails. How the tool comes
to run every five minutes is the business of each installer.

Exit status of an installer: 0 done, or `status`: all is in order; 1 it could not be done, or `status`:
something is missing; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import environment

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import is_vm_in_maint  # noqa: E402 - it lies beside this folder, and is no package

NAME = "is-vm-in-maint"
VERSION = is_vm_in_maint.__version__
TOOL = ROOT / "is_vm_in_maint.py"
windows_program = is_vm_in_maint.windows_program
ON_WINDOWS = os.name == "nt"
SYSTEM_PYTHON = Path("/usr/bin/python3")
# What cron and systemd give a program, and so the trial too: no more of root's own environment.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Who else may have registered the tool for the whole machine. Two at once would use two sets of options.
REGISTERED_BY = {
    "cron.py": Path("/etc/cron.d") / NAME,
    "systemd.py": Path("/etc/systemd/system") / f"{NAME}.service",
}
INTERVALS = (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60)  # minutes; the divisors of an hour
# What is run, instead of the tool itself. Python compiles the file that it runs anew each time and keeps
# what it imports in __pycache__, which saves compiling the tool at each start (see tests/bench/check.py).
# An upgraded Python sees that this bytecode is another's and makes its own; a .pyc that is run by its
# name would fail.
LAUNCHER = """\
import sys

from is_vm_in_maint import main

sys.exit(main())
"""
# After an upgrade of Python a virtual environment is empty, for each version has a folder of its own in
# it. What is in the old one is pure Python and does for the new one too.
LAUNCHER_WITH_PACKAGES = LAUNCHER.replace("sys\n\n", "sys\n\nsys.path.append({packages!r})\n", 1)
# No PYTHON... variables and no packages of a user's own: neither cron nor the Task Scheduler has them.
ISOLATED = "-Es"
VENV = "venv"  # beside the tool, where no Python of this machine can import requests
RECORD = "installation.json"  # what was installed; a folder without it is somebody else's
TRIAL_IS_ONLY_A_WARNING = 3  # no metadata service answers: images are built off the cloud


class Trouble(Exception):
    """It cannot be done; the text says why and what the administrator can do."""


class Place(NamedTuple):
    """Where an installation lives."""

    folder: Path  # the tool, its bytecode and, if it needs one, its virtual environment
    state: Path  # where the tool keeps its state if it is not told otherwise


FOR_ALL = Place(Path("/usr/local/lib") / NAME, Path("/var/lib") / NAME)


class Surroundings(NamedTuple):
    """In what the tool will run: a relative path or a short PATH must fail in the trial, not at night."""

    directory: Path
    variables: dict[str, str] | None  # None: those of the installer


# ---- Changes to the machine --------------------------------------------------------------------------


class Changes:
    """Changes the machine step by step and says each step; takes all back when one fails.

    With dry_run it says what it would do, and does nothing.
    """

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.count = 0
        self.folders: list[Path] = []  # those made, parents first
        self._undo: list[tuple[str, Callable[[], object]]] = []

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None or not self._undo:
            return
        print("That failed, so what was done is taken back.", file=sys.stderr, flush=True)
        for what, undo in reversed(self._undo):
            try:
                undo()
            except (OSError, Trouble) as error:
                print(f"Could not take back: {what} ({error}); do it by hand.", file=sys.stderr)

    def on_failure(self, what: str, undo: Callable[[], object]) -> None:
        """Has `undo` done if a later step fails, after all that were done since are taken back."""
        if not self.dry_run:
            self._undo.append((what, undo))

    def step(self, word: str, what: str, *, counts: bool = True) -> bool:
        """Says one step; whether it is to be done."""
        self.count += counts
        print(f"Would {word.lower()} {what}" if self.dry_run else f"{word}: {what}", flush=True)
        return not self.dry_run

    def folder(self, path: Path, mode: int = 0o755) -> None:
        """Makes a folder, and its parents as anybody's are, unless it is there."""
        if path.is_dir():
            return
        if not path.parent.is_dir():
            self.folder(path.parent)
        if self.step("Make", f"the folder {path} (mode {mode:04o})"):
            path.mkdir()
            path.chmod(mode)
            self.folders.append(path)
            self.on_failure(f"the folder {path}", path.rmdir)

    def file(self, path: Path, content: bytes, mode: int = 0o644, what: str = "") -> bool:
        """Makes `path` a file of this content and mode, at a stroke; whether it was not so already.

        Args:
            what: is said instead of the content; without it --dry-run prints all.
        """
        old = read_file(path)
        if old == (content, mode) or (ON_WINDOWS and old and old[0] == content):
            return False
        lines = [what] if what else content.decode(errors="replace").splitlines() if self.dry_run else []
        if self.step("Write", "\n    ".join([f"{path} (mode {mode:04o})", *filter(None, lines)])):
            self.on_failure(f"writing {path}", lambda: restore_file(path, old))
            write_file(path, content, mode)
        return True

    def remove(self, path: Path) -> None:
        """Removes a file, or a folder with all that is in it, if it is there."""
        if not os.path.lexists(path):
            return
        if self.step("Remove", str(path)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                old = read_file(path)
                self.on_failure(f"removing {path}", lambda: restore_file(path, old))
                path.unlink()

    def run(
        self, *command: str | Path, counts: bool = True, stdin: bytes = b"", undo: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a program, which must succeed. `undo` is run if a later step fails.

        Raises:
            Trouble: with the program's own words.
        """
        words = [str(word) for word in command]
        if not self.step("Run", shown(words), counts=counts):
            return subprocess.CompletedProcess(words, 0, b"", b"")
        done = run(words, stdin)
        if done.returncode:
            raise Trouble(f"{shown(words)} failed with status {done.returncode}: {said(done)}")
        if undo:
            self.on_failure(shown(undo), lambda: run(undo))
        return done


def read_file(path: Path) -> tuple[bytes, int] | None:
    """Content and mode of a plain file; None if there is none."""
    try:
        info = path.lstat()
        return (path.read_bytes(), stat.S_IMODE(info.st_mode)) if stat.S_ISREG(info.st_mode) else None
    except FileNotFoundError:
        return None


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Replaces a file as a whole: whoever reads it meanwhile, cron say, sees the old one or the new one."""
    new = path.with_name(f".{path.name}.new")  # with a dot: cron and systemd overlook it
    with contextlib.suppress(FileNotFoundError):
        new.unlink()  # of an installer that was killed
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(mode)
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def restore_file(path: Path, old: tuple[bytes, int] | None) -> None:
    if old:
        write_file(path, *old)
    else:
        path.unlink(missing_ok=True)


def run(words: Sequence[str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The outcome of a program. One that cannot be started counts as failed, with the reason."""
    try:
        return subprocess.run(words, input=stdin, capture_output=True, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(list(words), 127, b"", f"{words[0]}: {error.strerror}".encode())


def said(done: subprocess.CompletedProcess[bytes]) -> str:
    """What a program said, on one line."""
    return " ".join((done.stderr + b" " + done.stdout).decode(errors="replace").split()) or "it said nothing"


def shown(words: Sequence[str]) -> str:
    """A command as one would type it."""
    return subprocess.list2cmdline(words) if ON_WINDOWS else shlex.join(words)


# ---- The copy of the tool ----------------------------------------------------------------------------


def prepare(changes: Changes, place: Place) -> None:
    """Makes the tool's folder.

    Raises:
        Trouble: it holds what is not ours, or others than root (and this user) could change it.
    """
    check_ours(place.folder)
    changes.folder(place.folder)
    reason = is_vm_in_maint.untrusted(str(place.folder)) if place.folder.is_dir() else ""
    if reason:
        raise Trouble(f"{reason}: whoever can change the tool can do what the tool may do.")


def check_ours(folder: Path) -> None:
    """Raises Trouble if the folder is somebody else's."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise Trouble(f"{folder} holds files that this program did not make, so it stays as it is; move it away.")


def copy_tool(changes: Changes, place: Place, options: argparse.Namespace, around: Surroundings) -> list[str]:
    """Copies the tool to its folder and tries it; the command that runs the copy, without any options.

    Raises:
        Trouble: no Python can run it, or the tool refuses these options.
    """
    python = find_python()
    own_python = environment.interpreter_in(place.folder / VENV)
    command = [str(python or own_python), ISOLATED, str(place.folder / "run.py")]
    write_record(changes, place, [*command, *options.tool], state_of(options, place, around))
    if not python:
        make_environment(changes, place.folder / VENV)
    try_once(changes, [command[0], ISOLATED, str(TOOL), *options.tool, "--dry-run"], around)
    copy = place.folder / TOOL.name
    content = TOOL.read_bytes()
    if read_file(copy) != (content, 0o644):
        # Python knows stale bytecode by time and size alone, and two versions can have both in common.
        bytecode = place.folder / "__pycache__"
        changes.on_failure(f"making {bytecode}", lambda: shutil.rmtree(bytecode, ignore_errors=True))
        changes.remove(bytecode)
    changes.file(copy, content, what=f"a copy of {TOOL}, version {VERSION}")
    changes.file(place.folder / "run.py", launcher(None if python else own_python).encode())
    # It shows that the copy starts, and has Python make the bytecode.
    changes.run(*command, "--version", counts=False)
    return command


def state_of(options: argparse.Namespace, place: Place, around: Surroundings) -> Path:
    """Where the tool will keep its state."""
    given = options.parsed.state != is_vm_in_maint.default_state()
    return around.directory / options.parsed.state if given else place.state


def launcher(own_python: Path | None) -> str:
    """The program that starts the tool, on the machine's Python or on the tool's own."""
    if own_python is None:
        return LAUNCHER
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = environment.run(own_python, "-I", "-c", code).stdout.rstrip("\n")
    return LAUNCHER_WITH_PACKAGES.format(packages=packages)


def write_record(changes: Changes, place: Place, command: list[str], state: Path) -> None:
    """Writes down what `status` and `uninstall` will have to know."""
    document = {
        "version": VERSION,
        "command": command,
        "state": str(state),
        "made": list(dict.fromkeys([*record(place).get("made", []), *map(str, changes.folders)])),
    }
    text = json.dumps(document, indent=1) + "\n"
    changes.file(place.folder / RECORD, text.encode(), what="what is installed, for status and uninstall")


def record(place: Place) -> dict[str, Any]:
    """What was written down; empty if nothing, or nothing that can be read, is installed."""
    with contextlib.suppress(OSError, ValueError):
        document = json.loads((place.folder / RECORD).read_bytes())
        if isinstance(document, dict):
            return document
    return {}


def candidates(modules: str) -> list[Path]:
    """The Pythons, new enough and with these modules, that nobody else can change.

    The system's own comes first: it stays, and it gets upgrades.
    """
    code = f"import sys, {modules}; sys.exit(sys.version_info < (3, 9))"
    pythons = dict.fromkeys([*([] if ON_WINDOWS else [SYSTEM_PYTHON]), Path(sys.executable)])
    return [
        python
        for python in pythons
        if not others_can_change(python) and environment.run(python, "-I", "-c", code).returncode == 0
    ]


def others_can_change(python: Path) -> bool:
    """Whether others than root (and this user) can change a file, or put another in its place."""
    if ON_WINDOWS:
        return False  # access lists say it there; task_scheduler.py has a word on it
    try:
        # What lies in /tmp is safe from others, but not from being tidied away.
        in_tmp = any(parent.stat().st_mode & stat.S_IWOTH for parent in python.absolute().parents)
        return in_tmp or bool(is_vm_in_maint.untrusted(str(python)))
    except OSError:
        return True


def find_python() -> Path | None:
    """A Python that can run the tool as it is; None if it needs a virtual environment."""
    return next(iter(candidates("requests")), None)


def make_environment(changes: Changes, venv: Path) -> None:
    """Makes the tool's own virtual environment, if it is not there yet.

    Raises:
        Trouble: with what to do about it.
    """
    base = next(iter(candidates("ensurepip, venv") or candidates("sys")), None)
    if base is None:
        raise Trouble(
            f"there is no Python that may run the tool: {SYSTEM_PYTHON} is missing or older than 3.9, and others "
            f"than you can change {sys.executable}, or it lies in a folder where all may write. Install Python 3.9 or "
            "newer, for all users, and start this with it."
        )
    before = read_file(venv / environment.MARK)
    try:
        if not before:
            if not changes.step("Make", f"a virtual environment with requests in {venv} (this takes a while)"):
                return
            changes.on_failure(f"making {venv}", lambda: shutil.rmtree(venv, ignore_errors=True))
        elif changes.dry_run:
            return
        environment.make(venv, python=base)
        if before and read_file(venv / environment.MARK) != before:
            changes.step("Made", f"the virtual environment in {venv} anew")
    except environment.CannotMake as error:
        hint = "" if ON_WINDOWS else " Or let the system's Python have it: apt-get install python3-requests."
        raise Trouble(f"{error}{hint}") from None


def try_once(changes: Changes, trial: list[str], around: Surroundings) -> None:
    """Runs the tool once in --dry-run, as it will be run, so that a typing error shows up now.

    Raises:
        Trouble: with the tool's own words.
    """
    if not changes.step("Try", shown(trial), counts=False):
        return
    print("(On Azure the very first answer can take two minutes.)", flush=True)
    done = subprocess.run(
        trial,
        cwd=around.directory,
        env=around.variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    words = "".join(f"    {line}\n" for line in done.stdout.decode(errors="replace").splitlines())
    if done.returncode not in (0, TRIAL_IS_ONLY_A_WARNING):
        raise Trouble(
            f"tried with these options, in {around.directory}, the tool ends with status {done.returncode}:\n{words}"
            "Nothing was registered; mend that and install again."
        )
    print(words, end="", flush=True)
    if done.returncode == TRIAL_IS_ONLY_A_WARNING:
        print("Warning: no metadata service could be asked. Off the cloud that is to be expected.", file=sys.stderr)


def remove_tool(changes: Changes, place: Place, purge: bool) -> None:
    """Removes the copy, and with `purge` the state and history too."""
    known = record(place)
    state = Path(known.get("state", place.state))
    warn_if_drained(state)
    check_ours(place.folder)
    changes.remove(place.folder)
    if purge:
        remove_state(changes, state, ours=state == place.state)
    for folder in reversed([Path(made) for made in known.get("made", [])]):
        if not changes.dry_run:
            with contextlib.suppress(OSError):  # somebody else has put something into it, or it is gone
                folder.rmdir()
    if not purge and state.is_dir():
        print(f"The state and history stay in {state}; --purge takes them too.")


def warn_if_drained(state: Path) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads((state / "state.json").read_bytes()).get("drained_for"):
            print(
                "Warning: this VM is drained at present, and nobody will restore it now. Do it by hand.",
                file=sys.stderr,
            )


def remove_state(changes: Changes, state: Path, ours: bool) -> None:
    """Removes the state directory; of one that the administrator has named, only the tool's own files."""
    if ours:
        changes.remove(state)
        return
    for pattern in ("state.json*", "history*", "lock"):
        for path in sorted(state.glob(pattern)):
            changes.remove(path)
    if state.is_dir() and not any(state.iterdir()):
        changes.remove(state)


def report(place: Place) -> bool:
    """Prints what is installed; whether it is there and starts."""
    known = record(place)
    if not known:
        print(f"Not installed: there is no copy of the tool in {place.folder}.")
        return False
    upgrade = "" if known["version"] == VERSION else f"; here is {VERSION}, and install upgrades it"
    print(f"Installed: version {known['version']} in {place.folder}{upgrade}.")
    print(f"Command:   {shown(known['command'])}")
    print(f"State:     {known['state']}")
    started = run([*known["command"][:3], "--version"])
    if started.returncode:
        print(f"It does not start: {said(started)}. Install it again.")
    return started.returncode == 0


# ---- Command line ------------------------------------------------------------------------------------


def add_interval(add: Callable[..., Any]) -> None:
    """The options that cron and the Task Scheduler have in common."""
    add("--interval", type=minutes, default=5, metavar="MINUTES", help="between two checks; a divisor of 60 (5)")
    add("--no-gap", action="store_true", help="let each run keep watching until shortly before the next")


def minutes(text: str) -> int:
    if text.isdecimal() and int(text) in INTERVALS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(map(str, INTERVALS))} (the divisors of 60)")


def watching(options: argparse.Namespace) -> list[str]:
    """What --no-gap adds to the tool's options: the pause is for starting, so that two runs never meet."""
    return ["--watch", str(options.interval * 60 - 10)] if options.no_gap else []


def parse(
    script: str, argv: Sequence[str], description: str, add_options: Callable[[Callable[..., Any]], None]
) -> argparse.Namespace:
    """The options. On wrong usage it prints what is wrong, in the tool's words if it is the tool's, and exits."""
    own, dashes, tool = split(argv)
    parser = argparse.ArgumentParser(
        prog=script,
        description=description,
        usage="%(prog)s [options] {install,uninstall,status} [-- OPTIONS OF THE TOOL]",
        epilog="What follows -- is handed to the tool at each run, for example: "
        "install -- --drain '/opt/lb drain' --restore '/opt/lb restore'",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("action", choices=("install", "uninstall", "status"))
    add("--dry-run", action="store_true", help="print every file and command, and do nothing")
    add("--purge", action="store_true", help="uninstall: the state and history too")
    add_options(add)
    options = parser.parse_args(own)
    if options.purge and options.action != "uninstall":
        parser.error("--purge is for uninstall")
    if dashes and options.action != "install":
        parser.error("options after -- are for install")
    options.script, options.tool = script, tool
    if options.action == "install":
        options.parsed = parse_for_tool(parser, tool)
    return options


def split(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """What is for the installer, whether there is a --, and what is for the tool."""
    words = list(argv)
    if "--" not in words:
        return words, False, []
    at = words.index("--")
    return words[:at], True, words[at + 1 :]


def parse_for_tool(parser: argparse.ArgumentParser, tool: list[str]) -> argparse.Namespace:
    """The tool's options, parsed by the tool itself."""
    for word in tool:
        if not word.isprintable():
            parser.error(f"{word!r}: neither a line's end nor another control character can be registered")
    if {"-h", "--help", "--version"} & set(tool):
        parser.error("after -- come options for each run, and --help and --version are none")
    parsed = is_vm_in_maint.parse_arguments(tool)
    for mode in ("watch", "test", "json", "rehearse", "dry_run"):
        if getattr(parsed, mode) not in (None, False):
            option = "--" + mode.replace("_", "-")
            parser.error(f"leave out {option} after --: how the tool is run is for this program to say")
    return parsed


def main(
    script: str,
    argv: Sequence[str] | None,
    description: str,
    add_options: Callable[[Callable[..., Any]], None],
    actions: Mapping[str, Callable[[argparse.Namespace], int]],
) -> int:
    """Does what the command line says; the exit status."""
    if not ON_WINDOWS:
        os.umask(0o022)
        for name in (signal.SIGTERM, signal.SIGHUP):  # an ssh connection lost must not leave half of it
            signal.signal(name, lambda number, _: sys.exit(128 + number))
    options = parse(script, sys.argv[1:] if argv is None else argv, description, add_options)
    try:
        check_system(script)
        return actions[options.action](options)
    except Trouble as error:
        print(f"{script}: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{script}: {error} (Is there room on the disk, and may you write there?)", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


def finish(changes: Changes, place: Place, outcome: str) -> int:
    """Tidies up after an installation and says how it went."""
    venv = place.folder / VENV
    if venv.exists() and find_python():
        changes.remove(venv)  # there was no such Python yet when it was made
    if not changes.count:
        print(f"Nothing to change: version {VERSION} is installed like this already.")
    elif not changes.dry_run:
        print(outcome)
    return 0


def uninstalled(changes: Changes) -> int:
    """Says how an uninstallation went."""
    if not changes.count:
        print("Nothing to remove: it is not installed.")
    elif not changes.dry_run:
        print("Uninstalled.")
    return 0


def check_system(script: str) -> None:
    """Raises Trouble if this machine has another kind of scheduler."""
    if ON_WINDOWS and script != "task_scheduler.py":
        raise Trouble("this is not for Windows; there it is: python install\\task_scheduler.py")
    if not ON_WINDOWS and script == "task_scheduler.py":
        raise Trouble("this is for Windows; here it is: sudo python3 install/cron.py, or install/systemd.py")


def check_alone(options: argparse.Namespace) -> None:
    """Raises Trouble if another installer has registered the tool for this machine."""
    for other, path in REGISTERED_BY.items():
        if other != options.script and path.exists():
            raise Trouble(f"{path} registers the tool already; first: sudo python3 install/{other} uninstall")


def need_root(options: argparse.Namespace, instead: str = "") -> None:
    """Raises Trouble unless this may write where only root may. Just looking needs no rights."""
    if os.geteuid() != 0 and not options.dry_run:
        raise Trouble(f"this needs root: sudo python3 install/{options.script} {options.action} ...{instead}")
