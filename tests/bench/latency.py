"""How soon after the metadata changes does the drain hook run its first instruction?

    python3 tests/bench/latency.py                 100 events each, about four minutes
    python3 tests/bench/latency.py --events 10

The tool's --watch, on gce and on azure, beside the loop that Google's sample wait_for_maintenance
describes (a long poll, then the callback) and beside loops that poll every minute. All run the same
hook, whose first instruction tells the time. An event comes at a random moment, the next one when
the one before is over and the hook that restores has run. The loops that poll are so many at once,
with an event each, because waiting for them one by one would take hours.
"""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

import common

from metadata_service import MetadataService

LIMIT = 150.0  # seconds without a sign of the hook, after which something is wrong
PAUSE = {"gce": 0.5, "azure": 1.0}  # an event comes at a random moment within so many seconds
LANES = {"gce": 1, "azure": 4}  # azure takes two seconds an event: several at a time
TYPE = {"gce": "MIGRATE_ON_HOST_MAINTENANCE", "azure": "Reboot"}
TOOL, LONG_POLL, EVERY_MINUTE = "--watch", "long-poll loop", "poll every 60 s"

HOOK = """\
#!/bin/sh
echo "$1" >"$2"
"""

LONG_POLL_LOOP = """
import subprocess, sys, time, requests
url, hook, signs = sys.argv[1:]
event, etag = "NONE", "0"
while True:
    query = {"last_etag": etag, "wait_for_change": "true"}
    answer = requests.get(url, params=query, headers={"Metadata-Flavor": "Google"})
    if answer.status_code == 503:
        time.sleep(1)
        continue
    etag = answer.headers["ETag"]
    if answer.text != event:
        event = answer.text
        subprocess.run([hook, "restore" if event == "NONE" else "drain", signs])
"""

POLLING_LOOPS = """
import random, subprocess, sys, threading, time, requests
hook, signs, *urls = sys.argv[1:]
headers = {"Metadata": "true", "Metadata-Flavor": "Google"}

def poll(number, url):
    time.sleep(60 * (number + random.random()) / len(urls))
    while True:
        text = requests.get(url, headers=headers).text
        if text != "NONE" and '"Events": []' not in text:
            return subprocess.run([hook, str(number), signs])
        time.sleep(60)

for number, url in enumerate(urls):
    threading.Thread(target=poll, args=(number, url)).start()
"""


def key(service: MetadataService) -> str:
    """The URL that a loop asks."""
    path = "/metadata/scheduledevents?api-version=2020-07-01"
    return service.url + (path if service.provider == "azure" else "/computeMetadata/v1/instance/maintenance-event")


class Signs:
    """What the hooks say, over a named pipe: a word a line, and we look at the clock."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self._pipe = os.open(path, os.O_RDWR)
        self._lines = b""

    def next(self) -> tuple[str, float]:
        """Waits for the next word and says when it came."""
        if b"\n" not in self._lines:
            if not select.select([self._pipe], [], [], LIMIT)[0]:
                raise TimeoutError(f"no hook within {LIMIT:.0f} s: see above for what the program said")
            self._lines += os.read(self._pipe, 4096)
        line, _, self._lines = self._lines.partition(b"\n")
        return line.decode(), time.monotonic()

    def expect(self, word: str) -> float:
        said, at = self.next()
        if said != word:
            raise RuntimeError(f"the hook said {said!r} when {word!r} was expected")
        return at


def wait_for_first_request(service: MetadataService) -> None:
    began = time.monotonic()
    while not service.requests:
        if time.monotonic() > began + LIMIT:
            raise TimeoutError("the program asks for nothing: see above for what it said")
        time.sleep(0.05)


def one_by_one(kind: str, provider: str, python: str, home: Path, events: int) -> list[float]:
    """The seconds from each event to its drain hook, of one program with a service of its own."""
    found = []
    folder = Path(tempfile.mkdtemp(dir=home))
    signs, hook = Signs(folder / "signs"), str(home / "hook")
    with MetadataService(provider) as service:
        hooks = [f"--{name}={hook} {name} {signs.path}" for name in ("drain", "restore")]
        command = common.tool(python, service, home, "--watch", "--log=none", f"--state={folder / 'state'}", *hooks)
        if kind == LONG_POLL:
            command = [python, "-c", LONG_POLL_LOOP, key(service), hook, signs.path]
        process = subprocess.Popen(command, cwd=home, env=common.quiet_environment())
        try:
            wait_for_first_request(service)
            for _ in range(events):
                time.sleep(random.uniform(0, PAUSE[provider]))
                began = time.monotonic()
                event = service.announce(TYPE[provider], not_before=600.0 if provider == "azure" else None)
                found.append(signs.expect("drain") - began)
                service.end(event)
                signs.expect("restore")
        finally:
            common.stop(process)
    return found


def all_at_once(provider: str, python: str, home: Path, events: int) -> list[float]:
    """The same of so many loops that poll every minute, each with a service and an event of its own."""
    signs = Signs(Path(tempfile.mkdtemp(dir=home)) / "signs")
    with ExitStack() as stack:
        services = [stack.enter_context(MetadataService(provider)) for _ in range(events)]
        command = [python, "-c", POLLING_LOOPS, str(home / "hook"), signs.path, *map(key, services)]
        process = subprocess.Popen(command, cwd=home)
        try:
            wait_for_first_request(services[0])
            began = []
            for service in services:
                began.append(time.monotonic())
                service.announce(TYPE[provider], not_before=600.0 if provider == "azure" else None)
            heard = [signs.next() for _ in services]
        finally:
            common.stop(process)
    return [at - began[int(number)] for number, at in heard]


class Lane(threading.Thread):
    """Measures in the background; what goes wrong there is raised when its figures are wanted."""

    def __init__(self, kind: str, provider: str, python: str, home: Path, events: int) -> None:
        super().__init__(daemon=True)
        self.kind, self.provider = kind, provider
        self._work = (provider, python, home, events)
        self._error: BaseException | None = None
        self._found: list[float] = []
        self.start()

    def run(self) -> None:
        try:
            self._found = all_at_once(*self._work) if self.kind == EVERY_MINUTE else one_by_one(self.kind, *self._work)
        except BaseException as error:
            self._error = error

    def latencies(self) -> list[float]:
        self.join()
        if self._error:
            raise self._error
        return self._found


def shares(events: int, lanes: int) -> list[int]:
    """So many events, spread over the lanes."""
    return [share for share in (events // lanes + (lane < events % lanes) for lane in range(lanes)) if share]


def measure(python: str, home: Path, events: int) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {}
    # First what is compared by milliseconds, each alone; then what takes seconds, together.
    for kind in (LONG_POLL, TOOL):
        found["gce", kind] = Lane(kind, "gce", python, home, events).latencies()
    lanes = [Lane(TOOL, "azure", python, home, share) for share in shares(events, LANES["azure"])]
    lanes += [Lane(EVERY_MINUTE, provider, python, home, events) for provider in TYPE]
    for lane in lanes:
        found.setdefault((lane.provider, lane.kind), []).extend(lane.latencies())
    return found


def in_words(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def summary(latencies: Sequence[float]) -> dict[str, float]:
    most = quantiles(latencies, n=20, method="inclusive")[-1] if len(latencies) > 1 else latencies[0]
    return {"median": median(latencies), "19 of 20 within": most, "worst": max(latencies)}


def main() -> None:
    options = common.parse(__doc__, events=(100, "events for each"))
    if os.name != "posix":
        sys.exit("This needs a Unix, where there are named pipes.")
    python = common.find_python()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        common.install(python, home)
        (home / "hook").write_text(HOOK)
        (home / "hook").chmod(0o755)
        found = measure(python, home, options.events)
    figures: dict[str, object] = {}
    rows = []
    for (provider, kind), latencies in sorted(found.items()):
        summed = summary(latencies)
        figures[f"{provider} {kind}"] = {"events": len(latencies), **{k: round(v, 4) for k, v in summed.items()}}
        rows.append((f"{provider}, {kind}", len(latencies), *map(in_words, summed.values())))
    headings = ("", "events", "median", "19 of 20 within", "worst")
    common.show("From the metadata changing to the drain hook's first instruction", headings, rows)
    common.finish(python, figures)


if __name__ == "__main__":
    main()
