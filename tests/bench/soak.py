"""Does --watch grow with the events that it sees?

    python3 tests/bench/soak.py             10,000 events, a few minutes
    python3 tests/bench/soak.py --events 1000

One --watch on a simulated Azure, where whole weeks pass in a minute: it polls without a pause, and
events come, start and end twenty at a time, as fast as it logs them. Each batch is drained for and
restored after. Every tenth of the way its memory, its open files and the size of its state file are
noted, and at the end what it has logged is counted. Linux only.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import common

from metadata_service import MetadataService

BATCH = 20
LIMIT = 60.0  # seconds for a step, which takes a fraction of one
HEADINGS = ("events", "memory", "open files", "state file")
# The installed tool, but for the pause between two polls.
WITHOUT_PAUSE = "import sys, is_vm_in_maint as tool; tool.Azure.interval = 0.0; sys.exit(tool.main())"
WORDS = {
    "announced": "Incoming VM Event: ",
    "started": "VM Event started: ",
    "over": "VM Event over: ",
    "drained": "VM drained: ",
    "restored": "VM restored: ",
}


class Journal(threading.Thread):
    """Counts what the tool logs to stderr, by its first words."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self.stream = stream
        self.counts: Counter[str] = Counter()
        self.start()

    def run(self) -> None:
        for line in self.stream:
            kinds = [kind for kind, words in WORDS.items() if line.startswith(f"IsVmInMaint: {words}")]
            self.counts[kinds[0] if kinds else f"other: {line.strip()}"] += 1

    def wait_for(self, kind: str, count: int) -> None:
        began = time.monotonic()
        while self.counts[kind] < count:
            if not self.is_alive() or time.monotonic() > began + LIMIT:
                raise SystemExit(f"waited in vain for {count} lines {kind!r}; there are {dict(self.counts)}")
            time.sleep(0.002)


class Sample(NamedTuple):
    memory: float  # MiB that are resident
    files: int  # that are open
    state: int  # bytes


def sample(process: subprocess.Popen[str], state: Path) -> Sample:
    files = len(list(Path("/proc", str(process.pid), "fd").iterdir()))
    return Sample(round(common.memory_of(process.pid, "VmRSS"), 2), files, state.stat().st_size)


def pass_by(service: MetadataService, journal: Journal, done: int, batch: int, note: Callable[[], None]) -> None:
    """Lets a batch of events come, start and end, with `done` before it; notes in the middle."""
    ids = [service.announce("Reboot", not_before=300) for _ in range(batch)]
    journal.wait_for("announced", done + batch)
    for event in ids:
        service.begin(event)
    journal.wait_for("started", done + batch)
    note()
    for event in ids:
        service.end(event)
    journal.wait_for("over", done + batch)
    # The restore that follows is logged only after the last event is over.
    journal.wait_for("restored", journal.counts["drained"])
    service.requests.clear()


def main() -> None:
    options = common.parse(__doc__, events=(10_000, "events"))
    common.need_linux()
    python = common.find_python()
    with tempfile.TemporaryDirectory() as folder, MetadataService("azure") as service:
        home = Path(folder)
        common.install(python, home)
        command = common.tool(python, service, home, "--watch", "--log=stderr", "--drain=true", "--restore=true")
        process = subprocess.Popen(
            [python, "-c", WITHOUT_PAUSE, *command[3:]],
            cwd=home,
            env=common.quiet_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr
        journal = Journal(process.stderr)
        samples: list[Sample] = []
        state = home / "state-azure" / "state.json"
        try:
            for done in range(0, options.events, BATCH):
                batch = min(BATCH, options.events - done)
                pass_by(service, journal, done, batch, lambda: samples.append(sample(process, state)))
        finally:
            common.stop(process)
    noted = [(min(number * BATCH, options.events), each) for number, each in enumerate(samples, 1)]
    noted = noted[: -1 : max(1, len(noted) // 10)] + noted[-1:]
    rows = [(f"{n:,}", f"{each.memory:.1f} MiB", each.files, f"{each.state:,} B") for n, each in noted]
    common.show("One --watch, with the last events under way", HEADINGS, rows)
    common.show("What it has logged", ("", "lines"), journal.counts.items())
    figures = {"events": options.events, "log_lines": journal.counts, "exit_status": process.returncode}
    common.finish(python, {**figures, "samples": [{"events": n, **each._asdict()} for n, each in noted]})


if __name__ == "__main__":
    common.run(main)
