"""install/task_scheduler.py, with programs that stand for those of Windows, and with Wine's schtasks.exe.

Wine's knows /Create, /Change and /Delete, and writes the settings that it has understood to a file. So
with Wine a task is shown by that file, and that it exists by /Change.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import registration
import task_scheduler
import windows_command_line
from conftest import ROOT, need
from metadata_service import MetadataService

NAMESPACE = {"": "http://schemas.microsoft.com/windows/2004/02/mit/task"}
NASTY = [
    "C:\\Program Files\\lb\\",
    'say "x"',
    "größer 日本",
    "a&b<c>d",
    "",
    "100%PATH%",
    '\\"',
    "it's ^|",
    "]]>",
    "x y\\",
]


def options(*, interval: int = 5, no_gap: bool = False, timeout: float = 600, tool: list[str]) -> argparse.Namespace:
    parsed = argparse.Namespace(hook_timeout=timeout)
    return argparse.Namespace(interval=interval, no_gap=no_gap, parsed=parsed, tool=tool)


def task(command: list[str] | None = None, **changes: object) -> ET.Element:
    given = options(**{"tool": [], **changes})  # type: ignore[arg-type]
    xml = task_scheduler.task_xml(command or ["C:\\Python\\python.exe", "run.py"], given, Path("C:\\Windows"))
    return ET.fromstring(xml.decode("utf-16"))


def text(task: ET.Element, path: str) -> str | None:
    return task.findtext(path, namespaces=NAMESPACE)


# ---- The task ----------------------------------------------------------------------------------------


def test_the_task_is_utf_16_as_schtasks_wants_it() -> None:
    xml = task_scheduler.task_xml(["python.exe"], options(tool=[]), Path("C:\\Windows"))
    assert xml[:2] in (b"\xff\xfe", b"\xfe\xff")
    assert xml.decode("utf-16").startswith('<?xml version="1.0" encoding="UTF-16"?>')


def test_it_runs_as_system_at_boot_and_every_five_minutes_for_ever() -> None:
    made = task()
    assert text(made, "Principals/Principal/UserId") == "S-1-5-18"
    assert text(made, "Triggers/BootTrigger/Enabled") == "true"
    assert text(made, "Triggers/TimeTrigger/Repetition/Interval") == "PT5M"
    assert made.find("Triggers/TimeTrigger/Repetition/Duration", NAMESPACE) is None
    assert made.find("Triggers/TimeTrigger/EndBoundary", NAMESPACE) is None


def test_it_never_runs_twice_at_once_and_neither_battery_nor_idleness_stops_it() -> None:
    settings = task().find("Settings", NAMESPACE)
    assert settings is not None
    wanted = {
        "MultipleInstancesPolicy": "IgnoreNew",
        "DisallowStartIfOnBatteries": "false",
        "StopIfGoingOnBatteries": "false",
        "RunOnlyIfIdle": "false",
        "StartWhenAvailable": "true",
        "RestartOnFailure/Interval": "PT1M",
    }
    assert {name: text(settings, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("interval", "no_gap", "watch"), [(1, True, 50), (5, True, 290), (60, True, 3590), (10, False, None)]
)
def test_the_interval_and_what_is_watched_of_it(interval: int, no_gap: bool, watch: int | None) -> None:
    made = task(interval=interval, no_gap=no_gap)
    assert text(made, "Triggers/TimeTrigger/Repetition/Interval") == f"PT{interval}M"
    expected = "run.py" if watch is None else f"run.py --watch {watch}"
    assert text(made, "Actions/Exec/Arguments") == expected


@pytest.mark.parametrize("no_gap", [False, True])
def test_the_time_limit_leaves_time_for_a_hook_that_takes_all_of_its_own(no_gap: bool) -> None:
    limit = text(task(interval=10, no_gap=no_gap, timeout=3600), "Settings/ExecutionTimeLimit")
    assert limit
    assert int(limit[2:-1]) > 60 + (10 if no_gap else 0)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text(st.sampled_from('ab \\"<&>ü%^') | st.characters(min_codepoint=32, codec="utf-16"))))
def test_arguments_survive_the_xml_and_the_command_line(words: list[str]) -> None:
    printable = [word for word in words if word.isprintable()]  # others are refused
    made = task(["C:\\Program Files\\python.exe", "C:\\a b\\run.py"], tool=printable)
    line = text(made, "Actions/Exec/Arguments")
    assert line is not None
    assert windows_command_line.split_arguments(line) == ["C:\\a b\\run.py", *printable]
    assert text(made, "Actions/Exec/Command") == "C:\\Program Files\\python.exe"


# ---- Windows -----------------------------------------------------------------------------------------

# Stands for a program of Windows: writes down how it was called, and keeps the task in a file.
PROGRAM = """\
#!{python}
import json, os, shutil, subprocess, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open({log!r}, "a", encoding="utf-8") as file:
    print(json.dumps([name, *words]), file=file)
if "/Create" in words:
    if os.path.exists({refuse!r}):
        sys.exit("ERROR: Access is denied.")
    shutil.copy(words[words.index("/XML") + 1], {task!r})
elif "/Query" in words or "/Delete" in words:
    if not os.path.exists({task!r}):
        sys.exit("ERROR: The system cannot find the file specified.")
    if "/Delete" in words:
        os.unlink({task!r})
"""
# Calls Wine's program, with Windows paths.
WINE_PROGRAM = """\
#!{python}
import os, subprocess, sys
words = ["/Change", *sys.argv[2:], "/ENABLE"] if sys.argv[1] == "/Query" else sys.argv[1:]
words = ["Z:" + word.replace("/", chr(92)) if os.path.exists(word) else word for word in words]
program = "C:/windows/system32/" + os.path.basename(sys.argv[0])
nothing = subprocess.DEVNULL  # not a pipe: Wine's services would keep it open
sys.exit(subprocess.run([{wine!r}, program, *words], stdout=nothing, stderr=nothing, timeout=120).returncode)
"""


class Windows:
    """Folders and programs of Windows, in a folder of this machine."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.refuse, self.registered = root / "log", root / "refuse", root / "task"
        self.programs, self.data, self.system = root / "Program Files", root / "ProgramData", root / "Windows/System32"
        for folder in (self.programs, self.data, self.system):
            folder.mkdir(parents=True)
        self.provide(PROGRAM, log=str(self.log), refuse=str(self.refuse), task=str(self.registered))
        monkeypatch.setenv("SystemRoot", str(self.system.parent))
        monkeypatch.setenv("ProgramFiles", str(self.programs))
        monkeypatch.setenv("ProgramData", str(self.data))
        monkeypatch.setattr(registration, "ON_WINDOWS", True)
        monkeypatch.setattr(task_scheduler, "is_elevated", lambda: True)

    def provide(self, program: str, **values: str) -> None:
        for name in ("schtasks.exe", "icacls.exe"):
            (self.system / name).write_text(program.format(python=sys.executable, **values))
            (self.system / name).chmod(0o755)

    def calls(self) -> list[list[str]]:
        """How the programs were called since this was last asked."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def task(self) -> ET.Element | None:
        """The task as it was registered."""
        return ET.fromstring(self.registered.read_bytes().decode("utf-16")) if self.registered.exists() else None

    def files(self) -> dict[Path, bytes]:
        paths = [path for folder in (self.programs, self.data) for path in folder.rglob("*")]
        return {path: path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Windows:
    """Has the installer take this machine for Windows, and itself for elevated."""
    if os.name == "nt":
        pytest.skip("here it is Windows itself that would be asked, and changed")
    return Windows(tmp_path, monkeypatch)


@pytest.fixture
def tool_options(service: Callable[..., MetadataService]) -> list[str]:
    """Options of the tool that pass its trial."""
    hook = shlex.join([sys.executable, *NASTY])
    return ["--provider", "azure", "--endpoint", service("azure").url, "--drain", hook, "--restore", hook]


def test_what_is_registered_runs_the_copy_with_the_very_arguments_that_were_given(
    windows: Windows, tool_options: list[str]
) -> None:
    assert task_scheduler.main(["install", "--", *tool_options]) == 0
    made = windows.task()
    assert made is not None
    program, line = text(made, "Actions/Exec/Command"), text(made, "Actions/Exec/Arguments")
    assert program
    assert line
    arguments = windows_command_line.split_arguments(line)
    assert arguments == ["-Es", str(windows.programs / "IsVmInMaint" / "run.py"), *tool_options]
    run = subprocess.run([program, *arguments, "--json"], capture_output=True, text=True, check=False)
    assert json.loads(run.stdout)["instance"]["name"] == "web-1"


def test_windows_is_asked_in_exactly_these_words(windows: Windows, tool_options: list[str]) -> None:
    assert task_scheduler.main(["install", "--", *tool_options]) == 0
    folder, state = str(windows.programs / "IsVmInMaint"), str(windows.data / "IsVmInMaint")
    system, administrators, users = "*S-1-5-18:(OI)(CI)F", "*S-1-5-32-544:(OI)(CI)F", "*S-1-5-32-545:(OI)(CI)RX"

    def protected(folder: str, *grants: str) -> list[list[str]]:
        return [
            ["icacls.exe", folder, "/setowner", "*S-1-5-32-544", "/T", "/L", "/Q"],
            ["icacls.exe", folder, "/reset", "/T", "/L", "/Q"],
            ["icacls.exe", folder, "/inheritance:r", "/grant:r", *grants, "/Q"],
        ]

    assert windows.calls() == [
        *protected(folder, system, administrators, users),
        *protected(state, system, administrators),
        ["schtasks.exe", "/Query", "/TN", "IsVmInMaint"],
        ["schtasks.exe", "/Create", "/TN", "IsVmInMaint", "/XML", os.path.join(folder, "task.xml"), "/F"],
    ]
    assert task_scheduler.main(["uninstall"]) == 0
    assert windows.calls() == [
        ["schtasks.exe", "/Query", "/TN", "IsVmInMaint"],
        ["schtasks.exe", "/End", "/TN", "IsVmInMaint"],
        ["schtasks.exe", "/Delete", "/TN", "IsVmInMaint", "/F"],
    ]


def test_uninstall_leaves_nothing(windows: Windows, tool_options: list[str]) -> None:
    assert task_scheduler.main(["install", "--", *tool_options]) == 0
    assert task_scheduler.main(["uninstall"]) == 0
    assert windows.task() is None
    assert windows.files() == {}
    assert task_scheduler.main(["status"]) == 1


def test_installing_twice_changes_nothing_and_another_interval_replaces_the_task(
    windows: Windows, tool_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert task_scheduler.main(["install", "--", *tool_options]) == 0
    assert windows.calls()
    capsys.readouterr()
    assert task_scheduler.main(["install", "--", *tool_options]) == 0
    assert "Nothing to change" in capsys.readouterr().out
    assert not [call for call in windows.calls() if "/Create" in call]
    assert task_scheduler.main(["install", "--interval", "30", "--no-gap", "--", *tool_options]) == 0
    made = windows.task()
    assert made is not None
    assert text(made, "Triggers/TimeTrigger/Repetition/Interval") == "PT30M"
    assert task_scheduler.main(["status"]) == 0


def test_a_task_that_is_refused_is_taken_back_whole(
    windows: Windows, tool_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    windows.refuse.touch()
    assert task_scheduler.main(["install", "--", *tool_options]) == 1
    assert "Access is denied" in capsys.readouterr().err
    assert windows.files() == {}
    assert windows.task() is None


def test_an_upgrade_that_is_refused_leaves_the_old_task(windows: Windows, tool_options: list[str]) -> None:
    assert task_scheduler.main(["install", "--", *tool_options]) == 0
    files, registered = windows.files(), windows.registered.read_bytes()
    windows.refuse.touch()
    assert task_scheduler.main(["install", "--interval", "30", "--", *tool_options]) == 1
    assert windows.files() == files
    assert windows.registered.read_bytes() == registered


def test_a_wrong_option_registers_nothing(
    windows: Windows, tool_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert task_scheduler.main(["install", "--", *tool_options, "--drain", "no-such-program"]) == 1
    assert "no-such-program: not found" in capsys.readouterr().err
    assert windows.files() == {}
    assert windows.task() is None


def test_dry_run_prints_the_task_and_every_command_and_does_nothing(
    windows: Windows, tool_options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_scheduler, "is_elevated", lambda: False)
    assert task_scheduler.main(["install", "--dry-run", "--", *tool_options]) == 0
    said = capsys.readouterr().out
    assert "<MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>" in said
    assert 'schtasks.exe" /Create' in said or "schtasks.exe /Create" in said
    assert windows.files() == {}
    assert all("/Query" in call for call in windows.calls())


@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_a_prompt_that_is_not_elevated_is_told_so(
    windows: Windows, action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_scheduler, "is_elevated", lambda: False)
    assert task_scheduler.main([action]) == 1
    assert "'Run as administrator'" in capsys.readouterr().err
    assert windows.calls() == []


def test_a_state_folder_that_is_a_link_is_refused(
    windows: Windows, tool_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (windows.data / "IsVmInMaint").symlink_to(tmp_path, target_is_directory=True)
    assert task_scheduler.main(["install", "--", *tool_options]) == 1
    assert "is a link to" in capsys.readouterr().err


def test_the_python_of_the_store_is_refused(
    windows: Windows, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", r"C:\Users\me\AppData\Local\Microsoft\WindowsApps\python.exe")
    assert task_scheduler.main(["install"]) == 1
    assert "Microsoft Store" in capsys.readouterr().err
    assert windows.calls() == []


def test_a_python_in_a_users_own_folders_is_warned_of(
    windows: Windows, tool_options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USERPROFILE", str(Path(sys.executable).parent.parent))
    assert task_scheduler.main(["install", "--", *tool_options]) == 0
    assert "install Python for all users" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="this is Windows")
def test_elsewhere_it_names_the_other_installers() -> None:
    script = ROOT / "install" / "task_scheduler.py"
    refused = subprocess.run([sys.executable, script, "install"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "install/cron.py" in refused.stderr


# ---- Wine --------------------------------------------------------------------------------------------


def wine_program() -> str:
    """Wine itself, and not Debian's script around it, which looks for a 32-bit one first."""
    script = need("wine", "wine")
    found = "/usr/lib/wine/wine64"
    return found if os.access(found, os.X_OK) else script


@pytest.fixture
def wine(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Has Wine's programs do the work; its folder C:\\windows.

    A Windows of Wine's has hundreds of megabytes, so it is not kept in pytest's folders.
    """
    program, server = wine_program(), need("wineserver", "wine")
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    monkeypatch.setenv("WINEDEBUG", "-all")
    monkeypatch.setenv("WINEDLLOVERRIDES", "mscoree,mshtml=")  # or it would offer to download them
    monkeypatch.delenv("DISPLAY", raising=False)
    folder = tempfile.mkdtemp(prefix="wine-")
    monkeypatch.setenv("WINEPREFIX", folder)
    monkeypatch.setenv("TMPDIR", folder)  # or its sockets would stay behind in /tmp
    try:
        subprocess.run([server, "--persistent=60"], check=True, **silent)
        subprocess.run([program, "cmd", "/c", "exit"], timeout=240, check=True, **silent)
        windows.provide(WINE_PROGRAM, wine=program)
        yield Path(folder) / "drive_c" / "windows"
    finally:
        subprocess.run([server, "--kill"], check=False, **silent)
        subprocess.run([server, "--wait"], timeout=60, check=False, **silent)
        shutil.rmtree(folder, ignore_errors=True)


def test_wines_task_scheduler_accepts_shows_and_deletes_the_task(
    windows: Windows, wine: Path, tool_options: list[str], tmp_path: Path
) -> None:
    """One test, because a Windows takes Wine a quarter of a minute."""
    assert not task_scheduler.task_exists()
    for interval, limit in (("10", "PT25M"), ("30", "PT45M")):  # the second replaces the first
        assert task_scheduler.main(["install", "--no-gap", "--interval", interval, "--", *tool_options]) == 0
        assert task_scheduler.task_exists()
        shown = ET.fromstring((wine / "system32/tasks/IsVmInMaint").read_bytes())
        wanted = {
            "MultipleInstancesPolicy": "IgnoreNew",
            "DisallowStartIfOnBatteries": "false",
            "StopIfGoingOnBatteries": "false",
            "StartWhenAvailable": "true",
            "ExecutionTimeLimit": limit,
        }
        assert {name: text(shown, f"Settings/{name}") for name in wanted} == wanted
    assert task_scheduler.main(["uninstall", "--purge"]) == 0
    assert not task_scheduler.task_exists()
    assert not (wine / "system32/tasks/IsVmInMaint").exists()
    assert windows.files() == {}

    # And it does not accept just anything.
    broken = tmp_path / "broken.xml"
    xml = task_scheduler.task_xml(["python.exe"], options(tool=[]), Path("C:\\Windows")).decode("utf-16")
    broken.write_bytes(xml.replace("</Exec>", "</Exe>").encode("utf-16"))
    create = [str(windows.system / "schtasks.exe"), "/Create", "/TN", "Broken", "/XML", str(broken), "/F"]
    assert subprocess.run(create, check=False).returncode != 0
