"""How many notices are seen before the event begins, and with how much time left?

    python3 tests/bench/coverage.py         10,000 events for each figure, a few minutes

By a check every five minutes, by --watch 290 from a five-minute crontab, and by --watch. The tool
itself runs here, with its real providers, plan and loops, in this process. Only what is below and
around it is made up: a clock that jumps instead of waiting, the metadata service behind
MetadataClient, a state in memory. An event is announced at a random moment, and it is seen when the
tool runs the drain hook.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import datetime, timezone
from email.utils import formatdate
from itertools import product
from statistics import median
from typing import NamedTuple

import common

import is_vm_in_maint as tool

CRON = 300.0  # seconds between two runs
START = 0.5  # seconds from cron's minute to the first question: Python starts
ANSWER = 0.005  # seconds that the metadata service takes
CHUNK = 250  # events a task
EPOCH = 1_800_000_000.0
NAME = "web-1"


class Notice(NamedTuple):
    name: str
    seconds: float
    provider: str
    what: str


NOTICES = (
    Notice("30 s", 30, "gce", "preempted"),
    Notice("60 s", 60, "gce", "maintenance-event"),
    Notice("5 min", 300, "azure-v1", "maintenance"),
    Notice("15 min", 900, "azure", "scheduledevents"),
)
WAYS = CHECK, CRON_WATCH, WATCH = ("check every 5 min", "--watch 290 from cron", "--watch")


class Seen(BaseException):
    """The drain hook runs. Like the next one no Exception: the tool must not catch it."""


class Begun(BaseException):
    """The event has begun."""


class World:
    """The clock, and the one event that is to come."""

    def __init__(self, notice: Notice, announced: float) -> None:
        self.now = 0.0
        self.notice = notice
        self.announced = announced
        self.begins = announced + notice.seconds

    def sleep(self, seconds: float) -> None:
        self.now += max(0.0, seconds)
        if self.now >= self.begins:
            raise Begun

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return EPOCH + self.now

    def tells(self, what: str) -> bool:
        """Whether the metadata says now that the event is coming."""
        return what == self.notice.what and self.now >= self.announced


class Wire:
    """In the place of MetadataClient: answers as the service does, on the world's clock."""

    world: World

    def __init__(self, base: str) -> None:
        self.base = base

    def ask(self, method: str, path: str, *_: object) -> tool.Reply:
        self.world.sleep(ANSWER)
        place, _, query = path.partition("?")
        what = place.rpartition("/")[2]
        if "wait_for_change" in query and not self.world.tells(what):
            self.long_poll(what, float(query.rpartition("timeout_sec=")[2]))
        status, body = self.answer(what)
        reply_headers = {"Metadata-Flavor": "Google", "ETag": body}
        return tool.Reply(f"{method} {path}", status, reply_headers, body.encode())

    def long_poll(self, what: str, limit: float) -> None:
        until_announced = self.world.announced - self.world.now
        changes = what == self.world.notice.what and until_announced < limit
        self.world.sleep(until_announced if changes else limit)

    def answer(self, what: str) -> tuple[int, str]:
        coming = self.world.tells(what)
        if what == "maintenance-event":
            return 200, "MIGRATE_ON_HOST_MAINTENANCE" if coming else "NONE"
        if what == "preempted":
            return 200, "TRUE" if coming else "FALSE"
        if what == "maintenance":
            return 200, self.created() if coming else "{}"
        if what == "scheduledevents":
            return 200, self.scheduled() if coming else '{"DocumentIncarnation": 1, "Events": []}'
        return 404, ""

    def created(self) -> str:
        at = datetime.fromtimestamp(EPOCH + self.world.announced, timezone.utc)
        return json.dumps({"EventID": "1", "EventCreationTime": f"{at:%m/%d/%Y %I:%M:%S %p}"})

    def scheduled(self) -> str:
        begins = formatdate(EPOCH + self.world.begins, usegmt=True)
        event = {"EventId": "1", "EventType": "Reboot", "EventStatus": "Scheduled", "NotBefore": begins}
        return json.dumps({"DocumentIncarnation": 2, "Events": [{**event, "Resources": [NAME]}]})


class Memory:
    """In the place of the state directory; what one run leaves, the next one finds."""

    state = tool.State()
    folder = path = ""

    def __init__(self, folder: str) -> None:
        pass

    def lock(self, *_: object) -> bool:
        return True

    def load(self) -> tool.State:
        return Memory.state

    def save(self, state: tool.State) -> None:
        Memory.state = state


def hook(*_: object) -> None:
    raise Seen


def enter(world: World) -> None:
    """Puts the tool into this world."""
    Wire.world = world
    Memory.state = tool.State(boot="this boot")
    replaced = {
        "time": world,
        "utcnow": lambda: datetime.fromtimestamp(world.time(), timezone.utc),
        "this_boot": lambda: tool.Boot("this boot", datetime.fromtimestamp(EPOCH - 86400, timezone.utc)),
        "MetadataClient": Wire,
        "Store": Memory,
        "run_hook": hook,
    }
    for name, value in replaced.items():
        setattr(tool, name, value)


@functools.cache
def command_line(*arguments: str) -> argparse.Namespace:
    """The options of a run. They do not depend on the world, so they need not be found anew for each."""
    return tool.parse_arguments([*arguments, "--drain", "hook", "--state", os.devnull, "--log", "none"])


def run_tool(provider: str, *arguments: str) -> None:
    """One run of the tool, from its start to its end: what its main() does."""
    Wire.world.sleep(START)
    options = command_line(*arguments)
    check = tool.Check(options, tool.PROVIDERS[provider]("http://127.0.0.1", NAME))
    if options.watch is None:
        tool.check_once(check)
    else:
        tool.watch(check, options.watch)


def time_left(way: str, world: World) -> float:
    """The seconds that are left when the event is seen; 0 if it is not."""
    enter(world)
    arguments = {CHECK: [], CRON_WATCH: ["--watch", "290"], WATCH: ["--watch"]}[way]
    minute = 0.0
    try:
        while True:  # as cron starts it; --watch never ends
            world.sleep(minute - world.now)
            run_tool(world.notice.provider, *arguments)
            minute += CRON
    except Seen:
        return world.begins - world.now
    except Begun:
        return 0.0


def prepare_worker() -> None:
    """Makes a process in which the tool can be run again and again."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    signal.signal = lambda *_: None  # type: ignore[assignment]  # --watch would keep Ctrl-C for itself
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until it ends; on a terminal the tool would count down


def some(notice: Notice, way: str, seed: str, events: int) -> list[float]:
    """The time left of so many events, each in a world of its own."""
    chance = random.Random(seed)
    # Anywhere between two of cron's minutes; --watch has no minutes, so within one is as good.
    span = 60.0 if way == WATCH else CRON
    return [time_left(way, World(notice, START + ANSWER * 10 + chance.uniform(0, span))) for _ in range(events)]


def words(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes > 1 else f"{round(seconds)} s"


def measure(events: int) -> dict[tuple[Notice, str], list[float]]:
    """The time left of each event, for each notice and each way; on all processors."""
    with ProcessPoolExecutor(initializer=prepare_worker) as pool:
        parts: dict[tuple[Notice, str], list[Future[list[float]]]] = {}
        for notice, way in product(NOTICES, WAYS):
            counts = [CHUNK] * (events // CHUNK) + [events % CHUNK]
            seeds = [f"{notice.name} {way} {number}" for number in range(len(counts))]  # the same in every run
            parts[notice, way] = [pool.submit(some, notice, way, *each) for each in zip(seeds, counts)]
        try:
            return {key: [left for part in found for left in part.result()] for key, found in parts.items()}
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    options = common.parse(__doc__, events=(10_000, "events for each figure"))
    found = measure(options.events)
    figures: dict[str, object] = {"events": options.events}
    rows = []
    for notice in NOTICES:
        cells = []
        for way in WAYS:
            left = found[notice, way]
            seen = [seconds for seconds in left if seconds > 0]
            share, middle = len(seen) / len(left), median(seen or [0.0])
            figures[f"{notice.name}, {way}"] = {"seen": share, "median_seconds_left": round(middle, 2)}
            cells.append(f"{share:.1%}, {words(middle)}")
        rows.append((f"{notice.name} ({notice.provider}, {notice.what})", *cells))
    title = f"Share of {options.events:,} notices seen before the event begins, median time left of those"
    common.show(title, ("notice", *WAYS), rows)
    common.finish(sys.executable, figures)


if __name__ == "__main__":
    common.run(main)
