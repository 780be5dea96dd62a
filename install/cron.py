#!/usr/bin/env python3
"""Registers the tool with cron: every five minutes, and when the machine has booted.

    sudo python3 install/cron.py install -- --drain '/opt/lb drain' --restore '/opt/lb restore'
    sudo python3 install/cron.py status
    sudo python3 install/cron.py uninstall

For the whole machine it writes /etc/cron.d/is-vm-in-maint; with --user it adds two lines to your own
crontab and needs no root.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # sudo must not leave root's files in your copy of the project

import registration  # noqa: E402
from registration import NAME, Changes, Place, Surroundings, Trouble  # noqa: E402

CRON_FILE = registration.REGISTERED_BY["cron.py"]
BEGIN = f"# BEGIN {NAME} (made by install/cron.py; what is between these two lines is replaced)"
END = f"# END {NAME}"
LONGEST_COMMAND = 998  # bytes; Debian's cron ignores the whole file for one that is longer
# Right after boot the network may not be up yet, so that run tries again for so long. The next regular
# run waits up to 30 s for one that still watches, so with --no-gap too it does not miss its turn.
AT_BOOT = ["--watch", "30"]
PIDFILE = Path("/run/crond.pid")  # of Debian's cron and of cronie


def crontab_command(words: Sequence[str]) -> str:
    """A command as a crontab has it: for /bin/sh, after cron has replaced what it understands.

    cron takes % for a line's end and \\% for a percent sign. Whether \\\\ is one backslash or two to it
    is not the same for every cron, so no backslash is left before another or before a percent sign:
    the quotes around it are closed and opened again.

    Raises:
        Trouble: it is longer than cron takes.
    """
    quoted = re.sub(r"\\(?=[\\%])", r"\\''", shlex.join(words)).replace("%", r"\%")
    if len(os.fsencode(quoted)) > LONGEST_COMMAND:
        raise Trouble(
            f"the line would have more than the {LONGEST_COMMAND} bytes that cron takes; put the commands of --drain "
            "and --restore into a script."
        )
    return quoted


def crontab_lines(words: Sequence[str], options: argparse.Namespace, user: str = "") -> list[str]:
    """The two lines: every so many minutes, and at boot. `user` is a field that only /etc/cron.d has."""
    minute = {1: "*", 60: "0"}.get(options.interval, f"*/{options.interval}")
    regular = crontab_command([*words, *registration.watching(options), *options.tool])
    at_boot = crontab_command([*words, *AT_BOOT, *options.tool])
    return [f"{minute} * * * * {user}{regular}", f"@reboot {user}{at_boot}"]


def cron_file(words: Sequence[str], options: argparse.Namespace) -> bytes:
    """The content of the file in /etc/cron.d."""
    lines = [
        f"# Made by install/cron.py of {NAME}; installing again replaces it.",
        "SHELL=/bin/sh",
        f"PATH={registration.PATH}",
        *crontab_lines(words, options, "root "),
    ]
    return os.fsencode("\n".join(lines) + "\n")


# ---- The user's own crontab --------------------------------------------------------------------------


def without_block(crontab: bytes) -> bytes:
    """A crontab without our lines; all others byte for byte.

    Raises:
        Trouble: our lines begin and do not end, so nobody knows which are ours.
    """
    kept, ours = [], False
    for line in crontab.splitlines(keepends=True):
        text = line.rstrip(b"\n")
        if text == BEGIN.encode():
            ours = True
        elif text == END.encode() and ours:
            ours = False
        elif not ours:
            kept.append(line)
    if ours:
        raise Trouble(f"your crontab has the line {BEGIN!r} without {END!r}; mend it with: crontab -e")
    return b"".join(kept)


def with_block(crontab: bytes, lines: Sequence[str]) -> bytes:
    """A crontab with our lines, at its end: what is set there, PATH or MAILTO, holds for them too."""
    others = without_block(crontab)
    if others and not others.endswith(b"\n"):
        others += b"\n"
    return others + os.fsencode("\n".join([BEGIN, *lines, END, ""]))


def read_crontab() -> bytes:
    """The user's crontab; empty if there is none."""
    done = registration.run(["crontab", "-l"])
    if done.returncode and b"no crontab" not in done.stderr:
        raise Trouble(f"crontab -l failed: {registration.said(done)}")
    return b"" if done.returncode else done.stdout


def write_crontab(changes: Changes, old: bytes, new: bytes) -> None:
    """Hands a new crontab to cron, which checks it; one that it refuses leaves the old one."""
    if new == old:
        return
    if changes.dry_run:
        print("".join(f"    {line}\n" for line in new.decode(errors="replace").splitlines()), end="")
    if new:
        changes.run("crontab", "-", stdin=new)
    else:
        changes.run("crontab", "-r")


# ---- The actions -------------------------------------------------------------------------------------


def place_for(options: argparse.Namespace) -> Place:
    """Where the tool goes: for the whole machine, or for this user."""
    if not options.user:
        return registration.FOR_ALL
    home = home_directory()
    state = registration.FOR_ALL.state if os.geteuid() == 0 else home / ".local/state" / NAME
    return Place(home / ".local/lib" / NAME, state)


def home_directory() -> Path:
    """The home that cron gives the user, whatever HOME says here."""
    import pwd

    return Path(pwd.getpwuid(os.geteuid()).pw_dir)


def surroundings(options: argparse.Namespace) -> Surroundings:
    """In what cron runs a job."""
    import pwd

    name = pwd.getpwuid(os.geteuid()).pw_name
    path = "/usr/bin:/bin" if options.user else registration.PATH
    variables = {"PATH": path, "HOME": str(home_directory()), "LOGNAME": name, "SHELL": "/bin/sh"}
    return Surroundings(home_directory(), variables)


def check_cron(options: argparse.Namespace) -> None:
    """Raises Trouble if there is no cron."""
    wanted = ("crontab",) if options.user else ("cron", "crond")
    found = any(shutil.which(name, path=registration.PATH) for name in wanted)
    if not found or not (options.user or CRON_FILE.parent.is_dir()):
        raise Trouble(
            "there is no cron on this machine (Amazon Linux 2023 and Fedora come without); let systemd run the tool: "
            "sudo python3 install/systemd.py install ..."
        )


def warn_if_cron_sleeps() -> None:
    try:
        os.kill(int(PIDFILE.read_text()), 0)
    except PermissionError:
        pass  # it runs, and is root's
    except (OSError, ValueError):
        print("Warning: cron does not seem to run; start it: systemctl enable --now cron (or crond)", file=sys.stderr)


def install(options: argparse.Namespace) -> int:
    if not options.user:
        registration.need_root(options, " (or, in your own crontab: add --user)")
        registration.check_alone(options)
    check_cron(options)
    place, around = place_for(options), surroundings(options)
    crontab = read_crontab() if options.user else b""
    without_block(crontab)  # so that one that is broken is found before anything is done
    with Changes(options.dry_run) as changes:
        registration.prepare(changes, place)
        if registration.state_of(options, place, around) == place.state:
            changes.folder(place.state, 0o700)
        words = registration.copy_tool(changes, place, options, around)
        if options.user:
            write_crontab(changes, crontab, with_block(crontab, crontab_lines(words, options)))
        else:
            changes.file(CRON_FILE, cron_file(words, options))
        every = "minute" if options.interval == 1 else f"{options.interval} minutes"
        status = registration.finish(changes, place, f"Installed: cron runs it every {every} and at boot.")
    warn_if_cron_sleeps()
    return status


def uninstall(options: argparse.Namespace) -> int:
    if not options.user:
        registration.need_root(options, " (or, from your own crontab: add --user)")
    changes = Changes(options.dry_run)
    if not options.user:
        changes.remove(CRON_FILE)
    elif shutil.which("crontab"):
        crontab = read_crontab()
        write_crontab(changes, crontab, without_block(crontab))
    registration.remove_tool(changes, place_for(options), options.purge)
    return registration.uninstalled(changes)


def status(options: argparse.Namespace) -> int:
    installed = registration.report(place_for(options))
    if options.user:
        where, crontab = "your crontab", read_crontab()
        registered = crontab != without_block(crontab)
    else:
        where, registered = str(CRON_FILE), CRON_FILE.is_file()
    print(f"Registered in {where}." if registered else f"Not registered in {where}: install it again.")
    if registered:
        warn_if_cron_sleeps()
    return 0 if installed and registered else 1


def add_options(add: Callable[..., Any]) -> None:
    add("--user", action="store_true", help="your own crontab, without root, instead of /etc/cron.d")
    registration.add_interval(add)


def main(argv: Sequence[str] | None = None) -> int:
    actions = {"install": install, "uninstall": uninstall, "status": status}
    return registration.main("cron.py", argv, "Registers is_vm_in_maint.py with cron.", add_options, actions)


if __name__ == "__main__":
    sys.exit(main())
