"""EC2 instance metadata: each trap that WIRE.md names, over real HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

import is_vm_in_maint
from checking import Vm
from is_vm_in_maint import CANNOT_TELL, NOT_IN_MAINTENANCE, OK, Boot, Ec2
from metadata_service import MetadataService

pytestmark = pytest.mark.wire

Start = Callable[..., MetadataService]
META = "/latest/meta-data/"
SCHEDULED = f"{META}events/maintenance/scheduled"
SPOT = f"{META}spot/instance-action"
REBALANCE = f"{META}events/recommendations/rebalance"
AUTOSCALING = f"{META}autoscaling/target-lifecycle-state"
ASK_TOKEN = "PUT /latest/api/token"
ASK_EVENTS = [f"GET {place}" for place in (SCHEDULED, SPOT, REBALANCE, AUTOSCALING)]
TOKEN = "x-aws-ec2-metadata-token"
# The manual's own answer.
ANSWER = {
    "NotBefore": "21 Jan 2019 09:00:43 GMT",
    "Code": "system-reboot",
    "Description": "scheduled reboot",
    "EventId": "instance-event-0d59937288b749b32",
    "NotAfter": "21 Jan 2019 09:17:23 GMT",
    "State": "active",
}
LINE = (
    "impact=reboot type=system-reboot status=scheduled not_before=2019-01-21T09:00:43Z provider=ec2 "
    'id=instance-event-0d59937288b749b32 description="scheduled reboot"'
)
SUCCEEDS = f'"{sys.executable}" -V'


@pytest.fixture
def vm(service: Start, tmp_path: Path) -> Vm:
    return Vm(service("ec2"), tmp_path)


def serve(vm: Vm, *entries: Any) -> None:
    vm.service.serve(SCHEDULED, json.dumps(entries))


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in ANSWER.items() if key not in keys}


def kinds(log: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in log]


# ---- scheduled events ----------------------------------------------------------------------------------


def test_the_manuals_event_is_logged_once_through_twenty_checks_and_over_once(vm: Vm) -> None:
    serve(vm, ANSWER)
    assert [vm.check() for _ in range(20)] == [(OK, [f"Incoming VM Event: {LINE}"], "")] + [(OK, [], "")] * 19
    serve(vm)
    assert [vm.check() for _ in range(3)] == [(OK, [f"VM Event over: outcome=ended {LINE}"], ""), *[(OK, [], "")] * 2]


@pytest.mark.parametrize(
    ("code", "impact"),
    [
        ("instance-reboot", "reboot"),
        ("system-reboot", "reboot"),
        ("system-maintenance", "freeze"),
        ("instance-retirement", "terminate"),
        ("instance-stop", "stop"),
        ("instance-polish", "unknown"),
    ],
)
def test_every_code_has_its_impact(code: str, impact: str, vm: Vm) -> None:
    serve(vm, {**ANSWER, "Code": code})
    assert vm.check().log[0].startswith(f"Incoming VM Event: impact={impact} type={code} status=scheduled not_before=")


@pytest.mark.parametrize("nothing", ["[]", "404"])
def test_no_scheduled_event_is_an_empty_list_or_404(nothing: str, service: Start, tmp_path: Path) -> None:
    vm = Vm(service("ec2", nothing=nothing), tmp_path)
    assert vm.asked() == [ASK_TOKEN, *ASK_EVENTS]
    assert vm.check() == (OK, [], "")
    assert vm.check("--test").status == NOT_IN_MAINTENANCE


@pytest.mark.parametrize(
    "finished",
    [
        {"State": "completed"},
        {"State": "canceled"},
        {"Description": "[Completed] scheduled reboot"},
        {"Description": "[Canceled] scheduled reboot"},
        {"Description": "[completed] scheduled reboot"},
    ],
    ids=repr,
)
def test_a_finished_event_that_stays_listed_is_over_once_and_never_new(finished: dict[str, str], vm: Vm) -> None:
    serve(vm, {**ANSWER, **finished})
    assert vm.check() == (OK, [], ""), "never seen before, it is no news"
    serve(vm, ANSWER)
    assert kinds(vm.check().log) == ["Incoming VM Event"]
    serve(vm, {**ANSWER, **finished})
    assert kinds(vm.check().log) == ["VM Event over"]
    assert [vm.check() for _ in range(3)] == [(OK, [], "")] * 3


@pytest.mark.parametrize("outcome", ["cancel", "end"])
def test_the_life_of_an_event_to_the_day_when_it_is_listed_no_more(outcome: str, vm: Vm) -> None:
    event = vm.service.announce(not_before=86400)
    assert kinds(vm.check().log) == ["Incoming VM Event"]
    getattr(vm.service, outcome)(event)
    assert kinds(vm.check().log) == ["VM Event over"]
    assert vm.check().log == []
    vm.service.forget(event)
    assert vm.check().log == []


def test_an_event_that_is_put_off_is_moved(vm: Vm) -> None:
    event = vm.service.announce(not_before=86400)
    vm.check()
    vm.service.move(event, datetime(2099, 1, 1, tzinfo=timezone.utc))
    assert (
        vm.check()
        .log[0]
        .startswith("VM Event moved: impact=reboot type=system-reboot status=scheduled not_before=2099")
    )


@pytest.mark.parametrize("not_after", ["", None, "soon", 7])
def test_not_after_can_be_empty(not_after: object, vm: Vm) -> None:
    serve(vm, {**ANSWER, "NotAfter": not_after})
    assert vm.check() == (OK, [f"Incoming VM Event: {LINE}"], "")


@pytest.mark.parametrize("not_before", ["", None, "soon", 7, []])
def test_a_not_before_that_cannot_be_read_does_not_hide_the_event(not_before: object, vm: Vm) -> None:
    serve(vm, {**ANSWER, "NotBefore": not_before})
    assert vm.check() == (OK, [f"Incoming VM Event: {LINE.replace('not_before=2019-01-21T09:00:43Z ', '')}"], "")


@pytest.mark.parametrize("fields", [{"State": None}, {"State": "pending"}, {"Description": None}, {"Colour": ["red"]}])
def test_odd_and_unknown_fields_do_no_harm(fields: dict[str, Any], vm: Vm) -> None:
    serve(vm, {**ANSWER, **fields})
    status, log, _ = vm.check()
    assert (status, kinds(log)) == (OK, ["Incoming VM Event"])


@pytest.mark.parametrize(
    "entry",
    [
        *(None, 7, "e1", [], {}, without("EventId"), without("Code")),
        *({**ANSWER, "EventId": value} for value in (None, 7, "", [])),
        *({**ANSWER, "Code": value} for value in (None, 7, "", {})),
    ],
    ids=repr,
)
def test_a_bad_entry_is_cannot_tell_and_never_hides_its_neighbours(entry: object, vm: Vm) -> None:
    serve(vm, {**ANSWER, "EventId": "before"}, entry, {**ANSWER, "EventId": "after"})
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert kinds(log) == ["Metadata service unreachable", "Incoming VM Event", "Incoming VM Event"]
    assert {event["id"] for event in vm.remembered()["events"]} == {"before", "after"}


# ---- after the reboot ----------------------------------------------------------------------------------


def reboot(monkeypatch: pytest.MonkeyPatch, after: timedelta) -> None:
    """As if the machine had booted so long after now."""
    boot = Boot(f"boot of {after}", datetime.now(timezone.utc) + after)
    monkeypatch.setattr(is_vm_in_maint, "this_boot", lambda: boot)


def test_an_event_that_still_reads_active_after_the_reboot_is_over_once_and_does_not_drain_again(
    vm: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = ("--drain", SUCCEEDS, "--restore", SUCCEEDS)
    vm.service.announce("system-reboot", not_before=60)
    assert kinds(vm.check(*hooks).log) == ["Incoming VM Event", "VM drained"]
    reboot(monkeypatch, timedelta(minutes=3))
    assert kinds(vm.check(*hooks).log) == ["VM Event over", "VM restored"]
    assert [vm.check(*hooks) for _ in range(5)] == [(OK, [], "")] * 5
    assert vm.check("--test").status == NOT_IN_MAINTENANCE
    assert vm.document()["events"] == []


def test_an_event_is_still_to_come_after_a_reboot_before_its_time(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.service.announce("system-reboot", not_before=3600)
    vm.check()
    reboot(monkeypatch, timedelta(minutes=3))
    assert vm.check() == (OK, [], "")
    assert len(vm.document()["events"]) == 1


def test_an_event_that_came_while_the_machine_was_down_is_announced(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.check()
    reboot(monkeypatch, timedelta(minutes=3))
    vm.service.announce("system-reboot", not_before=60)
    assert kinds(vm.check().log) == ["Incoming VM Event"]


# ---- what is not scheduled -----------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "impact"), [("terminate", "terminate"), ("stop", "stop"), ("hibernate", "stop")])
def test_a_spot_action_is_an_event(action: str, impact: str, vm: Vm) -> None:
    vm.service.serve(SPOT, json.dumps({"action": action, "time": "2017-09-18T08:22:00Z"}))
    line = (
        f"impact={impact} type=spot-{action} status=scheduled not_before=2017-09-18T08:22:00Z "
        f"provider=ec2 id=spot-{action}/2017-09-18T08:22:00Z"
    )
    assert [vm.check().log for _ in range(3)] == [[f"Incoming VM Event: {line}"], [], []]
    vm.service.heal()
    assert [vm.check().log for _ in range(3)] == [[f"VM Event over: outcome=ended {line}"], [], []]


def test_a_spot_action_has_two_minutes_so_it_is_imminent(vm: Vm) -> None:
    vm.service.announce("spot-terminate")
    assert kinds(vm.check("--drain", SUCCEEDS).log) == ["Incoming VM Event", "VM drained"]


def test_a_rebalance_recommendation_is_an_event_that_does_not_drain(vm: Vm) -> None:
    vm.service.serve(REBALANCE, json.dumps({"noticeTime": "2020-10-27T08:22:00Z"}))
    line = (
        "impact=rebalance type=rebalance-recommendation status=scheduled not_before=2020-10-27T08:22:00Z "
        "provider=ec2 id=rebalance-recommendation/2020-10-27T08:22:00Z"
    )
    assert vm.check("--drain", SUCCEEDS).log == [f"Incoming VM Event: {line}"]


@pytest.mark.parametrize("place", [SPOT, REBALANCE])
def test_a_notice_whose_time_cannot_be_read_is_still_a_notice(place: str, vm: Vm) -> None:
    vm.service.serve(place, json.dumps({"action": "stop", "time": "soon", "noticeTime": None}))
    status, log, _ = vm.check()
    assert (status, kinds(log)) == (OK, ["Incoming VM Event"])
    assert "not_before" not in log[0]
    assert vm.check().log == []


@pytest.mark.parametrize(
    ("place", "body"),
    [
        *((SPOT, body) for body in ("", "<html>", "[]", "42", "null", "{", "{}", '{"action": 7}', '{"action": ""}')),
        *((REBALANCE, body) for body in ("", "<html>", "[]", "42", "null", "{")),
        *((AUTOSCALING, body) for body in ("", "<html>", "[]", "42", "In Service", "x" * 99)),
    ],
)
def test_a_notice_that_is_not_understood_is_cannot_tell(place: str, body: str, vm: Vm) -> None:
    vm.service.serve(place, body)
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert f"GET {vm.service.url}{place}" in log[0]


def test_an_instance_that_its_group_terminates_is_told_so(service: Start, tmp_path: Path) -> None:
    vm = Vm(service("ec2", lifecycle="InService"), tmp_path)
    assert vm.check() == (OK, [], "")
    vm.service.announce("asg-terminated")
    line = "impact=terminate type=asg-terminated status=scheduled provider=ec2 id=asg-terminated"
    assert [vm.check().log for _ in range(3)] == [[f"Incoming VM Event: {line}"], [], []]


@pytest.mark.parametrize("state", ["InService", "Standby", "Detached", "Warmed:Stopped", "Terminating:Wait"])
def test_any_other_lifecycle_state_is_no_event(state: str, vm: Vm) -> None:
    vm.service.serve(AUTOSCALING, state)
    assert vm.check() == (OK, [], "")


def test_a_key_that_fails_does_not_hide_the_others(vm: Vm) -> None:
    vm.service.fail(500, path="events/maintenance")
    vm.service.announce("spot-terminate")
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert kinds(log) == ["Metadata service unreachable", "Incoming VM Event"]


# ---- tokens --------------------------------------------------------------------------------------------


def test_a_check_asks_for_one_token_and_sends_it_with_every_question(vm: Vm) -> None:
    assert vm.asked() == [ASK_TOKEN, *ASK_EVENTS]
    put, *gets = vm.service.requests
    assert put.headers["x-aws-ec2-metadata-token-ttl-seconds"] == "21600"
    assert TOKEN not in put.headers
    assert len({request.headers[TOKEN] for request in gets}) == 1


def test_the_token_is_kept_for_the_run(vm: Vm) -> None:
    provider = Ec2(vm.service.url)
    for _ in range(3):
        assert provider.events() == ((), (), True)
    assert [request.method for request in vm.service.requests].count("PUT") == 1


def test_an_expired_token_is_fetched_anew_once(service: Start) -> None:
    now = [0.0]
    cloud = service("ec2", token_ttl_max=60.0, clock=lambda: now[0])
    provider = Ec2(cloud.url)
    assert provider.events() == ((), (), True)
    now[0] = 61.0
    del cloud.requests[:]
    assert provider.events() == ((), (), True)
    asked = [f"{request.method} {request.path}" for request in cloud.requests]
    assert asked == [ASK_EVENTS[0], ASK_TOKEN, *ASK_EVENTS], "only the question that was refused is asked again"


def test_a_revoked_token_is_fetched_anew_in_the_midst_of_it(vm: Vm) -> None:
    provider = Ec2(vm.service.url)
    vm.service.announce("spot-stop")
    provider.events()
    vm.service.revoke_tokens()
    reading = provider.events()
    assert [event.type for event in reading.events] == ["spot-stop"]
    assert reading.doubts == ()


def test_a_service_that_refuses_every_token_is_cannot_tell_and_is_not_asked_for_ever(vm: Vm) -> None:
    vm.service.fail(401, path="meta-data")
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert "status 401" in log[0]
    assert len(vm.service.requests) <= 4 * len(ASK_EVENTS)


@pytest.mark.parametrize("status", [403, 404, 405])
def test_an_old_service_without_tokens_is_asked_without(status: int, service: Start, tmp_path: Path) -> None:
    vm = Vm(service("ec2", token_status=status), tmp_path)
    assert vm.asked() == [ASK_TOKEN, *ASK_EVENTS]
    assert not [request for request in vm.service.requests if TOKEN in request.headers]
    vm.service.announce()
    assert kinds(vm.check().log) == ["Incoming VM Event"]


def test_an_old_service_that_lists_nothing_says_at_least_who_it_is(service: Start, tmp_path: Path) -> None:
    vm = Vm(service("ec2", token_status=404, nothing="404"), tmp_path)
    assert vm.check() == (OK, [], "")


def test_what_answers_404_to_everything_is_no_ec2(vm: Vm) -> None:
    vm.service.announce(not_before=3600)
    vm.check()
    vm.service.fail(404)
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert kinds(log) == ["Metadata service unreachable"]
    assert len(vm.remembered()["events"]) == 1
    assert vm.check("--test").status == CANNOT_TELL


@pytest.mark.parametrize("how", [400, 429, 500, "html", "empty", "redirect", "bad-utf8"])
def test_a_token_that_cannot_be_had_is_cannot_tell(how: int | str, vm: Vm) -> None:
    vm.service.fail(how, path="api/token")
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert f"PUT {vm.service.url}/latest/api/token" in log[0]


@pytest.mark.parametrize("token", ["a b", "a\r\nX-Injected: yes", "é", "x" * 5000])
def test_what_could_not_be_sent_as_a_header_is_no_token(token: str, vm: Vm) -> None:
    vm.service.serve("/latest/api/token", token)
    vm.service.protocol.answer = vm.service.protocol.look  # the page, not the protocol's own token
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert "not a token" in log[0]


# ---- who -----------------------------------------------------------------------------------------------


def test_it_says_who_it_is_when_asked_with_its_zone(vm: Vm) -> None:
    instance_id = vm.service.protocol.identity()["meta-data/instance-id"]
    who = vm.document()["instance"]
    assert (who["id"], who["location"], who["name"]) == (instance_id, "eu-west-1a", None)
    expected = f"No maintenance is announced for this VM (ec2, id {instance_id}, zone eu-west-1a).\n"
    assert vm.check("-v").printed == expected
