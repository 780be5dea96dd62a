"""The service of 2015: what WIRE.md says of it, over real HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from checking import Vm
from is_vm_in_maint import CANNOT_TELL, NOT_IN_MAINTENANCE, OK, PROVIDERS, USAGE
from metadata_service import MetadataService

pytestmark = pytest.mark.wire

Start = Callable[..., MetadataService]
MAINTENANCE = "/metadata/v1/maintenance"
# The manual's own answer, with its slashes escaped.
ANSWER = rb'{"EventID": "6f0a13a3-dc0d-4bbe-ab24-df710a3917e6", "EventCreationTime": "9\/15\/2015 6:42:51 AM"}'
LINE = (
    "impact=reboot type=Maintenance status=scheduled not_before=2015-09-15T06:42:51Z "
    "provider=azure-v1 id=6f0a13a3-dc0d-4bbe-ab24-df710a3917e6"
)


@pytest.fixture
def vm(service: Start, tmp_path: Path) -> Vm:
    return Vm(service("azure-v1", vm="samplevm1"), tmp_path)


def test_the_manuals_notice_is_logged_once_through_twenty_checks_and_over_once(vm: Vm) -> None:
    vm.service.serve(MAINTENANCE, ANSWER)
    assert [vm.check() for _ in range(20)] == [(OK, [f"Incoming VM Event: {LINE}"], "")] + [(OK, [], "")] * 19
    vm.service.heal()
    assert [vm.check() for _ in range(20)] == [(OK, [f"VM Event over: outcome=ended {LINE}"], "")] + [(OK, [], "")] * 19


def test_nothing_planned_costs_one_request_and_logs_nothing(vm: Vm) -> None:
    assert vm.asked() == [f"GET {MAINTENANCE}"]
    assert vm.check() == (OK, [], "")
    assert vm.check("--test").status == NOT_IN_MAINTENANCE


def test_an_event_costs_no_further_request(vm: Vm) -> None:
    vm.service.announce()
    assert vm.asked() == [f"GET {MAINTENANCE}"]


def test_no_header_is_needed(vm: Vm) -> None:
    vm.check()
    assert "metadata" not in vm.service.requests[0].headers


def test_the_service_speaks_plain_http_so_https_is_wrong_usage(vm: Vm) -> None:
    with pytest.raises(SystemExit) as ended:
        vm.check("--endpoint", "https://169.254.169.254")
    assert ended.value.code == USAGE


def test_an_event_begins_within_five_minutes_so_the_vm_is_in_maintenance_at_once(vm: Vm) -> None:
    vm.service.announce()
    assert vm.check("--test").status == OK
    assert vm.document()["in_maintenance"] is True


def test_it_says_who_it_is_when_asked_with_its_update_and_fault_domain(vm: Vm) -> None:
    vm.service.serve("/metadata/v1/InstanceInfo", b'{"ID": "_samplevm1", "UD": "0", "FD": "2"}')
    who = {"id": "_samplevm1", "name": "samplevm1", "update_domain": "0", "fault_domain": "2", "location": None}
    assert vm.document()["instance"] == who
    sentence = vm.check("-v").printed
    assert "samplevm1" in sentence
    assert "update domain 0, fault domain 2" in sentence


def test_an_instance_that_does_not_say_who_it_is_is_checked_all_the_same(vm: Vm) -> None:
    vm.service.fail(500, path="InstanceInfo")
    assert set(vm.document()["instance"].values()) == {None}
    assert vm.check("-v").printed == "No maintenance is announced for this VM (azure-v1).\n"


@pytest.mark.parametrize("time", ["yesterday", "15/9/2015 6:42:51 AM", "", None, 42, ["9/15/2015 6:42:51 AM"]])
def test_an_event_whose_time_cannot_be_read_is_reported_without_not_before(vm: Vm, time: object) -> None:
    vm.service.serve(MAINTENANCE, json.dumps({"EventID": "e1", "EventCreationTime": time}))
    line = "Incoming VM Event: impact=reboot type=Maintenance status=scheduled provider=azure-v1 id=e1"
    assert vm.check() == (OK, [line], "")
    assert vm.document()["events"][0]["not_before"] is None


def test_fields_that_nobody_knows_do_no_harm(vm: Vm) -> None:
    vm.service.serve(MAINTENANCE, json.dumps({**json.loads(ANSWER), "Comment": {"a": [None]}, "EventType": 7}))
    assert vm.check() == (OK, [f"Incoming VM Event: {LINE}"], "")


@pytest.mark.parametrize("id", [None, "", " \n", 42, True, ["e1"], {"e1": 1}])
def test_an_event_without_a_usable_id_is_cannot_tell(vm: Vm, id: object) -> None:
    vm.service.serve(MAINTENANCE, json.dumps({"EventID": id, "EventCreationTime": "9/15/2015 6:42:51 AM"}))
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert "an event without a usable EventID" in log[0]


def test_it_is_polled_and_one_wait_is_one_request(service: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = PROVIDERS["azure-v1"]
    assert kind.interval <= 10, "five minutes' notice at most"
    monkeypatch.setattr(kind, "interval", 0.2)
    cloud = service("azure-v1")
    provider = kind(cloud.url)
    assert provider.events().events == ()
    event = cloud.announce()
    assert [each.id for each in provider.wait(60).events] == [event]
    assert len(cloud.requests) == 2


def test_a_wait_that_is_cut_short_asks_early(service: Start) -> None:
    cloud = service("azure-v1")
    provider = PROVIDERS["azure-v1"](cloud.url)
    provider.events()
    assert provider.wait(0.01).events == ()
    assert len(cloud.requests) == 2
