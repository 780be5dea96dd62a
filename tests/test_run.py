"""The programs that run all the other tests: tests/run.py and .ci/run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import run
from conftest import ROOT, need

on_posix = pytest.mark.skipif(os.name == "nt", reason="the stand-in interpreter is a shell script")


def test_a_step_that_cannot_be_run_has_failed_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def check() -> bool:
        raise run.environment.CannotMake("Install something first.")

    assert not run.perform(run.Step("set up", check)).passed
    assert "Install something first." in capsys.readouterr().out


def test_all_steps_are_run_and_one_failure_among_them_makes_it_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def step(name: str, passes: bool) -> run.Step:
        return run.Step(name, lambda: ran.append(name) or passes)

    monkeypatch.setattr(run.environment, "make", lambda directory, *_: Path(sys.executable))
    monkeypatch.setattr(run, "checks", lambda _: [step("first", False), step("second", True)])
    monkeypatch.setattr(run, "wire_tests", lambda: True)
    assert run.main([]) == 1
    assert ran == ["first", "second"]
    monkeypatch.setattr(run, "checks", lambda _: [step("third", True)])
    assert run.main([]) == 0


@on_posix
@pytest.mark.parametrize("script", ["exit 127", '[ "$PYENV_VERSION" ] && echo /opt/python3.9'])
def test_a_python_3_9_is_used_only_if_it_runs(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = tmp_path / "python3.9"
    shim.write_text(f"#!/bin/sh\n{script}\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PYENV_VERSION", raising=False)
    assert run.oldest_python() == ("/opt/python3.9" if "echo" in script else sys.executable)


def test_shellcheck_has_nothing_to_say_of_the_ci_script() -> None:
    shellcheck = need("shellcheck", "shellcheck")
    answer = subprocess.run([shellcheck, ROOT / ".ci" / "run"], stdout=subprocess.PIPE, text=True, check=False)
    assert answer.stdout == ""
    assert answer.returncode == 0
