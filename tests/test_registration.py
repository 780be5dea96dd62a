"""install/registration.py: what all installers do alike, shown with install/cron.py on a private machine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import registration
from conftest import ROOT, need
from metadata_service import MetadataService
from private_machine import IN_TMP, PrivateMachine

CRON = ROOT / "install" / "cron.py"
FOLDER = "/usr/local/lib/is-vm-in-maint"
COPY = f"{FOLDER}/is_vm_in_maint.py"
STATE = "/var/lib/is-vm-in-maint"
Installer = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def machine() -> Iterator[PrivateMachine]:
    need("cron", "cron")
    with PrivateMachine() as machine:
        yield machine


@pytest.fixture
def on(machine: PrivateMachine) -> Installer:
    """on("install", "--dry-run"): runs cron.py on the machine."""
    return lambda *arguments: machine.run(sys.executable, CRON, *arguments)


@pytest.fixture
def azure(service: Callable[..., MetadataService]) -> MetadataService:
    return service("azure")


def to(azure: MetadataService, *more: str) -> list[str]:
    """Options of the tool."""
    return ["--", "--provider", "azure", "--endpoint", azure.url, *more]


def command(machine: PrivateMachine) -> list[str]:
    """What was registered."""
    words: list[str] = json.loads(machine.run("cat", f"{FOLDER}/installation.json").stdout)["command"]
    return words


def edited(tmp_path: Path, old: str, new: str) -> Path:
    """cron.py of another version of the project, in which the tool says something else."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT / "install", copy / "install", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "is_vm_in_maint.py").read_text(encoding="utf-8")
    assert old in text
    (copy / "is_vm_in_maint.py").write_text(text.replace(old, new), encoding="utf-8")
    return copy / "install" / "cron.py"


# ---- The copy ----------------------------------------------------------------------------------------


@pytest.mark.skipif(IN_TMP, reason="this checkout is in a folder like /tmp, whose Python is not root's to run")
def test_only_root_can_write_what_is_installed(machine: PrivateMachine, on: Installer, azure: MetadataService) -> None:
    before = machine.files()
    machine.run("sh", "-c", f"umask 077; {shlex.join([sys.executable, str(CRON), 'install', *to(azure)])}")
    new = [line.split(" ")[:4] for line in machine.files() - before]
    assert {path for path, *_ in new} >= {COPY, f"{FOLDER}/run.py", "/etc/cron.d/is-vm-in-maint", STATE}
    assert {owner for *_, owner in new} == {"root:root"}
    expected = {"d": "755", "f": "644"}
    assert {path: mode for path, kind, mode, _ in new if mode != expected[kind]} == {STATE: "700"}


def test_it_starts_from_bytecode(machine: PrivateMachine, on: Installer, azure: MetadataService) -> None:
    on("install", *to(azure))
    python, *words = command(machine)
    said = machine.run(python, "-v", *words, "--version").stderr
    assert re.search(rf"code object from '{FOLDER}/__pycache__/is_vm_in_maint\.\S+\.pyc'", said)


def test_bytecode_of_another_python_does_no_harm(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    """As after an upgrade of Python within one minor version, where the file keeps its name."""
    on("install", *to(azure))
    magic = f"for pyc in {FOLDER}/__pycache__/*.pyc; do printf XXXX | dd of=$pyc conv=notrunc; done"
    assert machine.run("sh", "-c", magic).returncode == 0
    ran = machine.run(*command(machine), "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["provider"] == "azure"


def test_an_older_version_is_upgraded_and_status_says_that_it_can_be(
    machine: PrivateMachine, on: Installer, azure: MetadataService, tmp_path: Path
) -> None:
    older = edited(tmp_path, f'__version__ = "{registration.VERSION}"', '__version__ = "0.0.9"')
    assert machine.run(sys.executable, older, "install", *to(azure)).returncode == 0
    assert f"version 0.0.9 in {FOLDER}; here is {registration.VERSION}" in on("status").stdout
    # Python tells stale bytecode by size and time alone, so none of the old version may stay.
    machine.run("touch", f"{FOLDER}/__pycache__/old")
    assert on("install", *to(azure)).returncode == 0
    assert machine.run("ls", f"{FOLDER}/__pycache__").stdout.startswith("is_vm_in_maint.")
    assert machine.run("cat", COPY).stdout == (ROOT / "is_vm_in_maint.py").read_text(encoding="utf-8")
    assert "0.0.9" not in on("status").stdout


def test_installing_twice_changes_nothing_and_says_so(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    on("install", *to(azure))
    before = machine.files()
    again = on("install", *to(azure))
    assert again.returncode == 0
    assert "Nothing to change" in again.stdout
    assert machine.files() == before


def test_what_somebody_has_changed_is_mended(machine: PrivateMachine, on: Installer, azure: MetadataService) -> None:
    on("install", *to(azure))
    machine.run("sh", "-c", f"echo >>{COPY}; chmod 666 /etc/cron.d/is-vm-in-maint; rm {FOLDER}/run.py")
    assert on("status").returncode == 1
    assert on("install", *to(azure)).returncode == 0
    assert on("status").returncode == 0
    assert machine.run("stat", "-c", "%a", "/etc/cron.d/is-vm-in-maint").stdout == "644\n"
    assert machine.run("cat", COPY).stdout == (ROOT / "is_vm_in_maint.py").read_text(encoding="utf-8")


def test_a_folder_of_somebody_elses_stays_as_it_is(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    machine.run("sh", "-c", f"mkdir {FOLDER}; echo mine >{FOLDER}/notes")
    before = machine.files()
    for arguments in (["install", *to(azure)], ["uninstall", "--purge"]):
        refused = on(*arguments)
        assert refused.returncode == 1
        assert f"{FOLDER} holds files that this program did not make" in refused.stderr
    assert machine.files() == before


def test_a_folder_that_others_can_change_is_refused(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    machine.run("chmod", "777", "/usr/local/lib")
    before = machine.files()
    refused = on("install", *to(azure))
    assert refused.returncode == 1
    assert "chmod go-w /usr/local/lib" in refused.stderr
    assert machine.files() == before


# ---- The interpreter ---------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A folder in which pip finds requests and what it needs, as one package: those of this Python."""
    names = ("requests", "urllib3", "idna", "certifi", "charset_normalizer", "chardet")
    with zipfile.ZipFile(tmp_path / "requests-2.99-py3-none-any.whl", "w") as wheel:
        for name in names:
            found = importlib.util.find_spec(name)
            for folder in (found.submodule_search_locations if found else None) or []:
                for path in Path(folder).rglob("*.py*"):
                    if path.suffix != ".pyc":
                        wheel.write(path, str(Path(name) / path.relative_to(folder)))
        for file, text in {
            "METADATA": "Metadata-Version: 2.1\nName: requests\nVersion: 2.99\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
            "RECORD": "",
        }.items():
            wheel.writestr(f"requests-2.99.dist-info/{file}", text)
    return tmp_path


def hide(module: str, machine: PrivateMachine, tmp_path: Path) -> None:
    """Has the machine's own Python find no such module."""
    nothing = tmp_path / "nothing.py"
    nothing.write_text("raise ImportError\n")
    while True:
        code = f"import {module}; print({module}.__file__)"
        found = machine.run(registration.SYSTEM_PYTHON, "-I", "-c", code).stdout.strip()
        if not found:
            return
        assert machine.run("mount", "--bind", nothing, found).returncode == 0


@pytest.mark.skipif(IN_TMP, reason="this checkout is in a folder like /tmp, whose Python is not root's to run")
def test_where_no_python_has_requests_it_makes_one_that_outlives_an_upgrade(
    machine: PrivateMachine, azure: MetadataService, wheel: Path, tmp_path: Path
) -> None:
    python = registration.SYSTEM_PYTHON
    if machine.run(python, "-I", "-c", "import ensurepip, venv").returncode:
        need("/usr/bin/python3 with venv", "python3-venv")
    hide("requests", machine, tmp_path)
    before = machine.files()
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel)}
    installed = machine.run(python, CRON, "install", *to(azure), env=pip)
    assert installed.returncode == 0, installed.stderr
    words = command(machine)
    assert words[0] == f"{FOLDER}/venv/bin/python"
    assert machine.run(*words, "--json").returncode == 0
    # As after an upgrade of Python: it looks for packages in another folder.
    assert machine.run(python, *words[1:], "--json").returncode == 0
    again = machine.run(python, CRON, "install", *to(azure), env=pip)
    assert "Nothing to change" in again.stdout

    assert machine.run(sys.executable, CRON, "install", *to(azure)).returncode == 0  # this one has requests
    assert command(machine)[0] == sys.executable
    assert machine.run("test", "-e", f"{FOLDER}/venv").returncode == 1
    assert machine.run(python, CRON, "uninstall", "--purge").returncode == 0
    assert machine.files() == before


def test_where_none_can_be_made_nothing_is_left_and_it_says_what_to_install(
    machine: PrivateMachine, azure: MetadataService, tmp_path: Path
) -> None:
    """As on a fresh Debian, which has neither requests nor what makes virtual environments."""
    for module in ("requests", "ensurepip"):
        hide(module, machine, tmp_path)
    before = machine.files()
    failed = machine.run(registration.SYSTEM_PYTHON, CRON, "install", *to(azure))
    assert failed.returncode == 1
    assert "apt-get install python3-requests" in failed.stderr
    assert machine.files() == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has access lists instead")
def test_a_python_that_others_can_change_or_that_lies_in_tmp_is_none_for_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(registration, "others_can_change", lambda python: False)
    assert python in registration.candidates("sys")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", str(python))
    assert python not in registration.candidates("sys")


# ---- The trial ---------------------------------------------------------------------------------------


def test_a_wrong_option_stops_it_with_the_tools_own_words(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    before = machine.files()
    refused = on("install", *to(azure, "--lead", "soon"))
    assert refused.returncode == 2
    assert "is_vm_in_maint: error: argument --lead: 'soon' is not a time" in refused.stderr
    assert machine.files() == before


def test_a_hook_that_cannot_run_stops_it_with_the_tools_own_words(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    before = machine.files()
    refused = on("install", *to(azure, "--drain", "/usr/local/sbin/drian"))
    assert refused.returncode == 1
    assert "status 4" in refused.stderr
    assert "--drain: /usr/local/sbin/drian: not found" in refused.stderr
    assert machine.files() == before


def test_a_hook_that_cannot_run_stops_it_off_the_cloud_too(machine: PrivateMachine, on: Installer) -> None:
    """As where an image is built: nobody knows yet which cloud it will be."""
    before = machine.files()
    refused = on("install", "--", "--drain", "/usr/local/sbin/drian")
    assert refused.returncode == 1
    assert "--drain: /usr/local/sbin/drian: not found" in refused.stderr
    assert machine.files() == before


def test_a_hook_is_looked_for_as_cron_will_look_for_it(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    """Not from the folder and with the PATH of whoever installs: else it would fail at night."""
    hook = "mkdir /srv/bin; cp /bin/true /srv/bin/drain-it; cd /srv/bin; "
    install = shlex.join([sys.executable, str(CRON), "install", *to(azure)])
    for drain in ("./drain-it", "drain-it"):
        refused = machine.run("sh", "-c", f"{hook} PATH=/srv/bin:$PATH {install} --drain {drain}")
        assert refused.returncode == 1
        assert f"--drain: {drain}: not found" in refused.stderr


def test_a_metadata_service_that_does_not_answer_is_only_a_warning(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    azure.fail("refuse")
    installed = on("install", *to(azure))
    assert installed.returncode == 0
    assert "Warning: no metadata service could be asked" in installed.stderr
    assert "Connection refused" in installed.stdout
    assert on("status").returncode == 0


def test_an_upgrade_that_fails_its_trial_leaves_the_old_one(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    on("install", *to(azure))
    before = machine.files()
    contents = machine.run("grep", "-r", "", FOLDER, "/etc/cron.d", "--include=*.json", "--include=is-vm*").stdout
    assert on("install", *to(azure, "--drain", "no-such-hook")).returncode == 1
    after = machine.run("grep", "-r", "", FOLDER, "/etc/cron.d", "--include=*.json", "--include=is-vm*").stdout
    assert after == contents
    times = re.compile(r" \S+$")  # what is taken back is written anew
    assert {times.sub("", line) for line in machine.files()} == {times.sub("", line) for line in before}
    assert machine.run(*command(machine), "--json").returncode == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_installer_that_is_stopped_takes_all_back(
    machine: PrivateMachine, azure: MetadataService, name: str
) -> None:
    azure.fail("hang")
    before = machine.files()
    words = machine.command(sys.executable, CRON, "install", *to(azure))
    installer = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 30
    while not azure.requests:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(installer.pid, getattr(signal, name))  # as the terminal does
    assert installer.wait(30) != 0
    assert machine.files() == before


# ---- Uninstalling ------------------------------------------------------------------------------------


def test_the_state_stays_and_purge_takes_it(machine: PrivateMachine, on: Installer, azure: MetadataService) -> None:
    before = machine.files()
    on("install", *to(azure))
    machine.run(*command(machine))
    kept = on("uninstall")
    assert f"stay in {STATE}; --purge" in kept.stdout
    assert machine.run("test", "-e", f"{STATE}/state.json").returncode == 0
    assert on("uninstall", "--purge").returncode == 0
    assert machine.files() == before
    assert "Nothing to remove" in on("uninstall", "--purge").stdout


def test_purge_takes_only_the_tools_files_from_a_folder_that_was_named(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    machine.run("sh", "-c", "mkdir /srv/data; echo mine >/srv/data/notes")
    before = machine.files()
    on("install", *to(azure, "--state", "/srv/data", "--log", "stderr"))
    azure.announce("Reboot", not_before=86400)
    machine.run(*command(machine))
    assert machine.run("test", "-e", "/srv/data/state.json").returncode == 0
    assert on("uninstall", "--purge").returncode == 0
    assert machine.files() == before


def test_it_warns_when_nobody_will_be_left_to_restore_the_vm(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    on("install", *to(azure, "--drain", "/bin/true", "--log", "stderr"))
    azure.announce("Reboot", not_before=300)
    machine.run(*command(machine))
    assert "this VM is drained at present" in on("uninstall").stderr


def test_status_tells_what_is_installed_and_what_is_not(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    nothing = on("status")
    assert nothing.returncode == 1
    assert nothing.stdout.startswith("Not installed")
    on("install", *to(azure, "--drain", "/bin/echo '100% ü'"))
    status = on("status")
    assert status.returncode == 0
    assert shlex.split(re.findall(r"^Command: +(.+)$", status.stdout, re.MULTILINE)[0]) == command(machine)
    assert STATE in status.stdout
    machine.run("rm", "/etc/cron.d/is-vm-in-maint")
    unregistered = on("status")
    assert unregistered.returncode == 1
    assert "Not registered" in unregistered.stdout


def test_dry_run_prints_every_file_and_command_and_does_nothing(
    machine: PrivateMachine, on: Installer, azure: MetadataService
) -> None:
    before = machine.files()
    would = on("install", "--dry-run", *to(azure, "--drain", "/bin/true"))
    assert would.returncode == 0
    assert machine.files() == before
    assert azure.requests == []
    on("install", *to(azure, "--drain", "/bin/true"))
    for line in machine.run("cat", "/etc/cron.d/is-vm-in-maint").stdout.splitlines():
        assert line in would.stdout
    for file in (COPY, f"{FOLDER}/run.py", f"{FOLDER}/installation.json"):
        assert f"Would write {file} (mode 0644)" in would.stdout
    installed = machine.files()
    gone = on("uninstall", "--purge", "--dry-run")
    assert f"Would remove {FOLDER}" in gone.stdout
    assert machine.files() == installed


# ---- The command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["install", "--", "--watch"], "leave out --watch"),
        (["install", "--", "--dry-run"], "leave out --dry-run"),
        (["install", "--", "--rehearse"], "leave out --rehearse"),
        (["install", "--", "--version"], "--help and --version are none"),
        (["install", "--", "--drain", "a\nb"], "line's end"),
        (["install", "--", "--restore", "x"], "need --drain"),
        (["install", "--drain", "x"], "unrecognized arguments: --drain"),
        (["install", "--purge"], "--purge is for uninstall"),
        (["uninstall", "--", "--lead", "5m"], "are for install"),
        (["reinstall"], "invalid choice: 'reinstall'"),
        ([], "required: action"),
    ],
)
def test_wrong_usage_is_told_in_words_and_has_status_2(arguments: list[str], words: str) -> None:
    refused = subprocess.run([sys.executable, CRON, *arguments], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert words in refused.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux and another user")
@pytest.mark.parametrize("script", ["cron.py", "systemd.py"])
def test_without_root_it_says_how_to_get_it(script: str) -> None:
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    # Not in tmp_path, which nobody else may enter.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "install", Path(folder) / "install")
        shutil.copy(ROOT / "is_vm_in_maint.py", folder)
        Path(folder).chmod(0o755)
        words = [*as_nobody, registration.SYSTEM_PYTHON, Path(folder) / "install" / script, "install"]
        refused = subprocess.run(words, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert f"this needs root: sudo python3 install/{script} install" in refused.stderr


def test_no_installer_leaves_bytecode_in_the_project(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "install", tmp_path / "install", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "is_vm_in_maint.py", tmp_path)
    for script in ("cron.py", "systemd.py", "task_scheduler.py"):
        shown = subprocess.run([sys.executable, tmp_path / "install" / script, "-h"], capture_output=True, check=False)
        assert shown.returncode == 0
    assert list(tmp_path.rglob("__pycache__")) == []
