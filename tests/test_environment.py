"""install/environment.py: real virtual environments and a real pip, without the Internet.

What pip installs is a wheel of ours that goes by the name of requests.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import environment
from environment import CannotMake

PROGRAM = environment.__file__
on_posix = pytest.mark.skipif(os.name == "nt", reason="the stand-in interpreter is a shell script")
# One worker: all of them look at the one environment that `made` is.
pytestmark = pytest.mark.xdist_group("environment")


@pytest.fixture(scope="module", autouse=True)
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with "requests" 2.0, the only place where pip looks."""
    folder = tmp_path_factory.mktemp("wheels")
    contents = {
        "requests.py": "__version__ = '2.0'\n",
        "requests-2.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: requests\nVersion: 2.0\n",
        "requests-2.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
        "requests-2.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / "requests-2.0-py3-none-any.whl", "w") as wheel:
        for name, text in contents.items():
            wheel.writestr(name, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder))
        yield folder


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has no requests."""
    directory = tmp_path_factory.mktemp("without")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    return environment.interpreter_in(directory)


@pytest.fixture(scope="module")
def made(without: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that the program made, after one attempt that was killed half-way."""
    directory = tmp_path_factory.mktemp("made") / "a b" / "venv"
    first = subprocess.Popen([str(without), PROGRAM, str(directory)], start_new_session=True)
    while not (directory / "pyvenv.cfg").exists():
        assert first.poll() is None, "it ended too soon to be killed"
        time.sleep(0.01)
    if os.name == "nt":
        first.kill()
    else:
        os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert printed_by_program(without, directory) == str(environment.interpreter_in(directory))
    return directory


def printed_by_program(python: Path, directory: Path) -> str:
    command = [str(python), PROGRAM, str(directory)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def requests_version(python: Path) -> str:
    command = [str(python), "-c", "import requests; print(requests.__version__)"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def files(directory: Path) -> dict[Path, int]:
    """All files and when they were written, except those that Python writes when it likes."""
    return {path: path.lstat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_one_that_was_killed_half_way_is_made_anew(made: Path) -> None:
    assert requests_version(environment.interpreter_in(made)) == "2.0"


def test_making_it_again_changes_nothing(made: Path, without: Path) -> None:
    before = files(made)
    assert printed_by_program(without, made) == str(environment.interpreter_in(made))
    assert files(made) == before


def test_one_that_has_lost_requests_is_made_anew(made: Path, without: Path) -> None:
    for module in made.rglob("requests.py"):
        module.unlink()
    leftover = made / "leftover"
    leftover.touch()
    assert requests_version(Path(printed_by_program(without, made))) == "2.0"
    assert not leftover.exists()


def test_an_environment_cannot_replace_itself(made: Path) -> None:
    python = environment.interpreter_in(made)
    with pytest.raises(CannotMake, match="start this with another Python"):
        environment.make(made, ["requests==1.0"], python)
    assert requests_version(python) == "2.0"


def test_what_others_made_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = somewhere\n")
    with pytest.raises(CannotMake, match=r"did not make.*name another folder"):
        environment.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pyvenv.cfg"]


def test_a_file_in_the_way_is_named_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for directory in (file, file / "below"):
        with pytest.raises(CannotMake, match=re.escape(f"cannot write {directory} (")):
            environment.make(directory)
    assert file.read_text() == "mine"


def test_what_pip_said_last_is_passed_on() -> None:
    with pytest.raises(CannotMake, match=r"requests==3: ERROR: .*requests==3"):
        environment.install(Path(sys.executable), ["requests==3"])


@on_posix
def test_what_could_not_be_finished_leaves_nothing(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f"case $* in *venv\\ *) exec '{sys.executable}' -m venv --without-pip \"$4\" ;; esac\n"
        f"exec '{sys.executable}' \"$@\"\n"
    )
    python.chmod(0o755)
    with pytest.raises(CannotMake, match="No module named pip"):
        environment.make(tmp_path / "venv", python=python)
    assert not (tmp_path / "venv").exists()


def test_something_that_is_no_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotMake, match="nopython is not a Python that runs"):
        environment.make(tmp_path / "venv", python=tmp_path / "nopython")
    assert not (tmp_path / "venv").exists()


@pytest.fixture
def debians_python(tmp_path: Path) -> Path:
    """A Python without ensurepip, as Debian's is without its package python3-venv."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncase $* in *ensurepip*) exit 1 ;; esac\nexec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    return python


@on_posix
def test_a_debian_without_venv_is_told_what_to_install(
    tmp_path: Path, debians_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = tmp_path / "apt-get"
    apt.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotMake, match=r"install .*: apt-get install python3(\.\d+)?-venv\.$"):
        environment.make(tmp_path / "venv", python=debians_python)
    assert not (tmp_path / "venv").exists()


@on_posix
def test_elsewhere_nobody_is_sent_to_apt(tmp_path: Path, debians_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotMake, match="your system's package") as error:
        environment.make(tmp_path / "venv", python=debians_python)
    assert "apt-get" not in str(error.value)


def test_a_python_that_has_requests_is_taken_as_it_is(tmp_path: Path) -> None:
    assert environment.find_or_make(tmp_path / "venv") == Path(sys.executable)
    assert not (tmp_path / "venv").exists()


def test_requests_that_only_the_caller_would_find_do_not_count(
    tmp_path: Path, without: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requests.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert not environment.imports_requests(without)


def test_the_program_says_in_one_line_why_it_cannot(tmp_path: Path, without: Path) -> None:
    (tmp_path / "file").touch()
    answer = subprocess.run([str(without), PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert answer.stdout == ""
    [line] = answer.stderr.splitlines()
    assert line.startswith(f"environment.py: {tmp_path} holds files")
