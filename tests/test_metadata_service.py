"""The simulated clouds keep what WIRE.md says of the real ones, for clients that others wrote too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import requests

import metadata_service
from conftest import HERE, need
from metadata_service import (
    FAILURES,
    PROVIDERS,
    Cloud,
    MetadataService,
    ScriptError,
    first_event,
    play,
    read_script,
)

NOON = datetime(2026, 4, 11, 22, 26, 58, tzinfo=timezone.utc)
AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
GCE = "/computeMetadata/v1/instance/"
EC2_EVENTS = "/latest/meta-data/events/maintenance/scheduled"
HEADERS = {
    "azure-v1": {},
    "azure": {"Metadata": "true"},
    "gce": {"Metadata-Flavor": "Google"},
    "ec2": {},
}
# A path of each provider that answers 200 and tells of an event.
EVENTS = {
    "azure-v1": "/metadata/v1/maintenance",
    "azure": AZURE_EVENTS,
    "gce": f"{GCE}upcoming-maintenance?alt=json",
    "ec2": EC2_EVENTS,
}
SERVICE = HERE / "metadata_service.py"
Start = Callable[..., MetadataService]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's proxy stands between other people's clients and our service."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture
def ask(session: requests.Session) -> Callable[..., requests.Response]:
    """ask(service, path): a GET with the headers that the provider wants, over one connection."""

    def get(service: MetadataService, path: str, **headers: str | None) -> requests.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return session.get(
            service.url + path,
            headers={**HEADERS[service.provider], **named},
            timeout=30,
            allow_redirects=False,
        )

    return get


def token(service: MetadataService, ttl: object = 21600, **headers: str) -> requests.Response:
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(ttl), **headers}
    return requests.put(f"{service.url}/latest/api/token", headers=headers, timeout=30)


def wait_until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


class Later:
    """A request in a thread, for those that are not answered at once."""

    def __init__(self, send: Callable[[], Any]) -> None:
        self.answer: Any = None
        self._thread = threading.Thread(target=self._run, args=(send,))
        self._thread.start()

    def _run(self, send: Callable[[], Any]) -> None:
        try:
            self.answer = send()
        except requests.RequestException as error:
            self.answer = error

    def waits(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.answer


# ---------------------------------------------------------------- clients that others wrote


def test_curl_and_grep_find_the_event_of_2015(service: Start) -> None:
    v1 = service("azure-v1")
    event = v1.announce()
    pipeline = '"$1" --noproxy "*" -s "$2/metadata/v1/maintenance" | grep -i EventID'
    need("grep", "grep")
    shell = [need("sh", "dash"), "-c", pipeline, "sh", need("curl", "curl"), v1.url]
    assert event in subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    v1.end(event)
    assert subprocess.run(shell, capture_output=True, check=False).stdout == b""


def google(service: MetadataService, path: str, **options: Any) -> Any:
    from google.auth.compute_engine import _metadata
    from google.auth.transport.requests import Request

    root = f"{service.url}/computeMetadata/v1/"
    return _metadata.get(Request(), path, root=root, retry_count=1, **options)


def test_google_auth_reads_keys(service: Start) -> None:
    gce = service("gce", vm="web-7")
    gce.announce("MIGRATE_ON_HOST_MAINTENANCE")
    assert google(gce, "instance/name") == "web-7"
    assert google(gce, "instance/maintenance-event") == "MIGRATE_ON_HOST_MAINTENANCE"
    assert google(gce, "instance/upcoming-maintenance", params={"alt": "json"}) == {}


def test_google_auth_reads_a_directory(service: Start) -> None:
    gce = service("gce", vm="web-7")
    gce.announce("UPCOMING_MAINTENANCE", not_before=3600)
    everything = google(gce, "instance/", recursive=True)
    assert everything["name"] == "web-7"
    assert everything["maintenanceEvent"] == "NONE"
    assert everything["upcomingMaintenance"]["maintenance_status"] == "PENDING"


def test_google_auth_takes_it_for_the_metadata_server(service: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth.compute_engine import _metadata
    from google.auth.transport.requests import Request

    monkeypatch.setenv("GCE_METADATA_IP", service("gce").url.removeprefix("http://"))
    assert _metadata.ping(Request(), retry_count=1)
    monkeypatch.setenv("GCE_METADATA_IP", service("ec2").url.removeprefix("http://"))
    assert not _metadata.ping(Request(), retry_count=1)


def credentials(service: MetadataService, timeout: float = 10) -> Any:
    from botocore.utils import InstanceMetadataFetcher

    return InstanceMetadataFetcher(timeout=timeout, base_url=service.url).retrieve_iam_role_credentials()


def test_botocore_reads_credentials_with_a_token(service: Start) -> None:
    from botocore.utils import InstanceMetadataRegionFetcher

    ec2 = service("ec2")
    assert credentials(ec2)["role_name"] == "web-role"
    put, *gets = ec2.requests
    assert put.method == "PUT"
    assert all("x-aws-ec2-metadata-token" in get.headers for get in gets)
    assert InstanceMetadataRegionFetcher(base_url=ec2.url).retrieve_region() == "eu-west-1"


@pytest.mark.parametrize("status", [403, 404, 405])
def test_botocore_goes_without_tokens_where_there_are_none(service: Start, status: int) -> None:
    assert credentials(service("ec2", token_status=status))["role_name"] == "web-role"


def test_botocore_goes_without_a_token_that_does_not_come(service: Start) -> None:
    ec2 = service("ec2", token_required=False)
    ec2.fail("hang", path="api/token")
    assert credentials(ec2, timeout=0.2)["role_name"] == "web-role"


@pytest.mark.parametrize("status", [400, 500])
def test_botocore_gets_nothing_without_the_token_that_is_required(service: Start, status: int) -> None:
    ec2 = service("ec2")
    ec2.fail(status, path="api/token")
    assert credentials(ec2) == {}


def test_botocore_is_refused_when_its_token_has_expired(service: Start) -> None:
    from botocore.utils import InstanceMetadataFetcher

    now = [0.0]
    ec2 = service("ec2", clock=lambda: now[0])
    fetcher = InstanceMetadataFetcher(base_url=ec2.url)
    old = fetcher._fetch_metadata_token()
    assert fetcher._get_iam_role(old) == "web-role"
    now[0] = 21600.0
    with pytest.raises(fetcher._RETRIES_EXCEEDED_ERROR_CLS):
        fetcher._get_iam_role(old)
    assert fetcher._get_iam_role(fetcher._fetch_metadata_token()) == "web-role"


def other_peoples_ec2(service: MetadataService) -> Any:
    from ec2_metadata import EC2Metadata

    client = EC2Metadata()
    for name in ("service_url", "dynamic_url", "metadata_url", "userdata_url"):
        ours = getattr(client, name).replace("http://169.254.169.254", service.url)
        setattr(client, name, ours)
    return client


def test_ec2_metadata_reads_who_the_vm_is(service: Start) -> None:
    ec2 = service("ec2", lifecycle="InService")
    client = other_peoples_ec2(ec2)
    assert client.instance_id == client.instance_identity_document["instanceId"]
    assert client.availability_zone == "eu-west-1a"
    assert client.region == "eu-west-1"
    assert client.public_ipv4 is None
    assert client.autoscaling_target_lifecycle_state == "InService"


def test_ec2_metadata_reads_the_end_of_a_spot_instance(service: Start) -> None:
    ec2 = service("ec2")
    client = other_peoples_ec2(ec2)
    assert client.spot_instance_action is None
    ec2.announce("spot-hibernate", not_before=NOON)
    assert client.spot_instance_action.action == "hibernate"
    assert client.spot_instance_action.time == NOON


def test_ec2_metadata_fetches_a_new_token_before_the_old_one_expires(
    service: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ec2_metadata

    now = [1e9]
    monkeypatch.setattr(ec2_metadata.time, "time", lambda: now[0])
    ec2 = service("ec2", clock=lambda: now[0])
    client = other_peoples_ec2(ec2)
    for _ in range(3):
        assert client.autoscaling_target_lifecycle_state is None
        now[0] += 21600 - 60 + 1
    assert [request.method for request in ec2.requests] == ["PUT", "GET"] * 3


# ---------------------------------------------------------------- azure-v1


def test_v1_needs_no_header_and_shows_nothing_but_the_first_event(service: Start, ask: Any) -> None:
    v1 = service("azure-v1")
    assert ask(v1, EVENTS["azure-v1"]).text == "{}"
    first, second = v1.announce(), v1.announce()
    assert ask(v1, EVENTS["azure-v1"]).json()["EventID"] == first
    v1.end(first)
    assert ask(v1, EVENTS["azure-v1"]).json()["EventID"] == second
    v1.cancel(second)
    assert ask(v1, EVENTS["azure-v1"]).text == "{}"


def test_v1_escapes_the_slashes_of_its_dates(service: Start, ask: Any) -> None:
    v1 = service("azure-v1")
    v1.announce()
    answer = ask(v1, EVENTS["azure-v1"])
    assert answer.text.count("\\/") == 2
    created = datetime.strptime(answer.json()["EventCreationTime"], "%m/%d/%Y %I:%M:%S %p")
    assert abs(created - datetime.now(timezone.utc).replace(tzinfo=None)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("hour", "said"),
    [(0, "12:07:51 AM"), (6, "6:07:51 AM"), (12, "12:07:51 PM"), (23, "11:07:51 PM")],
)
def test_v1_tells_the_time_as_americans_do(hour: int, said: str) -> None:
    cloud = Cloud("azure-v1")
    event = cloud.events[cloud.announce()]
    created = datetime(2015, 9, 5, hour, 7, 51, tzinfo=timezone.utc)
    shown = first_event([event._replace(created=created)])
    assert shown["EventCreationTime"] == f"9/5/2015 {said}"


def test_v1_tells_who_the_vm_is(service: Start, ask: Any) -> None:
    answer = ask(service("azure-v1", vm="samplevm1"), "/metadata/v1/InstanceInfo")
    assert answer.json() == {"ID": "_samplevm1", "UD": "0", "FD": "0"}


# ---------------------------------------------------------------- azure


@pytest.mark.parametrize("path", [AZURE_EVENTS, "/metadata/instance/compute?api-version=2021-02-01"])
def test_azure_wants_its_header_and_no_proxy(service: Start, ask: Any, path: str) -> None:
    azure = service("azure")
    assert ask(azure, path).status_code == 200
    assert ask(azure, path, Metadata=None).status_code == 400
    assert ask(azure, path, Metadata="no").status_code == 400
    assert ask(azure, path, X_Forwarded_For="10.0.0.1").status_code == 400


@pytest.mark.parametrize("place", ["scheduledevents", "instance/compute"])
@pytest.mark.parametrize("query", ["", "?api-version=", "?api-version=2016-01-01", "?api-version=x"])
def test_azure_wants_an_api_version(service: Start, ask: Any, place: str, query: str) -> None:
    answer = ask(service("azure"), f"/metadata/{place}{query}")
    assert answer.status_code == 400
    assert "api-version" in answer.json()["error"]


def test_azure_incarnation_rises_with_every_change_and_only_then(service: Start, ask: Any) -> None:
    azure = service("azure")
    seen = [ask(azure, AZURE_EVENTS).json()["DocumentIncarnation"]]

    def rises() -> bool:
        seen.append(ask(azure, AZURE_EVENTS).json()["DocumentIncarnation"])
        return seen[-1] > seen[-2]

    assert not rises()
    event = azure.announce(not_before=60)
    assert rises()
    azure.move(event, NOON)
    assert rises()
    azure.begin(event)
    assert rises()
    azure.begin(event)
    assert not rises()
    azure.end(event)
    assert rises()
    assert not rises()


def test_azure_document_is_that_of_the_manual(service: Start, ask: Any) -> None:
    azure = service("azure", vm="WestNO_0")
    event = azure.announce("Freeze", not_before=NOON, vms=["WestNO_0", "WestNO_1"])
    assert ask(azure, AZURE_EVENTS).json()["Events"] == [
        {
            "EventId": event,
            "EventStatus": "Scheduled",
            "EventType": "Freeze",
            "ResourceType": "VirtualMachine",
            "Resources": ["WestNO_0", "WestNO_1"],
            "NotBefore": "Sat, 11 Apr 2026 22:26:58 GMT",
            "Description": "Virtual machine is being paused because of a memory-preserving Live Migration operation.",
            "EventSource": "Platform",
            "DurationInSeconds": 5,
        }
    ]


def test_azure_time_is_gone_once_it_has_started(service: Start, ask: Any) -> None:
    azure = service("azure", iso_dates=True)
    event = azure.announce(not_before=NOON)
    assert ask(azure, AZURE_EVENTS).json()["Events"][0]["NotBefore"] == "2026-04-11T22:26:58Z"
    azure.begin(event)
    (started,) = ask(azure, AZURE_EVENTS).json()["Events"]
    assert (started["EventStatus"], started["NotBefore"]) == ("Started", "")
    azure.end(event)
    assert ask(azure, AZURE_EVENTS).json()["Events"] == []


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        ("2020-07-01", set()),
        ("2019-08-01", {"DurationInSeconds"}),
        ("2019-04-01", {"DurationInSeconds", "EventSource"}),
        ("2017-08-01", {"DurationInSeconds", "EventSource", "Description"}),
    ],
)
def test_azure_older_versions_lack_fields(service: Start, ask: Any, version: str, missing: set[str]) -> None:
    azure = service("azure")
    azure.announce()
    full, old = (
        ask(azure, f"/metadata/scheduledevents?api-version={each}").json()["Events"][0]
        for each in ("2020-07-01", version)
    )
    assert full.keys() - old.keys() == missing


def test_azure_oldest_version_puts_an_underscore_before_names(service: Start, ask: Any) -> None:
    azure = service("azure")
    azure.announce()
    answer = ask(azure, "/metadata/scheduledevents?api-version=2017-03-01")
    assert answer.json()["Events"][0]["Resources"] == ["_web-1"]


def test_azure_vms_of_one_set_see_the_events_of_all(service: Start, ask: Any) -> None:
    first = service("azure")
    second = service("azure", vm="web-2", cloud=first.cloud)
    event = second.announce()
    third = service("azure", vm="web-3", cloud=first.cloud)
    for vm in (first, second, third):
        (seen,) = ask(vm, AZURE_EVENTS).json()["Events"]
        assert (seen["EventId"], seen["Resources"]) == (event, ["web-2"])


@pytest.mark.parametrize("provider", ["azure-v1", "gce", "ec2"])
def test_elsewhere_a_vm_sees_only_its_own_events(service: Start, provider: str) -> None:
    first = service(provider)
    second = service(provider, vm="web-2", cloud=first.cloud)
    event = second.announce()
    assert not first.node.events
    assert list(second.node.events) == [event]


def test_azure_any_vm_may_approve_and_again(service: Start, ask: Any, session: Any) -> None:
    first = service("azure")
    second = service("azure", vm="web-2", cloud=first.cloud)
    event = first.announce(not_before=900)
    before = ask(first, AZURE_EVENTS).json()["DocumentIncarnation"]
    for vm in (second, first):
        answer = session.post(
            vm.url + AZURE_EVENTS,
            headers=HEADERS["azure"],
            json={"StartRequests": [{"EventId": event}]},
        )
        assert answer.status_code == 200
    document = ask(first, AZURE_EVENTS).json()
    assert document["Events"][0]["EventStatus"] == "Started"
    assert document["DocumentIncarnation"] == before + 1
    assert (first.approvals, second.approvals) == ([event], [event])


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "[]", "null", "{}", '{"StartRequests": []}', '{"StartRequests": ["e1"]}'),
        *('{"StartRequests": {"EventId": "e1"}}', '{"StartRequests": [{"EventId": 1}]}'),
        '{"StartRequests": [{"EventId": "e1"}, {"EventId": ["e1"]}]}',
    ],
)
def test_azure_refuses_a_malformed_approval(service: Start, session: Any, body: str) -> None:
    azure = service("azure")
    azure.announce(id="e1")
    post = {"headers": HEADERS["azure"], "data": body}
    assert session.post(azure.url + AZURE_EVENTS, **post).status_code == 400
    assert session.post(f"{azure.url}/metadata/scheduledevents", **post).status_code == 400
    assert azure.approvals == []
    assert azure.cloud.events["e1"].status == "Scheduled"


def test_azure_is_switched_on_by_its_first_request(service: Start, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    azure = service("azure", first_delay=120)
    waits: list[float] = []
    monkeypatch.setattr(azure.protocol.stopped, "wait", waits.append)
    assert ask(azure, "/metadata/instance/compute?api-version=2021-02-01").status_code == 200
    assert waits == []
    ask(azure, AZURE_EVENTS)
    assert 60 < waits.pop() <= 120
    azure.protocol.on_at = time.monotonic()
    ask(azure, AZURE_EVENTS)
    assert waits == []
    azure.switch_off()
    ask(azure, AZURE_EVENTS)
    assert 60 < waits.pop() <= 120


def test_azure_incarnation_starts_over_when_it_was_switched_off(service: Start, ask: Any) -> None:
    azure = service("azure")
    fresh = ask(azure, AZURE_EVENTS).json()["DocumentIncarnation"]
    event = azure.announce()
    azure.switch_off()
    document = ask(azure, AZURE_EVENTS).json()
    assert document["DocumentIncarnation"] == fresh
    assert [each["EventId"] for each in document["Events"]] == [event]


@pytest.mark.parametrize("status", [404, 410])
def test_azure_of_2015_has_only_the_old_service(service: Start, ask: Any, status: int) -> None:
    old = service("azure", legacy=status)
    event = old.announce()
    assert ask(old, AZURE_EVENTS).status_code == status
    assert ask(old, EVENTS["azure-v1"], Metadata=None).json()["EventID"] == event
    assert ask(service("azure"), EVENTS["azure-v1"]).status_code == 404


def test_azure_tells_who_the_vm_is(service: Start, ask: Any) -> None:
    vms = [service("azure", scale_set="web")]
    vms.append(service("azure", vm="web-2", cloud=vms[0].cloud))
    one, two = (ask(vm, "/metadata/instance/compute?api-version=2021-02-01").json() for vm in vms)
    assert (one["name"], two["name"]) == ("web-1", "web-2")
    assert (one["platformUpdateDomain"], two["platformUpdateDomain"]) == ("0", "1")
    assert (one["vmScaleSetName"], two["vmScaleSetName"]) == ("web", "")
    assert one["vmId"] != two["vmId"]


# ---------------------------------------------------------------- gce


def test_gce_wants_its_header_and_no_proxy(service: Start, ask: Any) -> None:
    gce = service("gce")
    assert ask(gce, f"{GCE}name").status_code == 200
    assert ask(gce, f"{GCE}name", Metadata_Flavor=None).status_code == 403
    assert ask(gce, f"{GCE}name", X_Forwarded_For="10.0.0.1").status_code == 403


def test_gce_every_answer_has_flavor_and_etag(service: Start, ask: Any) -> None:
    gce = service("gce")
    gce.fail(503, path="preempted")
    answers = [ask(gce, GCE + key) for key in ("name", "preempted", "nothing-like-it", "")]
    answers.append(ask(gce, f"{GCE}name", Metadata_Flavor=None))
    assert [each.status_code for each in answers] == [200, 503, 404, 200, 403]
    for each in answers:
        assert each.headers["Metadata-Flavor"] == "Google"
        assert each.headers["Server"] == "Metadata Server for VM"
        assert each.headers["ETag"]


def test_gce_keys(service: Start, ask: Any) -> None:
    gce = service("gce")
    assert ask(gce, f"{GCE}zone").text == "projects/123456789/zones/europe-west1-b"
    assert ask(gce, f"{GCE}id").text.isdecimal()
    assert ask(gce, f"{GCE}name?alt=json").json() == "web-1"
    assert "maintenance-event" in ask(gce, GCE).text.splitlines()
    assert "instance/" in ask(gce, "/computeMetadata/v1/").text.splitlines()


@pytest.mark.parametrize("event_type", PROVIDERS["gce"].types[:2])
def test_gce_maintenance_event_stays_for_the_duration(service: Start, ask: Any, event_type: str) -> None:
    gce = service("gce")
    assert ask(gce, f"{GCE}maintenance-event").text == "NONE"
    event = gce.announce(event_type)
    assert ask(gce, f"{GCE}maintenance-event").text == event_type
    gce.begin(event)
    assert ask(gce, f"{GCE}maintenance-event").text == event_type
    gce.end(event)
    assert ask(gce, f"{GCE}maintenance-event").text == "NONE"


def test_gce_preempted(service: Start, ask: Any) -> None:
    gce = service("gce")
    assert ask(gce, f"{GCE}preempted").text == "FALSE"
    gce.announce("PREEMPTED")
    assert ask(gce, f"{GCE}preempted").text == "TRUE"
    assert ask(gce, f"{GCE}maintenance-event").text == "NONE"


def test_gce_upcoming_maintenance_is_pending_then_ongoing(service: Start, ask: Any) -> None:
    gce = service("gce")
    start = datetime(2024, 12, 1, 19, 0, 1, tzinfo=timezone.utc)
    event = gce.announce("UPCOMING_MAINTENANCE", not_before=start)
    document = ask(gce, EVENTS["gce"]).json()
    assert document == {
        "can_reschedule": "true",
        "latest_window_start_time": "2024-12-01T19:00:01Z",
        "maintenance_reasons": ["PLANNED_UPDATE"],
        "maintenance_status": "PENDING",
        "type": "SCHEDULED",
        "window_end_time": "2024-12-01T21:00:01Z",
        "window_start_time": "2024-12-01T19:00:01Z",
    }
    gce.begin(event)
    assert ask(gce, EVENTS["gce"]).json() == {**document, "maintenance_status": "ONGOING"}
    gce.cancel(event)
    assert ask(gce, EVENTS["gce"]).json() == {}


@pytest.mark.parametrize(
    ("nothing", "status", "body"),
    [("{}", 200, "{}"), ("NONE", 200, "NONE"), ("not-yet", 503, "try again later"), ("404", 404, "")],
)
def test_gce_every_form_of_nothing_upcoming(service: Start, ask: Any, nothing: str, status: int, body: str) -> None:
    answer = ask(service("gce", nothing=nothing), EVENTS["gce"])
    assert answer.status_code == status
    assert body in answer.text


def test_gce_sixty_seconds_need_a_read_of_the_very_key(service: Start, ask: Any) -> None:
    gce = service("gce")
    ask(gce, GCE)
    ask(gce, f"{GCE}?recursive=true")
    ask(gce, f"{GCE}upcoming-maintenance?alt=json")
    assert not gce.maintenance_event_was_read
    ask(gce, f"{GCE}maintenance-event")
    assert gce.maintenance_event_was_read
    event = gce.announce()
    ask(gce, f"{GCE}maintenance-event")
    gce.end(event)
    assert not gce.maintenance_event_was_read


def poll(etag: str, timeout: int = 60, key: str = "maintenance-event") -> str:
    return f"{GCE}{key}?wait_for_change=true&last_etag={etag}&timeout_sec={timeout}"


def test_gce_long_poll_answers_when_the_value_changes(service: Start, ask: Any) -> None:
    gce = service("gce")
    now = ask(gce, poll("0"))
    assert now.text == "NONE"
    later = Later(lambda: ask(gce, poll(now.headers["ETag"])))
    wait_until(lambda: len(gce.requests) == 2)
    gce.announce("PREEMPTED")
    gce.announce("UPCOMING_MAINTENANCE")
    assert later.waits()
    gce.announce("MIGRATE_ON_HOST_MAINTENANCE")
    answer = later.wait()
    assert answer.text == "MIGRATE_ON_HOST_MAINTENANCE"
    assert answer.headers["ETag"] != now.headers["ETag"]
    assert gce.connections == 1


def test_gce_long_poll_answers_with_the_present_value_at_the_time_out(service: Start, ask: Any) -> None:
    gce = service("gce")
    gce.announce("MIGRATE_ON_HOST_MAINTENANCE")
    etag = ask(gce, poll("0")).headers["ETag"]
    answer = ask(gce, poll(etag, timeout=0))
    assert answer.text == "MIGRATE_ON_HOST_MAINTENANCE"
    assert answer.headers["ETag"] == etag
    assert ask(gce, f"{GCE}preempted?wait_for_change=true&timeout_sec=soon").status_code == 400


def test_gce_long_poll_ends_when_the_service_does(service: Start, ask: Any) -> None:
    gce = service("gce")
    etag = ask(gce, poll("0")).headers["ETag"]
    later = Later(lambda: ask(gce, poll(etag)))
    wait_until(lambda: len(gce.requests) == 2)
    gce.stop()
    later.wait()


# ---------------------------------------------------------------- ec2


def test_ec2_wants_a_token(service: Start, ask: Any) -> None:
    ec2 = service("ec2")
    mine = token(ec2).text
    assert ask(ec2, EC2_EVENTS, X_aws_ec2_metadata_token=mine).status_code == 200
    assert ask(ec2, EC2_EVENTS).status_code == 401
    assert ask(ec2, EC2_EVENTS, X_aws_ec2_metadata_token="somebody-else's").status_code == 401
    ec2.revoke_tokens()
    assert ask(ec2, EC2_EVENTS, X_aws_ec2_metadata_token=mine).status_code == 401
    assert ask(ec2, EC2_EVENTS, X_aws_ec2_metadata_token=token(ec2).text).status_code == 200


@pytest.mark.parametrize(("allowed", "lives"), [(None, 600), (90, 90)])
def test_ec2_token_expires(service: Start, ask: Any, allowed: int | None, lives: int) -> None:
    now = [0.0]
    ec2 = service("ec2", clock=lambda: now[0], token_ttl_max=allowed)
    mine = token(ec2, 600).text
    now[0] = lives - 1
    assert ask(ec2, EC2_EVENTS, X_aws_ec2_metadata_token=mine).status_code == 200
    now[0] = lives
    assert ask(ec2, EC2_EVENTS, X_aws_ec2_metadata_token=mine).status_code == 401


@pytest.mark.parametrize("ttl", ["", "0", "21601", "-1", "soon", "1.5"])
def test_ec2_refuses_a_bad_time_to_live(service: Start, ttl: str) -> None:
    assert token(service("ec2"), ttl).status_code == 400


def test_ec2_gives_tokens_to_a_put_that_came_directly(service: Start, ask: Any) -> None:
    ec2 = service("ec2")
    assert token(ec2, **{"X-Forwarded-For": "10.0.0.1"}).status_code == 403
    assert requests.put(f"{ec2.url}/latest/api/token", timeout=30).status_code == 400
    assert ask(ec2, "/latest/api/token").status_code == 405


def test_ec2_may_do_without_a_token_but_not_with_a_wrong_one(service: Start, ask: Any) -> None:
    ec2 = service("ec2", token_required=False)
    assert ask(ec2, EC2_EVENTS).status_code == 200
    assert ask(ec2, EC2_EVENTS, X_aws_ec2_metadata_token="wrong").status_code == 401


@pytest.mark.parametrize("status", [403, 404, 405])
def test_ec2_from_before_tokens(service: Start, ask: Any, status: int) -> None:
    ec2 = service("ec2", token_status=status)
    assert token(ec2).status_code == status
    assert ask(ec2, EC2_EVENTS).status_code == 200


def test_ec2_event_is_that_of_the_manual(service: Start, ask: Any) -> None:
    ec2 = service("ec2", token_required=False)
    start = datetime(2019, 1, 21, 9, 0, 43, tzinfo=timezone.utc)
    ec2.announce(id="instance-event-0d59937288b749b32", not_before=start)
    assert ask(ec2, EC2_EVENTS).json() == [
        {
            "NotBefore": "21 Jan 2019 09:00:43 GMT",
            "Code": "system-reboot",
            "Description": "scheduled reboot",
            "EventId": "instance-event-0d59937288b749b32",
            "NotAfter": "21 Jan 2019 09:17:23 GMT",
            "State": "active",
        }
    ]


def test_ec2_not_after_can_be_empty(service: Start, ask: Any) -> None:
    ec2 = service("ec2", token_required=False)
    ec2.announce(not_before=NOON, duration=-1)
    (event,) = ask(ec2, EC2_EVENTS).json()
    assert event["NotAfter"] == ""


@pytest.mark.parametrize("state", ["completed", "canceled"])
def test_ec2_finished_event_stays_listed(service: Start, ask: Any, state: str) -> None:
    ec2 = service("ec2", token_required=False)
    event = ec2.announce()
    ec2.begin(event)
    (listed,) = ask(ec2, EC2_EVENTS).json()
    assert listed["State"] == "active"
    (ec2.end if state == "completed" else ec2.cancel)(event)
    (listed,) = ask(ec2, EC2_EVENTS).json()
    assert listed["State"] == state
    assert listed["Description"] == f"[{state.title()}] scheduled reboot"
    ec2.forget(event)
    assert ask(ec2, EC2_EVENTS).json() == []


def test_ec2_may_have_no_list_of_events(service: Start, ask: Any) -> None:
    ec2 = service("ec2", token_required=False, nothing="404")
    assert ask(ec2, EC2_EVENTS).status_code == 404
    ec2.announce()
    assert len(ask(ec2, EC2_EVENTS).json()) == 1


@pytest.mark.parametrize(
    ("event_type", "path", "shown"),
    [
        ("spot-terminate", "spot/instance-action", '"action": "terminate"'),
        ("spot-stop", "spot/instance-action", '"time": "2026-04-11T22:26:58Z"'),
        ("spot-hibernate", "spot/instance-action", '"action": "hibernate"'),
        ("rebalance-recommendation", "events/recommendations/rebalance", '"noticeTime": "20'),
        ("asg-terminated", "autoscaling/target-lifecycle-state", "Terminated"),
    ],
)
def test_ec2_what_is_not_scheduled_is_404_or_there(
    service: Start, ask: Any, event_type: str, path: str, shown: str
) -> None:
    ec2 = service("ec2", token_required=False)
    assert ask(ec2, f"/latest/meta-data/{path}").status_code == 404
    event = ec2.announce(event_type, not_before=NOON)
    assert shown in ask(ec2, f"/latest/meta-data/{path}").text
    assert ask(ec2, EC2_EVENTS).json() == []
    ec2.end(event)
    assert ask(ec2, f"/latest/meta-data/{path}").status_code == 404


def test_ec2_lists_its_directories(service: Start, ask: Any) -> None:
    ec2 = service("ec2", token_required=False)
    assert "placement/" in ask(ec2, "/latest/meta-data/").text.splitlines()
    assert ask(ec2, "/latest/meta-data/iam/security-credentials/").text == "web-role"


# ---------------------------------------------------------------- failing, and healing


@pytest.fixture(params=list(PROVIDERS))
def any_service(request: pytest.FixtureRequest, service: Start) -> MetadataService:
    options = {"token_required": False} if request.param == "ec2" else {}
    return service(request.param, **options)


def truth(service: MetadataService, ask: Any) -> requests.Response:
    return ask(service, EVENTS[service.provider])


def raw(service: MetadataService) -> bytes:
    """All that the service sends, to the end of the connection."""
    from socket import create_connection

    address = service.url.removeprefix("http://").split(":")
    wanted = "".join(f"{k}: {v}\r\n" for k, v in HEADERS[service.provider].items())
    with create_connection((address[0], int(address[1])), 30) as connection:
        path = EVENTS[service.provider]
        connection.sendall(f"GET {path} HTTP/1.1\r\nConnection: close\r\n{wanted}\r\n".encode())
        return connection.makefile("rb").read()


@pytest.mark.parametrize("status", [302, 404, 429, 500, 503, 599])
def test_fails_with_any_status(any_service: MetadataService, ask: Any, status: int) -> None:
    any_service.fail(status, times=1)
    assert truth(any_service, ask).status_code == status
    assert truth(any_service, ask).status_code == 200


@pytest.mark.parametrize(
    ("how", "expected"),
    [("list", list), ("number", int), ("null", type(None)), ("string", str)],
)
def test_fails_with_json_of_the_wrong_type(any_service: MetadataService, ask: Any, how: str, expected: type) -> None:
    any_service.fail(how)
    assert type(truth(any_service, ask).json()) is expected


def test_fails_with_something_else_than_json(any_service: MetadataService, ask: Any) -> None:
    for how, sign in (("html", b"<html>"), ("bad-utf8", b"\xff"), ("empty", b"")):
        any_service.fail(how)
        answer = truth(any_service, ask)
        assert answer.status_code == 200
        assert answer.content.startswith(sign)
        with pytest.raises(requests.RequestException):
            answer.json()


@pytest.mark.parametrize("how", ["huge", "gzip-bomb"])
def test_fails_with_too_much_of_the_truth(any_service: MetadataService, ask: Any, how: str) -> None:
    right = truth(any_service, ask).json()
    any_service.fail(how)
    answer = truth(any_service, ask)
    assert len(answer.content) > 1024 * 1024
    assert answer.json() == right


def test_fails_with_a_redirect_that_leads_nowhere(any_service: MetadataService, session: Any) -> None:
    any_service.fail("redirect", path=EVENTS[any_service.provider])
    answer = session.get(any_service.url + EVENTS[any_service.provider], headers=HEADERS["gce"])
    assert [each.status_code for each in answer.history] == [302]
    assert answer.status_code != 200
    assert any_service.requests[-1].path == "/redirected"


@pytest.mark.parametrize("how", ["hang", "hang-mid-body"])
def test_hangs_until_the_client_has_had_enough(any_service: MetadataService, how: str) -> None:
    any_service.fail(how)
    url = any_service.url + EVENTS[any_service.provider]
    with pytest.raises((requests.Timeout, requests.ConnectionError)):
        requests.get(url, headers=HEADERS[any_service.provider], timeout=0.1)
    wait_until(lambda: not any_service._open)


def test_hang_mid_body_sends_half_of_it(any_service: MetadataService, ask: Any) -> None:
    any_service.announce()
    body = truth(any_service, ask).content
    any_service.fail("hang-mid-body")
    later = Later(lambda: raw(any_service))
    wait_until(lambda: len(any_service.requests) == 2)
    any_service.drop_connections()
    assert later.wait().partition(b"\r\n\r\n")[2] == body[: len(body) // 2]


def test_resets_and_truncates(any_service: MetadataService, ask: Any) -> None:
    any_service.fail("reset", times=1)
    with pytest.raises(ConnectionResetError):
        raw(any_service)
    any_service.fail("truncate", times=1)
    head, _, body = raw(any_service).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body) + 100}".encode() in head
    assert body == truth(any_service, ask).content


@pytest.mark.parametrize("how", ["drip", "drip-headers"])
def test_drips_one_byte_a_second(
    any_service: MetadataService, ask: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    right = truth(any_service, ask).json()
    waits: list[float] = []
    monkeypatch.setattr(any_service.protocol.stopped, "wait", waits.append)
    any_service.fail(how)
    message = raw(any_service)
    body = message.partition(b"\r\n\r\n")[2]
    assert json.loads(body) == right
    assert waits == [1.0] * len(body if how == "drip" else message)
    assert len(waits) > 60, "nobody should have the patience to hear it to its end"


def test_refuses_connections_and_keeps_its_port(any_service: MetadataService, ask: Any) -> None:
    url = any_service.url
    assert truth(any_service, ask).status_code == 200
    any_service.fail("refuse")
    for _ in range(2):
        with pytest.raises(requests.ConnectionError):
            truth(any_service, ask)
    any_service.heal()
    assert truth(any_service, ask).status_code == 200
    assert any_service.url == url


def test_gce_answers_without_a_header(service: Start, ask: Any) -> None:
    gce = service("gce")
    for how, header in (("no-etag", "ETag"), ("no-flavor", "Metadata-Flavor")):
        assert header in ask(gce, f"{GCE}name").headers
        gce.fail(how, times=1)
        answer = ask(gce, f"{GCE}name")
        assert header not in answer.headers
        assert answer.text == "web-1"


def test_gce_has_no_news_yet(service: Start, ask: Any) -> None:
    gce = service("gce")
    gce.fail("not-yet", path="upcoming")
    assert ask(gce, f"{GCE}upcoming-maintenance?alt=json").status_code == 503
    assert ask(gce, f"{GCE}maintenance-event").text == "NONE"


def test_a_failing_long_poll_does_not_wait_first(service: Start, ask: Any) -> None:
    gce = service("gce")
    etag = ask(gce, poll("0")).headers["ETag"]
    for how in ("html", "truncate", 503):
        gce.fail(how, times=1)
        later = Later(lambda: ask(gce, poll(etag)))
        later.wait()


def test_the_newest_failure_counts_and_the_older_one_after_it(service: Start, ask: Any) -> None:
    v1 = service("azure-v1")
    v1.fail(500)
    v1.fail(503, times=2, path="maintenance")
    assert ask(v1, "/metadata/v1/InstanceInfo").status_code == 500
    assert [truth(v1, ask).status_code for _ in range(3)] == [503, 503, 500]
    v1.heal()
    assert truth(v1, ask).status_code == 200


@pytest.mark.parametrize("wrong", [{"how": "sulk"}, {"how": "refuse", "times": 1}])
def test_a_failure_that_there_is_not_is_an_error(service: Start, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"refuse"):
        service("gce").fail(**wrong)


def test_serves_exactly_these_bytes(any_service: MetadataService, ask: Any) -> None:
    path, right = EVENTS[any_service.provider], truth(any_service, ask).content
    any_service.serve(path.partition("?")[0], b"\x00\xff{", status=201, headers={"X-Is": "odd"})
    answer = truth(any_service, ask)
    assert (answer.status_code, answer.content, answer.headers["X-Is"]) == (201, b"\x00\xff{", "odd")
    any_service.heal()
    assert truth(any_service, ask).content == right


def test_what_is_served_wakes_a_long_poll(service: Start, ask: Any) -> None:
    gce = service("gce")
    etag = ask(gce, poll("0")).headers["ETag"]
    later = Later(lambda: ask(gce, poll(etag)))
    wait_until(lambda: len(gce.requests) == 2)
    gce.serve(f"{GCE}maintenance-event", "SOMETHING_NEW")
    assert later.wait().text == "SOMETHING_NEW"
    assert ask(gce, poll(etag)).text == "SOMETHING_NEW"


# ---------------------------------------------------------------- the server


def test_keeps_a_connection_and_remembers_its_requests(any_service: MetadataService, ask: Any) -> None:
    for _ in range(3):
        truth(any_service, ask)
    assert any_service.connections == 1
    assert [each.path for each in any_service.requests] == [EVENTS[any_service.provider]] * 3
    assert any_service.requests[0].headers["host"] == any_service.url.removeprefix("http://")


def test_can_only_be_read(any_service: MetadataService, session: Any) -> None:
    event = any_service.announce()
    for method in ("PUT", "DELETE", "PATCH"):
        url = any_service.url + EVENTS[any_service.provider]
        answer = session.request(method, url, headers=HEADERS[any_service.provider], data=b"{}")
        assert answer.status_code == 405
    assert list(any_service.node.events) == [event]


def test_survives_what_is_not_http(any_service: MetadataService, ask: Any) -> None:
    from socket import create_connection

    host, port = any_service.url.removeprefix("http://").split(":")
    for nonsense in (b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET /\r\n\r\n"):
        with create_connection((host, int(port)), 30) as connection:
            connection.sendall(nonsense + b"\r\n")
            assert connection.makefile("rb").read() == b""
    assert truth(any_service, ask).status_code == 200


def test_can_be_stopped_and_started_again_at_the_same_address(any_service: MetadataService, ask: Any) -> None:
    url, event = any_service.url, any_service.announce()
    any_service.stop()
    any_service.start()
    assert any_service.url == url
    assert truth(any_service, ask).status_code == 200
    assert list(any_service.node.events) == [event]


def test_a_command_for_no_event_names_those_there_are() -> None:
    cloud = Cloud("azure")
    cloud.announce(id="e1")
    with pytest.raises(LookupError, match=r"no event 'e2'; there are: e1"):
        cloud.begin("e2")
    with pytest.raises(ValueError, match=r"e1"):
        cloud.announce(id="e1")


def test_wrong_options_are_errors_that_name_the_right_ones() -> None:
    with pytest.raises(ValueError, match=r"first_delay"):
        MetadataService("azure", first_dealy=1)
    with pytest.raises(ValueError, match=r"not-yet"):
        MetadataService("gce", nothing="nil")
    with pytest.raises(ValueError, match=r"azure-v1"):
        MetadataService("aws")
    with pytest.raises(ValueError, match=r"cloud of gce"):
        MetadataService("ec2", cloud=Cloud("gce"))
    with pytest.raises(ValueError, match=r"time zone"):
        Cloud("azure").announce(not_before=NOON.replace(tzinfo=None))


# ---------------------------------------------------------------- scripts


def test_plays_a_script_on_time_and_says_each_step(service: Start) -> None:
    azure = service("azure")
    heard: list[Any] = []
    script = """
    # a comment, and an empty line

    0    announce Freeze id=e1 in=60 vms=web-1,web-9 duration=9 description="Don't panic."
    2.5  begin e1       # it begins
    10   fail 503 times=2 path=scheduledevents
    10   exit
    99   end e1
    """
    assert play(azure, script, say=heard.append, sleep=heard.append)
    assert heard[0::2] == [0, 2.5, 7.5, 0]
    assert [line.split(maxsplit=3)[2] for line in heard[1::2]] == ["announce", "begin", "fail", "exit"]
    event = azure.cloud.events["e1"]
    assert (event.type, event.status, event.vms) == ("Freeze", "Started", ("web-1", "web-9"))
    assert (event.duration, event.description) == (9, "Don't panic.")
    assert (azure._failures[0].how, azure._failures[0].left) == (503, 2)


def test_plays_every_command_of_a_provider(service: Start) -> None:
    ec2, azure = service("ec2"), service("azure")
    script = """0 announce id=a at=2026-04-11T22:26:58Z
    0 move a at=2026-04-11T23:26:58+01:00\n0 cancel a\n0 forget a\n0 announce id=b\n0 end b
    0 fail refuse\n0 heal\n0 revoke-tokens"""
    assert not play(ec2, script, say=lambda line: None)
    assert [event.status for event in ec2.cloud.events.values()] == ["Completed"]
    play(azure, "0 announce\n0 announce id=e at=2026-04-11T22:26:58Z\n0 switch-off", say=lambda line: None)
    assert azure.cloud.events["e"].not_before == NOON
    assert azure.node.incarnation == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("soon begin e1", "'soon' is not a number of seconds"),
        ("-1 begin e1", "'-1'"),
        ("inf heal", "'inf'"),
        ("5", "no command for azure: ''"),
        ("5 bgin e1", "begin, move"),
        ("5 forget e1", "no command for azure: 'forget'"),
        ("5 begin e2", "no event announced before: 'e2'; there are: e1"),
        ("5 begin", "begin takes 1 word(s), here are 0"),
        ("5 heal now", "heal takes 0 word(s), here are 1"),
        ("5 announce reboot", "Reboot, Freeze"),
        ("5 announce id=e1", "there is an event 'e1' already"),
        ("5 announce in=soon", "in=soon: 'soon' is not a number of seconds"),
        ("5 announce at=soon", "at=soon"),
        ("5 announce at=2026-04-11T22:26:58", "needs a time zone"),
        ("5 announce when=60", "id, in, at"),
        ("5 announce in=5 at=2026-04-11T22:26:58Z", "in= or at=, not both"),
        ("5 announce status=Over", "Scheduled, Started"),
        ("5 announce description=it's", "quotation"),
        ("5 move e1", "move needs in=SECONDS or at=TIME"),
        ("5 fail sulk", "drip"),
        ("5 fail refuse times=2", "neither path nor times"),
        ("5 fail 503 times=x", "times=x"),
        ("0.5 heal", "time goes forward"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_played(service: Start, line: str, says: str) -> None:
    azure = service("azure")
    with pytest.raises(ScriptError) as error:
        play(azure, f"# one\n1 announce id=e1\n{line}\n", name="my.txt", say=pytest.fail)
    assert str(error.value).startswith("my.txt, line 3: ")
    assert says in str(error.value)
    assert not azure.cloud.events


@pytest.mark.parametrize("provider", list(PROVIDERS))
def test_sample_script_is_the_life_of_an_event_in_a_minute(service: Start, provider: str) -> None:
    simulated = service(provider)
    script = (HERE / "scripts" / f"{provider}.txt").read_text()
    steps = read_script(script, provider)
    assert {"announce", "end"} <= {step.command for step in steps}
    assert 30 <= steps[-1].at <= 90
    assert play(simulated, script, say=lambda line: None, sleep=lambda seconds: None)
    assert not simulated.cloud.events
    assert not simulated._failures


# ---------------------------------------------------------------- the program

by_signal = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to end a program with")


@pytest.fixture
def program() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(SERVICE), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@by_signal
def test_program_serves_a_set_of_vms_until_it_is_told_to_stop(program: Any, session: Any) -> None:
    process = program("--provider", "azure", "--vm", "web-1", "web-2")
    for vm in ("web-1", "web-2"):
        words = process.stdout.readline().split()
        assert words[:-1] == ["Serving", "azure", "for", vm, "at"]
        answer = session.get(words[-1] + AZURE_EVENTS, headers=HEADERS["azure"])
        assert answer.json()["Events"] == []
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert process.stderr.read() == ""


@by_signal
def test_program_ends_quietly_on_ctrl_c(program: Any) -> None:
    process = program("--provider", "azure", "--first-delay", "0.1")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert process.stderr.read() == ""


def test_program_plays_a_script_and_exits(program: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.txt"
    script.write_text("0 announce PREEMPTED id=e1\n0.1 end e1\n0.2 exit\n")
    out, err = program("--provider", "gce", "--script", script).communicate(timeout=30)
    assert err == ""
    serving, *steps = out.splitlines()
    assert serving.startswith("Serving gce for web-1 at http://127.0.0.1:")
    assert [step.split("s", 1)[1].strip() for step in steps] == ["announce PREEMPTED id=e1", "end e1", "exit"]


@pytest.mark.parametrize(("script", "says"), [("0 hide", "script.txt, line 1: no command"), (None, "script.txt")])
def test_program_refuses_a_script_it_cannot_read(program: Any, tmp_path: Path, script: str | None, says: str) -> None:
    path = tmp_path / "script.txt"
    if script:
        path.write_text(script)
    process = program("--provider", "ec2", "--script", path)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


def test_program_names_a_port_that_is_taken(program: Any, service: Start) -> None:
    taken = service("gce").url.rpartition(":")[2]
    process = program("--provider", "gce", "--port", taken)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert taken in err
    assert "Traceback" not in err


def test_program_has_a_first_delay_on_azure_only(program: Any) -> None:
    process = program("--provider", "gce", "--first-delay", "5")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "--first-delay is for --provider azure" in err


def test_help_lists_commands_and_ways_to_fail(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        metadata_service.main(["--help"])
    said = capsys.readouterr().out
    assert all(how.partition("-")[0] in said for how in FAILURES)
    assert "revoke-tokens" in said.replace("\n", "").replace("  ", "")
