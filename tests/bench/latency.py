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
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

import common

from metadata_service import MetadataService

LIMIT = 150.0  # seconds without a sign of the hook, after which something is wrong
PAUSE = {"gce": 0.5, "azure": 1.0}  # an event comes at a random moment within so many seconds
LANES = 4  # of azure, that takes two seconds an event
TYPE = {"gce": "MIGRATE_ON_HOST_MAINTENANCE", "azure": "Reboot"}
TOOL, LONG_POLL, POLLING = "--watch", "long-poll loop", "poll every {} s"

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
pause, hook, signs, *urls = sys.argv[1:]
pause = int(pause)
headers = {"Metadata": "true", "Metadata-Flavor": "Google"}

def poll(number, url):
    time.sleep(pause * (number + random.random()) / len(urls))
    while True:
        text = requests.get(url, headers=headers).text
        if text != "NONE" and '"Events": []' not in text:
            return subprocess.run([hook, str(number), signs])
        time.sleep(pause)

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

    def next(self, process: subprocess.Popen[bytes]) -> tuple[str, float]:
        """Waits for the next word, as long as this program lives, and says when it came."""
        began = time.monotonic()
        while b"\n" not in self._lines:
            if select.select([self._pipe], [], [], 0.5)[0]:
                self._lines += os.read(self._pipe, 4096)
            elif time.monotonic() > began + LIMIT or process.poll() is not None:
                sys.exit("the hook was not run; see above for what the program said")
        line, _, self._lines = self._lines.partition(b"\n")
        return line.decode(), time.monotonic()

    def expect(self, word: str, process: subprocess.Popen[bytes]) -> float:
        said, at = self.next(process)
        if said != word:
            sys.exit(f"the hook said {said!r} when {word!r} was expected")
        return at


def wait_for_first_request(service: MetadataService, process: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    while not service.requests:
        if time.monotonic() > began + LIMIT or process.poll() is not None:
            sys.exit("the program asks for nothing; see above for what it said")
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
            wait_for_first_request(service, process)
            for _ in range(events):
                time.sleep(random.uniform(0, PAUSE[provider]))
                began = time.monotonic()
                event = service.announce(TYPE[provider], not_before=600.0 if provider == "azure" else None)
                found.append(signs.expect("drain", process) - began)
                service.end(event)
                signs.expect("restore", process)
        finally:
            common.stop(process)
    return found


def all_at_once(pause: int, provider: str, python: str, home: Path, events: int) -> list[float]:
    """The same of so many loops that poll every so many seconds, each with a service and an event of its own."""
    signs = Signs(Path(tempfile.mkdtemp(dir=home)) / "signs")
    with ExitStack() as stack:
        services = [stack.enter_context(MetadataService(provider)) for _ in range(events)]
        command = [python, "-c", POLLING_LOOPS, str(pause), str(home / "hook"), signs.path, *map(key, services)]
        process = subprocess.Popen(command, cwd=home)
        try:
            wait_for_first_request(services[0], process)
            began = []
            for service in services:
                began.append(time.monotonic())
                service.announce(TYPE[provider], not_before=600.0 if provider == "azure" else None)
            heard = [signs.next(process) for _ in services]
        finally:
            common.stop(process)
    return [at - began[int(number)] for number, at in heard]


def shares(events: int, lanes: int) -> list[int]:
    """So many events, spread over the lanes."""
    return [share for share in (events // lanes + (lane < events % lanes) for lane in range(lanes)) if share]


def measure(python: str, home: Path, events: int, pause: int) -> dict[str, list[float]]:
    """The latencies of each, by the name that it has in the table."""
    found: dict[str, list[float]] = {}
    # First what is compared by milliseconds, each alone; then what takes seconds, together.
    for kind in (LONG_POLL, TOOL):
        found[f"gce {kind}"] = one_by_one(kind, "gce", python, home, events)
    with ThreadPoolExecutor(LANES + len(TYPE)) as pool:
        watches = [pool.submit(one_by_one, TOOL, "azure", python, home, share) for share in shares(events, LANES)]
        polls = {provider: pool.submit(all_at_once, pause, provider, python, home, events) for provider in TYPE}
        found[f"azure {TOOL}"] = [latency for watch in watches for latency in watch.result()]
        found.update({f"{provider} {POLLING.format(pause)}": poll.result() for provider, poll in polls.items()})
    return found


def in_words(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def summary(latencies: Sequence[float]) -> dict[str, float]:
    most = quantiles(latencies, n=20, method="inclusive")[-1] if len(latencies) > 1 else latencies[0]
    return {"median": median(latencies), "19 of 20 within": most, "worst": max(latencies)}


def main() -> None:
    options = common.parse(
        __doc__, events=(100, "events for each"), every=(60, "seconds between two polls of the loops that poll")
    )
    if os.name != "posix":
        sys.exit("This needs a Unix, where there are named pipes.")
    python = common.find_python()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        common.install(python, home)
        (home / "hook").write_text(HOOK)
        (home / "hook").chmod(0o755)
        found = measure(python, home, options.events, options.every)
    figures: dict[str, object] = {}
    rows = []
    for name, latencies in sorted(found.items()):
        summed = summary(latencies)
        figures[name] = {"events": len(latencies), **{key: round(value, 4) for key, value in summed.items()}}
        rows.append((name.replace(" ", ", ", 1), len(latencies), *map(in_words, summed.values())))
    headings = ("", "events", "median", "19 of 20 within", "worst")
    common.show("From the metadata changing to the drain hook's first instruction", headings, rows)
    common.finish(python, figures)


if __name__ == "__main__":
    common.run(main)
