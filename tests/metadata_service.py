#!/usr/bin/env python3
"""The simulated clouds: one VM's metadata service, for the tests, the demo and the curious.

As a program in one terminal, and the tool with --provider and --endpoint in another:

    python3 tests/metadata_service.py --provider azure --script tests/scripts/azure.txt

As an object, in threads, over real HTTP on 127.0.0.1:

    with MetadataService("gce") as service:
        event = service.announce("MIGRATE_ON_HOST_MAINTENANCE")
        ...                                # ask service.url
        service.end(event)

It is built as the clouds are: a command of the controller (`Cloud`) reaches the VM's host (`Node`),
the node keeps it until the work is done, and the VM, through HTTP (`Provider`), can only read it.
The one exception is Azure's approval, which travels from the VM back to the controller.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shlex
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http import HTTPStatus
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import parse_qsl

MIB = 1024 * 1024
DRIP_SECONDS = 1.0  # between two bytes of an answer that drips
DRIP_BYTES = 600  # ten minutes at least: longer than any client should listen
PHRASES = {status.value: status.phrase for status in HTTPStatus}

# ---------------------------------------------------------------- the controller and its nodes


class Event(NamedTuple):
    """One piece of maintenance as the controller knows it; a provider shows it in its own words."""

    id: str
    type: str
    vms: tuple[str, ...]
    created: datetime
    not_before: datetime | None
    description: str
    source: str
    duration: int | None  # seconds; None: what is usual for the type
    status: str  # Scheduled, Started; on ec2 also Completed, Canceled


class Node:
    """The host of one VM. It keeps what the controller ordered until the work is done."""

    def __init__(self, vm: str, index: int) -> None:
        self.vm = vm
        self.index = index
        self.events: dict[str, Event] = {}
        self.incarnation = 1  # azure: rises with every change
        self.maintenance_event_was_read = False  # gce: itself, since the last event

    def keep(self, event: Event) -> None:
        if self.events.get(event.id) != event:
            self.events[event.id] = event
            self.incarnation += 1

    def release(self, event: Event) -> None:
        if self.events.pop(event.id, None):
            self.incarnation += 1
            if gce_key(event.type) == "maintenance-event":
                self.maintenance_event_was_read = False


class Cloud:
    """The controller. The VMs of one Cloud form one availability set."""

    def __init__(self, provider: str) -> None:
        if provider not in PROVIDERS:
            raise ValueError(f"no provider {provider!r}; there are {', '.join(PROVIDERS)}")
        self.provider = provider
        self.nodes: dict[str, Node] = {}
        self.events: dict[str, Event] = {}
        self.changed = threading.Condition()  # guards all of the above; long polls wait for it

    def node(self, vm: str) -> Node:
        """The node of a VM. A VM that is new learns of the events that there are already."""
        with self.changed:
            if vm not in self.nodes:
                self.nodes[vm] = Node(vm, len(self.nodes))
                for event in self.events.values():
                    self._order(event)
            return self.nodes[vm]

    def announce(
        self,
        type: str | None = None,
        *,
        id: str | None = None,
        not_before: datetime | float | None = None,
        description: str | None = None,
        vms: Sequence[str] | None = None,
        source: str | None = None,
        duration: int | None = None,
        status: str = "Scheduled",
    ) -> str:
        """Announces an event and returns its id.

        Args:
            type: the cloud's own word; default: the one that is most like a reboot.
            not_before: aware datetime, or seconds from now, or None: not given. azure-v1 and the
                short notices of gce show no time at all.
            vms: names of the VMs that it hits; default: all.
            duration: seconds; -1: unknown.
        """
        kind = type or PROVIDERS[self.provider].types[0]
        with self.changed:
            event = Event(
                id=id or new_id(self.provider),
                type=kind,
                vms=tuple(self.nodes if vms is None else vms),
                created=datetime.now(timezone.utc),
                not_before=as_time(not_before),
                description=DESCRIPTIONS.get(kind, "") if description is None else description,
                source="Platform" if source is None else source,
                duration=duration,
                status=status,
            )
            if event.id in self.events:
                raise ValueError(f"there is an event {event.id!r} already")
            self._order(event)
        return event.id

    def begin(self, event_id: str) -> None:
        """The work starts. Only azure and gce's upcoming-maintenance show it."""
        self._change(event_id, status="Started")

    def move(self, event_id: str, not_before: datetime | float | None) -> None:
        self._change(event_id, not_before=as_time(not_before))

    def cancel(self, event_id: str) -> None:
        self._finish(event_id, "Canceled")

    def end(self, event_id: str) -> None:
        self._finish(event_id, "Completed")

    def forget(self, event_id: str) -> None:
        """The event is listed no more. cancel() and end() see to that themselves, except on ec2."""
        with self.changed:
            event = self._event(event_id)
            del self.events[event_id]
            for node in self.nodes.values():
                node.release(event)
            self.changed.notify_all()

    def approve(self, ids: Sequence[str]) -> bool:
        """Azure's StartRequests, from any VM. False, and nothing done, if an id is not known."""
        with self.changed:
            if not all(event_id in self.events for event_id in ids):
                return False
            for event_id in ids:
                self.begin(event_id)
        return True

    def _event(self, event_id: str) -> Event:
        if event_id not in self.events:
            raise LookupError(f"no event {event_id!r}; there are: {', '.join(self.events)}")
        return self.events[event_id]

    def _change(self, event_id: str, **fields: Any) -> None:
        with self.changed:
            self._order(self._event(event_id)._replace(**fields))

    def _finish(self, event_id: str, status: str) -> None:
        with self.changed:
            event = self._event(event_id)
            if self.provider == "ec2" and event.type not in Ec2.unscheduled:
                # Stays listed for up to a week (WIRE, ec2).
                said = f"[{status}] {event.description}"
                self._change(event_id, status=status, description=said)
            else:
                self.forget(event_id)

    def _order(self, event: Event) -> None:
        self.events[event.id] = event
        for node in self.nodes.values():
            # Every VM of an Azure availability set sees the events of all of them (WIRE, azure).
            if self.provider == "azure" or node.vm in event.vms:
                node.keep(event)
        self.changed.notify_all()


DESCRIPTIONS = {
    "Freeze": "Virtual machine is being paused because of a memory-preserving Live Migration operation.",
    "Reboot": "Host server is undergoing maintenance.",
    "system-reboot": "scheduled reboot",
}


def new_id(provider: str) -> str:
    if provider == "ec2":
        return f"instance-event-{uuid.uuid4().hex[:17]}"
    return str(uuid.uuid4()).upper() if provider == "azure" else str(uuid.uuid4())


def as_time(when: datetime | float | None) -> datetime | None:
    if isinstance(when, datetime):
        if when.tzinfo is None:
            raise ValueError(f"{when} needs a time zone")
        return when.astimezone(timezone.utc)
    return None if when is None else datetime.now(timezone.utc) + timedelta(seconds=when)


def rfc1123(when: datetime | None) -> str:
    return format_datetime(when, usegmt=True) if when else ""


def iso8601(when: datetime | None) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ") if when else ""


def one_of(allowed: Iterable[str], word: str, what: str) -> None:
    if word not in allowed:
        raise ValueError(f"no {what}: {word!r}; there are: {', '.join(filter(None, allowed))}")


def number_of(vm: str) -> str:
    """Hex digits made of a VM's name: its ids are the same in every run."""
    return hashlib.sha256(vm.encode()).hexdigest()


# ---------------------------------------------------------------- what the VM can read


class Request(NamedTuple):
    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case
    at: float  # monotonic seconds
    body: bytes = b""

    @property
    def place(self) -> str:
        return self.path.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.path.partition("?")[2], keep_blank_values=True))


class Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


JSON = "application/json; charset=utf-8"


def text(body: str, kind: str = "text/plain", status: int = 200) -> Answer:
    return Answer(status, body.encode(), (("Content-Type", kind),))


def as_json(value: object, status: int = 200) -> Answer:
    return text(json.dumps(value), JSON, status)


def error(status: int) -> Answer:
    return text(f"<html>{status} {PHRASES.get(status)}</html>\n", "text/html", status)


class Provider:
    """One cloud's protocol, for one VM: turns a request into an answer, and can only read."""

    types: tuple[str, ...] = ()  # of events; the first is the default
    headers: tuple[tuple[str, str], ...] = ()  # on every answer, failures included
    options: tuple[str, ...] = ()  # attributes that MetadataService(...) can set
    nothings: tuple[str, ...] = ("",)  # what the option `nothing` can be, the default first

    def __init__(self, node: Node, cloud: Cloud, **options: Any) -> None:
        self.node = node
        self.cloud = cloud
        self.served: dict[str, Answer] = {}
        self.stopped = threading.Event()
        self.nothing = self.nothings[0]
        for option, value in options.items():
            one_of(self.options, option, f"option of {type(self).__name__}")
            setattr(self, option, value)
        one_of(self.nothings, self.nothing, "way to say nothing")

    def answer(self, request: Request) -> Answer:
        """Refuses the request or answers it, possibly after a while."""
        return self.look(request) if request.method == "GET" else error(405)

    def look(self, request: Request) -> Answer:
        """What is there now."""
        with self.cloud.changed:
            return self.served.get(request.place) or self.page(request)

    def page(self, request: Request) -> Answer:
        raise NotImplementedError


class AzureV1(Provider):
    """The service of 2015: no header, no version, one event at a time."""

    types = ("Maintenance",)
    headers = (("Server", "Microsoft-IIS/8.5"),)

    def page(self, request: Request) -> Answer:
        if request.place == "/metadata/v1/maintenance":
            mine = [event for event in self.node.events.values() if self.node.vm in event.vms]
            # The real service escapes the slashes of its dates.
            return text(json.dumps(first_event(mine)).replace("/", "\\/"), JSON)
        if request.place == "/metadata/v1/InstanceInfo":
            update_domain, fault_domain = domains(self.node)
            return as_json({"ID": f"_{self.node.vm}", "UD": update_domain, "FD": fault_domain})
        return error(404)


def first_event(events: list[Event]) -> dict[str, str]:
    """{} or the first event with its time of creation as the service wrote it in 2015."""
    if not events:
        return {}
    at = events[0].created
    clock = f"{at.hour % 12 or 12}:{at:%M:%S} {'AM' if at.hour < 12 else 'PM'}"
    created = f"{at.month}/{at.day}/{at.year} {clock}"
    return {"EventID": events[0].id, "EventCreationTime": created}


def domains(node: Node) -> tuple[str, str]:
    """Update and fault domain; an availability set has five and three by default."""
    return str(node.index % 5), str(node.index % 3)


class Azure(Provider):
    """Scheduled Events."""

    types = ("Reboot", "Freeze", "Redeploy", "Preempt", "Terminate")
    headers = (("Server", "Microsoft-IIS/10.0"),)
    events_place = "/metadata/scheduledevents"
    versions = (*("2017-03-01", "2017-08-01", "2017-11-01", "2019-01-01"), *("2019-04-01", "2019-08-01", "2020-07-01"))
    options = ("first_delay", "legacy", "iso_dates", "scale_set")
    first_delay = 0.0  # seconds until the first request has switched the service on
    legacy: int | None = None  # 404 or 410: how an Azure that has only the service of 2015 refuses
    iso_dates = False  # NotBefore in ISO 8601
    scale_set = ""  # vmScaleSetName

    def __init__(self, node: Node, cloud: Cloud, **options: Any) -> None:
        super().__init__(node, cloud, **options)
        self.on_at: float | None = None  # monotonic; None: switched off
        self.approvals: list[str] = []
        self.before = AzureV1(node, cloud)
        self.before.served = self.served

    def switch_off(self) -> None:
        """As Azure does after 24 hours without a request: the incarnation starts over."""
        with self.cloud.changed:
            self.on_at = None
            self.node.incarnation = 1

    def answer(self, request: Request) -> Answer:
        if self.legacy:
            gone = request.place == self.events_place
            return error(self.legacy) if gone else self.before.answer(request)
        if request.headers.get("metadata", "").lower() != "true":
            return bad_request("Required metadata header not specified")
        if "x-forwarded-for" in request.headers:
            return bad_request("X-Forwarded-For is not allowed")
        if request.place == self.events_place:
            self.wait_until_on()
            if request.method == "POST":
                return self.start_requests(request)
        return super().answer(request)

    def wait_until_on(self) -> None:
        """The first request switches the service on; until it is, every request waits."""
        with self.cloud.changed:
            self.on_at = self.on_at or time.monotonic() + self.first_delay
            left = self.on_at - time.monotonic()
        if left > 0:
            self.stopped.wait(left)

    def page(self, request: Request) -> Answer:
        version = request.query.get("api-version", "")
        if request.place == self.events_place and version in self.versions:
            events = [self.shown(event, version) for event in self.node.events.values()]
            return as_json({"DocumentIncarnation": self.node.incarnation, "Events": events})
        if request.place == "/metadata/instance/compute" and "2017-04-02" <= version <= "2099":
            return as_json(self.compute())
        if request.place in (self.events_place, "/metadata/instance/compute"):
            return bad_request("api-version is invalid or was not specified in the request")
        return error(404)

    def shown(self, event: Event, version: str) -> dict[str, Any]:
        show_time = iso8601 if self.iso_dates else rfc1123
        underscore = "_" if version == "2017-03-01" else ""
        document: dict[str, Any] = {
            "EventId": event.id,
            "EventStatus": event.status,
            "EventType": event.type,
            "ResourceType": "VirtualMachine",
            "Resources": [underscore + vm for vm in event.vms],
            "NotBefore": "" if event.status == "Started" else show_time(event.not_before),
        }
        if version >= "2019-04-01":
            document["Description"] = event.description
        if version >= "2019-08-01":
            document["EventSource"] = event.source
        if version >= "2020-07-01":
            usual = 5 if event.type == "Freeze" else -1
            document["DurationInSeconds"] = usual if event.duration is None else event.duration
        return document

    def compute(self) -> dict[str, str]:
        update_domain, fault_domain = domains(self.node)
        return {
            "name": self.node.vm,
            "vmId": str(uuid.UUID(number_of(self.node.vm)[:32])),
            "platformUpdateDomain": update_domain,
            "platformFaultDomain": fault_domain,
            "location": "westeurope",
            "vmScaleSetName": self.scale_set,
        }

    def start_requests(self, request: Request) -> Answer:
        if request.query.get("api-version") not in self.versions:
            return bad_request("api-version is invalid or was not specified in the request")
        try:
            ids = [each["EventId"] for each in json.loads(request.body)["StartRequests"]]
            approved = bool(ids) and self.cloud.approve(ids)
        except (ValueError, TypeError, KeyError):
            approved = False
        if not approved:
            return bad_request("StartRequests is malformed")
        self.approvals += ids
        return Answer(200)


def bad_request(why: str) -> Answer:
    return as_json({"error": f"Bad request. {why}."}, 400)


def gce_key(event_type: str) -> str:
    """The key that shows events of this type."""
    keys = {"PREEMPTED": "preempted", "UPCOMING_MAINTENANCE": "upcoming-maintenance"}
    return keys.get(event_type, "maintenance-event")


NOT_YET = as_json({"error": "no notifications have been received yet, try again later"}, 503)
NOTHING_UPCOMING = {"{}": as_json({}), "NONE": text("NONE", "application/text"), "not-yet": NOT_YET, "404": error(404)}


class Gce(Provider):
    """The Compute Engine metadata server."""

    types = (*("TERMINATE_ON_HOST_MAINTENANCE", "MIGRATE_ON_HOST_MAINTENANCE"), *("PREEMPTED", "UPCOMING_MAINTENANCE"))
    headers = (("Server", "Metadata Server for VM"), ("Metadata-Flavor", "Google"))
    root = "/computeMetadata/v1/"
    options = ("nothing",)
    nothings = tuple(NOTHING_UPCOMING)  # how upcoming-maintenance says that nothing is

    def answer(self, request: Request) -> Answer:
        if request.headers.get("metadata-flavor") != "Google":
            return error(403)
        if "x-forwarded-for" in request.headers:
            return error(403)
        if request.place == self.root + "instance/maintenance-event":
            self.node.maintenance_event_was_read = True
        if request.query.get("wait_for_change", "").lower() == "true":
            return self.when_changed(request)
        return super().answer(request)

    def when_changed(self, request: Request) -> Answer:
        """The long poll: answers when the value is not that of last_etag, or at the time-out."""
        seconds = request.query.get("timeout_sec")
        if seconds is not None and not seconds.isdecimal():
            return error(400)
        with self.cloud.changed:
            seen = request.query.get("last_etag") or etag(self.look(request))
            self.cloud.changed.wait_for(
                lambda: self.stopped.is_set() or etag(self.look(request)) != seen, int(seconds) if seconds else None
            )
            return self.look(request)

    def page(self, request: Request) -> Answer:
        if request.place == "/":
            return text("computeMetadata/\n", "application/text")
        if not request.place.startswith(self.root):
            return error(404)
        key = request.place[len(self.root) :]
        values = self.values()
        if key == "instance/upcoming-maintenance" and key not in values:
            return NOTHING_UPCOMING[self.nothing]
        if key in values:
            value = values[key]
            plain = not isinstance(value, dict) and request.query.get("alt") != "json"
            return text(str(value), "application/text") if plain else as_json(value)
        inside = directory(values, key)
        if not inside:
            return error(404)
        if request.query.get("recursive", "").lower() == "true":
            return as_json(nested(inside))
        return text(listing(inside), "application/text")

    def values(self) -> dict[str, Any]:
        shown: dict[str, Event] = {}
        for event in self.node.events.values():
            shown.setdefault(gce_key(event.type), event)
        values = {
            "instance/id": int(number_of(self.node.vm)[:15], 16),
            "instance/maintenance-event": "NONE",
            "instance/name": self.node.vm,
            "instance/preempted": "TRUE" if "preempted" in shown else "FALSE",
            "instance/zone": "projects/123456789/zones/europe-west1-b",
            "project/project-id": "sample-project",
        }
        if "maintenance-event" in shown:
            values["instance/maintenance-event"] = shown["maintenance-event"].type
        if "upcoming-maintenance" in shown:
            values["instance/upcoming-maintenance"] = window(shown["upcoming-maintenance"])
        return values


def window(event: Event) -> dict[str, Any]:
    """An event as upcoming-maintenance shows it; booleans come as strings (WIRE, gce)."""
    document: dict[str, Any] = {
        "can_reschedule": "true",
        "maintenance_reasons": ["PLANNED_UPDATE"],
        "maintenance_status": "ONGOING" if event.status == "Started" else "PENDING",
        "type": "SCHEDULED",
    }
    if event.not_before:
        end = event.not_before + timedelta(seconds=event.duration or 7200)
        document["latest_window_start_time"] = iso8601(event.not_before)
        document["window_start_time"] = iso8601(event.not_before)
        document["window_end_time"] = iso8601(end)
    return document


def etag(answer: Answer) -> str:
    return hashlib.blake2b(answer.body, digest_size=8).hexdigest()


def directory(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What is below a key, with or without a slash at its end."""
    prefix = key if key.endswith("/") or not key else key + "/"
    return {each[len(prefix) :]: values[each] for each in values if each.startswith(prefix)}


def listing(inside: Iterable[str]) -> str:
    """A directory's names, one a line; one that is a directory itself ends with a slash."""
    return "\n".join(sorted({"".join(key.partition("/")[:2]) for key in inside}))


def nested(inside: Mapping[str, Any]) -> dict[str, Any]:
    """A directory as ?recursive=true shows it, its keys in camelCase."""
    tree: dict[str, Any] = {}
    for key, value in inside.items():
        *above, name = [words[:1].lower() + words[1:] for words in key.title().split("/")]
        branch = tree
        for each in above:
            branch = branch.setdefault(each.replace("-", ""), {})
        branch[name.replace("-", "")] = value
    return tree


class Ec2(Provider):
    """Instance metadata, version 2."""

    scheduled = (*("system-reboot", "instance-reboot", "system-maintenance"), *("instance-retirement", "instance-stop"))
    spot_actions = ("spot-terminate", "spot-stop", "spot-hibernate")
    unscheduled = (*spot_actions, "rebalance-recommendation", "asg-terminated")
    types = (*scheduled, *unscheduled)
    headers = (("Server", "EC2ws"),)
    root = "/latest/"
    options = (*("token_required", "token_status", "token_ttl_max"), *("clock", "nothing", "lifecycle"))
    token_required = True  # False: a request without a token is answered too
    token_status: int | None = None  # 403, 404, 405: how a service without tokens answers the PUT
    token_ttl_max: float | None = None  # seconds that no token outlives, whatever was asked for
    clock: Callable[[], float] = staticmethod(time.monotonic)  # what tokens grow old by
    lifecycle = ""  # target-lifecycle-state, if the VM is in an Auto Scaling group
    nothings = ("[]", "404")  # how "no scheduled events" is said

    def __init__(self, node: Node, cloud: Cloud, **options: Any) -> None:
        super().__init__(node, cloud, **options)
        self.tokens: dict[str, float] = {}  # and when each expires

    def answer(self, request: Request) -> Answer:
        if request.place == "/latest/api/token":
            return error(self.token_status) if self.token_status else self.new_token(request)
        token = request.headers.get("x-aws-ec2-metadata-token", "")
        checked = (self.token_required or token) and not self.token_status
        if checked and self.tokens.get(token, 0.0) <= self.clock():
            return error(401)
        return super().answer(request)

    def new_token(self, request: Request) -> Answer:
        ttl = "X-aws-ec2-metadata-token-ttl-seconds"
        asked = request.headers.get(ttl.lower(), "")
        if request.method != "PUT":
            return error(405)
        if "x-forwarded-for" in request.headers:
            return error(403)
        if not (asked.isdecimal() and 1 <= int(asked) <= 21600):
            return error(400)
        lives = min(int(asked), self.token_ttl_max or 21600)
        token = uuid.uuid4().hex
        self.tokens[token] = self.clock() + lives
        return Answer(200, token.encode(), ((ttl, str(int(lives))),))

    def page(self, request: Request) -> Answer:
        if not request.place.startswith(self.root):
            return error(404)
        key = request.place[len(self.root) :]
        values = {**self.identity(), **self.announced()}
        if key.rstrip("/") in values:
            return text(values[key.rstrip("/")])
        inside = directory(values, key)
        return text(listing(inside)) if inside else error(404)

    def announced(self) -> dict[str, str]:
        """The keys that tell of events; those that are not there answer 404."""
        values: dict[str, str] = {}
        events = self.node.events.values()
        scheduled = [listed(event) for event in events if event.type not in self.unscheduled]
        if scheduled or self.nothing == "[]":
            values["meta-data/events/maintenance/scheduled"] = json.dumps(scheduled)
        if self.lifecycle:
            values["meta-data/autoscaling/target-lifecycle-state"] = self.lifecycle
        for event in events:
            if event.type in self.spot_actions:
                when = event.not_before or event.created + timedelta(minutes=2)
                action = {"action": event.type[len("spot-") :], "time": iso8601(when)}
                values["meta-data/spot/instance-action"] = json.dumps(action)
            elif event.type == "rebalance-recommendation":
                notice = {"noticeTime": iso8601(event.created)}
                values["meta-data/events/recommendations/rebalance"] = json.dumps(notice)
            elif event.type == "asg-terminated":
                values["meta-data/autoscaling/target-lifecycle-state"] = "Terminated"
        return values

    def identity(self) -> dict[str, str]:
        """Who the VM is, and what clients that others wrote want to know besides."""
        instance_id = "i-" + number_of(self.node.vm)[:17]
        document = {
            "accountId": "123456789012",
            "availabilityZone": "eu-west-1a",
            "instanceId": instance_id,
            "region": "eu-west-1",
        }
        credentials = {
            "Code": "Success",
            "AccessKeyId": "simulated-id",
            "SecretAccessKey": "simulated-secret",
            "Token": "simulated-token",
            "Expiration": "2099-01-01T00:00:00Z",
        }
        return {
            "dynamic/instance-identity/document": json.dumps(document),
            "meta-data/iam/security-credentials/web-role": json.dumps(credentials),
            "meta-data/instance-id": instance_id,
            "meta-data/instance-life-cycle": "on-demand",
            "meta-data/instance-type": "m5.large",
            "meta-data/placement/availability-zone": "eu-west-1a",
            "meta-data/placement/region": "eu-west-1",
        }


def listed(event: Event) -> dict[str, str]:
    """A scheduled event. It reads `active` from its announcement on, and even after the reboot."""
    not_after = None
    if event.not_before and event.duration != -1:
        not_after = event.not_before + timedelta(seconds=event.duration or 1000)
    weekday = len("Mon, ")  # is not shown
    return {
        "NotBefore": rfc1123(event.not_before)[weekday:],
        "Code": event.type,
        "Description": event.description,
        "EventId": event.id,
        "NotAfter": rfc1123(not_after)[weekday:],
        "State": event.status.lower() if event.status in ("Completed", "Canceled") else "active",
    }


PROVIDERS: dict[str, type[Provider]] = {"azure-v1": AzureV1, "azure": Azure, "gce": Gce, "ec2": Ec2}

# ---------------------------------------------------------------- failing

# Wrong answers: what becomes of the right one.
WRONG: dict[str, Callable[[Answer], Answer]] = {
    "html": lambda _: text("<html>Sign in to the hotel's Wi-Fi</html>", "text/html"),
    "list": lambda _: as_json([1, "two", None]),
    "number": lambda _: as_json(42),
    "null": lambda _: as_json(None),
    "string": lambda _: as_json("maintenance"),
    "empty": lambda _: Answer(200),
    "not-yet": lambda _: NOT_YET,
    "redirect": lambda _: Answer(302, b"", (("Location", "/redirected"),)),
    "bad-utf8": lambda right: right._replace(body=b"\xff\xfe\x80" + right.body),
    # Right but for the size: white space does no harm in JSON.
    "huge": lambda right: right._replace(body=right.body.ljust(2 * MIB)),
    "gzip-bomb": lambda right: right._replace(
        body=gzip.compress(right.body.ljust(16 * MIB), 1), headers=(*right.headers, ("Content-Encoding", "gzip"))
    ),
    "drip": lambda right: right._replace(body=right.body.ljust(DRIP_BYTES)),
}
WITHOUT_HEADER = {"no-etag": "ETag", "no-flavor": "Metadata-Flavor"}
WRONG_WAYS = ("drip-headers", "hang", "hang-mid-body", "reset", "truncate", "refuse")
FAILURES = (*WRONG, *WITHOUT_HEADER, *WRONG_WAYS)


class Failure:
    def __init__(self, how: int | str, path: str | None = None, times: int | None = None) -> None:
        if not isinstance(how, int) and how not in FAILURES:
            raise ValueError(f"cannot fail {how!r}; an HTTP status or {', '.join(FAILURES)}")
        if how == "refuse" and (path, times) != (None, None):
            raise ValueError("refuse closes the port: it takes neither path nor times")
        self.how = how
        self.path = path or ""
        self.left = times

    def strikes(self, request: Request) -> bool:
        if self.left == 0 or self.path not in request.path:
            return False
        if self.left:
            self.left -= 1
        return True


# ---------------------------------------------------------------- the HTTP server


class MetadataService:
    """The metadata service of one VM, in threads, on 127.0.0.1.

    Args:
        provider: azure-v1, azure, gce or ec2.
        vm: the VM's name.
        cloud: the controller to obey; default: one of its own.
        port: 0: any free one.
        options: those of the provider's class above.

    The controller's begin(), move(), cancel(), end() and forget() are here too.
    """

    def __init__(
        self, provider: str, *, vm: str = "web-1", cloud: Cloud | None = None, port: int = 0, **options: Any
    ) -> None:
        self.provider = provider
        self.vm = vm
        self.port = port
        self.cloud = cloud or Cloud(provider)
        if self.cloud.provider != provider:
            raise ValueError(f"a VM of {provider} cannot be in a cloud of {self.cloud.provider}")
        self.node = self.cloud.node(vm)
        self.begin, self.move, self.cancel = self.cloud.begin, self.cloud.move, self.cloud.cancel
        self.end, self.forget = self.cloud.end, self.cloud.forget
        self.protocol: Any = PROVIDERS[provider](self.node, self.cloud, **options)
        self.requests: list[Request] = []
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._failures: list[Failure] = []
        self._lock = threading.Lock()  # guards the two above
        self._socket = socket.socket()
        self._acceptor: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> MetadataService:
        self.protocol.stopped.clear()
        self._bind()
        self._listen()
        return self

    def stop(self) -> None:
        """Ends whatever waits. It can be started again, on the same port."""
        self.protocol.stopped.set()
        with self.cloud.changed:
            self.cloud.changed.notify_all()
        self._refuse()
        self._socket.close()
        self.drop_connections()

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- the controller's commands

    def announce(self, type: str | None = None, **event: Any) -> str:
        """`Cloud.announce`, by default for this VM only."""
        return self.cloud.announce(type, **{"vms": [self.vm], **event})

    @property
    def approvals(self) -> list[str]:
        """azure: ids of the events that this VM has approved."""
        return list(self.protocol.approvals)

    @property
    def maintenance_event_was_read(self) -> bool:
        """gce: itself, since the last event ended; only then are 60 seconds of notice granted."""
        return self.node.maintenance_event_was_read

    def revoke_tokens(self) -> None:
        """ec2: every token given so far is void."""
        self.protocol.tokens.clear()

    def switch_off(self) -> None:
        """azure: as after 24 hours without a request."""
        self.protocol.switch_off()

    # -- being wrong on purpose

    def fail(self, how: int | str, *, path: str | None = None, times: int | None = None) -> None:
        """Fails the requests that arrive from now on; a long poll that waits already goes on.

        Args:
            how: an HTTP status, or one of FAILURES.
            path: only requests whose path, query included, contains it.
            times: only the next so many of them.
        """
        failure = Failure(how, path, times)
        if how == "refuse":
            self._refuse()
            self.drop_connections()
        with self._lock:
            self._failures.insert(0, failure)

    def serve(
        self, path: str, body: bytes | str, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Exactly this body at this path (without query), long polls included, until heal()."""
        raw = body.encode() if isinstance(body, str) else body
        answer = Answer(status, raw, tuple((headers or {}).items()))
        with self.cloud.changed:
            self.protocol.served[path] = answer
            self.cloud.changed.notify_all()

    def heal(self) -> None:
        """Back to the truth."""
        with self._lock:
            self._failures.clear()
        with self.cloud.changed:
            self.protocol.served.clear()
            self.cloud.changed.notify_all()
        if not self._acceptor:
            self._listen()

    def drop_connections(self) -> None:
        """Closes every open connection, as a restart of the real service would."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with suppress(OSError):  # closed in the meantime
                connection.shutdown(socket.SHUT_RDWR)

    # -- sockets

    def _bind(self) -> None:
        self._socket = socket.socket()
        if os.name == "posix":  # means something else on Windows
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", self.port))
        except (OSError, OverflowError) as problem:
            raise OSError(f"cannot listen on 127.0.0.1:{self.port}: {problem}") from problem
        self.port = self._socket.getsockname()[1]

    def _listen(self) -> None:
        self._socket.listen(128)
        self._acceptor = threading.Thread(target=self._accept, args=(self._socket,), daemon=True)
        self._acceptor.start()

    def _refuse(self) -> None:
        """Bound but not listening, a socket keeps its port and refuses connections."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor:
            socket.create_connection(("127.0.0.1", self.port)).close()  # wakes accept()
            acceptor.join()
            self._socket.close()
            self._bind()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            if self._acceptor is not threading.current_thread():
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            with self._lock:
                self._open.add(connection)
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        """All requests of one connection."""
        with suppress(OSError), connection, connection.makefile("rb") as stream:
            goes_on = True
            while goes_on and (request := read_request(stream)):
                goes_on = self._exchange(connection, request)
        with self._lock:
            self._open.discard(connection)

    def _exchange(self, connection: socket.socket, request: Request) -> bool:
        """Answers one request, or fails to. False: the connection is to be closed."""
        with self._lock:
            self.requests.append(request)
            how = next((each.how for each in self._failures if each.strikes(request)), None)
        if how == "hang":
            return hang(connection)
        if how == "reset":
            linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return False
        answer = error(how) if isinstance(how, int) else self._truth(request, how)
        answer = WRONG[how](answer) if how in WRONG else answer
        head, body = self._head(answer, how), answer.body
        if how in ("drip", "drip-headers"):
            return self._drip(connection, head, body, from_start=how == "drip-headers")
        if how == "hang-mid-body":
            connection.sendall(head + body[: len(body) // 2])
            return hang(connection)
        connection.sendall(head + body)
        return how != "truncate" and request.headers.get("connection", "").lower() != "close"

    def _truth(self, request: Request, how: str | None) -> Answer:
        # What fails does not wait for a change first.
        at_once = how in (*WRONG, *WRONG_WAYS) and "wait_for_change" in request.path
        answer: Answer = self.protocol.look(request) if at_once else self.protocol.answer(request)
        return answer

    def _head(self, answer: Answer, how: int | str | None) -> bytes:
        headers = {**dict(self.protocol.headers), **dict(answer.headers)}
        headers["Content-Length"] = str(len(answer.body) + (100 if how == "truncate" else 0))
        if self.provider == "gce":
            headers["ETag"] = etag(answer)
        headers.pop(WITHOUT_HEADER.get(str(how), ""), None)
        lines = [f"HTTP/1.1 {answer.status} {PHRASES.get(answer.status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _drip(self, connection: socket.socket, head: bytes, body: bytes, *, from_start: bool) -> bool:
        slowly = head + body if from_start else body
        connection.sendall(b"" if from_start else head)
        for byte in slowly:
            connection.sendall(bytes([byte]))
            if self.protocol.stopped.wait(DRIP_SECONDS):
                break
        return False


def hang(connection: socket.socket) -> bool:
    """Says nothing until the client has had enough."""
    while connection.recv(4096):
        pass
    return False


def read_request(stream: BinaryIO) -> Request | None:
    """The next request; None at the end of the connection, and when it is not HTTP."""
    words = stream.readline(65537).decode("latin-1").split()
    if len(words) != 3:
        return None
    headers: dict[str, str] = {}
    while line := stream.readline(65537).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    length = headers.get("content-length", "0")
    body = stream.read(int(length)) if length.isdecimal() else b""
    return Request(words[0], words[1], headers, time.monotonic(), body)


# ---------------------------------------------------------------- scripts


class ScriptError(Exception):
    """A line of a script that cannot be understood: where, what, and what is allowed."""


class Step(NamedTuple):
    at: float  # seconds since the start
    line: str
    command: str
    words: list[str]
    options: dict[str, Any]


# How many words each command takes, and which options.
COMMANDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "announce": (1, ("id", "in", "at", "description", "vms", "source", "duration", "status")),
    "begin": (1, ()),
    "move": (1, ("in", "at")),
    "cancel": (1, ()),
    "end": (1, ()),
    "forget": (1, ()),
    "fail": (1, ("path", "times")),
    "heal": (0, ()),
    "revoke-tokens": (0, ()),
    "switch-off": (0, ()),
    "exit": (0, ()),
}
ONLY_ON = {"forget": "ec2", "revoke-tokens": "ec2", "switch-off": "azure"}


def read_script(script: str, provider: str, name: str = "script") -> list[Step]:
    """Understands all of a script before any of it is played.

    Raises: ScriptError.
    """
    steps: list[Step] = []
    ids: set[str] = set()
    for number, line in enumerate(script.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
            if words:
                steps.append(read_step(words, provider, ids))
            if len(steps) > 1 and steps[-1].at < steps[-2].at:
                raise ValueError(f"{words[0]} is before {steps[-2].at:g}: time goes forward")
        except ValueError as problem:
            hint = "a line is: SECONDS COMMAND ARGUMENTS"
            raise ScriptError(f"{name}, line {number}: {problem} ({hint})") from None
    return steps


def read_step(words: list[str], provider: str, ids: set[str]) -> Step:
    """One line. `ids`, of the events that were announced before it, grows by its own."""
    at, command = seconds(words[0]), (words[1:2] or [""])[0]
    allowed = [each for each in COMMANDS if ONLY_ON.get(each, provider) == provider]
    one_of(allowed, command, f"command for {provider}")
    takes, names = COMMANDS[command]
    plain = [word for word in words[2:] if "=" not in word]
    options = dict(word.split("=", 1) for word in words[2:] if "=" in word)
    for option in options:
        one_of(names, option, f"option of {command}")
    if len(plain) > takes or (len(plain) < takes and command != "announce"):
        raise ValueError(f"{command} takes {takes} word(s), here are {len(plain)}")
    if command == "announce":
        for event_type in plain:
            one_of(PROVIDERS[provider].types, event_type, f"type on {provider}")
        if options.get("id") in ids:
            raise ValueError(f"there is an event {options['id']!r} already")
        ids.add(options.get("id", ""))
        one_of(("Scheduled", "Started"), options.get("status", "Started"), "status")
    elif command == "fail":
        Failure(status_or_way(plain[0]), **understood(options))
    elif plain:
        one_of(sorted(ids), plain[0], "event announced before")
    if command == "move" and len(options) != 1:
        raise ValueError("move needs in=SECONDS or at=TIME")
    line = " ".join("=".join(map(shlex.quote, word.split("=", 1))) for word in words[1:])
    return Step(at, line, command, plain, understood(options))


def status_or_way(word: str) -> int | str:
    return int(word) if word.isdecimal() else word


def understood(options: dict[str, str]) -> dict[str, Any]:
    """A line's options as the Python methods take them."""
    if {"in", "at"} <= options.keys():
        raise ValueError("in= or at=, not both")
    result = {}
    for option, word in options.items():
        name, convert = UNDERSTOOD.get(option, (option, str))
        try:
            result[name] = convert(word)
        except ValueError as problem:
            raise ValueError(f"{option}={word}: {problem}") from None
    return result


def seconds(word: str) -> float:
    with suppress(ValueError):
        if 0 <= float(word) < 1e9:
            return float(word)
    raise ValueError(f"{word!r} is not a number of seconds")


def whole(word: str) -> int:
    if not word.lstrip("-").isdecimal():
        raise ValueError(f"{word!r} is not a whole number")
    return int(word)


def moment(word: str) -> datetime | None:
    return as_time(datetime.fromisoformat(word.replace("Z", "+00:00")))


# What an option is called in Python, and what becomes of its word.
UNDERSTOOD: dict[str, tuple[str, Callable[[str], Any]]] = {
    "in": ("not_before", seconds),
    "at": ("not_before", moment),
    "duration": ("duration", whole),
    "times": ("times", whole),
    "vms": ("vms", lambda word: word.split(",")),
}


def play(
    service: MetadataService,
    script_text: str,
    *,
    name: str = "script",
    say: Callable[[str], object] = print,
    sleep: Callable[[float], object] = time.sleep,
) -> bool:
    """Plays a script, one line said for each step. True if it ended with `exit`.

    Raises: ScriptError, before anything is done.
    """
    now = 0.0
    for step in read_script(script_text, service.provider, name):
        sleep(step.at - now)
        now = step.at
        say(f"{step.at:5g} s  {step.line}")
        if step.command == "exit":
            return True
        words = map(status_or_way, step.words) if step.command == "fail" else step.words
        getattr(service, step.command.replace("-", "_"))(*words, **step.options)
    return False


# ---------------------------------------------------------------- the program


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="The metadata service of a VM that does not exist.",
        epilog="A script is a line for each step: SECONDS COMMAND ARGUMENTS; see tests/scripts. "
        f"Commands: {', '.join(COMMANDS)}. Ways to fail: an HTTP status, {', '.join(FAILURES)}.",
    )
    add = parser.add_argument
    add("--provider", required=True, choices=list(PROVIDERS))
    add("--port", type=int, default=0, help="(0: any free one)")
    add("--vm", nargs="+", default=["web-1"], metavar="NAME", help="several form an availability set (web-1)")
    add("--script", metavar="FILE", help="what happens to the first VM, and when")
    add("--first-delay", type=float, metavar="SECONDS", help="azure: of the first answer (0)")
    options = parser.parse_args(argv)
    if options.first_delay and options.provider != "azure":
        parser.error("--first-delay is for --provider azure")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        run(options)
    except (OSError, UnicodeDecodeError, ScriptError) as problem:
        parser.exit(2, f"{parser.prog}: {problem}\n")
    except KeyboardInterrupt:
        pass
    return 0


def run(options: argparse.Namespace) -> None:
    script = ""
    if options.script:
        with open(options.script, encoding="utf-8") as file:
            script = file.read()
        read_script(script, options.provider, options.script)
    extra = {"first_delay": options.first_delay} if options.first_delay else {}
    cloud = Cloud(options.provider)
    with ExitStack() as running:
        services = []
        for number, vm in enumerate(options.vm):
            port = options.port and options.port + number
            service = MetadataService(options.provider, vm=vm, cloud=cloud, port=port, **extra)
            services.append(running.enter_context(service))
            print(f"Serving {options.provider} for {vm} at {service.url}", flush=True)
        if not play(services[0], script, say=lambda line: print(line, flush=True)):
            while True:
                time.sleep(3600)  # unlike a lock, Ctrl-C ends it on Windows as well


if __name__ == "__main__":
    sys.exit(main())
