#!/usr/bin/env python3
r"""Registers the tool with the Windows Task Scheduler: every five minutes, and when Windows has booted.

    python install\task_scheduler.py install -- --drain "C:\lb\drain.exe web-1" --restore "C:\lb\restore.exe web-1"
    python install\task_scheduler.py status
    python install\task_scheduler.py uninstall

The prompt must be elevated ("Run as administrator"). The task runs as SYSTEM.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

sys.dont_write_bytecode = True  # an administrator must not leave files of his in your copy of the project

import registration  # noqa: E402
from registration import Changes, Place, Surroundings, Trouble, windows_program  # noqa: E402

TASK = "IsVmInMaint"
XML = "task.xml"  # in the tool's folder: what schtasks was given, to see whether it has changed
SYSTEM, ADMINISTRATORS, USERS = "*S-1-5-18", "*S-1-5-32-544", "*S-1-5-32-545"  # their names are translated
FULL, READ = "(OI)(CI)F", "(OI)(CI)RX"  # for the folder and all that is in it
LONGER_THAN_A_HOOK = 5  # minutes: Azure's first answer, two tries of a webhook, an unwilling hook's end

# The elements are in the order in which Windows itself writes them. A repetition without a duration
# goes on for ever, and its minutes count from the start boundary, so they are those of the clock.
TASK_XML = """\
<?xml version="1.0" encoding="UTF-16"?>
<Task version="1.2" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">
  <RegistrationInfo>
    <Description>Takes this VM out of service before its cloud maintains it, and puts it back.</Description>
    <URI>\\{task}</URI>
  </RegistrationInfo>
  <Triggers>
    <BootTrigger>
      <Enabled>true</Enabled>
      <Delay>PT15S</Delay>
    </BootTrigger>
    <TimeTrigger>
      <Repetition>
        <Interval>PT{interval}M</Interval>
        <StopAtDurationEnd>false</StopAtDurationEnd>
      </Repetition>
      <StartBoundary>2015-01-01T00:00:00</StartBoundary>
      <Enabled>true</Enabled>
    </TimeTrigger>
  </Triggers>
  <Principals>
    <Principal id="Author">
      <UserId>S-1-5-18</UserId>
      <RunLevel>HighestAvailable</RunLevel>
    </Principal>
  </Principals>
  <Settings>
    <MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>
    <DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries>
    <StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
    <StartWhenAvailable>true</StartWhenAvailable>
    <RunOnlyIfNetworkAvailable>false</RunOnlyIfNetworkAvailable>
    <RunOnlyIfIdle>false</RunOnlyIfIdle>
    <ExecutionTimeLimit>PT{limit}M</ExecutionTimeLimit>
    <RestartOnFailure>
      <Interval>PT1M</Interval>
      <Count>3</Count>
    </RestartOnFailure>
  </Settings>
  <Actions Context="Author">
    <Exec>
      <Command>{program}</Command>
      <Arguments>{arguments}</Arguments>
      <WorkingDirectory>{directory}</WorkingDirectory>
    </Exec>
  </Actions>
</Task>
"""


def task_xml(command: Sequence[str], options: argparse.Namespace, directory: Path) -> bytes:
    """The task as schtasks wants it: XML in UTF-16.

    The arguments are one string, which each program splits by the rules of Microsoft's C library.
    """
    words = [*command[1:], *registration.watching(options), *options.tool]
    watched = options.interval if options.no_gap else 0
    text = TASK_XML.format(
        task=TASK,
        interval=options.interval,
        limit=watched + round(options.parsed.hook_timeout / 60) + LONGER_THAN_A_HOOK,
        program=escape(command[0]),
        arguments=escape(subprocess.list2cmdline(words)),
        directory=escape(str(directory)),
    )
    return text.replace("\n", "\r\n").encode("utf-16")


# ---- Windows -----------------------------------------------------------------------------------------


def folder_in(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable, default)) / "IsVmInMaint"


def place() -> Place:
    return Place(folder_in("ProgramFiles", r"C:\Program Files"), folder_in("ProgramData", r"C:\ProgramData"))


def surroundings() -> Surroundings:
    """In what the Task Scheduler runs a program of SYSTEM; its variables are those of the machine."""
    return Surroundings(Path(windows_program("")), None)


def is_elevated() -> bool:
    if sys.platform != "win32":
        return False
    import ctypes

    return bool(ctypes.windll.shell32.IsUserAnAdmin())


def need_elevation(options: argparse.Namespace) -> None:
    """Raises Trouble unless this may change what only administrators may. A dry run needs no rights."""
    if not options.dry_run and not is_elevated():
        raise Trouble(
            "this needs an elevated prompt: open the Start menu, type cmd, choose 'Run as administrator', and "
            f"there again: python install\\{options.script} {options.action} ..."
        )


def protect(changes: Changes, folder: Path, *, readable: bool) -> None:
    """Lets only administrators and SYSTEM write a folder; `readable`: users may read it.

    Also if it was there: anybody may make a folder in C:\\ProgramData, and stay its owner.

    Raises:
        Trouble: it is a link, so the rights would be set elsewhere.
    """
    if folder.exists() and folder.resolve() != folder:
        raise Trouble(f"{folder} is a link to {folder.resolve()}; see who made it, and remove it.")
    icacls = windows_program("icacls.exe")
    changes.folder(folder)
    for words in (["/setowner", ADMINISTRATORS], ["/reset"]):
        changes.run(icacls, folder, *words, "/T", "/L", "/Q", counts=False)
    grants = [f"{SYSTEM}:{FULL}", f"{ADMINISTRATORS}:{FULL}", *([f"{USERS}:{READ}"] if readable else [])]
    changes.run(icacls, folder, "/inheritance:r", "/grant:r", *grants, "/Q", counts=False)


def check_python() -> None:
    """Says what is wrong with running this Python as SYSTEM, if something is."""
    path = sys.executable.lower()
    if "\\windowsapps\\" in path:
        raise Trouble(
            "SYSTEM cannot run the Python of the Microsoft Store; install the one of python.org for all users, and "
            "start this with it."
        )
    profile = os.environ.get("USERPROFILE", "").lower()
    if profile and path.startswith(profile + os.sep):
        print(
            f"Warning: {sys.executable} is in your own folders, so whatever runs as you could change what SYSTEM runs. "
            "Better install Python for all users, and start this with that one.",
            file=sys.stderr,
        )


def task_exists() -> bool:
    return registration.run([windows_program("schtasks.exe"), "/Query", "/TN", TASK]).returncode == 0


# ---- The actions -------------------------------------------------------------------------------------


def install(options: argparse.Namespace) -> int:
    need_elevation(options)
    check_python()
    here, around = place(), surroundings()
    with Changes(options.dry_run) as changes:
        registration.check_ours(here.folder)
        protect(changes, here.folder, readable=True)
        if registration.state_of(options, here, around) == here.state:
            protect(changes, here.state, readable=False)
        command = registration.copy_tool(changes, here, options, around)
        register(changes, here.folder / XML, task_xml(command, options, around.directory))
        every = "minute" if options.interval == 1 else f"{options.interval} minutes"
        return registration.finish(changes, here, f"Installed: the Task Scheduler runs it every {every} and at boot.")


def register(changes: Changes, path: Path, xml: bytes) -> None:
    """Has the Task Scheduler take the task, if it is not the one that it has."""
    schtasks = windows_program("schtasks.exe")
    existed = task_exists()
    old = registration.read_file(path)
    create = [schtasks, "/Create", "/TN", TASK, "/XML", str(path), "/F"]
    if existed and old:  # after the old XML is back
        changes.on_failure(f"task {TASK}", lambda: registration.run(create))
    shown = xml.decode("utf-16") if changes.dry_run else ""
    if changes.file(path, xml, what=shown) or not existed:
        changes.run(*create, undo=[] if existed else [schtasks, "/Delete", "/TN", TASK, "/F"])


def uninstall(options: argparse.Namespace) -> int:
    need_elevation(options)
    changes = Changes(options.dry_run)
    if task_exists():
        schtasks = windows_program("schtasks.exe")
        if not options.dry_run:
            registration.run([schtasks, "/End", "/TN", TASK])  # fails if it does not run
        changes.run(schtasks, "/Delete", "/TN", TASK, "/F")
    registration.remove_tool(changes, place(), options.purge)
    return registration.uninstalled(changes)


def status(_: argparse.Namespace) -> int:
    installed = registration.report(place())
    asked = registration.run([windows_program("schtasks.exe"), "/Query", "/TN", TASK, "/V", "/FO", "LIST"])
    if asked.returncode:
        print(f"Not registered: there is no task {TASK}; install it again.")
    else:
        print(asked.stdout.decode(errors="replace").strip())
    return 0 if installed and not asked.returncode else 1


def add_options(add: Callable[..., Any]) -> None:
    registration.add_interval(add)


def main(argv: Sequence[str] | None = None) -> int:
    actions = {"install": install, "uninstall": uninstall, "status": status}
    words = "Registers is_vm_in_maint.py with the Windows Task Scheduler."
    return registration.main("task_scheduler.py", argv, words, add_options, actions)


if __name__ == "__main__":
    sys.exit(main())
