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

from is_vm_in_maint import CANNOT_TELL, MAX_BODY, OK, PROVIDERS, CannotTell, MetadataClient, Unreachable, main
from metadata_service import MetadataService

pytestmark = pytest.mark.wire

Start = Callable[..., MetadataService]
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
    "truncate": r"cut short",
    "reset": r"no answer: (Connection reset|.*forcibly closed)",
    "refuse": r"no answer: (Connection refused|.*actively refused)",
}
# A key that EC2 has no news for is not there at all; a 503 on gce is asked again, which takes its time.
SENSELESS = [("ec2", 404), ("gce", 503)]
CASES = [(provider, how) for provider in PROVIDERS for how in BAD if (provider, how) not in SENSELESS]


def arguments(provider: str, url: str, folder: Path) -> list[str]:
    return ["--provider", provider, "--endpoint", url, "--state", str(folder / "state"), "--log", "stderr"]


def learn_of_an_event(service: MetadataService, folder: Path) -> bytes:
    """Announce an event that is an hour away, let the tool see it, and return what it remembers."""
    service.announce(not_before=3600)
    assert main(arguments(service.provider, service.url, folder)) == OK
    remembered = state_of(folder)
    assert json.loads(remembered)["events"]
    return remembered


def state_of(folder: Path) -> bytes:
    return (folder / "state" / "state.json").read_bytes()


def the_one_sentence(stderr: str) -> str:
    """The line on stderr, of which there is one."""
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1, stderr
    return stderr.rstrip("\n")


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
def test_a_bad_answer_is_one_sentence_and_loses_nothing(
    provider: str, how: int | str, service: Start, tool: Run, tmp_path: Path
) -> None:
    cloud = service(provider)
    before = learn_of_an_event(cloud, tmp_path)
    cloud.fail(how)
    first = tool(service=cloud)
    assert first.returncode == CANNOT_TELL
    assert first.stdout == ""
    sentence = the_one_sentence(first.stderr)
    assert sentence.startswith(f"IsVmInMaint: Metadata service unreachable: provider={provider} reason=")
    assert cloud.url in sentence
    assert re.search(BAD[how], sentence)
    # That it fails has been said, and is remembered; nothing else has changed.
    assert b'"unreachable": true' in state_of(tmp_path)
    assert state_of(tmp_path).replace(b'"unreachable": true', b'"unreachable": false') == before


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_service_that_goes_on_failing_is_said_once_and_changes_nothing(
    provider: str, service: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cloud = service(provider)
    before = learn_of_an_event(cloud, tmp_path)
    cloud.fail(500)
    runs = [arguments(provider, cloud.url, tmp_path)] * 3
    capfd.readouterr()
    assert main(runs[0]) == CANNOT_TELL
    remembered = state_of(tmp_path)
    the_one_sentence(capfd.readouterr().err)
    assert [main(run) for run in runs] == [CANNOT_TELL] * 3
    assert state_of(tmp_path) == remembered
    assert capfd.readouterr() == ("", ""), "cron would mail it every five minutes"
    cloud.heal()
    assert [main(run) for run in runs] == [OK] * 3
    assert "Metadata service reachable again: " in the_one_sentence(capfd.readouterr().err)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("how", ["hang", "hang-mid-body", "drip", "drip-headers"])
def test_an_answer_that_does_not_end_is_given_up(
    *,
    provider: str,
    how: str,
    service: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(PROVIDERS[provider], "patience", 0.4)
    cloud = service(provider)
    before = learn_of_an_event(cloud, tmp_path)
    capfd.readouterr()
    cloud.fail(how, path=PLACES[provider])
    assert main(arguments(provider, cloud.url, tmp_path)) == CANNOT_TELL
    sentence = the_one_sentence(capfd.readouterr().err)
    assert f"{cloud.url}{PLACES[provider]}" in sentence
    assert "no whole answer within" in sentence
    assert state_of(tmp_path).replace(b'"unreachable": true', b'"unreachable": false') == before


@pytest.mark.parametrize("provider", PROVIDERS)
def test_after_no_answer_nothing_else_is_asked(provider: str, service: Start, tmp_path: Path) -> None:
    cloud = service(provider)
    cloud.fail("reset")
    assert main(arguments(provider, cloud.url, tmp_path)) == CANNOT_TELL
    assert len(cloud.requests) == 1, "every question would wait for its own time-out"


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


def test_test_and_json_cannot_tell_either(service: Start, tool: Run, tmp_path: Path) -> None:
    cloud = service("azure-v1")
    before = learn_of_an_event(cloud, tmp_path)
    cloud.fail(500)
    asked = tool("--test", service=cloud)
    assert (asked.returncode, asked.stdout) == (CANNOT_TELL, "")
    assert cloud.url in the_one_sentence(asked.stderr)
    printed = tool("--json", service=cloud)
    assert printed.returncode == CANNOT_TELL
    document = json.loads(printed.stdout)
    assert document["in_maintenance"] is None
    assert len(document["events"]) == 1, "what is known is still known"
    assert state_of(tmp_path) == before


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
def test_what_is_no_http_is_cannot_tell(answer: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with raw_server(answer) as url:
        assert main(arguments("azure-v1", url, tmp_path)) == CANNOT_TELL
    assert f"GET {url}/metadata/v1/maintenance: " in the_one_sentence(capfd.readouterr().err)


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
def test_a_whole_answer_is_understood(pieces: list[bytes], tmp_path: Path) -> None:
    with raw_server(*pieces) as url:
        assert main(arguments("azure-v1", url, tmp_path)) == OK


# ---- the client's limits -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["hang", "hang-mid-body", "drip", "drip-headers"])
def test_time_is_bounded_however_slowly_the_bytes_come(how: str, service: Start) -> None:
    cloud = service("azure-v1")
    client = MetadataClient(cloud.url)
    assert client.ask("GET", PLACES["azure-v1"], {}, 5).status == 200  # the connection is there already
    cloud.fail(how)
    with pytest.raises(Unreachable, match="no whole answer within"):
        client.ask("GET", PLACES["azure-v1"], {}, 0.3)
    cloud.heal()
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
def test_a_body_may_have_1_mib_and_no_more(size: int, status: int, service: Start, tmp_path: Path) -> None:
    cloud = service("azure-v1")
    cloud.serve(PLACES["azure-v1"], b"{}".ljust(size))
    assert main(arguments("azure-v1", cloud.url, tmp_path)) == status
    assert MAX_BODY == 1024 * 1024


@pytest.mark.parametrize(("provider", "questions"), [("azure-v1", 1), ("azure", 1), ("gce", 3), ("ec2", 5)])
def test_all_questions_go_over_one_connection(provider: str, questions: int, service: Start, tmp_path: Path) -> None:
    cloud = service(provider)
    assert main(arguments(provider, cloud.url, tmp_path)) == OK
    assert len(cloud.requests) == questions
    assert cloud.connections == 1


def test_a_connection_that_the_service_closed_is_opened_anew(service: Start) -> None:
    cloud = service("azure-v1")
    client = MetadataClient(cloud.url)
    for _ in range(2):
        assert client.ask("GET", PLACES["azure-v1"], {}, 5).status == 200
        cloud.drop_connections()
    assert cloud.connections == 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_redirect_is_not_followed(provider: str, service: Start, tmp_path: Path) -> None:
    cloud = service(provider)
    cloud.fail("redirect")
    assert main(arguments(provider, cloud.url, tmp_path)) == CANNOT_TELL
    assert not [request for request in cloud.requests if request.place == "/redirected"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_of_the_environment_stands_in_between(provider: str, service: Start, tool: Run, tmp_path: Path) -> None:
    cloud, proxy = service(provider), service("azure-v1")
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine 127.0.0.1 login root password secret\n")
    names = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY")
    environment = {**dict.fromkeys(names, proxy.url), "NO_PROXY": None, "no_proxy": None, "HOME": str(home)}
    certificates = dict.fromkeys(("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"), "/nowhere/ca.pem")
    done = tool(service=cloud, env={**environment, **certificates})
    assert (done.returncode, done.stderr) == (OK, "")
    assert cloud.requests
    assert proxy.connections == 0
    assert not [request for request in cloud.requests if "authorization" in request.headers]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_is_sent_has_no_header_that_a_metadata_service_refuses(
    provider: str, service: Start, tmp_path: Path
) -> None:
    cloud = service(provider)
    assert main(arguments(provider, cloud.url, tmp_path)) == OK
    for request in cloud.requests:
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
    provider: str, service: Start, tool: Run
) -> None:
    cloud = service(provider)
    place = "/computeMetadata/v1/instance/upcoming-maintenance" if provider == "gce" else PLACES[provider]
    cloud.serve(place, json.dumps(NASTY_DOCUMENTS[provider]))
    done = tool(service=cloud, env={"PYTHONUTF8": "1"})
    assert done.returncode == OK
    line = the_one_sentence(done.stderr)
    assert line.startswith("IsVmInMaint: Incoming VM Event: impact=")
    assert line.isprintable()
    assert "forged" in line
    again = tool(service=cloud)
    assert (again.returncode, again.stderr) == (OK, ""), "and it is known the next time"


def test_an_answer_that_is_quoted_in_the_sentence_is_clean_as_well(service: Start, tool: Run) -> None:
    cloud = service("azure-v1")
    cloud.serve(PLACES["azure-v1"], "\x1b[2J\nforged: line\r\n")
    done = tool(service=cloud, env={"PYTHONUTF8": "1"})
    assert done.returncode == CANNOT_TELL
    assert the_one_sentence(done.stderr).isprintable()
