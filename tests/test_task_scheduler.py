"""install/task_scheduler.py, with the schtasks.exe of Wine.

Wine's knows /Create, /Change and /Delete, and writes the settings that it has understood to a file. So
a task is shown here by that file, and that it exists by /Change. The commands of Windows lie in a
folder of our own, as shell scripts that write down their arguments and call Wine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
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


@given(words=st.lists(st.text(st.sampled_from('ab \\"<&>ü%^') | st.characters(min_codepoint=32, codec="utf-16"))))
def test_arguments_survive_the_xml_and_the_command_line(words: list[str]) -> None:
    printable = [word for word in words if word.isprintable()]  # others are refused
    made = task(["C:\\Program Files\\python.exe", "C:\\a b\\run.py"], tool=printable)
    line = text(made, "Actions/Exec/Arguments")
    assert line is not None
    assert windows_command_line.split_arguments(line) == ["C:\\a b\\run.py", *printable]
    assert text(made, "Actions/Exec/Command") == "C:\\Program Files\\python.exe"


# ---- Windows, as far as Wine is one ------------------------------------------------------------------

# Wine's own words do not matter, and it must not offer to download anything.
QUIET = {"WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml=", "DISPLAY": ""}
# Stands for a program of Windows: writes down how it was called, and calls Wine's with Windows paths.
PROGRAM = """\
#!{python}
import json, os, subprocess, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open({log!r}, "a", encoding="utf-8") as file:
    print(json.dumps([name, *words]), file=file)
if os.path.exists({refuse!r}) and "/Create" in words:
    sys.exit("ERROR: Access is denied.")
if "/Query" in words:  # of which Wine's knows nothing
    words = ["/Change", *words[1:3], "/ENABLE"]
words = ["Z:" + word.replace("/", chr(92)) if os.path.exists(word) else word for word in words]
# Not to a pipe: Wine's own server would keep it open.
sys.exit(subprocess.run(["wine", name, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode)
"""


@pytest.fixture(scope="module")
def wine_prefix() -> Iterator[Path]:
    """A fresh Windows of Wine's. It has hundreds of megabytes, so it is not kept in pytest's folders."""
    wine, server = need("wine", "wine"), need("wineserver", "wine")
    with tempfile.TemporaryDirectory(prefix="wine-", ignore_cleanup_errors=True) as folder:
        silent = {
            "env": {**os.environ, **QUIET, "WINEPREFIX": folder},
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        try:
            subprocess.run([server, "--persistent"], check=True, **silent)
            subprocess.run([wine, "cmd", "/c", "exit"], timeout=180, check=True, **silent)
            yield Path(folder)
        finally:
            subprocess.run([server, "--kill"], check=False, **silent)
            subprocess.run([server, "--wait"], timeout=60, check=False, **silent)


class Windows:
    """Folders and programs of Windows, in a folder of this machine."""

    def __init__(self, root: Path, prefix: Path) -> None:
        self.prefix, self.log, self.refuse = prefix, root / "log", root / "refuse"
        self.programs, self.data, self.system = root / "Program Files", root / "ProgramData", root / "Windows/System32"
        for folder in (self.programs, self.data, self.system):
            folder.mkdir(parents=True)
        for name in ("schtasks.exe", "icacls.exe"):
            program = self.system / name
            program.write_text(PROGRAM.format(python=sys.executable, log=str(self.log), refuse=str(self.refuse)))
            program.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """How the programs were called since this was last asked."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def task(self) -> dict[str, str | None]:
        """The settings of the task as Wine has understood them; empty if there is no task."""
        file = self.prefix / "drive_c/windows/system32/tasks" / task_scheduler.TASK
        if not file.exists():
            return {}
        settings = ET.fromstring(file.read_bytes()).findall("Settings/*", NAMESPACE)
        return {setting.tag.partition("}")[2]: setting.text for setting in settings}

    def files(self) -> set[Path]:
        return {path for folder in (self.programs, self.data) for path in folder.rglob("*")}


@pytest.fixture
def windows(wine_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Windows]:
    """Has the installer take this machine for Windows, and itself for elevated."""
    windows = Windows(tmp_path, wine_prefix)
    variables = {
        "WINEPREFIX": str(wine_prefix),
        "SystemRoot": str(windows.system.parent),
        "ProgramFiles": str(windows.programs),
        "ProgramData": str(windows.data),
    }
    for name, value in {**QUIET, **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(registration, "ON_WINDOWS", True)
    monkeypatch.setattr(task_scheduler, "is_elevated", lambda: True)
    yield windows
    task_scheduler.main(["uninstall", "--purge"])


@pytest.fixture
def tool_options(service: Callable[..., MetadataService]) -> list[str]:
    """Options of the tool that pass its trial."""
    hook = shlex.join([sys.executable, *NASTY])
    return ["--provider", "azure", "--endpoint", service("azure").url, "--drain", hook, "--restore", hook]


def test_install_registers_a_task_that_the_task_scheduler_accepts_and_shows(
    windows: Windows, tool_options: list[str]
) -> None:
    assert task_scheduler.main(["install", "--interval", "10", "--", *tool_options]) == 0
    assert {
        "MultipleInstancesPolicy": "IgnoreNew",
        "DisallowStartIfOnBatteries": "false",
        "StopIfGoingOnBatteries": "false",
        "StartWhenAvailable": "true",
        "ExecutionTimeLimit": "PT15M",
    }.items() <= windows.task().items()
    assert task_scheduler.task_exists()


def test_what_is_registered_runs_the_copy_with_the_very_arguments_that_were_given(
    windows: Windows, tool_options: list[str]
) -> None:
    assert task_scheduler.main(["install", "--", *tool_options]) == 0
    folder = windows.programs / "IsVmInMaint"
    made = ET.fromstring((folder / "task.xml").read_bytes().decode("utf-16"))
    program, line = text(made, "Actions/Exec/Command"), text(made, "Actions/Exec/Arguments")
    assert program
    assert line
    arguments = windows_command_line.split_arguments(line)
    assert arguments == ["-Es", str(folder / "run.py"), *tool_options]
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
    assert windows.task() == {}
    assert windows.files() == set()
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
    assert windows.task()["ExecutionTimeLimit"] == "PT45M"
    assert task_scheduler.main(["status"]) == 0


def test_a_task_that_is_refused_is_taken_back_whole(
    windows: Windows, tool_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    windows.refuse.touch()
    assert task_scheduler.main(["install", "--", *tool_options]) == 1
    assert "Access is denied" in capsys.readouterr().err
    assert windows.files() == set()
    assert windows.task() == {}


def test_an_upgrade_that_is_refused_leaves_the_old_task(windows: Windows, tool_options: list[str]) -> None:
    assert task_scheduler.main(["install", "--", *tool_options]) == 0
    before = {path: path.read_bytes() for path in windows.files() if path.is_file()}
    windows.refuse.touch()
    assert task_scheduler.main(["install", "--interval", "30", "--", *tool_options]) == 1
    assert {path: path.read_bytes() for path in windows.files() if path.is_file()} == before
    assert windows.task()["ExecutionTimeLimit"] == "PT15M"


def test_a_wrong_option_registers_nothing(
    windows: Windows, tool_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert task_scheduler.main(["install", "--", *tool_options, "--drain", "no-such-program"]) == 1
    assert "no-such-program: not found" in capsys.readouterr().err
    assert windows.files() == set()
    assert windows.task() == {}


def test_dry_run_prints_the_task_and_every_command_and_does_nothing(
    windows: Windows, tool_options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_scheduler, "is_elevated", lambda: False)
    assert task_scheduler.main(["install", "--dry-run", "--", *tool_options]) == 0
    said = capsys.readouterr().out
    assert "<MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>" in said
    assert 'schtasks.exe" /Create' in said or "schtasks.exe /Create" in said
    assert windows.files() == set()
    assert all("/Query" in call for call in windows.calls())
    monkeypatch.setattr(task_scheduler, "is_elevated", lambda: True)


@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_a_prompt_that_is_not_elevated_is_told_so(
    windows: Windows, action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_scheduler, "is_elevated", lambda: False)
    assert task_scheduler.main([action]) == 1
    assert "'Run as administrator'" in capsys.readouterr().err
    assert windows.calls() == []
    monkeypatch.setattr(task_scheduler, "is_elevated", lambda: True)


def test_a_state_folder_that_is_a_link_is_refused(
    windows: Windows, tool_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (windows.data / "IsVmInMaint").symlink_to(tmp_path, target_is_directory=True)
    assert task_scheduler.main(["install", "--", *tool_options]) == 1
    assert "is a link to" in capsys.readouterr().err
    (windows.data / "IsVmInMaint").unlink()


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


@pytest.mark.parametrize(("right", "wrong"), [("<Exec>", "<Exe>"), ("<Triggers>", "<Trigger>"), ("</Task>", "")])
def test_this_task_scheduler_does_not_accept_just_anything(
    windows: Windows, tmp_path: Path, right: str, wrong: str
) -> None:
    xml = task_scheduler.task_xml(["python.exe"], options(tool=[]), Path("C:\\Windows")).decode("utf-16")
    path = tmp_path / "wrong.xml"
    path.write_bytes(
        xml.replace(right, wrong).replace(right.replace("<", "</"), wrong.replace("<", "</")).encode("utf-16")
    )
    create = [str(windows.system / "schtasks.exe"), "/Create", "/TN", "Wrong", "/XML", str(path), "/F"]
    assert subprocess.run(create, check=False).returncode != 0


@pytest.mark.skipif(os.name == "nt", reason="this is Windows")
def test_elsewhere_it_names_the_other_installers() -> None:
    script = ROOT / "install" / "task_scheduler.py"
    refused = subprocess.run([sys.executable, script, "install"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "install/cron.py" in refused.stderr
