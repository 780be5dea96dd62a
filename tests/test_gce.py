"""The Compute Engine metadata server: each trap that WIRE.md names, over real HTTP."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

import is_vm_in_maint
from checking import Vm
from is_vm_in_maint import CANNOT_TELL, NOT_IN_MAINTENANCE, OK, Gce, Provider
from metadata_service import MetadataService, Request

pytestmark = pytest.mark.wire

Start = Callable[..., MetadataService]
ROOT = "/computeMetadata/v1/instance/"
MAINTENANCE_EVENT = f"{ROOT}maintenance-event"
PREEMPTED = f"{ROOT}preempted"
UPCOMING = f"{ROOT}upcoming-maintenance"
MIGRATE, TERMINATE = "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"
# The manual's own answer.
ANSWER = {
    "can_reschedule": "true",
    "latest_window_start_time": "2024-12-01T19:00:01Z",
    "maintenance_reasons": ["PLANNED_UPDATE"],
    "maintenance_status": "PENDING",
    "type": "SCHEDULED",
    "window_end_time": "2024-12-01T21:00:01Z",
    "window_start_time": "2024-12-01T19:00:01Z",
}
LINE = (
    "impact=stop type=UPCOMING_MAINTENANCE status=scheduled not_before=2024-12-01T19:00:01Z provider=gce "
    'id=upcoming-maintenance/SCHEDULED/2024-12-01T19:00:01Z description="SCHEDULED PLANNED_UPDATE"'
)


@pytest.fixture
def vm(service: Start, tmp_path: Path) -> Vm:
    return Vm(service("gce"), tmp_path)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the tool would have made."""
    pauses: list[float] = []
    monkeypatch.setattr(is_vm_in_maint.time, "sleep", pauses.append)
    return pauses


def places(requests: list[Request]) -> list[str]:
    return [request.place for request in requests]


def in_camel_case(document: dict[str, Any]) -> dict[str, Any]:
    words = {key: key.title().replace("_", "") for key in document}
    return {word[0].lower() + word[1:]: document[key] for key, word in words.items()}


# ---- maintenance-event ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "impact"), [(MIGRATE, "migrate"), (TERMINATE, "stop"), ("SOMETHING_NEW", "unknown")])
def test_a_maintenance_event_is_logged_once_while_it_stays_and_over_once(value: str, impact: str, vm: Vm) -> None:
    line = f"impact={impact} type={value} status=scheduled provider=gce id=maintenance-event/{value}"
    vm.service.serve(MAINTENANCE_EVENT, value)
    assert [vm.check() for _ in range(20)] == [(OK, [f"Incoming VM Event: {line}"], "")] + [(OK, [], "")] * 19
    assert vm.check("--test").status == OK, "it begins in 60 seconds, so it is imminent"
    vm.service.heal()
    assert [vm.check() for _ in range(3)] == [(OK, [f"VM Event over: outcome=ended {line}"], ""), *[(OK, [], "")] * 2]
    assert vm.check("--test").status == NOT_IN_MAINTENANCE


def test_the_same_maintenance_event_a_week_later_is_announced_anew(vm: Vm) -> None:
    for _ in range(2):
        event = vm.service.announce(MIGRATE)
        assert vm.check().log[0].startswith("Incoming VM Event: ")
        vm.service.end(event)
        assert vm.check().log[0].startswith("VM Event over: ")


def test_nothing_planned_costs_three_requests_and_logs_nothing(vm: Vm) -> None:
    assert vm.asked() == [f"GET {MAINTENANCE_EVENT}", f"GET {PREEMPTED}", f"GET {UPCOMING}?alt=json"]
    assert vm.check() == (OK, [], "")


def test_an_event_costs_no_further_request(vm: Vm) -> None:
    vm.service.announce(MIGRATE)
    assert len(vm.asked()) == 3


def test_gce_maintenance_event_itself_is_read_at_every_check(vm: Vm) -> None:
    assert not vm.service.maintenance_event_was_read
    vm.check()
    assert vm.service.maintenance_event_was_read
    event = vm.service.announce(MIGRATE)
    vm.check()
    vm.service.end(event)
    assert not vm.service.maintenance_event_was_read, "the next 60 seconds must be earned anew"
    vm.check()
    assert vm.service.maintenance_event_was_read


@pytest.mark.parametrize("how", [500, 404, "html", "no-flavor"])
def test_maintenance_event_is_read_whatever_else_fails(how: int | str, vm: Vm) -> None:
    vm.service.fail(how, path="preempted")
    vm.service.fail(how, path="upcoming")
    vm.service.announce(MIGRATE)
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert [line.partition(":")[0] for line in log] == ["Metadata service unreachable", "Incoming VM Event"]


@pytest.mark.parametrize("value", ["", "none", "true", "<html>", "42", "NONE NONE", "{}", '"NONE"', "A", "A" * 99])
def test_what_is_no_maintenance_event_is_cannot_tell(value: str, vm: Vm) -> None:
    vm.service.serve(MAINTENANCE_EVENT, value)
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert "not a maintenance event" in log[0]


def test_every_request_carries_the_header_and_none_is_forwarded(vm: Vm) -> None:
    vm.check("-v")
    assert {request.headers.get("metadata-flavor") for request in vm.service.requests} == {"Google"}
    assert not [request for request in vm.service.requests if "x-forwarded-for" in request.headers]


@pytest.mark.parametrize("key", ["maintenance-event", "preempted", "upcoming-maintenance"])
def test_an_answer_without_the_header_is_somebody_elses(key: str, vm: Vm) -> None:
    vm.service.fail("no-flavor", path=key)
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert f"GET {vm.service.url}{ROOT}{key}" in log[0]
    assert "somebody else's: it lacks the header Metadata-Flavor: Google" in log[0]


def test_the_header_of_somebody_else_is_not_googles(vm: Vm) -> None:
    vm.service.serve(MAINTENANCE_EVENT, "NONE", headers={"Metadata-Flavor": "Hotel"})
    assert vm.check().status == CANNOT_TELL


# ---- 503 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["maintenance-event", "preempted", "upcoming-maintenance"])
def test_a_503_on_gce_is_asked_again(key: str, vm: Vm, no_pauses: list[float]) -> None:
    vm.service.fail(503, path=key, times=2)
    assert vm.check() == (OK, [], "")
    assert len([place for place in places(vm.service.requests) if key in place]) == 3
    assert len([pause for pause in no_pauses if pause > 0]) == 2, "not at once"


def test_a_503_that_stays_is_cannot_tell_and_says_nothing_about_the_event(vm: Vm, no_pauses: list[float]) -> None:
    event = vm.service.announce(MIGRATE)
    vm.check()
    vm.service.fail(503)
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert [line.partition(":")[0] for line in log] == ["Metadata service unreachable"]
    assert len(vm.remembered()["events"]) == 1
    assert sum(no_pauses) < 30, "a check is not to take longer than this"
    vm.service.heal()
    vm.service.end(event)
    assert [line.partition(":")[0] for line in vm.check().log] == ["Metadata service reachable again", "VM Event over"]


# ---- preempted -----------------------------------------------------------------------------------------


def test_a_preempted_vm_has_30_seconds(vm: Vm) -> None:
    vm.service.announce("PREEMPTED")
    line = "impact=terminate type=PREEMPTED status=started provider=gce id=preempted/TRUE"
    assert [vm.check().log for _ in range(3)] == [[f"Incoming VM Event: {line}"], [], []]


@pytest.mark.parametrize("value", ["", "true", "false", "1", "NONE", "TRUE FALSE", "<html>"])
def test_neither_true_nor_false_is_cannot_tell(value: str, vm: Vm) -> None:
    vm.service.serve(PREEMPTED, value)
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert "neither TRUE nor FALSE" in log[0]


# ---- upcoming-maintenance ------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [ANSWER, in_camel_case(ANSWER)], ids=["snake_case", "camelCase"])
def test_the_manuals_upcoming_maintenance_is_logged_once_through_twenty_checks_and_over_once(
    document: dict[str, Any], vm: Vm
) -> None:
    vm.service.serve(UPCOMING, json.dumps(document))
    assert [vm.check() for _ in range(20)] == [(OK, [f"Incoming VM Event: {LINE}"], "")] + [(OK, [], "")] * 19
    vm.service.heal()
    assert [vm.check().log for _ in range(3)] == [[f"VM Event over: outcome=ended {LINE}"], [], []]


@pytest.mark.parametrize("key", ["startTime", "start_time"])
def test_start_time_has_been_seen_in_its_place(key: str, vm: Vm) -> None:
    vm.service.serve(UPCOMING, json.dumps({key: "2099-12-01T19:00:01Z"}))
    assert vm.document()["events"][0]["not_before"] == "2099-12-01T19:00:01Z"


def test_upcoming_maintenance_starts_and_stays_the_same_event(vm: Vm) -> None:
    event = vm.service.announce("UPCOMING_MAINTENANCE", not_before=datetime(2099, 1, 1, tzinfo=timezone.utc))
    assert vm.check().log[0].startswith("Incoming VM Event: impact=stop type=UPCOMING_MAINTENANCE status=scheduled ")
    vm.service.begin(event)
    assert [line.partition(" impact")[0] for line in vm.check().log] == ["VM Event started:"]
    vm.service.end(event)
    assert [line.partition(" impact")[0] for line in vm.check().log] == ["VM Event over: outcome=ended"]


def test_upcoming_maintenance_first_seen_as_ongoing_is_started(vm: Vm) -> None:
    vm.service.serve(UPCOMING, json.dumps({**ANSWER, "maintenance_status": "ONGOING"}))
    assert vm.check().log[0].startswith("Incoming VM Event: impact=stop type=UPCOMING_MAINTENANCE status=started ")


def test_upcoming_maintenance_of_another_time_is_another_event(vm: Vm) -> None:
    ids = set()
    for begin in ("2099-12-01T19:00:01Z", "2099-12-08T19:00:01Z"):
        vm.service.serve(UPCOMING, json.dumps({**ANSWER, "window_start_time": begin}))
        ids.add(vm.document()["events"][0]["id"])
    assert len(ids) == 2


@pytest.mark.parametrize("nothing", ["{}", "NONE", "not-yet", "404"])
def test_every_form_of_nothing_planned_is_understood(
    nothing: str, service: Start, tmp_path: Path, no_pauses: list[float]
) -> None:
    vm = Vm(service("gce", nothing=nothing), tmp_path)
    assert len(vm.asked()) == 3, "and not asked again"
    assert vm.check() == (OK, [], "")
    assert sum(no_pauses) == 0


@pytest.mark.parametrize("body", ['"NONE"', "NONE\n", " {} "])
def test_nothing_planned_may_be_quoted_or_padded(body: str, vm: Vm) -> None:
    vm.service.serve(UPCOMING, body)
    assert vm.check() == (OK, [], "")


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500, 502, 503, 302, 204])
def test_any_other_status_of_upcoming_maintenance_is_cannot_tell(status: int, vm: Vm, no_pauses: list[float]) -> None:
    vm.service.fail(status, path="upcoming-maintenance")
    assert vm.check().status == CANNOT_TELL


@pytest.mark.parametrize(
    "body",
    ["", "[]", "null", "42", '"PENDING"', "none", "<html>", '{"type": "SCHEDULED"}', '{"window_start_time": 7}', "{"],
)
def test_an_upcoming_maintenance_that_is_not_understood_is_cannot_tell(body: str, vm: Vm) -> None:
    vm.service.serve(UPCOMING, body)
    assert vm.check().status == CANNOT_TELL


@pytest.mark.parametrize("begin", ["soon", "", None, 7, [], {}])
def test_a_window_that_cannot_be_read_does_not_hide_the_event(begin: object, vm: Vm) -> None:
    vm.service.serve(UPCOMING, json.dumps({**ANSWER, "window_start_time": begin}))
    status, log, _ = vm.check()
    assert status == OK
    assert log[0].startswith("Incoming VM Event: impact=stop type=UPCOMING_MAINTENANCE status=scheduled provider=gce ")


@pytest.mark.parametrize(
    "fields",
    [
        {"can_reschedule": True},
        {"type": None},
        {"type": 7},
        {"maintenance_reasons": "PLANNED_UPDATE"},
        {"maintenance_reasons": [None, 7]},
        {"maintenance_status": ["PENDING"]},
        {"something": {"new": []}},
    ],
    ids=repr,
)
def test_odd_and_unknown_fields_do_no_harm(fields: dict[str, Any], vm: Vm) -> None:
    vm.service.serve(UPCOMING, json.dumps({**ANSWER, **fields}))
    status, log, _ = vm.check()
    assert (status, len(log)) == (OK, 1)
    assert "not_before=2024-12-01T19:00:01Z" in log[0]


def test_all_three_keys_tell_of_their_own_events(vm: Vm) -> None:
    vm.service.announce(MIGRATE)
    vm.service.announce("PREEMPTED")
    vm.service.announce("UPCOMING_MAINTENANCE", not_before=86400)
    assert len(vm.check().log) == 3
    assert vm.check().log == []


# ---- who and where -------------------------------------------------------------------------------------


def test_it_says_who_it_is_when_asked_with_its_zone(vm: Vm) -> None:
    who = vm.document()["instance"]
    assert who["id"] == str(vm.service.protocol.values()["instance/id"])
    assert (who["name"], who["location"]) == ("web-1", "europe-west1-b")
    assert (who["update_domain"], who["fault_domain"]) == (None, None)
    sentence = vm.check("-v").printed
    assert sentence == (f"No maintenance is announced for this VM (gce, id {who['id']}, web-1, zone europe-west1-b).\n")


def test_where_the_name_does_not_resolve_its_address_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuses)
    assert Gce().client.base == "http://169.254.169.254" == Provider.home


def test_where_the_name_resolves_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    assert Gce().client.base == "http://metadata.google.internal"
    assert asked == ["metadata.google.internal"]


# ---- long poll -----------------------------------------------------------------------------------------


def test_the_long_poll_keeps_the_etag_and_returns_when_the_value_changes(vm: Vm) -> None:
    provider = Gce(vm.service.url)
    assert provider.events() == ((), (), True)
    announced = threading.Timer(0.3, vm.service.announce, [MIGRATE])
    announced.start()
    reading = provider.wait(60)
    while not reading.events:  # if the announcement came later than one poll
        reading = provider.wait(60)
    announced.join()
    polls = [request for request in vm.service.requests if "wait_for_change" in request.query]
    assert {request.place for request in polls} == {MAINTENANCE_EVENT}
    assert polls[0].query["wait_for_change"] == "true"
    assert polls[0].query["last_etag"]
    assert [event.type for event in reading.events] == [MIGRATE]
    before = provider.etag
    vm.service.end(next(iter(vm.service.cloud.events)))
    assert provider.wait(60) == ((), (), True), "the etag was that of the event, so this is answered at once"
    assert provider.etag != before


def test_the_long_poll_answers_with_the_present_value_after_its_time(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gce, "poll", 1.0)
    vm.service.announce(MIGRATE)
    provider = Gce(vm.service.url)
    first = provider.events()
    assert provider.wait(60) == first
    poll = next(request for request in vm.service.requests if "wait_for_change" in request.query)
    assert poll.query["timeout_sec"] == "1"


def test_a_long_poll_is_bounded_so_that_preempted_is_read_in_time(vm: Vm) -> None:
    assert 1 <= Gce.poll <= 10, "PREEMPTED has 30 seconds' notice, and 60 is the most that WIRE.md allows"
    provider = Gce(vm.service.url)
    provider.events()
    vm.service.announce("PREEMPTED")
    vm.service.announce(MIGRATE)  # ends the poll
    assert {event.type for event in provider.wait(60).events} == {MIGRATE, "PREEMPTED"}


def test_a_connection_that_a_migration_left_hanging_has_a_limit_of_its_own(
    vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gce, "poll", 1.0)
    provider = Gce(vm.service.url)
    provider.events()
    vm.service.fail("hang", path="wait_for_change")
    reading = provider.wait(60)
    limit = re.search(r"no whole answer within (\d+) s", reading.doubts[0])
    assert limit
    assert 1 < int(limit[1]) < 10, "a little longer than the poll itself"
    assert not reading.answered
    vm.service.announce(MIGRATE)
    assert len(provider.wait(60).events) == 1, "the next reading is a plain one, and does not hang"


def test_a_503_during_a_long_poll_is_asked_again(vm: Vm, no_pauses: list[float]) -> None:
    provider = Gce(vm.service.url)
    provider.events()
    vm.service.announce(MIGRATE)
    vm.service.fail(503, path="wait_for_change", times=2)
    assert [event.type for event in provider.wait(60).events] == [MIGRATE]
    assert len(no_pauses) >= 2


def test_without_an_etag_there_is_no_long_poll_but_a_pause(vm: Vm, no_pauses: list[float]) -> None:
    vm.service.fail("no-etag")
    provider = Gce(vm.service.url)
    assert provider.events() == ((), (), True)
    vm.service.announce(MIGRATE)
    assert len(provider.wait(60).events) == 1
    assert max(no_pauses) > 0
    assert not [request for request in vm.service.requests if "wait_for_change" in request.query]


def test_a_wait_shorter_than_a_second_is_no_long_poll(vm: Vm) -> None:
    provider = Gce(vm.service.url)
    provider.events()
    assert provider.wait(0.01) == ((), (), True)
    assert not [request for request in vm.service.requests if "wait_for_change" in request.query]


def test_between_long_polls_upcoming_maintenance_is_asked_once_a_minute_as_long_as_it_is_nothing(
    vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gce, "poll", 1.0)
    provider = Gce(vm.service.url)
    provider.events()
    for number in range(3):  # a change each time, so that no poll waits
        vm.service.announce(MIGRATE, id=f"e{number}") if number % 2 == 0 else vm.service.end("e0")
        provider.wait(60)
    asked = places(vm.service.requests)
    assert (asked.count(MAINTENANCE_EVENT), asked.count(PREEMPTED), asked.count(UPCOMING)) == (4, 4, 2)
    real = is_vm_in_maint.time.monotonic
    monkeypatch.setattr(is_vm_in_maint.time, "monotonic", lambda: real() + 61)
    vm.service.announce("UPCOMING_MAINTENANCE", not_before=86400)
    for _ in range(2):
        assert "UPCOMING_MAINTENANCE" in {event.type for event in provider.wait(60).events}
    assert places(vm.service.requests).count(UPCOMING) == 4, "and every time once there is something"
