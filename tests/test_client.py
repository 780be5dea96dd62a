"""Whatever comes instead of an answer: status 3, one sentence, bounded time, and nothing that is known is lost."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from checking import Vm
from is_vm_in_maint import CANNOT_TELL, MAX_BODY, OK, PROVIDERS, CannotTell, MetadataClient, Unreachable
from metadata_service import MetadataService

pytestmark = pytest.mark.wire

Start = Callable[[str], Vm]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

# Where each provider tells of events.
PLACES = {
    "azure-v1": "/metadata/v1/maintenance",
    "azure": "/metadata/scheduledevents",
    "gce": "/computeMetadata/v1/instance/maintenance-event",
    "ec2": "/latest/meta-data/events/maintenance/scheduled",
}
# What a provider does not understand, and in which words it says so.
BAD: dict[int | str, str] = {
    404: r"is --provider right.*status 404",
    429: r"refused; the answer, status 429",
    500: r"refused; the answer, status 500",
    503: r"refused; the answer, status 503",
    "redirect": r"a redirect, which no metadata service sends, so it is not followed",
    "huge": r"longer than 1 MiB",
    "html": r"not (JSON|a token|a maintenance event).*<html>",
    "list": r"(a JSON dict is wanted|not a token|not a maintenance event).*\[1, ",
    "number": r"(a JSON \w+ is wanted|not a maintenance event).*'42'",
    "null": r"(a JSON \w+ is wanted|not a maintenance event).*'null'",
    "string": r"(a JSON \w+ is wanted|not a maintenance event)",
    "empty": r"(not JSON|not a token|not a maintenance event).*begins ''",
    "bad-utf8": r"not UTF-8",
    "gzip-bomb": r"not UTF-8",
    "truncate": r"cut short|IncompleteRead",
    "reset": r"no answer: (Connection reset|.*forcibly closed)",
    "refuse": r"no answer: (Connection refused|.*actively refused)",
}
# A key that EC2 has no news for is not there at all; a 503 on gce is asked again, which takes its time.
SENSELESS = [("ec2", 404), ("gce", 503)]
CASES = [(provider, how) for provider in PROVIDERS for how in BAD if (provider, how) not in SENSELESS]


@pytest.fixture
def start(service: Callable[..., MetadataService], tmp_path: Path) -> Start:
    """start("gce"): a VM there."""
    return lambda provider: Vm(service(provider), tmp_path)


def learn_of_an_event(vm: Vm) -> bytes:
    """Announce an event that is an hour away, let the tool see it, and return what it remembers."""
    vm.service.announce(not_before=3600)
    assert vm.check().status == OK
    assert vm.remembered()["events"]
    return vm.state.read_bytes()


def the_one_sentence(stderr: str) -> str:
    """The line on stderr, of which there is one."""
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1, stderr
    return stderr.rstrip("\n")


def assert_only_the_failure_is_new(vm: Vm, before: bytes) -> None:
    """That it fails is remembered, so that it is said once; what is known of events is as it was."""
    now = vm.state.read_bytes()
    assert b'"unreachable": true' in now
    assert now.replace(b'"unreachable": true', b'"unreachable": false') == before


@contextmanager
def raw_server(*pieces: bytes, goes_on: bool = False) -> Iterator[str]:
    """The URL of a server that answers every connection with these bytes, then closes it or goes on for ever."""
    over = threading.Event()

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(65536)
                for piece in pieces:
                    connection.sendall(piece)
                    over.wait(0.05)  # so that the pieces arrive as pieces
                while goes_on and not over.is_set():
                    connection.sendall(pieces[-1])
            except OSError:
                pass  # the client has had enough

    def serve(listener: socket.socket) -> None:
        while not over.is_set():
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            over.set()
            socket.create_connection(("127.0.0.1", port)).close()  # wakes accept()
            thread.join()


# ---- bad answers, through the whole tool ---------------------------------------------------------------


@pytest.mark.parametrize(("provider", "how"), CASES)
def test_a_bad_answer_is_one_sentence_and_loses_nothing(provider: str, how: int | str, start: Start, tool: Run) -> None:
    vm = start(provider)
    before = learn_of_an_event(vm)
    vm.service.fail(how)
    done = tool(service=vm.service)
    assert done.returncode == CANNOT_TELL
    assert done.stdout == ""
    sentence = the_one_sentence(done.stderr)
    assert sentence.startswith(f"IsVmInMaint: Metadata service unreachable: provider={provider} reason=")
    assert vm.service.url in sentence
    assert re.search(BAD[how], sentence)
    assert_only_the_failure_is_new(vm, before)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_service_that_goes_on_failing_is_said_once_and_changes_nothing(provider: str, start: Start) -> None:
    vm = start(provider)
    before = learn_of_an_event(vm)
    vm.service.fail(500)
    status, log, printed = vm.check()
    assert (status, len(log), printed) == (CANNOT_TELL, 1, "")
    remembered = vm.state.read_bytes()
    # Not a word more: cron would mail it every five minutes.
    assert [vm.check() for _ in range(3)] == [(CANNOT_TELL, [], "")] * 3
    assert vm.state.read_bytes() == remembered
    vm.service.heal()
    again = vm.check()
    assert again == (OK, [f"Metadata service reachable again: provider={provider}"], "")
    assert vm.check() == (OK, [], "")
    assert vm.state.read_bytes() == before


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("how", ["hang", "hang-mid-body", "drip", "drip-headers"])
def test_an_answer_that_does_not_end_is_given_up(
    provider: str, how: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PROVIDERS[provider], "patience", 0.4)
    vm = start(provider)
    before = learn_of_an_event(vm)
    vm.service.fail(how, path=PLACES[provider])
    status, (sentence,), _ = vm.check()
    assert status == CANNOT_TELL
    assert f"{vm.service.url}{PLACES[provider]}" in sentence
    assert "no whole answer within" in sentence
    assert_only_the_failure_is_new(vm, before)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_after_no_answer_nothing_else_is_asked(provider: str, start: Start) -> None:
    vm = start(provider)
    vm.service.fail("reset")
    assert len(vm.asked()) == 1, "every question would wait for its own time-out"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a connection to a broadcast address may be tried")
def test_no_route_is_one_sentence(tool: Run) -> None:
    done = tool("--endpoint", "http://255.255.255.255", provider="gce")
    assert done.returncode == CANNOT_TELL
    assert "http://255.255.255.255/" in the_one_sentence(done.stderr)
    assert "no answer: " in done.stderr


def test_a_host_that_has_no_address_is_one_sentence(tool: Run) -> None:
    done = tool("--endpoint", "http://metadata.invalid.", provider="azure-v1", timeout=120)
    assert done.returncode == CANNOT_TELL
    assert "http://metadata.invalid./" in the_one_sentence(done.stderr)


def test_test_and_json_cannot_tell_either(start: Start, tool: Run) -> None:
    vm = start("azure-v1")
    before = learn_of_an_event(vm)
    vm.service.fail(500)
    asked = tool("--test", service=vm.service)
    assert (asked.returncode, asked.stdout) == (CANNOT_TELL, "")
    assert vm.service.url in the_one_sentence(asked.stderr)
    printed = tool("--json", service=vm.service)
    assert printed.returncode == CANNOT_TELL
    assert vm.service.url in the_one_sentence(printed.stderr)
    document = json.loads(printed.stdout)
    assert document["in_maintenance"] is None
    assert len(document["events"]) == 1, "what is known is still known"
    assert vm.state.read_bytes() == before


GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="another protocol"),
        pytest.param(b"\x16\x03\x01\x00\x00", id="TLS"),
        pytest.param(b"HTTP/1.1 abc OK\r\n\r\n{}", id="a status that is no number"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n{}", id="too many headers"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n{}", id="too long a header"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n", id="a bad chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}", id="no last chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}", id="a negative length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}", id="a length that is no number"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", id="two lengths"),
        pytest.param(b"HTTP/1.1 304 Not Modified\r\n\r\n", id="not modified"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", id="no content"),
        pytest.param(GOOD + b"Content-Encoding: gzip\r\n\r\n\x1f\x8b", id="half a gzip"),
    ],
)
def test_what_is_no_http_is_cannot_tell(answer: bytes, start: Start) -> None:
    with raw_server(answer) as url:
        status, (sentence,), _ = start("azure-v1").check("--endpoint", url)
    assert status == CANNOT_TELL
    assert f"GET {url}/metadata/v1/maintenance: " in sentence


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([GOOD + b"\r\n{", b"}"], id="in pieces"),
        pytest.param([GOOD[:9], GOOD[9:], b"\r\n", b"{}"], id="with headers in pieces"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"1\r\n}\r\n0\r\n\r\n"], id="chunked"
        ),
        pytest.param([b"HTTP/1.1 200 OK\r\n\r\n{}"], id="without a length"),
        pytest.param([b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"], id="of HTTP 1.0"),
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD + b"\r\n{}"], id="after 100 Continue"),
    ],
)
def test_a_whole_answer_is_understood(pieces: list[bytes], start: Start) -> None:
    with raw_server(*pieces) as url:
        assert start("azure-v1").check("--endpoint", url) == (OK, [], "")


# ---- the client's limits -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hang", "hang-mid-body", "drip", "drip-headers"])
def test_time_is_bounded_however_slowly_the_bytes_come(how: str, start: Start) -> None:
    service = start("azure-v1").service
    client = MetadataClient(service.url)
    assert client.ask("GET", PLACES["azure-v1"], {}, 5).status == 200  # the connection is there already
    service.fail(how)
    with pytest.raises(Unreachable, match="no whole answer within"):
        client.ask("GET", PLACES["azure-v1"], {}, 0.3)
    service.heal()
    assert client.ask("GET", PLACES["azure-v1"], {}, 5).body == b"{}", "and then it goes on"


@pytest.mark.parametrize(
    "endless",
    [
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n"], id="100 Continue"),
        pytest.param([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"], id="chunks"),
        pytest.param([b"HTTP/1.1 200 OK\r\n\r\n", b" " * 4096], id="body"),
    ],
)
def test_an_answer_without_end_is_given_up_however_fast_it_comes(endless: Sequence[bytes]) -> None:
    with raw_server(*endless, goes_on=True) as url, pytest.raises(CannotTell):
        MetadataClient(url).ask("GET", PLACES["azure-v1"], {}, 1.0)


@pytest.mark.parametrize(("size", "status"), [(MAX_BODY, OK), (MAX_BODY + 1, CANNOT_TELL)])
def test_a_body_may_have_1_mib_and_no_more(size: int, status: int, start: Start) -> None:
    vm = start("azure-v1")
    vm.service.serve(PLACES["azure-v1"], b"{}".ljust(size))
    assert vm.check().status == status
    assert MAX_BODY == 1024 * 1024


@pytest.mark.parametrize(("provider", "questions"), [("azure-v1", 1), ("azure", 1), ("gce", 3), ("ec2", 5)])
def test_all_questions_of_a_check_go_over_one_connection(provider: str, questions: int, start: Start) -> None:
    vm = start(provider)
    assert len(vm.asked()) == questions
    assert vm.service.connections == 1


def test_a_connection_that_the_service_closed_is_opened_anew(start: Start) -> None:
    service = start("azure-v1").service
    client = MetadataClient(service.url)
    for _ in range(2):
        assert client.ask("GET", PLACES["azure-v1"], {}, 5).status == 200
        service.drop_connections()
    assert service.connections == 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_redirect_is_not_followed(provider: str, start: Start) -> None:
    vm = start(provider)
    vm.service.fail("redirect")
    assert vm.check().status == CANNOT_TELL
    assert vm.service.requests
    assert "/redirected" not in [request.place for request in vm.service.requests]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_of_the_environment_stands_in_between(
    provider: str, service: Callable[..., MetadataService], tool: Run, tmp_path: Path
) -> None:
    cloud, proxy = service(provider), service("azure-v1")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login root password secret\n")
    names = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY")
    environment = {**dict.fromkeys(names, proxy.url), "NO_PROXY": None, "no_proxy": None, "HOME": str(tmp_path)}
    certificates = dict.fromkeys(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"), "/nowhere/ca.pem")
    done = tool(service=cloud, env={**environment, **certificates})
    assert (done.returncode, done.stderr) == (OK, "")
    assert cloud.requests
    assert proxy.connections == 0
    assert not [request for request in cloud.requests if "authorization" in request.headers]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_is_sent_has_no_header_that_a_metadata_service_refuses(provider: str, start: Start) -> None:
    vm = start(provider)
    vm.check()
    assert vm.service.requests
    for request in vm.service.requests:
        assert "x-forwarded-for" not in request.headers
        assert request.headers["user-agent"].startswith("is-vm-in-maint/")
        assert "gzip" not in request.headers.get("accept-encoding", "")


# ---- nasty text comes out as one clean line -------------------------------------------------------------

NASTY = "one\nNov 22 10:00:00 web-1 sshd[1]: forged\r\x00\x1b[31m\u2028\u202e\ud800 end"
NASTY_DOCUMENTS = {
    "azure-v1": {"EventID": NASTY, "EventCreationTime": NASTY, NASTY: NASTY},
    "azure": {
        "DocumentIncarnation": NASTY,
        "Events": [
            {
                "EventId": NASTY,
                "EventStatus": NASTY,
                "EventType": NASTY,
                "Resources": ["web-1", NASTY],
                "NotBefore": NASTY,
                "Description": NASTY,
                "EventSource": NASTY,
                "DurationInSeconds": NASTY,
            }
        ],
    },
    "gce": {"type": NASTY, "maintenance_reasons": [NASTY], "maintenance_status": "PENDING", "window_start_time": NASTY},
    "ec2": [{"EventId": NASTY, "Code": NASTY, "Description": NASTY, "NotBefore": NASTY, "State": NASTY}],
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_control_characters_and_line_breaks_in_every_field_come_out_as_one_clean_line(
    provider: str, start: Start, tool: Run
) -> None:
    service = start(provider).service
    place = "/computeMetadata/v1/instance/upcoming-maintenance" if provider == "gce" else PLACES[provider]
    service.serve(place, json.dumps(NASTY_DOCUMENTS[provider]))
    done = tool(service=service)
    assert done.returncode == OK
    line = the_one_sentence(done.stderr)
    assert line.startswith("IsVmInMaint: Incoming VM Event: impact=")
    assert line.isprintable()
    assert "forged" in line
    again = tool(service=service)
    assert (again.returncode, again.stderr) == (OK, ""), "and it is known the next time"


def test_an_answer_that_is_quoted_in_the_sentence_is_clean_as_well(start: Start, tool: Run) -> None:
    service = start("azure-v1").service
    service.serve(PLACES["azure-v1"], "\x1b[2J\nforged: line\r\n")
    done = tool(service=service)
    assert done.returncode == CANNOT_TELL
    assert the_one_sentence(done.stderr).isprintable()
