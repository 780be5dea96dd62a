"""Azure Scheduled Events: each trap that WIRE.md names, over real HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from checking import Vm
from conftest import TOOL
from is_vm_in_maint import CANNOT_TELL, FAILED, NOT_IN_MAINTENANCE, OK, Azure, CannotTell
from metadata_service import Cloud, MetadataService

pytestmark = pytest.mark.wire

Start = Callable[..., MetadataService]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
EVENTS = "/metadata/scheduledevents"
COMPUTE = "/metadata/instance/compute"
ASK_EVENTS = f"GET {EVENTS}?api-version=2020-07-01"
ASK_NAME = f"GET {COMPUTE}?api-version=2021-02-01"
ASK_2015 = "GET /metadata/v1/maintenance"
# The manual's own answer. Its 11 April 2026 was a Saturday.
ANSWER = {
    "DocumentIncarnation": 2,
    "Events": [
        {
            "EventId": "C7061BAC-AFDC-4513-B24B-AA5F13A16123",
            "EventStatus": "Scheduled",
            "EventType": "Freeze",
            "ResourceType": "VirtualMachine",
            "Resources": ["WestNO_0", "WestNO_1"],
            "NotBefore": "Mon, 11 Apr 2026 22:26:58 GMT",
            "Description": "Virtual machine is being paused because of a memory-preserving Live Migration operation.",
            "EventSource": "Platform",
            "DurationInSeconds": 5,
        }
    ],
}
LINE = (
    "impact=freeze type=Freeze status=scheduled not_before=2026-04-11T22:26:58Z provider=azure "
    "id=C7061BAC-AFDC-4513-B24B-AA5F13A16123 source=Platform "
    'description="Virtual machine is being paused because of a memory-preserving Live Migration operation."'
)


@pytest.fixture
def vm(service: Start, tmp_path: Path) -> Vm:
    return Vm(service("azure", vm="web-1"), tmp_path)


def an_entry(**fields: Any) -> dict[str, Any]:
    """One event of the document that hits web-1."""
    return {**ANSWER["Events"][0], "EventId": "e1", "Resources": ["web-1"], **fields}


def serve(vm: Vm, *entries: Any) -> None:
    vm.service.serve(EVENTS, json.dumps({"DocumentIncarnation": 1, "Events": entries}))


def without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


# ---- the document --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["WestNO_0", "WestNO_1"])
def test_the_manuals_event_is_logged_once_through_twenty_checks_and_over_once(
    name: str, service: Start, tmp_path: Path
) -> None:
    vm = Vm(service("azure", vm=name), tmp_path)
    vm.service.serve(EVENTS, json.dumps(ANSWER))
    assert [vm.check() for _ in range(20)] == [(OK, [f"Incoming VM Event: {LINE}"], "")] + [(OK, [], "")] * 19
    assert vm.document()["events"][0]["duration_seconds"] == 5
    assert vm.document()["events"][0]["resources"] == ["WestNO_0", "WestNO_1"]
    vm.service.heal()
    over = f"VM Event over: outcome=ended {LINE}"
    ended = datetime.now(timezone.utc) > datetime(2026, 4, 11, 22, 26, 58, tzinfo=timezone.utc)
    assert vm.check().log == [over if ended else over.replace("ended", "cancelled")]
    assert [vm.check() for _ in range(3)] == [(OK, [], "")] * 3


@pytest.mark.parametrize(
    ("type", "impact"),
    [
        ("Freeze", "freeze"),
        ("Reboot", "reboot"),
        ("Redeploy", "redeploy"),
        ("Preempt", "terminate"),
        ("Terminate", "terminate"),
        ("Defrost", "unknown"),
    ],
)
def test_every_type_of_event_has_its_impact(type: str, impact: str, vm: Vm) -> None:
    vm.service.announce(type, not_before=900)
    assert vm.check().log[0].startswith(f"Incoming VM Event: impact={impact} type={type} status=scheduled not_before=")


def test_an_event_is_scheduled_then_started_then_gone(vm: Vm) -> None:
    event = vm.service.announce("Reboot", not_before=900)
    assert vm.check().log[0].startswith("Incoming VM Event: ")
    vm.service.begin(event)
    assert vm.check().log[0].startswith("VM Event started: impact=reboot type=Reboot status=started provider=azure")
    assert "not_before" not in str(vm.remembered()["events"][0]["not_before"]), "it is empty once started"
    vm.service.end(event)
    assert vm.check().log[0].startswith("VM Event over: outcome=ended ")
    assert vm.check().log == []


def test_an_event_that_is_cancelled_before_it_started_is_simply_gone(vm: Vm) -> None:
    event = vm.service.announce(not_before=900)
    vm.check()
    vm.service.cancel(event)
    assert vm.check().log[0].startswith("VM Event over: outcome=cancelled ")


def test_failing_hardware_first_appears_as_started(vm: Vm) -> None:
    vm.service.announce("Redeploy", status="Started")
    assert vm.check().log[0].startswith("Incoming VM Event: impact=redeploy type=Redeploy status=started provider=")
    assert vm.check("--test").status == OK


def test_an_event_that_is_put_off_is_moved(vm: Vm) -> None:
    event = vm.service.announce(not_before=900)
    vm.check()
    vm.service.move(event, datetime(2099, 1, 1, tzinfo=timezone.utc))
    assert "not_before=2099-01-01T00:00:00Z" in vm.check().log[0]


@pytest.mark.parametrize("iso_dates", [False, True])
def test_not_before_is_rfc_1123_or_iso_8601(iso_dates: bool, service: Start, tmp_path: Path) -> None:
    vm = Vm(service("azure", iso_dates=iso_dates), tmp_path)
    vm.service.announce(not_before=datetime(2099, 4, 11, 22, 26, 58, tzinfo=timezone.utc))
    assert "not_before=2099-04-11T22:26:58Z" in vm.check().log[0]


def test_a_not_before_that_cannot_be_read_does_not_hide_the_event(vm: Vm) -> None:
    serve(vm, an_entry(NotBefore="soon"))
    status, log, _ = vm.check()
    assert status == OK
    assert "not_before" not in log[0]


@pytest.mark.parametrize(("seconds", "known"), [(-1, None), (0, 0), (9, 9), ("9", None), (None, None), (1.5, None)])
def test_a_duration_of_minus_one_is_unknown(seconds: object, known: int | None, vm: Vm) -> None:
    serve(vm, an_entry(DurationInSeconds=seconds))
    assert vm.document()["events"][0]["duration_seconds"] == known


def test_an_event_that_a_user_asked_for_says_so(vm: Vm) -> None:
    vm.service.announce(source="User", not_before=900)
    assert "source=User" in vm.check().log[0]


def test_older_api_versions_lack_the_last_three_fields(vm: Vm) -> None:
    serve(vm, without(an_entry(), "Description", "EventSource", "DurationInSeconds"))
    status, log, _ = vm.check()
    assert (status, len(log)) == (OK, 1)
    event = vm.document()["events"][0]
    assert (event["description"], event["source"], event["duration_seconds"]) == (None, None, None)


def test_fields_that_nobody_knows_do_no_harm(vm: Vm) -> None:
    serve(vm, an_entry(Comment={"a": [None]}, EventColour=7))
    assert vm.check().status == OK


@pytest.mark.parametrize(
    "entry",
    [
        *(None, 1, "e1", [], {}),
        without(an_entry(), "EventId"),
        without(an_entry(), "EventType"),
        without(an_entry(), "Resources"),
        *(an_entry(EventId=value) for value in (None, 7, "", {})),
        *(an_entry(EventType=value) for value in (None, 7, "", [])),
        *(an_entry(Resources=value) for value in (None, "web-1", {"web-1": 1}, [1], ["web-1", None])),
    ],
    ids=repr,
)
def test_a_bad_entry_is_cannot_tell_and_never_hides_its_neighbours(entry: object, vm: Vm) -> None:
    serve(vm, an_entry(EventId="before"), entry, an_entry(EventId="after"))
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert log[0].startswith("Metadata service unreachable: ")
    assert [line.partition(":")[0] for line in log[1:]] == ["Incoming VM Event"] * 2
    assert {event["id"] for event in vm.remembered()["events"]} == {"before", "after"}
    assert vm.check().status == CANNOT_TELL, "it is still not understood at the next check"


@pytest.mark.parametrize("document", [{}, {"Events": None}, {"Events": {}}, {"Events": "none"}, {"events": []}])
def test_a_document_without_a_list_of_events_is_cannot_tell(document: object, vm: Vm) -> None:
    vm.service.serve(EVENTS, json.dumps(document))
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert 'no list of "Events"' in json.loads(log[0].partition("reason=")[2])


def test_an_incarnation_that_starts_over_hides_nothing(vm: Vm) -> None:
    provider = Azure(vm.service.url)
    vm.service.announce(id="old")
    assert [event.id for event in provider.events().events] == ["old"]
    vm.service.end("old")
    vm.service.switch_off()
    vm.service.announce(id="new")
    assert vm.service.node.incarnation == 2, "the same as before"
    assert [event.id for event in provider.events().events] == ["new"]


def test_an_unchanged_document_means_unchanged_events(vm: Vm) -> None:
    provider = Azure(vm.service.url)
    vm.service.announce()
    first = provider.events()
    assert provider.events() == first
    assert len(first.events) == 1


@pytest.mark.parametrize("bad", ["[]", "", '{"Events": [{}]}', '{"Events": 7}'])
def test_the_document_that_comes_back_after_a_bad_one_is_read_again(bad: str, vm: Vm) -> None:
    provider = Azure(vm.service.url)
    vm.service.announce()
    first = provider.events()
    vm.service.serve(EVENTS, bad)
    assert provider.events().doubts
    vm.service.heal()
    assert provider.events() == first


# ---- this VM's own events only -------------------------------------------------------------------------


def test_every_vm_of_an_availability_set_sees_all_events_and_only_its_own_count(service: Start, tmp_path: Path) -> None:
    cloud = Cloud("azure")
    vms = {name: Vm(service("azure", vm=name, cloud=cloud), tmp_path / name) for name in ("web-1", "web-2", "web-3")}
    cloud.announce(id="one", vms=["web-1"])
    cloud.announce(id="two", vms=["web-1", "web-2"])
    seen = {}
    for name, vm in vms.items():
        assert vm.check().status == OK
        seen[name] = [event["id"] for event in vm.remembered()["events"]]
    assert seen == {"web-1": ["one", "two"], "web-2": ["two"], "web-3": []}
    assert vms["web-3"].check("--test").status == NOT_IN_MAINTENANCE


@pytest.mark.parametrize("listed", ["WEB-1", "Web-1", "_web-1", "_WEB-1"])
def test_names_are_compared_without_regard_to_case_or_the_oldest_versions_underscore(listed: str, vm: Vm) -> None:
    serve(vm, an_entry(Resources=["other", listed]))
    assert len(vm.check().log) == 1


@pytest.mark.parametrize("listed", ["web-10", "web", "web_1", "xweb-1", "web-1.internal", ""])
def test_a_name_that_is_only_like_ours_is_not_ours(listed: str, vm: Vm) -> None:
    serve(vm, an_entry(Resources=[listed]))
    assert vm.check() == (OK, [], "")


def test_the_name_is_asked_for_only_when_there_are_events(vm: Vm) -> None:
    assert vm.asked() == [ASK_EVENTS]
    vm.service.announce()
    assert vm.asked() == [ASK_EVENTS, ASK_NAME]


def test_the_name_is_asked_for_once_a_run(vm: Vm) -> None:
    provider = Azure(vm.service.url)
    for number in range(3):
        vm.service.announce(id=f"e{number}")
        provider.events()
    assert [request.place for request in vm.service.requests].count(COMPUTE) == 1


def test_a_name_given_by_hand_is_not_asked_for(vm: Vm) -> None:
    vm.service.announce(vms=["db-1"])
    assert vm.asked("--vm-name", "DB-1") == [ASK_EVENTS]
    assert len(vm.remembered()["events"]) == 1


@pytest.mark.parametrize("how", [404, 500, "html", "list", "reset"])
def test_without_a_name_it_cannot_tell_and_never_takes_all_events_for_its_own(how: int | str, vm: Vm) -> None:
    vm.service.announce(vms=["web-2"])
    vm.service.fail(how, path=COMPUTE)
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert [line.partition(":")[0] for line in log] == ["Metadata service unreachable"]
    assert vm.check("--test").status == CANNOT_TELL
    vm.service.heal()
    assert [line.partition(":")[0] for line in vm.check().log] == ["Metadata service reachable again"]


@pytest.mark.parametrize("name", [None, "", 7, []])
def test_an_instance_without_a_name_is_cannot_tell_and_the_sentence_names_the_option(name: object, vm: Vm) -> None:
    vm.service.announce()
    vm.service.serve(COMPUTE, json.dumps({"name": name, "vmId": "x"}))
    status, log, _ = vm.check()
    assert status == CANNOT_TELL
    assert "give it with --vm-name" in log[0]
    assert vm.check("--vm-name", "web-1").status == OK


def test_it_says_who_it_is_when_asked_with_its_update_and_fault_domain(vm: Vm) -> None:
    who = vm.document()["instance"]
    compute = vm.service.protocol.compute()
    assert who == {
        "id": compute["vmId"],
        "name": "web-1",
        "update_domain": "0",
        "fault_domain": "0",
        "location": "westeurope",
    }
    sentence = vm.check("-v").printed
    assert f"azure, id {compute['vmId']}, web-1, location westeurope, update domain 0, fault domain 0" in sentence


# ---- asking --------------------------------------------------------------------------------------------


def test_every_request_carries_the_metadata_header(vm: Vm) -> None:
    event = vm.service.announce(not_before=60)
    assert vm.check("--drain", f'"{sys.executable}" -V', "--approve").status == OK
    assert vm.service.approvals == [event]
    assert {request.method for request in vm.service.requests} == {"GET", "POST"}
    assert {request.headers.get("metadata") for request in vm.service.requests} == {"true"}


def test_the_manual_recommends_polling_once_a_second() -> None:
    assert Azure.interval == 1.0


def test_a_first_answer_that_takes_two_minutes_is_waited_for_and_crons_next_run_ends_quietly(
    service: Start, tool: Run, tmp_path: Path
) -> None:
    assert Azure.patience > 120
    cloud = service("azure", first_delay=4.0)
    command = [sys.executable, str(TOOL), "--provider", "azure", "--endpoint", cloud.url, "--log", "stderr"]
    with subprocess.Popen(
        [*command, "--state", str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={key: value for key, value in os.environ.items() if key != "STATE_DIRECTORY"},
    ) as first:
        while not cloud.requests:
            assert first.poll() is None
            time.sleep(0.01)
        second = tool(service=cloud)
        asked, still_waiting = len(cloud.requests), first.poll() is None
        assert first.communicate(timeout=60) == (b"", b"")
    assert first.returncode == OK
    assert (second.returncode, second.stdout, second.stderr) == (OK, "", "")
    if still_waiting:  # which only a machine that stood still for seconds misses
        assert asked == 1, "the second run asked nothing"


# ---- approval ------------------------------------------------------------------------------------------


def test_an_approval_that_another_vm_has_given_already_is_no_failure(service: Start) -> None:
    cloud = Cloud("azure")
    services = [service("azure", vm=name, cloud=cloud) for name in ("web-1", "web-2")]
    event = cloud.announce(vms=["web-1", "web-2"])
    for each in services:
        provider = Azure(each.url)
        provider.approve(provider.events().events[0])
    assert [each.approvals for each in services] == [[event], [event]]


def test_a_malformed_approval_is_a_failure(vm: Vm) -> None:
    provider = Azure(vm.service.url)
    vm.service.announce(id="e1")
    event = provider.events().events[0]
    vm.service.cancel("e1")
    with pytest.raises(CannotTell, match=f"POST {vm.service.url}{EVENTS}.*status 400"):
        provider.approve(event)


def test_a_vm_approves_only_an_event_that_names_it_alone(vm: Vm) -> None:
    vm.service.announce(id="shared", not_before=60, vms=["web-1", "web-2"])
    vm.service.announce(id="alone", not_before=60)
    approving = ("--drain", f'"{sys.executable}" -V', "--approve")
    assert vm.check(*approving).status == OK
    assert vm.service.approvals == ["alone"]
    assert [line.partition(":")[0] for line in vm.check(*approving).log] == ["VM Event started"]
    assert vm.service.approvals == ["alone"]


def test_an_event_is_not_approved_when_the_drain_has_failed(vm: Vm) -> None:
    vm.service.announce(not_before=60)
    assert vm.check("--drain", f'"{sys.executable}" -c "raise SystemExit(1)"', "--approve").status == FAILED
    assert vm.service.approvals == []


# ---- only the service of 2015 is there -----------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 410])
def test_where_scheduled_events_is_not_there_the_service_of_2015_is_asked(
    status: int, service: Start, tmp_path: Path
) -> None:
    vm = Vm(service("azure", legacy=status), tmp_path)
    assert vm.asked() == [ASK_EVENTS, ASK_2015]
    vm.service.announce(id="e1")
    assert (
        vm.check().log[0].startswith("Incoming VM Event: impact=reboot type=Maintenance status=scheduled not_before=")
    )
    document = vm.document()
    assert document["provider"] == "azure-v1"
    assert document["instance"]["name"] == "web-1"
    assert vm.check().log == []


def test_that_only_the_service_of_2015_is_there_is_remembered_for_the_run_only(service: Start) -> None:
    cloud = service("azure", legacy=404)
    for _ in range(2):
        provider = Azure(cloud.url)
        for _ in range(3):
            assert provider.events() == ((), (), True)
    one_run = [ASK_EVENTS, *[ASK_2015] * 3]
    assert [f"{request.method} {request.path}" for request in cloud.requests] == one_run * 2


def test_where_neither_is_there_it_cannot_tell_and_goes_on_looking_for_both(vm: Vm) -> None:
    provider = Azure(vm.service.url)
    vm.service.announce()
    vm.service.fail(404)
    assert provider.events().doubts
    vm.service.heal()
    assert len(provider.events().events) == 1
