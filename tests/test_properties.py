"""Whatever a metadata service says, the tool ends as it should, and no event is lost, invented or repeated.

The tool talks real HTTP to one simulated service a provider, which serves what Hypothesis thinks of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import is_vm_in_maint
from checking import Checked, Vm
from is_vm_in_maint import CANNOT_TELL, NOT_IN_MAINTENANCE, OK, PROVIDERS, Store
from metadata_service import MetadataService

# A slow machine is no failure; the services and the folder are meant to outlive an example.
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
PROPERTY = settings(deadline=None, max_examples=30, suppress_health_check=SUPPRESSED)

GCE = "/computeMetadata/v1/instance/"
EC2 = "/latest/meta-data/"
# The keys of each provider, with what they really say while something is planned.
REAL: dict[str, dict[str, Any]] = {
    "azure-v1": {
        "/metadata/v1/maintenance": {"EventID": "6f0a13a3-dc0d", "EventCreationTime": "9/15/2015 6:42:51 AM"},
        "/metadata/v1/InstanceInfo": {"ID": "_web-1", "UD": "0", "FD": "0"},
    },
    "azure": {
        "/metadata/scheduledevents": {
            "DocumentIncarnation": 2,
            "Events": [
                {
                    "EventId": "C7061BAC-AFDC",
                    "EventStatus": "Scheduled",
                    "EventType": "Freeze",
                    "ResourceType": "VirtualMachine",
                    "Resources": ["web-1", "web-2"],
                    "NotBefore": "Mon, 11 Apr 2026 22:26:58 GMT",
                    "Description": "Virtual machine is being paused.",
                    "EventSource": "Platform",
                    "DurationInSeconds": 5,
                }
            ],
        },
        "/metadata/instance/compute": {"name": "web-1", "vmId": "a", "platformUpdateDomain": "0", "location": "eu"},
        "/metadata/v1/maintenance": {},
    },
    "gce": {
        f"{GCE}maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE",
        f"{GCE}preempted": "TRUE",
        f"{GCE}upcoming-maintenance": {
            "can_reschedule": "true",
            "maintenance_reasons": ["PLANNED_UPDATE"],
            "maintenance_status": "PENDING",
            "type": "SCHEDULED",
            "window_start_time": "2024-12-01T19:00:01Z",
        },
        f"{GCE}name": "web-1",
        f"{GCE}zone": "projects/1/zones/eu",
    },
    "ec2": {
        f"{EC2}events/maintenance/scheduled": [
            {
                "NotBefore": "21 Jan 2019 09:00:43 GMT",
                "Code": "system-reboot",
                "Description": "scheduled reboot",
                "EventId": "instance-event-0d59937288b749b32",
                "NotAfter": "",
                "State": "active",
            }
        ],
        f"{EC2}spot/instance-action": {"action": "terminate", "time": "2017-09-18T08:22:00Z"},
        f"{EC2}events/recommendations/rebalance": {"noticeTime": "2020-10-27T08:22:00Z"},
        f"{EC2}autoscaling/target-lifecycle-state": "Terminated",
        f"{EC2}instance-id": "i-1",
    },
}


@pytest.fixture(scope="module")
def services() -> Iterator[dict[str, MetadataService]]:
    with ExitStack() as running:
        # A 503 of gce is asked again after a pause, which tells nothing here.
        running.enter_context(pytest.MonkeyPatch.context()).setattr(is_vm_in_maint.time, "sleep", lambda _: None)
        yield {name: running.enter_context(MetadataService(name)) for name in PROVIDERS}


@pytest.fixture
def fresh_vm(services: dict[str, MetadataService], tmp_path: Path) -> Any:
    """fresh_vm("gce"): a VM that has never been checked, whose service is back to the truth."""
    count = iter(range(1_000_000))

    def make(provider: str) -> Vm:
        services[provider].heal()
        return Vm(services[provider], tmp_path / str(next(count)))

    return make


def show(service: MetadataService, answers: dict[str, tuple[int, bytes]]) -> None:
    service.heal()
    for path, (status, body) in answers.items():
        service.serve(path, body, status=status)


def as_served(value: Any) -> bytes:
    """A value as it is on the wire: plain words are not JSON."""
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")


# ---- any document --------------------------------------------------------------------------------------

NASTY = ["", " ", "\n", "a\r\nb", "\0", "\x1b[31m", "\u2028", "\ud800", "x" * 300, "NONE", "0001-01-01T00:00:00Z", "/"]
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.sampled_from([10**400, -(10**30), 1e308, float("nan"), float("inf")])
    | st.sampled_from(NASTY)
    | st.text(st.characters(exclude_categories=[]), max_size=8)
)
any_json = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


def places_in(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value: of a field, of an entry, of a field of an entry, and so on."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place, *(each for key in keys for each in places_in(value[key], (*place, key)))]


def changed(value: Any, place: tuple[Any, ...], new: Any, gone: bool) -> Any:
    """The value with something else at that place, or nothing."""
    if not place:
        return new
    copy = value.copy()
    if gone and len(place) == 1:
        del copy[place[0]]
    else:
        copy[place[0]] = changed(value[place[0]], place[1:], new, gone)
    return copy


@st.composite
def mutations(draw: st.DrawFn, real: Any) -> Any:
    """A real document in which up to three things are not as they should be."""
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places_in(real)))
        real = changed(real, place, draw(leaves | any_json), draw(st.booleans()))
    return real


def bodies(real: Any) -> st.SearchStrategy[bytes]:
    return mutations(real).map(as_served) | any_json.map(as_served) | st.binary(max_size=30)


STATUSES = [200] * 12 + [204, 206, 301, 304, 400, 401, 403, 404, 410, 429, 500, 502, 503, 599]


@st.composite
def answers(draw: st.DrawFn, provider: str) -> dict[str, tuple[int, bytes]]:
    """Something for each key of the provider, or the truth."""
    found = {}
    for path, real in REAL[provider].items():
        if draw(st.booleans()):
            found[path] = (draw(st.sampled_from(STATUSES)), draw(bodies(real)))
    return found


def assert_sane(checked: Checked, *statuses: int) -> None:
    assert checked.status in statuses
    for line in checked.log:
        assert len(line.splitlines()) == 1
        assert line.isprintable()


@pytest.mark.parametrize("provider", PROVIDERS)
@PROPERTY
@given(data=st.data())
def test_whatever_is_served_the_check_ends_well_and_its_state_can_be_read(
    provider: str, fresh_vm: Any, data: st.DataObject
) -> None:
    vm = fresh_vm(provider)
    show(vm.service, {path: (200, as_served(real)) for path, real in REAL[provider].items()})
    assert vm.check().status == OK
    known = {event["id"] for event in vm.remembered()["events"]}
    show(vm.service, data.draw(answers(provider), label="answers"))
    checked = vm.check()
    assert_sane(checked, OK, CANNOT_TELL)
    Store(str(vm.state.parent)).load()
    if checked.status == CANNOT_TELL:
        assert known <= {event["id"] for event in vm.remembered()["events"]}
    remembered = vm.state.read_bytes()
    assert vm.check() == (checked.status, [], ""), "and what was said is not said again"
    assert vm.state.read_bytes() == remembered
    vm.service.heal()
    assert_sane(vm.check(), OK)
    assert vm.remembered()["events"] == []


@pytest.mark.parametrize("provider", PROVIDERS)
@settings(PROPERTY, max_examples=12)
@given(data=st.data())
def test_whatever_is_served_the_modes_that_only_look_end_well_and_change_nothing(
    provider: str, fresh_vm: Any, data: st.DataObject
) -> None:
    vm = fresh_vm(provider)
    show(vm.service, data.draw(answers(provider), label="answers"))
    assert_sane(vm.check("--test"), OK, NOT_IN_MAINTENANCE, CANNOT_TELL)
    assert_sane(vm.check("--dry-run"), OK, CANNOT_TELL)
    as_json = vm.check("--json")
    assert_sane(as_json, OK, CANNOT_TELL)
    document = json.loads(as_json.printed)
    assert document["in_maintenance"] in (True, False, None)
    assert not vm.state.parent.exists()
    assert_sane(vm.check("-v"), OK, CANNOT_TELL)


# ---- any sequence of documents -------------------------------------------------------------------------


class Look(NamedTuple):
    """What a service shows at one check."""

    shown: frozenset[str]  # ids of events
    details: int  # the times and statuses that they have there
    fails: str  # "" not at all; "all" of it; "part": something else than the events shown cannot be understood


def azure_document(look: Look) -> list[Any]:
    """Scheduled Events' list; events start and move as `details` says."""
    entries: list[Any] = [
        {
            "EventId": id,
            "EventStatus": "Started" if look.details % 3 == 0 else "Scheduled",
            "EventType": "Reboot",
            "Resources": ["WEB-1"],
            "NotBefore": f"2099-01-0{look.details + 1}T00:00:00Z",
        }
        for id in sorted(look.shown)
    ]
    return [{}, *entries] if look.fails else entries


def ec2_document(look: Look) -> list[Any]:
    entries: list[Any] = [
        {
            "EventId": id,
            "Code": "system-reboot",
            "NotBefore": f"0{look.details + 1} Jan 2099 09:00:43 GMT",
            "State": "active",
        }
        for id in sorted(look.shown)
        if id.startswith("instance-event")
    ]
    finished = {"EventId": "old", "Code": "system-reboot", "Description": "[Completed] it", "State": "active"}
    return [7, finished, *entries] if look.fails else [finished, *entries]


def show_look(service: MetadataService, look: Look) -> None:
    """Let the service show these events as its cloud would."""
    service.heal()
    if look.fails == "all":
        service.fail(500)
    elif service.provider == "azure":
        service.serve("/metadata/scheduledevents", json.dumps({"Events": azure_document(look)}))
    elif service.provider == "azure-v1":
        event = {"EventID": min(look.shown), "EventCreationTime": "soon"} if look.shown else {}
        service.serve("/metadata/v1/maintenance", json.dumps(event))
    elif service.provider == "ec2":
        service.serve(f"{EC2}events/maintenance/scheduled", json.dumps(ec2_document(look)))
        if "asg-terminated" in look.shown:
            service.serve(f"{EC2}autoscaling/target-lifecycle-state", "Terminated")
    else:
        value = next((id.partition("/")[2] for id in look.shown if id.startswith("maintenance-event")), "NONE")
        service.serve(f"{GCE}maintenance-event", value, headers={"ETag": value})
        service.serve(f"{GCE}preempted", "TRUE" if "preempted/TRUE" in look.shown else "FALSE")
        if look.fails:
            service.serve(f"{GCE}upcoming-maintenance", "<html>")


EVENT_IDS = {
    "azure-v1": ["e1", "e2"],
    "azure": ["e1", "e2", "e3"],
    "gce": ["maintenance-event/MIGRATE_ON_HOST_MAINTENANCE", "preempted/TRUE"],
    "ec2": ["instance-event-1", "instance-event-2", "asg-terminated"],
}


@st.composite
def looks(draw: st.DrawFn, provider: str) -> list[Look]:
    # azure-v1 has one event at a time, and nothing besides it that could fail.
    single = provider == "azure-v1"
    shown = st.frozensets(st.sampled_from(EVENT_IDS[provider]), max_size=1 if single else 3)
    fails = st.sampled_from(["", "", "", "all"] if single else ["", "", "", "all", "part"])
    return draw(st.lists(st.builds(Look, shown, st.integers(0, 3), fails), min_size=2, max_size=8))


@pytest.mark.parametrize("provider", PROVIDERS)
@settings(PROPERTY, max_examples=20)
@given(data=st.data())
def test_in_any_sequence_of_documents_every_event_is_announced_once_and_over_once(
    provider: str, fresh_vm: Any, data: st.DataObject
) -> None:
    vm = fresh_vm(provider)
    known: frozenset[str] = frozenset()
    for look in [*data.draw(looks(provider), label="looks"), Look(frozenset(), 0, "")]:
        show_look(vm.service, look)
        checked = vm.check()
        assert_sane(checked, CANNOT_TELL if look.fails else OK)
        seen = frozenset() if look.fails == "all" else look.shown
        said = [re.match(r"([^:]+): .*\bid=(\S+)", line) for line in checked.log]
        events = sorted(
            (line[1], line[2]) for line in said if line and line[1] not in ("VM Event started", "VM Event moved")
        )
        news = [("Incoming VM Event", id) for id in seen - known]
        over = [("VM Event over", id) for id in known - seen] if not look.fails else []
        assert events == sorted(news + over)
        known = seen | known if look.fails else seen
    assert known == frozenset()
