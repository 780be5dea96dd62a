#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["requests>=2.25"]
# ///
"""Is this VM about to be touched by its cloud? Log it, leave the load balancer in time, come back.

One file, to be read before it is trusted with root. It asks the VM's own metadata service (Azure, Google
Compute Engine, EC2), writes what is new to syslog or the Windows Event Log, runs the administrator's drain
command before the blow and the restore command after it. From top to bottom: the model, the metadata client,
the providers, the detection of the cloud, the plan (pure: all the rules), the journal, the effects on the
world, the modes, the command line. Each part knows only those above it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import gc
import json
import math
import os
import re
import socket
import stat
import sys
import time
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Callable, NamedTuple
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# Modules that few runs need (shlex, signal, subprocess, tempfile, threading) are imported where they are used:
# most runs find nothing, and a check every five minutes on every VM should cost next to nothing.
gc.disable()  # looking for garbage among modules, now and at exit, finds none and takes a tenth of such a run
try:
    import requests
    import urllib3
except ImportError:  # main() says how to get it; --help and --version work without
    if not TYPE_CHECKING:
        requests = None
gc.freeze()
gc.enable()

__version__ = "0.1.0"

TAG = "IsVmInMaint"
MAX_BODY = 1 << 20  # bytes; the longest real answer has a few thousand
MAX_TEXT = 256  # characters of one piece of cloud text
MAX_RESOURCES = 256  # names handed on: more would not fit into a hook's environment
REHEARSAL_PAUSE = 5.0  # seconds between drain and restore
RETRY = 60.0  # seconds after which --watch tries a failed hook again
OK, NOT_IN_MAINTENANCE, USAGE, CANNOT_TELL, FAILED = 0, 1, 2, 3, 4  # exit statuses

TYPES_OF_IMPACT = {
    "freeze": "Freeze system-maintenance",
    "migrate": "MIGRATE_ON_HOST_MAINTENANCE",
    "reboot": "Maintenance Reboot instance-reboot system-reboot",
    "redeploy": "Redeploy",
    "stop": "TERMINATE_ON_HOST_MAINTENANCE UPCOMING_MAINTENANCE instance-stop spot-stop spot-hibernate",
    "terminate": "Preempt Terminate PREEMPTED instance-retirement spot-terminate asg-terminated",
    "rebalance": "rebalance-recommendation",
    "unknown": "",  # everything else
}
IMPACT_OF_TYPE = {type: impact for impact, types in TYPES_OF_IMPACT.items() for type in types.split()}


# ---- 1. Model ----------------------------------------------------------------------------------------


class Event(NamedTuple):
    """One piece of maintenance announced for this VM. All its text has been through clean()."""

    provider: str
    id: str
    type: str  # the cloud's own word
    impact: str  # a key of TYPES_OF_IMPACT
    status: str  # "scheduled" or "started"
    not_before: datetime | None = None  # aware, UTC; None: it may begin at any moment
    duration_seconds: int | None = None
    source: str | None = None
    description: str | None = None
    resources: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the event as the JSON document and the state file have it."""
        return {**self._asdict(), "not_before": iso_time(self.not_before), "resources": list(self.resources)}

    def to_log(self) -> dict[str, str | None]:
        """Return the fields of the event's log line, in their order."""
        fields = self.to_json()
        names = ("impact", "type", "status", "not_before", "provider", "id", "source", "description")
        return {name: fields[name] for name in names}


class Instance(NamedTuple):
    """Who this VM is, as far as its cloud says."""

    id: str | None = None
    name: str | None = None
    update_domain: str | None = None
    fault_domain: str | None = None
    location: str | None = None


class Reading(NamedTuple):
    """What the metadata service says now: the events understood, a sentence for each answer that was not.

    With a doubt the list may be incomplete, so an event that is missing from it is not over.
    """

    events: tuple[Event, ...]
    doubts: tuple[str, ...] = ()
    answered: bool = True  # False: not one question was answered


def utcnow() -> datetime:
    """Return the present time, aware, UTC."""
    return datetime.now(timezone.utc)


def iso_time(when: datetime | None) -> str | None:
    """Return a UTC time as the log and the JSON document have it: `2026-11-22T10:00:00Z`."""
    return when.isoformat()[:19] + "Z" if when else None


def parse_time(value: object) -> datetime | None:
    """Return the aware UTC time that a cloud wrote, or None when it cannot be read as one.

    Known forms: `Mon, 11 Apr 2026 22:26:58 GMT` and `21 Jan 2019 09:00:43 GMT` (the day of the week is not
    checked: the clouds' own examples have it wrong), ISO 8601, and `9/15/2015 6:42:51 AM` (azure-v1).
    """
    text = value.strip() if isinstance(value, str) else ""
    iso = re.fullmatch(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.\d+)?([Zz]|[+-]\d\d:?\d\d)?", text)
    try:
        if iso:
            parsed = datetime.strptime(iso[1] + iso[2] + (iso[3] or "Z").upper(), "%Y-%m-%d%H:%M:%S%z")
        elif "/" in text:
            parsed = datetime.strptime(text, "%m/%d/%Y %I:%M:%S %p")
        else:
            parsed = parsedate_to_datetime(text)
        return parsed.astimezone(timezone.utc) if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def clean(text: str) -> str:
    """Return cloud text made safe for one log line: no control characters, at most MAX_TEXT characters."""
    # isprintable() is false for the line breaks of every script, terminal escapes, overrides of the writing
    # direction, and the lone surrogates that JSON lets in and UTF-8 refuses.
    return "".join(c if c.isprintable() else " " for c in text[:MAX_TEXT]).strip()


def clean_or_none(value: object) -> str | None:
    """Return a text field of an answer, cleaned; None when it is missing, empty or no text."""
    return (clean(value) or None) if isinstance(value, str) else None


# ---- 2. Metadata client ------------------------------------------------------------------------------


class CannotTell(Exception):
    """The metadata service could not be reached or understood; the text says what was asked and came back."""


class Unreachable(CannotTell):
    """There was no whole answer, so asking the next question is of no use."""


class Reply(NamedTuple):
    """One whole answer of the metadata service, whatever its status."""

    question: str  # for messages: "GET http://169.254.169.254/..."
    status: int
    headers: Any  # a mapping without regard to case
    body: bytes

    def not_understood(self, why: str) -> CannotTell:
        """Return the error that says what was asked and what came back."""
        seen = clean(self.body[:100].decode("utf-8", "replace"))
        return CannotTell(f"{self.question}: {why}; the answer, status {self.status}, begins {seen!r}")

    def expect(self, *statuses: int) -> Reply:
        """Return itself if its status is one of these; raise CannotTell otherwise."""
        if self.status in statuses:
            return self
        if 300 <= self.status < 400:
            raise self.not_understood("a redirect, which no metadata service sends, so it is not followed")
        raise self.not_understood("refused (is --provider right?)" if self.status == 404 else "refused")

    def text(self) -> str:
        """Return the body as text; raise CannotTell when it is not UTF-8."""
        try:
            return self.body.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise self.not_understood("not UTF-8") from None

    def json(self, kind: type) -> Any:
        """Return the body as a JSON value of this kind (dict or list); raise CannotTell otherwise."""
        try:
            value = json.loads(self.text())
        except (ValueError, RecursionError):
            raise self.not_understood("not JSON") from None
        if not isinstance(value, kind):
            raise self.not_understood(f"a JSON {kind.__name__} is wanted")
        return value

    def need_text(self, document: Any, key: str) -> str:
        """Return a text without which there is no event; raise CannotTell."""
        text = clean_or_none(document.get(key) if isinstance(document, dict) else None)
        if text is None:
            raise self.not_understood(f"an event without a usable {key}")
        return text


class MetadataClient:
    """The only place that talks to the metadata service: no proxy, no redirect, bounded size and time."""

    def __init__(self, base: str) -> None:
        self.base = base.rstrip("/")
        self.deadline = 0.0  # time.monotonic() by which the answer under way must be complete
        self.session = requests.Session()
        self.session.trust_env = False  # no HTTP_PROXY, no ~/.netrc: nobody stands in between
        self.session.headers.clear()
        self.session.headers["User-Agent"] = f"is-vm-in-maint/{__version__}"
        adapter = requests.adapters.HTTPAdapter()
        adapter.poolmanager.pool_classes_by_scheme = {"http": self._pool_with_deadline()}
        self.session.mount("http://", adapter)

    def _pool_with_deadline(self) -> type[urllib3.HTTPConnectionPool]:
        """Return a connection pool whose sockets obey `deadline`.

        The time-outs of requests start anew with every byte, so an answer that drips would never end.
        """
        client = self

        class Socket(socket.socket):
            def recv_into(self, *args: Any, **kwargs: Any) -> int:
                left = client.deadline - time.monotonic()
                if left <= 0:
                    raise socket.timeout("timed out")
                self.settimeout(left)
                return super().recv_into(*args, **kwargs)

        class Connection(urllib3.connection.HTTPConnection):
            def _new_conn(self) -> socket.socket:
                return Socket(fileno=super()._new_conn().detach())

        class Pool(urllib3.HTTPConnectionPool):
            ConnectionCls = Connection

        return Pool

    def ask(self, method: str, path: str, headers: dict[str, str], seconds: float, json: Any = None) -> Reply:
        """Return the whole answer; raise Unreachable when there is none within `seconds`."""
        question = f"{method} {self.base}{path}"
        limits = (min(5.0, seconds), seconds)  # to connect, to read
        self.deadline = time.monotonic() + seconds
        try:
            response = self.session.request(
                method,
                self.base + path,
                headers=headers,
                json=json,
                timeout=limits,
                allow_redirects=False,
                stream=True,
            )
            try:
                body = response.raw.read(MAX_BODY + 1, decode_content=False)
            finally:
                response.close()  # an answer read to its end has already given its connection back
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            cause: BaseException = error
            while inner := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
                cause = inner  # the innermost says it in plain words
            why = clean(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__)
            why = f"no whole answer within {seconds:.0f} s" if "timed out" in why else f"no answer: {why}"
            raise Unreachable(f"{question}: {why} (is --provider right? does a firewall forbid it?)") from None
        reply = Reply(question, response.status_code, response.headers, body)
        if len(body) > MAX_BODY:
            raise reply.not_understood("longer than 1 MiB")
        if response.headers.get("Content-Length", str(len(body))) != str(len(body)):
            raise reply.not_understood("cut short")
        return reply


# ---- 3. Providers ------------------------------------------------------------------------------------

Question = Callable[[], "Iterable[Event]"]  # asks for one key; yields its events, raises CannotTell


class Provider:
    """One protocol of metadata services: turns bytes into Events; knows nothing of state, logs or hooks."""

    name = ""
    home = "http://169.254.169.254"  # link-local (RFC 3927): only the VM itself reaches it
    headers: dict[str, str] = {}
    keys: tuple[str, ...] = ()  # names of the methods that each ask for one key and yield its events
    patience = 10.0  # seconds for a whole answer
    interval = 5.0  # seconds between two readings of --watch

    def __init__(self, endpoint: str | None = None, vm_name: str | None = None) -> None:
        self.client = MetadataClient(endpoint or self.home)
        self.vm_name = vm_name
        self.asked_at = 0.0  # time.monotonic() of the last reading

    def get(self, path: str, seconds: float | None = None) -> Reply:
        """Ask for one key; raise Unreachable."""
        return self.client.ask("GET", path, self.headers, seconds or self.patience)

    def events(self) -> Reading:
        """Return what is announced now. An answer that fails is a doubt and hides nothing of the others."""
        self.asked_at = time.monotonic()
        return self.gather([getattr(self, key) for key in self.keys])

    def gather(self, questions: list[Question]) -> Reading:
        """Return the answers to these questions."""
        found, doubts, answered = {}, [], False
        for question in questions:
            try:
                for event in question():
                    found[event.id] = event
                answered = True
            except CannotTell as error:
                doubts.append(str(error))
                if isinstance(error, Unreachable):
                    break
        return Reading(tuple(found.values()), tuple(doubts), answered)

    def wait(self, seconds: float) -> Reading:
        """Return the next reading: after `interval`, or after `seconds` if that is sooner."""
        time.sleep(max(0.0, min(self.asked_at + self.interval - time.monotonic(), seconds)))
        return self.events()

    def instance(self) -> Instance:
        """Return who this VM is; raise CannotTell when the service does not say."""
        raise NotImplementedError

    def approve(self, event: Event) -> None:
        """Tell the cloud that the event may start; raise CannotTell when it does not take it."""
        raise NotImplementedError

    def new_event(self, type: str, id: str, **known: Any) -> Event:
        """Return an event of this provider."""
        impact = IMPACT_OF_TYPE.get(type, "unknown")
        return Event(self.name, clean(id), clean(type), impact, known.pop("status", "scheduled"), **known)

    @staticmethod
    def each(entries: list[Any], parse: Callable[[Any], Iterable[Event]]) -> Iterator[Event]:
        """Yield the events of a list; a bad entry is reported after the good ones, never instead of them."""
        bad = ""
        for entry in entries:
            try:
                yield from parse(entry)
            except CannotTell as error:
                bad = str(error)
        if bad:
            raise CannotTell(bad)


class AzureV1(Provider):
    """`/metadata/v1/maintenance`, the service of 2015: a reboot within five minutes, or nothing."""

    name = "azure-v1"
    keys = ("maintenance",)

    def maintenance(self) -> Iterator[Event]:
        reply = self.get("/metadata/v1/maintenance").expect(200)
        document = reply.json(dict)
        if document:
            # It begins within five minutes *of* its creation, so the earliest time is the creation itself.
            created = parse_time(document.get("EventCreationTime"))
            yield self.new_event("Maintenance", reply.need_text(document, "EventID"), not_before=created)

    def instance(self) -> Instance:
        document = self.get("/metadata/v1/InstanceInfo").expect(200).json(dict)
        id, update, fault = (clean_or_none(document.get(key)) for key in ("ID", "UD", "FD"))
        return Instance(id, id.lstrip("_") if id else None, update, fault)


class Azure(Provider):
    """Azure Scheduled Events."""

    name = "azure"
    keys = ("scheduled",)
    headers = {"Metadata": "true"}
    patience = 130.0  # the first request of a VM switches the service on: answered after up to two minutes
    interval = 1.0  # the manual's recommendation
    path = "/metadata/scheduledevents?api-version=2020-07-01"

    def __init__(self, endpoint: str | None = None, vm_name: str | None = None) -> None:
        super().__init__(endpoint, vm_name)
        self.legacy: AzureV1 | None = None  # set when only the service of 2015 is there
        self.last_body: bytes | None = None  # not b"": an empty answer is not "nothing new"
        self.last_events: list[Event] = []

    def scheduled(self) -> Iterator[Event]:
        """Yield the events that name this VM: every VM of an availability set sees those of all."""
        reply = self.get(self.path) if not self.legacy else None
        if not reply or reply.status in (404, 410):
            legacy = self.legacy or AzureV1(self.client.base)
            yield from legacy.maintenance()
            self.legacy, self.name, self.interval = legacy, legacy.name, legacy.interval  # for this run
            return
        reply.expect(200)
        self.patience = 10.0  # it is switched on, so from now on silence means that something is wrong
        # The same bytes mean the same events. The incarnation alone would not do: it starts over.
        if reply.body == self.last_body:
            yield from self.last_events
            return
        self.last_body, self.last_events = None, []
        entries = reply.json(dict).get("Events")
        if not isinstance(entries, list):
            raise reply.not_understood('no list of "Events"')
        own = plain_name(self.own_name()) if entries else ""
        for event in self.each(entries, lambda entry: self.parse(reply, entry, own)):
            self.last_events.append(event)
            yield event
        self.last_body = reply.body  # only now: a list that was not understood whole is read again

    def parse(self, reply: Reply, entry: Any, own: str) -> Iterator[Event]:
        type, id = reply.need_text(entry, "EventType"), reply.need_text(entry, "EventId")
        names = entry.get("Resources")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise reply.not_understood('an event without a list of names as "Resources"')
        if own in map(plain_name, names):
            seconds = entry.get("DurationInSeconds")  # -1: unknown
            yield self.new_event(
                type,
                id,
                status="started" if entry.get("EventStatus") == "Started" else "scheduled",
                not_before=parse_time(entry.get("NotBefore")),
                duration_seconds=seconds if isinstance(seconds, int) and seconds >= 0 else None,
                source=clean_or_none(entry.get("EventSource")),
                description=clean_or_none(entry.get("Description")),
                resources=tuple(clean(name) for name in names[:MAX_RESOURCES]),
            )

    def own_name(self) -> str:
        """Return this VM's name; raise CannotTell when it is not to be had: never "all events are mine"."""
        self.vm_name = self.vm_name or self.instance().name
        if not self.vm_name:
            raise CannotTell("the metadata service does not say this VM's name; give it with --vm-name")
        return self.vm_name

    def instance(self) -> Instance:
        if self.legacy:
            return self.legacy.instance()
        reply = self.get("/metadata/instance/compute?api-version=2021-02-01", 10.0).expect(200)
        keys = ("vmId", "name", "platformUpdateDomain", "platformFaultDomain", "location")
        document = reply.json(dict)
        return Instance(*(clean_or_none(document.get(key)) for key in keys))

    def approve(self, event: Event) -> None:
        requests = {"StartRequests": [{"EventId": event.id}]}
        self.client.ask("POST", self.path, self.headers, 10.0, requests).expect(200)


def plain_name(name: str) -> str:
    """Return a VM's name for comparison: case does not count, old api-versions put an underscore before it."""
    return clean(name).casefold()[name.startswith("_") :]


class Gce(Provider):
    """The Compute Engine metadata server."""

    name = "gce"
    home = "http://metadata.google.internal"
    headers = {"Metadata-Flavor": "Google"}
    # The 60 seconds are granted only to those who read maintenance-event itself, not its parent.
    keys = ("maintenance_event", "preempted", "upcoming_maintenance")
    poll = 4.0  # seconds of one long poll, so that `preempted` (30 s notice) is read at least every 5 s

    def __init__(self, endpoint: str | None = None, vm_name: str | None = None) -> None:
        try:
            socket.getaddrinfo(urlsplit(endpoint or self.home).hostname, 80)
        except (OSError, UnicodeError):
            endpoint = endpoint or Provider.home  # the name does not resolve: its address
        super().__init__(endpoint, vm_name)
        self.etag = ""  # of the last value of maintenance-event
        self.nothing_upcoming_until = 0.0  # time.monotonic()

    def get(self, path: str, seconds: float | None = None) -> Reply:
        """Ask for one key. During maintenance any request can get a 503, which says nothing: ask again."""
        for attempt in range(3):
            time.sleep(1.0 if attempt else 0.0)
            reply = super().get(f"/computeMetadata/v1/instance/{path}", seconds)
            if reply.status != 503 or self.no_news(reply):
                break
        if reply.headers.get("Metadata-Flavor") != "Google":
            raise reply.not_understood("somebody else's: it lacks the header Metadata-Flavor: Google")
        return reply

    @staticmethod
    def no_news(reply: Reply) -> bool:
        """Return whether this 503 means that no maintenance was ever planned."""
        return reply.status == 503 and b"no notifications have been received yet" in reply.body

    def maintenance_event(self, query: str = "", seconds: float | None = None) -> Iterator[Event]:
        reply = self.get("maintenance-event" + query, seconds).expect(200)
        value = reply.text()
        if not re.fullmatch(r"[A-Z][A-Z_]{1,63}", value):
            raise reply.not_understood("not a maintenance event")
        self.etag = reply.headers.get("ETag", "")
        if value != "NONE":
            yield self.new_event(value, f"maintenance-event/{value}")  # of its beginning nothing is known

    def preempted(self) -> Iterator[Event]:
        reply = self.get("preempted").expect(200)
        if reply.text() not in ("TRUE", "FALSE"):
            raise reply.not_understood("neither TRUE nor FALSE")
        if reply.text() == "TRUE":
            yield self.new_event("PREEMPTED", "preempted/TRUE", status="started")

    def upcoming_maintenance(self) -> Iterator[Event]:
        reply = self.get("upcoming-maintenance?alt=json")
        # "Nothing planned" comes in four forms: 404, a 503 with words of its own, NONE, and {}.
        if reply.status == 404 or self.no_news(reply) or reply.expect(200).text().strip('"') == "NONE":
            return
        document = {key.replace("_", "").lower(): value for key, value in reply.json(dict).items()}
        if not document:
            return
        begin = parse_time(document.get("windowstarttime") or document.get("starttime"))
        status = document.get("maintenancestatus")
        if begin is None and status not in ("PENDING", "ONGOING"):
            raise reply.not_understood("neither a window_start_time nor a maintenance_status")
        kind = clean_or_none(document.get("type")) or "MAINTENANCE"
        reasons = document.get("maintenancereasons")
        reasons = [word for word in reasons if isinstance(word, str)] if isinstance(reasons, list) else []
        yield self.new_event(
            "UPCOMING_MAINTENANCE",
            f"upcoming-maintenance/{kind}/{iso_time(begin) or 'unknown'}",
            status="started" if status == "ONGOING" else "scheduled",
            not_before=begin,
            description=clean(" ".join([kind, *reasons])),
        )

    def wait(self, seconds: float) -> Reading:
        """Return when maintenance-event changes, or after `poll` seconds; `preempted` is read each time."""
        limit = int(min(self.poll, seconds))
        if not self.etag or limit < 1:
            time.sleep(min(1.0, seconds))
            return self.events()
        query = f"?wait_for_change=true&last_etag={quote(self.etag)}&timeout_sec={limit}"
        # A live migration can leave the connection hanging for ever, so the answer has a limit of its own.
        long_poll = functools.partial(self.maintenance_event, query, limit + 3.0)
        self.etag = ""  # a long poll that fails is followed by a plain reading
        return self.gather([long_poll, self.preempted, self.upcoming_now_and_then])

    def upcoming_now_and_then(self) -> Iterator[Event]:
        """Yield what is planned days ahead; as long as that is nothing, ask once a minute."""
        if time.monotonic() >= self.nothing_upcoming_until:
            upcoming = list(self.upcoming_maintenance())
            self.nothing_upcoming_until = 0.0 if upcoming else time.monotonic() + 60
            yield from upcoming

    def instance(self) -> Instance:
        id, name, zone = (clean(self.get(key).expect(200).text()) for key in ("id", "name", "zone"))
        return Instance(id, name, location=zone.rpartition("/")[2])  # projects/123/zones/europe-west1-b


class Ec2(Provider):
    """EC2 instance metadata, version 2 where there is one."""

    name = "ec2"
    keys = ("scheduled", "spot", "rebalance", "autoscaling")
    token: str | None = None  # "" where the service has none; kept for the run

    def get(self, path: str, seconds: float | None = None) -> Reply:
        """Ask for one key, with a token; one that expired or was revoked (401) is fetched anew, once."""
        for _ in range(2):
            if self.token is None:
                self.token = self.fetch_token()
            self.headers = {"X-aws-ec2-metadata-token": self.token} if self.token else {}
            reply = super().get(f"/latest/meta-data/{path}", seconds)
            if reply.status != 401:
                break
            self.token = None
        return reply

    def fetch_token(self) -> str:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
        reply = self.client.ask("PUT", "/latest/api/token", ttl, self.patience)
        if reply.status in (403, 404, 405):  # an old service
            return ""
        token = reply.expect(200).text()
        if not re.fullmatch(r"[!-~]{1,1024}", token):
            raise reply.not_understood("not a token")
        return token

    def get_if_any(self, path: str) -> Reply | None:
        """Ask for a key that is there (200) only when it has something to say (else 404)."""
        reply = self.get(path).expect(200, 404)
        return reply if reply.status == 200 else None

    def scheduled(self) -> Iterator[Event]:
        reply = self.get_if_any("events/maintenance/scheduled")
        if reply:
            yield from self.each(reply.json(list), functools.partial(self.parse, reply))
        elif not self.token:
            self.get("instance-id").expect(200)  # what answers 404 to everything is no EC2

    def parse(self, reply: Reply, entry: Any) -> Iterator[Event]:
        code, id = reply.need_text(entry, "Code"), reply.need_text(entry, "EventId")
        description = clean_or_none(entry.get("Description"))
        # A finished event stays listed for up to a week.
        marked = (description or "").lower().startswith(("[completed]", "[canceled]"))
        if not marked and entry.get("State") not in ("completed", "canceled"):
            yield self.new_event(code, id, not_before=parse_time(entry.get("NotBefore")), description=description)

    def spot(self) -> Iterator[Event]:
        reply = self.get_if_any("spot/instance-action")
        if reply:
            document = reply.json(dict)
            yield self.dated_event(f"spot-{reply.need_text(document, 'action')}", document.get("time"))

    def rebalance(self) -> Iterator[Event]:
        reply = self.get_if_any("events/recommendations/rebalance")
        if reply:
            yield self.dated_event("rebalance-recommendation", reply.json(dict).get("noticeTime"))

    def dated_event(self, type: str, time: object) -> Event:
        """Return an event that has no id of its own: what and when makes one."""
        when = parse_time(time)
        return self.new_event(type, f"{type}/{iso_time(when) or 'unknown'}", not_before=when)

    def autoscaling(self) -> Iterator[Event]:
        reply = self.get_if_any("autoscaling/target-lifecycle-state")
        if reply and not re.fullmatch(r"[A-Za-z:]{1,64}", reply.text()):
            raise reply.not_understood("not a lifecycle state")
        if reply and reply.text() == "Terminated":
            yield self.new_event("asg-terminated", "asg-terminated")

    def instance(self) -> Instance:
        keys = ("instance-id", "placement/availability-zone")
        id, zone = (clean(self.get(key).expect(200).text()) for key in keys)
        return Instance(id, location=zone)


PROVIDERS: dict[str, type[Provider]] = {kind.name: kind for kind in (Azure, AzureV1, Gce, Ec2)}


# ---- 4. Detection ------------------------------------------------------------------------------------

DMI = "/sys/class/dmi/id/"
XEN_UUID = "/sys/hypervisor/uuid"
AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"  # "Microsoft Corporation" alone is any Hyper-V


def firmware_word(name: str) -> str:
    """Return what the firmware says: sys_vendor, product_name, chassis_asset_tag or xen_uuid; "" for nothing."""
    try:
        if sys.platform != "win32":
            with open(XEN_UUID if name == "xen_uuid" else DMI + name, encoding="ascii", errors="replace") as file:
                return clean(file.read())
        import winreg

        bios = r"HARDWARE\DESCRIPTION\System\BIOS"
        key, value = {
            "sys_vendor": (bios, "SystemManufacturer"),
            "product_name": (bios, "SystemProductName"),
            "chassis_asset_tag": (r"SYSTEM\CurrentControlSet\Services\mssmbios\Data", "SMBiosData"),
        }[name]
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
            found = winreg.QueryValueEx(opened, value)[0]
    except (OSError, KeyError):
        return ""  # not every machine has every word
    if isinstance(found, bytes):  # the raw SMBIOS tables
        return AZURE_ASSET_TAG if AZURE_ASSET_TAG.encode() in found else ""
    return clean(str(found))


def detect() -> str:
    """Return the name of this VM's provider by the firmware's words; raise CannotTell off the known clouds.

    Never by trying addresses: on an unknown network anyone could answer 169.254.169.254.
    """
    names = ("sys_vendor", "product_name", "chassis_asset_tag", "xen_uuid")
    words = {name: firmware_word(name) for name in names}
    if words["chassis_asset_tag"] == AZURE_ASSET_TAG:
        return "azure"
    if words["product_name"].startswith("Google"):
        return "gce"
    if words["sys_vendor"] == "Amazon EC2" or words["xen_uuid"].lower().startswith("ec2"):
        return "ec2"
    seen = ", ".join(f"{name}={word!r}" for name, word in words.items())
    raise CannotTell(
        f"cannot tell which cloud this is: the firmware says {seen}; say it with --provider {'|'.join(PROVIDERS)}"
    )


# ---- 5. Plan -----------------------------------------------------------------------------------------


class State(NamedTuple):
    """What must not be forgotten between two runs."""

    events: dict[str, Event] = {}  # announced and not over, as last logged, by id
    finished: tuple[str, ...] = ()  # ids of the latest events that are over
    drained_for: Event | None = None  # the VM is drained, and this was the reason
    draining: bool = False  # ... or half drained: the drain began, and is not known to have ended well
    approved: tuple[str, ...] = ()  # ids of the events that the cloud was told to start
    unreachable: bool = False  # that the metadata service fails has been said
    boot: str = ""  # identity of the boot in which it was last read whole


class Boot(NamedTuple):
    """This boot of the machine."""

    id: str
    at: datetime  # aware, UTC


class Rules(NamedTuple):
    """What the administrator wants."""

    lead: timedelta = timedelta(minutes=15)
    ignore: frozenset[str] = frozenset(("freeze", "rebalance"))
    drains: bool = False  # there is a drain command
    approves: bool = False


class Action(NamedTuple):
    """One thing to do and then to record."""

    verb: str  # a key of LOG, or "booted", which is only recorded
    event: Event | None = None
    note: str = ""  # the outcome of "over", the reason of "unreachable", the identity of "booted"


def imminent(event: Event, now: datetime, lead: timedelta) -> bool:
    """Return whether the event has started, begins within the lead, or may begin at any moment."""
    return event.status == "started" or event.not_before is None or event.not_before - now <= lead


def survived(event: Event, boot: Boot) -> bool:
    """Return whether this boot came after the event: EC2 still lists it as active for some time after it."""
    scheduled = event.provider == "ec2" and event.type.startswith(("instance-", "system-"))
    return scheduled and (event.not_before is None or event.not_before <= boot.at)


def news(state: State, reading: Reading, now: datetime, boot: Boot) -> list[Action]:
    """Return what has happened to the events since the state was recorded, each thing once."""
    actions = []
    if bool(reading.doubts) != state.unreachable:
        actions.append(Action("unreachable" if reading.doubts else "reachable", note=" ".join(reading.doubts)))
    rebooted = state.boot not in ("", boot.id)
    listed = set()
    for event in reading.events:
        known = state.events.get(event.id)
        if survived(event, boot) and (event.id in state.finished or (known and rebooted)):
            continue
        listed.add(event.id)
        if known is None:
            actions.append(Action("announced", event))
        elif event.status == "started":
            actions += [Action("started", event)] if known.status != "started" else []
        elif known.status == "started" or event.not_before not in (None, known.not_before):  # None: unreadable
            actions.append(Action("moved", event))
    if not reading.doubts:
        for event in state.events.values():
            if event.id not in listed:
                ended = imminent(event, now, timedelta(0))  # it had started, or its time had come
                actions.append(Action("over", event, "ended" if ended else "cancelled"))
        if boot.id != state.boot:
            actions.append(Action("booted", note=boot.id))
    return actions


def plan(state: State, reading: Reading, now: datetime, rules: Rules, boot: Boot) -> list[Action]:
    """Return what is to be done, in order. Pure: no I/O, no clock. All rules of the tool live here.

    With a doubt in the reading nothing is over and nothing is restored: not knowing is never "no maintenance".
    What is known still counts: an event that was announced drains when its time comes.
    """
    actions = news(state, reading, now, boot)
    after = functools.reduce(record, actions, state)
    imminents = [event for event in after.events.values() if imminent(event, now, rules.lead)]
    pressing = [event for event in imminents if event.impact not in rules.ignore]
    if pressing and rules.drains and (after.draining or not after.drained_for):
        actions.append(Action("drain", min(pressing, key=lambda event: event.not_before or now)))
    # Not by a check without hooks, at a shell, say: it would only record that the VM is back.
    if not pressing and rules.drains and after.drained_for and not reading.doubts:
        actions.append(Action("restore", after.drained_for))
    for event in pressing if rules.approves else []:
        # An approval counts for every VM of the event, so only one that hits this VM alone may be approved.
        alone = event.provider == "azure" and len(event.resources) == 1
        if alone and event.status == "scheduled" and event.id not in after.approved:
            actions.append(Action("approve", event))
    return actions


def record(state: State, action: Action) -> State:
    """Return the state in which the action has been done."""
    verb, event = action.verb, action.event
    if verb in ("unreachable", "reachable"):
        return state._replace(unreachable=verb == "unreachable")
    if verb == "booted":
        return state._replace(boot=action.note)
    if verb == "restore" or event is None:
        return state._replace(drained_for=None, draining=False)
    if verb == "drain":
        return state._replace(drained_for=event, draining=False)
    if verb == "approve":
        return state._replace(approved=(*state.approved, event.id)[-50:])
    if verb == "over":
        others = {id: other for id, other in state.events.items() if id != event.id}
        return state._replace(events=others, finished=(*state.finished, event.id)[-50:])
    return state._replace(events={**state.events, event.id: event})


# ---- 6. Journal --------------------------------------------------------------------------------------

ERR, WARNING, NOTICE = 3, 4, 5  # severities of syslog (RFC 5424)
LOG = {  # verb: the words that never change, severity, Windows event ID
    "announced": ("Incoming VM Event", NOTICE, 1),
    "started": ("VM Event started", NOTICE, 2),
    "moved": ("VM Event moved", NOTICE, 3),
    "over": ("VM Event over", NOTICE, 4),
    "drain": ("VM drained", NOTICE, 5),
    "restore": ("VM restored", NOTICE, 6),
    "approve": ("VM Event approved", NOTICE, 7),
    "drain failed": ("VM drain failed", ERR, 20),
    "restore failed": ("VM restore failed", ERR, 20),
    "notify failed": ("Notification failed", WARNING, 21),
    "approve failed": ("VM Event approval failed", WARNING, 22),
    "unreachable": ("Metadata service unreachable", WARNING, 30),
    "reachable": ("Metadata service reachable again", NOTICE, 31),
    "state": ("State problem", WARNING, 40),
}


def logfmt(fields: dict[str, Any]) -> str:
    """Return `key=value key="two words"`; a field that is None is left out."""

    def quoted(value: str) -> str:
        return value if re.fullmatch(r"[^\s\"=\\]+", value) else json.dumps(value, ensure_ascii=False)

    return " ".join(f"{key}={quoted(str(value))}" for key, value in fields.items() if value is not None)


class Journal:
    """Writes single lines to syslog, the Windows Event Log or stderr."""

    def __init__(self, where: str, address: str) -> None:
        self.where = ("eventlog" if os.name == "nt" else "syslog") if where == "auto" else where
        self.address = address
        self.failed = False  # some line could not be written where it belongs

    def write(self, verb: str, fields: dict[str, Any]) -> str:
        """Write one line and return it. What is wrong goes to stderr as well: cron mails that."""
        words, severity, number = LOG[verb]
        line = f"{words}: {logfmt(fields)}"
        said, on_stderr = f"{TAG}: {line}", self.where == "stderr" or severity < NOTICE
        try:
            if self.where == "syslog":
                self.syslog(severity, line)
            elif self.where == "eventlog":
                self.eventlog(severity, number, line)
        except (OSError, ValueError) as error:
            self.failed = on_stderr = True
            said = f"{TAG}: cannot write to the {self.where} ({error}), so here:\n{said}"
        if on_stderr:
            try:
                print(said, file=sys.stderr, flush=True)
            except OSError:  # it is a file on a full disk, or nobody reads it any more: drain all the same
                self.failed = True
        return line

    def syslog(self, severity: int, line: str) -> None:
        """Send one RFC 3164 datagram, to a socket of this machine or to HOST:PORT. Raises OSError, ValueError."""
        now = datetime.now().astimezone()  # local time, as RFC 3164 has it
        stamp = f"{now:%b} {now.day:2} {now:%H:%M:%S}"
        address: Any = self.address
        family = socket.AF_INET
        if "/" in self.address:
            family = socket.AF_UNIX
        else:
            host, _, port = self.address.rpartition(":")
            stamp += f" {socket.gethostname()}"  # only a message to another machine names its host
            family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        facility = 1  # user
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.connect(address)
            client.sendall(f"<{facility * 8 + severity}>{stamp} {TAG}[{os.getpid()}]: {line}".encode())

    def eventlog(self, severity: int, number: int, line: str) -> None:
        """Write to Application through eventcreate, which also registers the source. Raises OSError."""
        import subprocess

        type = {ERR: "ERROR", WARNING: "WARNING", NOTICE: "INFORMATION"}[severity]
        command = [windows_program("eventcreate.exe"), "/L", "APPLICATION", "/SO", TAG, "/ID", str(number)]
        # No shell, and one list of arguments: whatever the line contains, it stays one argument.
        try:
            done = subprocess.run([*command, "/T", type, "/D", line], capture_output=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:
            raise OSError("eventcreate did not end within 30 s") from None
        if done.returncode:
            said = clean((done.stderr or done.stdout).decode("utf-8", "replace"))
            raise OSError(f"eventcreate: {said or done.returncode}; is this an elevated prompt?")


def windows_program(name: str) -> str:
    """Return the path of a program that comes with Windows, never one of the same name on the PATH."""
    return os.path.join(os.environ.get("SystemRoot", r"C:\Windows"), "System32", name)


# ---- 7. Effects --------------------------------------------------------------------------------------


def untrusted(path: str) -> str:
    """Return why others than root (and this user) could change a file or folder, or "" if they cannot."""
    if os.name == "nt":
        return ""  # Windows has access lists instead; the installer sets them
    forbidden = 0o022 if os.geteuid() == 0 else 0o002  # a user's own group is the user
    for start in {os.path.abspath(path), os.path.realpath(path)}:
        place, above = start, ""
        while place != above:
            info = os.lstat(place)
            # Nobody can replace another's file in a folder with the sticky bit, such as /tmp.
            sticky = place != start and stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX
            if info.st_uid not in (0, os.geteuid()):
                return f"{place} belongs to another user (chown root {place})"
            if info.st_mode & forbidden and not sticky and not stat.S_ISLNK(info.st_mode):
                return f"{place} may be written by others (chmod go-w {place})"
            place, above = os.path.dirname(place), place
    return ""


class Store:
    """The state directory: `state.json` and `lock`. All methods raise OSError."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = os.path.join(folder, "state.json")
        self.lock_file: Any = None

    def lock(self, ends: float, patience: float) -> bool:
        """Return whether this run is the only one, from now until the process ends.

        `ends`: epoch seconds at which this run will end, written down for the next one, which waits up to
        `patience` seconds for a run that ends within that time.
        """
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        reason = untrusted(self.folder)
        if reason:
            raise PermissionError(f"{reason}, or name another folder with --state")
        path = os.path.join(self.folder, "lock")
        self.lock_file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        give_up = time.monotonic() + patience
        while not lock_now(self.lock_file):
            self.lock_file.seek(0)
            word = self.lock_file.read(32).decode("ascii", "replace")
            other_ends = float(word) if re.fullmatch(r"\d+\.\d+|inf", word) else 0.0
            if time.monotonic() >= give_up or other_ends > time.time() + patience:
                return False
            time.sleep(0.1)
        self.lock_file.seek(0)
        self.lock_file.truncate()
        self.lock_file.write(str(ends).encode())
        return True

    def load(self) -> State:
        """Return the state; no file is an empty one. Raises ValueError when it is not a state file."""
        try:
            with open(self.path, encoding="utf-8") as file:
                return state_from_json(json.load(file))
        except FileNotFoundError:
            return State()
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None

    def set_aside(self) -> str:
        """Rename a state file that cannot be read; return its new name."""
        name = f"{self.path}.unreadable-{utcnow():%Y%m%dT%H%M%SZ}"
        os.replace(self.path, name)
        return name

    def save(self, state: State) -> None:
        """Replace the state file as a whole; it is on the disk when this returns."""
        new = f"{self.path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)  # left by a run that was killed
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            events = [event.to_json() for event in state.events.values()]
            drained_for = state.drained_for.to_json() if state.drained_for else None
            json.dump({**state._asdict(), "events": events, "drained_for": drained_for}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        if os.name != "nt":  # the new name too must be on the disk before the VM goes down
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


def state_from_json(document: Any) -> State:
    """Return the state of a state file. Raises ValueError, TypeError, KeyError or AttributeError."""

    def event(fields: dict[str, Any]) -> Event:
        found = Event(**{name: fields[name] for name in Event._fields})
        if not all(isinstance(text, str) for text in (*found[:5], *found.resources)):
            raise ValueError("an event with a field of the wrong type")
        return found._replace(not_before=parse_time(found.not_before), resources=tuple(found.resources))

    return State(
        events={known.id: known for known in map(event, document["events"])},
        finished=tuple(map(str, document["finished"])),
        drained_for=event(document["drained_for"]) if document["drained_for"] else None,
        approved=tuple(map(str, document["approved"])),
        draining=bool(document.get("draining")),
        unreachable=bool(document["unreachable"]),
        boot=str(document["boot"]),
    )


def lock_now(file: Any) -> bool:
    """Take the file's lock if it is free. It goes with the process, however that ends. Raises OSError."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 20)  # beyond the text: nobody else can read a byte that is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise
        return False
    return True


def this_boot() -> Boot:
    """Return the identity of this boot and when it was."""
    on_linux = sys.platform == "linux"
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME) if on_linux else time.monotonic()
    at = utcnow() - timedelta(seconds=uptime)
    if not on_linux:
        return Boot(f"{at:%Y-%m-%dT%H:%M}", at)
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return Boot(file.read().strip(), at)


def nameless_file() -> Any:
    """Return an empty file; in memory where that can be, because a full disk must not keep a VM from draining."""
    if sys.platform == "linux":
        return open(os.memfd_create("is_vm_in_maint"), "w+b")
    import tempfile

    return tempfile.TemporaryFile()


class HookFailed(Exception):
    """The hook did not do its work; the text says why, with the end of its output."""


def find_hook(words: Sequence[str]) -> str:
    """Return the path of the hook's program; raise HookFailed if nobody can run it, or root should not."""
    import shutil

    program = shutil.which(words[0])
    if program is None:
        raise HookFailed(f"{words[0]}: not found, or not executable (chmod +x)")
    reason = untrusted(program) if os.name != "nt" and os.geteuid() == 0 else ""
    if reason:
        raise HookFailed(f"{program} is refused, because root would run what others can change: {reason}")
    return program


def run_hook(words: Sequence[str], variables: dict[str, str], document: dict[str, Any], limit: float) -> None:
    """Run a command without a shell; raise HookFailed if it did not succeed within `limit` seconds.

    The document is what it reads on its standard input.
    """
    import subprocess

    program = find_hook(words)
    environment = {**os.environ, **variables}
    environment.pop("NOTIFY_SOCKET", None)  # systemd listens to us alone
    group: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    # Files, not pipes: a daemon that the hook leaves behind may keep them open for as long as it likes.
    with nameless_file() as given, nameless_file() as output:
        given.write(json.dumps(document).encode())
        given.seek(0)
        command = [program, *words[1:]]
        try:
            process = subprocess.Popen(command, stdin=given, stdout=output, stderr=output, env=environment, **group)
        except OSError as error:
            raise HookFailed(f"{program}: {error.strerror}") from None
        give_up = time.monotonic() + limit
        try:
            while process.poll() is None and time.monotonic() < give_up:
                tell_systemd("WATCHDOG=1")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(1.0, give_up - time.monotonic()))
        finally:
            ended = process.poll() is not None
            if not ended:  # on Ctrl-C too: a drain must not go on while a rehearsal restores
                kill_group(process)
        if ended and process.returncode == 0:
            return
        problem = f"ended with status {process.returncode}"  # negative: the signal
        problem = problem if ended else f"killed after {limit:.0f} s (--hook-timeout)"
        output.seek(max(0, output.seek(0, os.SEEK_END) - MAX_TEXT))
        raise HookFailed(f"{program} {problem}: {clean(output.read().decode('utf-8', 'replace'))}")


def kill_group(process: Any) -> None:
    """End a hook and all its children, those too that ignore SIGTERM."""
    import signal
    import subprocess

    if os.name == "nt":
        taskkill = [windows_program("taskkill.exe"), "/T", "/F", "/PID", str(process.pid)]
        subprocess.run(taskkill, capture_output=True, timeout=30, check=False)
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(3)


def notify(url: str, posts: list[dict[str, Any]], journal: Journal) -> bool:
    """POST each transition, three tries within ten seconds. A dead webhook is a warning, and no more."""
    for post in posts:
        for attempt in range(3):
            time.sleep(0.3 if attempt else 0.0)
            try:
                # Not the metadata service: the system's proxies and certificates count here. Of the answer only
                # the status counts; a redirect did not take it, and following it would turn the POST into a GET.
                with requests.post(url, json=post, timeout=1.5, allow_redirects=False, stream=True) as reply:
                    if not 200 <= reply.status_code < 300:
                        raise requests.HTTPError(response=reply)
                break
            except (requests.RequestException, OSError) as error:
                # Neither the URL nor the error's text, which repeats it: the path of a webhook is a secret.
                status = getattr(getattr(error, "response", None), "status_code", None)
                reason = f"{type(error).__name__}, status {status}" if status else type(error).__name__
        else:
            journal.write("notify failed", {"host": urlsplit(url).hostname, "reason": reason})
            return False
    return True


def tell_systemd(message: str) -> None:
    """Speak sd_notify(3) where systemd listens; elsewhere do nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        address = "\0" + address[1:] if address.startswith("@") else address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(message.encode(), address)


# ---- 8. Modes ----------------------------------------------------------------------------------------


def in_words(seconds: float) -> str:
    """Return a duration as a person says it: `4 min 12 s`, `2 days 4 h`."""
    parts, rest = [], max(0, int(seconds))
    for name, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        parts += [f"{count} {name}"] if count else []
    return " ".join(parts[:2]) or "0 s"


def sentence(event: Event, now: datetime) -> str:
    """Return what an event means to a person."""
    when = "may begin at any moment"
    if event.status == "started":
        when = "has started"
    elif event.not_before and event.not_before > now:
        when = f"in {in_words((event.not_before - now).total_seconds())}"
    what = "Maintenance" if event.impact == "unknown" else event.impact.capitalize()
    return f"{what} {when}: {event.description or event.type}"


class Check:
    """One check, or the same check again and again: what it works with, what it knows, what it does."""

    def __init__(self, options: argparse.Namespace, provider: Provider) -> None:
        self.options = options
        self.provider = provider
        self.journal = Journal(options.log, options.syslog)
        self.store = Store(options.state)
        self.rules = Rules(options.lead, options.ignore, bool(options.drain), options.approve)
        self.boot = this_boot()
        self.state = State()
        self.reading = Reading(())
        self.status = OK
        self.state_failed = False  # then it is no longer written, so that what is there is kept
        self.retry_at = 0.0  # time.monotonic() before which a failed hook is not tried again
        self.known_instance = Instance(name=options.vm_name)
        self.ask_instance_at = 0.0  # time.monotonic() from which the metadata service is asked (again)
        self.posts: list[dict[str, Any]] = []  # for --notify

    def instance(self) -> Instance:
        """Return who this VM is, as far as the metadata service says."""
        if self.reading.answered and time.monotonic() >= self.ask_instance_at:
            self.ask_instance_at = time.monotonic() + 60
            with contextlib.suppress(CannotTell):
                self.known_instance = self.provider.instance()
                self.ask_instance_at = math.inf
        return self.known_instance

    def in_maintenance(self) -> bool | None:
        """Return whether some event is imminent, ignored ones too; None: cannot tell."""
        now = utcnow()
        if any(imminent(event, now, self.rules.lead) for event in self.state.events.values()):
            return True if self.reading.answered else None
        return None if self.reading.doubts else False

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "provider": self.provider.name,
            "checked_at": iso_time(utcnow()),
            "instance": self.instance()._asdict(),
            "in_maintenance": self.in_maintenance(),
            "drained": self.state.drained_for is not None and not self.state.draining,
            "events": [event.to_json() for event in self.state.events.values()],
        }

    def sentences(self) -> list[str]:
        """Return what is known, for a person."""
        who, now = self.instance(), utcnow()
        place = "zone " if self.provider.name in ("gce", "ec2") else "location "
        named = {"id ": who.id if self.options.verbose or not who.name else None, "": who.name, place: who.location}
        named.update({"update domain ": who.update_domain, "fault domain ": who.fault_domain})
        here = ", ".join([self.provider.name, *(word + value for word, value in named.items() if value)])
        found = [f"{sentence(event, now)} ({here})" for event in self.state.events.values()]
        if not found and not self.reading.doubts:
            found = [f"No maintenance is announced for this VM ({here})."]
        return found + [f"Cannot tell whether maintenance is coming: {doubt}" for doubt in self.reading.doubts]

    def open(self, ends: float, patience: float = 0.0) -> bool:
        """Take the lock and read the state; return False if another run is at work."""
        try:
            if not self.store.lock(ends, patience):
                return False
        except OSError as error:
            self.state_problem(error)
            if isinstance(error, PermissionError):  # what others may write is not believed
                return True
        try:  # also without the lock: on a disk that is full or read-only, what is known still counts
            try:
                self.state = self.store.load()
            except ValueError as error:
                self.log("state", {"reason": f"{error}; the file is kept as {self.store.set_aside()}"})
        except OSError as error:
            self.state_problem(error)
        return True

    def state_problem(self, error: OSError) -> None:
        """Report, once, that the state cannot be used; events are logged and acted on all the same."""
        if not self.state_failed:
            self.log("state", {"reason": clean(f"cannot use {self.store.folder}: {error}")})
        self.state_failed = True

    def log(self, verb: str, fields: dict[str, Any], event: Event | None = None) -> None:
        """Write to the journal, and keep it for --notify."""
        line = self.journal.write(verb, fields)
        if self.options.notify:
            host = socket.gethostname()
            document = event.to_json() if event else None
            self.posts.append({"text": f"{host}: {line}", "event": document, "host": host})

    def act(self, reading: Reading) -> None:
        """Do what the plan says. Each action is performed, then recorded: none is lost when we are killed."""
        self.reading = reading
        self.status = CANNOT_TELL if reading.doubts else OK
        for action in plan(self.state, reading, utcnow(), self.rules, self.boot):
            if action.verb == "drain":
                # Said before it is done: a drain that fails or is cut short by the reboot itself may have had
                # its effect, and must be undone also if by then nothing is left to drain for.
                self.remember(self.state._replace(drained_for=action.event, draining=True))
            if not self.perform(action):
                self.status = FAILED
                break
            self.remember(record(self.state, action))
        if self.journal.failed or self.state_failed:
            self.status = FAILED

    def remember(self, state: State) -> None:
        """Go on with this state, and save it if that can be."""
        self.state = state
        try:
            if not self.state_failed:
                self.store.save(state)
        except OSError as error:
            self.state_problem(error)

    def perform(self, action: Action) -> bool:
        """Perform one action; return whether it is done."""
        verb, event = action.verb, action.event
        details = event.to_log() if event else {"provider": self.provider.name, "reason": clean(action.note) or None}
        if verb in ("drain", "restore", "approve") and event:
            if time.monotonic() < self.retry_at:
                return False
            try:
                self.provider.approve(event) if verb == "approve" else self.hook(verb, event)
            except (HookFailed, CannotTell, OSError) as error:
                self.retry_at = time.monotonic() + RETRY
                self.log(f"{verb} failed", {"reason": str(error), **details}, event)
                return False
        if verb != "booted":
            self.log(verb, {"outcome": action.note, **details} if verb == "over" else details, event)
        return True

    def hook(self, verb: str, event: Event) -> None:
        """Run the drain or restore command, if there is one; raises HookFailed."""
        words = self.options.drain if verb == "drain" else self.options.restore
        left = (event.not_before - utcnow()).total_seconds() if event.not_before else None
        fields = event.to_log()
        variables = {
            "action": verb,
            "event_id": fields.pop("id"),
            **fields,
            "seconds_left": None if left is None else max(0, int(left)),
            "resources": ",".join(event.resources),
            "rehearsal": "1" if self.options.rehearse else None,
        }
        if words:
            texts = {name: "" if value is None else str(value) for name, value in variables.items()}
            environment = {f"MAINT_{name.upper()}": text for name, text in texts.items()}
            run_hook(words, environment, self.document(), self.options.hook_timeout)

    def post(self) -> Any:
        """Begin to send what was logged to --notify; return the thread. It delays and fails nothing else."""
        import threading

        posts, self.posts = self.posts, []
        thread = threading.Thread(target=notify, args=(self.options.notify, posts, self.journal), daemon=True)
        thread.start()
        return thread


def check_once(check: Check) -> int:
    """Check, log what is new, drain or restore as needed."""
    talkative = sys.stdout.isatty() or check.options.verbose
    if not check.open(ends=0.0):
        if talkative:
            print("Another run is still at work, so this one has nothing to do.")
        return OK
    check.act(check.provider.events())
    if check.posts:
        check.post().join(10)
    if talkative:
        print("\n".join(check.sentences()))
    return check.status


def load_to_look(check: Check) -> None:
    """Read the state without lock or repair, for the modes that change nothing."""
    try:
        check.state = check.store.load()
    except (OSError, ValueError) as error:
        print(f"{TAG}: {check.store.path}: {error}; taken as empty", file=sys.stderr)


def look(check: Check) -> int:
    """The modes that change nothing: --test, --json, --dry-run."""
    load_to_look(check)
    check.reading = check.provider.events()
    actions = plan(check.state, check.reading, utcnow(), check.rules, check.boot)
    to_do = [action for action in actions if action.verb in ("drain", "restore", "approve")]
    check.state = functools.reduce(record, [action for action in actions if action not in to_do], check.state)
    status = CANNOT_TELL if check.reading.doubts else OK
    if check.options.test or check.options.json:
        print("".join(f"{TAG}: {doubt}\n" for doubt in check.reading.doubts), end="", file=sys.stderr)
        if check.options.test:
            return {True: OK, False: NOT_IN_MAINTENANCE, None: CANNOT_TELL}[check.in_maintenance()]
        print(json.dumps(check.document(), indent=1))
        return status
    print("\n".join(check.sentences()))
    for action in actions:
        if action.event:
            what = action.verb if action in to_do else f"log {LOG[action.verb][0]!r}"
            print(f"Would {what}: {logfmt(action.event.to_log())}")
    return status if hooks_are_found(check.options) else FAILED


def hooks_are_found(options: argparse.Namespace) -> bool:
    """Say what would drain and restore; return whether it is there and may be run."""
    found = True
    for name, words in (("drain", options.drain), ("restore", options.restore)):
        try:
            print(f"To {name}: {find_hook(words)}" if words else f"To {name}: nothing, no --{name} is given")
        except HookFailed as error:
            print(f"{TAG}: --{name}: {error}", file=sys.stderr)
            found = False
    return found


class Stopped(BaseException):
    """SIGTERM or SIGINT came while waiting."""


def watch(check: Check, seconds: float) -> int:
    """Check all the time, until stopped or for so many seconds (math.inf: for ever)."""
    import random
    import signal

    ends = time.monotonic() + seconds
    waiting = stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        if waiting:
            raise Stopped

    def patiently(ask: Callable[..., Any], *arguments: Any) -> Any:
        """Call what a signal may cut short. Nothing else may: it is finished and recorded first."""
        nonlocal waiting
        try:
            waiting = True
            if stopped:
                raise Stopped
            return ask(*arguments)
        finally:
            waiting = False

    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), stop)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    began, delay = time.monotonic(), 0.5
    try:
        if not patiently(check.open, time.time() + seconds, 30.0):
            return OK
        tell_systemd("READY=1\nSTATUS=Asking the metadata service for the first time")
        reading = patiently(check.provider.events)
        while True:
            check.journal.failed = False
            check.act(reading)
            if check.posts:
                check.post()
            show(check, time.monotonic() - began)
            left = ends - time.monotonic()
            if left <= 0:
                return check.status
            pause = min(left, due_in(check), 1.0 if sys.stdout.isatty() else math.inf)
            if reading.doubts:
                delay = min(2 * delay, check.provider.interval if reading.answered else 30.0)
                jitter = random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards no secret
                patiently(time.sleep, min(pause, jitter * delay))
                reading = patiently(check.provider.events)
            else:
                delay = 0.5
                reading = patiently(check.provider.wait, pause)
    except Stopped:
        return OK
    finally:
        tell_systemd("STOPPING=1")
        if sys.stdout.isatty():
            print()


def due_in(check: Check) -> float:
    """Return the seconds until the next known event becomes imminent."""
    now = utcnow()
    times = [event.not_before - now for event in check.state.events.values() if event.not_before]
    return min(((at - check.rules.lead).total_seconds() for at in times if at > check.rules.lead), default=math.inf)


def show(check: Check, seconds: float) -> None:
    """Tell systemd, and a person at a terminal in one line that changes in place, what is going on."""
    on_terminal = sys.stdout.isatty()
    if on_terminal or "NOTIFY_SOCKET" in os.environ:
        text = check.sentences()[0]
        tell_systemd(f"WATCHDOG=1\nSTATUS={text}")
        if on_terminal:
            who = " ".join(filter(None, [check.provider.name, check.known_instance.name or check.known_instance.id]))
            line = f"{who}, watched {in_words(seconds)}. {text}"[: os.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="", flush=True)


def rehearse(check: Check) -> int:
    """Go through log, drain, wait and restore once with a made-up event; say how each step went.

    It takes no lock, since --watch holds that all the time, and writes no state.
    """

    def step(name: str, act: Callable[[], bool]) -> bool:
        began = time.monotonic()
        good = act()
        print(f"{'ok' if good else 'FAILED':6}  {name:8} {time.monotonic() - began:6.1f} s", flush=True)
        return good

    def pause() -> bool:
        time.sleep(REHEARSAL_PAUSE)
        return True

    import signal

    for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C: a lost connection must not leave the VM drained either
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    load_to_look(check)
    if check.state.drained_for:
        print("This VM is drained for a real event, so there is no rehearsal now.")
        return FAILED
    now, words = utcnow(), "REHEARSAL made up by --rehearse: no maintenance is coming"
    event = check.provider.new_event("Rehearsal", f"rehearsal-{iso_time(now)}", source="rehearsal", description=words)
    event = event._replace(impact="reboot", not_before=now + check.rules.lead)
    check.reading = check.provider.events()
    could_read = step("metadata", lambda: not check.reading.doubts)
    print("".join(f"{TAG}: {doubt}\n" for doubt in check.reading.doubts), end="", file=sys.stderr)
    check.state = State({event.id: event})
    good = step("log", lambda: check.perform(Action("announced", event)) and not check.journal.failed)
    try:
        good &= step("drain", lambda: check.perform(Action("drain", event)))
        step("wait", pause)
    finally:  # Ctrl-C too must not leave the VM drained
        load_to_look(check)
        if check.state.drained_for:
            print("A real event has drained this VM meanwhile, so it stays drained.")
        else:
            check.retry_at = 0.0
            good &= step("restore", lambda: check.perform(Action("restore", event)))
    if check.posts:
        step("notify", lambda: notify(check.options.notify, check.posts, check.journal))
    print("The rehearsal went well." if good and could_read else "The rehearsal found something to mend.")
    return FAILED if not good else OK if could_read else CANNOT_TELL


# ---- 9. Command line ---------------------------------------------------------------------------------


def duration(text: str) -> float:
    """Return the seconds of `90`, `90s`, `15m`, `2h`."""
    match = re.fullmatch(r"(\d{1,7})([smh]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90, 90s, 15m or 2h")
    return float(int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]])


def impacts(text: str) -> frozenset[str]:
    """Return the impacts of a comma-separated list."""
    words = frozenset(word.strip() for word in text.split(",") if word.strip())
    for word in words.difference(TYPES_OF_IMPACT):
        raise argparse.ArgumentTypeError(f"{word!r} is none of the impacts {', '.join(TYPES_OF_IMPACT)}")
    return words


def command(text: str) -> list[str]:
    """Split like a shell would; on Windows a backslash is only a backslash."""
    import shlex

    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    lexer.escape = "" if os.name == "nt" else lexer.escape
    try:
        words = list(lexer)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if not words:
        raise argparse.ArgumentTypeError("an empty command")
    return words


def matching(pattern: str, form: str) -> Callable[[str], str]:
    """Return a function that lets only texts of this form pass."""

    def check(text: str) -> str:
        try:
            good = re.fullmatch(pattern, text) and urlsplit(text if "//" in text else f"//{text}").port != 0
        except ValueError:  # there is no such port, or a bracket is left open
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
        return text

    return check


def default_state() -> str:
    """Return the state directory: systemd's, this system's for root, or the user's own."""
    if "STATE_DIRECTORY" in os.environ:  # systemd may name several
        return os.environ["STATE_DIRECTORY"].split(":")[0]
    if os.name == "nt":
        return os.path.join(os.environ.get("ProgramData", r"C:\ProgramData"), "IsVmInMaint")
    if os.geteuid() == 0:
        return "/var/lib/is-vm-in-maint"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(home, "is-vm-in-maint")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; on wrong usage print what is wrong and exit with status 2."""
    parser = argparse.ArgumentParser(
        prog="is_vm_in_maint",
        description="Is this VM about to be touched by its cloud? Log it, drain before it, restore after it.",
        epilog="Exit status: 0 the check was done; 1 --test: not in maintenance; 2 wrong usage; 3 the metadata "
        "service could not be reached or understood; 4 a hook failed, or the journal or the state could not "
        "be written. Times are 90, 90s, 15m or 2h.",
        allow_abbrev=False,  # an option added later must not change what a crontab means
    )
    endpoint = matching(r"http://[^/?#@\s]+/?", "http://HOST[:PORT] and no more: the paths are the provider's")
    webhook = matching(r"https?://[^/?#\s]+\S*", "an http:// or https:// URL")
    syslog = matching(r".*/.*|[^:/\s]+:\d+|\[[0-9a-fA-F:.]+\]:\d+", "the path of a socket or HOST:PORT")
    sinks = ("auto", "syslog", "eventlog", "stderr", "none")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--watch", metavar="TIME", nargs="?", type=duration, const=math.inf, help="keep watching, for ever or so long")
    add("--test", action="store_true", help="print nothing; status 0: in maintenance, 1: not, 3: can't tell")
    add("--json", action="store_true", help="change nothing; print what is known as JSON")
    add("--rehearse", action="store_true", help="go through log, drain and restore once, with a made-up event")
    add = parser.add_argument
    add("--provider", choices=["auto", *PROVIDERS], default="auto", help="the cloud (the firmware tells)")
    add("--endpoint", metavar="URL", type=endpoint, help="http://HOST[:PORT] of the metadata service (its own)")
    add("--vm-name", metavar="NAME", help="this VM's name among an event's resources (asked for)")
    add("--drain", metavar="CMD", type=command, help="takes the VM out of service; runs without a shell")
    add("--restore", metavar="CMD", type=command, help="puts the VM back into service; runs without a shell")
    add("--hook-timeout", metavar="TIME", type=duration, default="10m", help="then a hook is killed (10m)")
    add("--lead", metavar="TIME", type=duration, default="15m", help="how long before an event to drain (15m)")
    add("--ignore", metavar="IMPACTS", type=impacts, default="freeze,rebalance", help="log, never drain (%(default)s)")
    add("--approve", action="store_true", help="Azure: after a successful drain tell Azure that it may start")
    add("--notify", metavar="URL", type=webhook, help="POST each transition there as JSON")
    add("--log", choices=sinks, default="auto", help="where to log (the system's own)")
    add("--syslog", metavar="ADDRESS", type=syslog, default="/dev/log", help="a socket or HOST:PORT (/dev/log)")
    add("--state", metavar="DIR", default=default_state(), help="the state directory (%(default)s)")
    add("--dry-run", action="store_true", help="say what would be done; do and record nothing")
    add("-v", "--verbose", action="store_true", help="say what is known also when not at a terminal")
    add("--version", action="version", version=f"is_vm_in_maint {__version__}")
    options = parser.parse_args(argv)
    if not options.drain and (options.approve or options.restore):
        parser.error("--approve and --restore need --drain")
    options.lead = timedelta(seconds=options.lead)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a Windows console has not all letters
    options = parse_arguments(argv)
    if requests is None:
        print(
            f"{TAG}: the Python module requests is missing; install it with `apt-get install python3-requests` "
            "(Debian, Ubuntu), `dnf install python3-requests` (RHEL, Amazon Linux) or `py -m pip install requests` "
            "(Windows)",
            file=sys.stderr,
        )
        return USAGE
    try:
        name = detect() if options.provider == "auto" else options.provider
        check = Check(options, PROVIDERS[name](options.endpoint, options.vm_name))
        if options.test or options.json or options.dry_run:
            return look(check)
        if options.rehearse:
            return rehearse(check)
        if options.watch is not None:
            return watch(check, options.watch)
        return check_once(check)
    except CannotTell as error:
        print(f"{TAG}: {error}", file=sys.stderr)
        # The installers rely on it: images are built off the cloud.
        hooks_fail = options.dry_run and options.drain and not hooks_are_found(options)
        return FAILED if hooks_fail else CANNOT_TELL
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
