"""The tool on a simulated VM, run in this process: a check takes milliseconds, so that a test can do many."""

from __future__ import annotations

import gc
import io
import itertools
import json
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import is_vm_in_maint
from metadata_service import MetadataService

TAG = "IsVmInMaint: "
RUNS = itertools.count(1)


class Checked(NamedTuple):
    """How one run of the tool ended."""

    status: int
    log: list[str]  # the lines of the journal, without the tag
    printed: str  # on stdout


class Vm:
    """A VM with its metadata service and its state directory. Further arguments go to every run."""

    def __init__(self, service: MetadataService, folder: Path, *arguments: str) -> None:
        self.service = service
        self.state = folder / "state" / "state.json"
        self.arguments = ["--provider", service.provider, "--endpoint", service.url, "--log", "stderr"]
        self.arguments += ["--state", str(self.state.parent), *arguments]

    def check(self, *arguments: str) -> Checked:
        self._clear_up()
        printed, logged = io.StringIO(), io.StringIO()
        with redirect_stdout(printed), redirect_stderr(logged):
            status = is_vm_in_maint.main([*self.arguments, *arguments])
        lines = logged.getvalue().split("\n")  # and no other line breaks: those would be the tool's fault
        assert lines.pop() == ""
        assert all(line.startswith(TAG) for line in lines), lines
        return Checked(status, [line[len(TAG) :] for line in lines], printed.getvalue())

    def _clear_up(self) -> None:
        """Close what runs before this one have left open, as the end of their process would have done."""
        lock = self.state.with_name("lock")
        if lock.exists():
            with lock.open("r+") as file:
                if not is_vm_in_maint.lock_now(file):  # the traceback of an exception keeps it
                    gc.collect()
        if next(RUNS) % 50 == 0:
            for client in gc.get_objects():
                if type(client) is is_vm_in_maint.MetadataClient:
                    client.session.close()

    def asked(self, *arguments: str) -> list[str]:
        """What one check asks the metadata service for."""
        before = len(self.service.requests)
        self.check(*arguments)
        return [f"{request.method} {request.path}" for request in self.service.requests[before:]]

    def document(self, *arguments: str) -> Any:
        """The JSON document."""
        return json.loads(self.check("--json", *arguments).printed)

    def remembered(self) -> Mapping[str, Any]:
        document: Mapping[str, Any] = json.loads(self.state.read_bytes())
        return document
