"""--notify: each transition is posted to a webhook, here a small real HTTP server, and a dead one harms nothing."""

from __future__ import annotations

import gc
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import pytest

import is_vm_in_maint
from conftest import FOREIGN_VARIABLES

pytestmark = pytest.mark.wire
posix_only = pytest.mark.skipif(os.name != "posix", reason="the hooks here are sh scripts")

SECRET = "/services/T0000/B0000/secret-of-the-webhook"
PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def logged(self) -> list[str]:
        """The words that begin each log line."""
        return re.findall(r"^IsVmInMaint: ([A-Z][\w ]+):", self.err, re.MULTILINE)


class Post(NamedTuple):
    target: str  # as in the request's first line
    headers: dict[str, str]  # names in lower case
    body: bytes
    seen: object  # what `look` saw when it came

    @property
    def document(self) -> Any:
        return json.loads(self.body)


class Webhook:
    """Takes POSTs on 127.0.0.1, answers them with the statuses given, the last of them again and again."""

    def __init__(self, statuses: Sequence[int] = (200,), look: Callable[[], object] = lambda: None) -> None:
        self.posts: list[Post] = []
        left = list(statuses)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N805 - http.server's name; self is the Webhook
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in handler.headers.items()}
                self.posts.append(Post(handler.path, headers, body, look()))
                self.answer(handler, left.pop(0) if len(left) > 1 else left[0])

            def log_message(handler, *_: object) -> None:  # noqa: N805
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def answer(self, handler: BaseHTTPRequestHandler, status: int) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "2")
        if 300 <= status < 400:
            handler.send_header("Location", "/elsewhere")
        handler.end_headers()
        handler.wfile.write(b"ok")

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return self.base + SECRET

    @property
    def texts(self) -> list[str]:
        return [post.document["text"].partition(": ")[2] for post in self.posts]

    def __enter__(self) -> Webhook:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Proxy(Webhook):
    """A proxy that hands each POST on to one server, whatever host the request names."""

    def __init__(self, onwards: str) -> None:
        super().__init__()
        self.onwards = onwards

    def answer(self, handler: BaseHTTPRequestHandler, status: int) -> None:
        post = self.posts[-1]
        request = Request(self.onwards + urlsplit(post.target).path, post.body, method="POST")
        build_opener(ProxyHandler({})).open(request).close()
        super().answer(handler, status)


@pytest.fixture
def webhook() -> Iterator[Callable[..., Webhook]]:
    """webhook(statuses, look): a Webhook that is stopped when the test ends."""
    with ExitStack() as running:
        yield lambda *arguments, **options: running.enter_context(Webhook(*arguments, **options))


@pytest.fixture
def check(tmp_path, capsys, monkeypatch) -> Callable[..., Done]:
    """check(azure, "--notify", ...): one run of the tool in this process, which is quicker than as a program."""
    for name in (*FOREIGN_VARIABLES, *PROXIES):
        monkeypatch.delenv(name, raising=False)

    def run(service, *options: str) -> Done:
        gc.collect()  # the lock of an earlier run goes with its objects, as it would with its process
        cloud = ("--provider", service.provider, "--endpoint", service.url)
        status = is_vm_in_maint.main(["--log", "stderr", "--state", str(tmp_path / "state"), *cloud, *options])
        return Done(status, *capsys.readouterr())

    return run


def hook(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_each_transition_is_posted_as_json(service, check, webhook) -> None:
    azure, chat = service("azure"), webhook()
    event = azure.announce("Reboot", id="E1", not_before=86400)
    announced = check(azure, "--notify", chat.url)
    (listed,) = json.loads(check(azure, "--json").out)["events"]
    azure.begin(event)
    started = check(azure, "--notify", chat.url)
    nothing_new = check(azure, "--notify", chat.url)
    azure.end(event)
    over = check(azure, "--notify", chat.url)

    assert [done.status for done in (announced, started, nothing_new, over)] == [0, 0, 0, 0]
    host = socket.gethostname()
    lines = [line[len("IsVmInMaint: ") :] for line in (announced.err + started.err + over.err).splitlines()]
    assert [post.document["text"] for post in chat.posts] == [f"{host}: {line}" for line in lines]
    assert [line.partition(":")[0] for line in lines] == ["Incoming VM Event", "VM Event started", "VM Event over"]
    assert chat.posts[0].document == {"text": f"{host}: {lines[0]}", "event": listed, "host": host}
    assert {tuple(sorted(post.document)) for post in chat.posts} == {("event", "host", "text")}
    assert {(post.target, post.headers["content-type"]) for post in chat.posts} == {(SECRET, "application/json")}


@posix_only
def test_the_vm_is_drained_before_anybody_is_told(service, check, webhook, tmp_path) -> None:
    azure, drained = service("azure"), tmp_path / "drained"
    chat = webhook(look=drained.exists)
    azure.announce("Reboot")
    check(azure, "--notify", chat.url, "--drain", hook(tmp_path / "drain", f"touch {drained}"))
    assert [text.partition(":")[0] for text in chat.texts] == ["Incoming VM Event", "VM drained"]
    assert [post.seen for post in chat.posts] == [True, True]


@posix_only
def test_a_failed_hook_is_told_too(service, check, webhook, tmp_path) -> None:
    azure, chat = service("azure"), webhook()
    azure.announce("Reboot", id="E1")
    done = check(azure, "--notify", chat.url, "--drain", hook(tmp_path / "drain", "exit 1"))
    assert done.status == 4
    assert [text.partition(":")[0] for text in chat.texts] == ["Incoming VM Event", "VM drain failed"]
    assert [post.document["event"]["id"] for post in chat.posts] == ["E1", "E1"]


def test_that_the_metadata_service_fails_is_told_once(service, check, webhook) -> None:
    gce, chat = service("gce"), webhook()
    gce.fail("refuse")
    check(gce, "--notify", chat.url)
    check(gce, "--notify", chat.url)
    (post,) = chat.posts
    assert "Metadata service unreachable" in post.document["text"]
    assert post.document["event"] is None


def test_it_is_tried_three_times(service, check, webhook) -> None:
    azure, chat = service("azure"), webhook([503, 500, 200])
    azure.announce("Reboot")
    done = check(azure, "--notify", chat.url)
    assert (done.status, done.logged) == (0, ["Incoming VM Event"])
    assert len(chat.posts) == 3
    assert len({post.body for post in chat.posts}) == 1


@pytest.mark.parametrize("status", [500, 404, 302])
def test_after_three_tries_it_is_a_warning_and_no_more(status, service, check, webhook) -> None:
    azure, chat = service("azure"), webhook([status])
    azure.announce("Reboot")
    done = check(azure, "--notify", chat.url)
    assert (done.status, done.logged) == (0, ["Incoming VM Event", "Notification failed"])
    assert len(chat.posts) == 3
    assert {post.target for post in chat.posts} == {SECRET}
    assert f"status {status}" in done.err


@posix_only
def test_a_dead_webhook_delays_and_fails_nothing_else(service, check, tmp_path) -> None:
    azure = service("azure")
    event = azure.announce("Reboot")
    hooks = ("--drain", hook(tmp_path / "drain", "exit 0"), "--restore", hook(tmp_path / "restore", "exit 0"))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}{SECRET}"
    first = check(azure, *hooks, "--notify", dead)
    azure.end(event)
    second = check(azure, *hooks, "--notify", dead)
    assert (first.status, first.logged) == (0, ["Incoming VM Event", "VM drained", "Notification failed"])
    assert (second.status, second.logged) == (0, ["VM Event over", "VM restored", "Notification failed"])


def test_a_webhook_that_never_answers_is_given_up(service, check) -> None:
    azure = service("azure")
    azure.announce("Reboot")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its queue for ever
        done = check(azure, "--notify", f"http://127.0.0.1:{silent.getsockname()[1]}{SECRET}")
    assert (done.status, done.logged) == (0, ["Incoming VM Event", "Notification failed"])


def test_a_webhook_whose_answer_never_ends_has_taken_it(service, check) -> None:
    hung_up = threading.Event()

    class Endless(Webhook):
        def answer(self, handler: BaseHTTPRequestHandler, status: int) -> None:
            handler.send_response(status)
            handler.end_headers()
            try:
                while True:
                    handler.wfile.write(b"." * 65536)
            except OSError:
                hung_up.set()

    azure = service("azure")
    azure.announce("Reboot")
    with Endless() as chat:
        done = check(azure, "--notify", chat.url)
        assert hung_up.wait(30)
    assert (done.status, done.logged, len(chat.posts)) == (0, ["Incoming VM Event"], 1)


def test_the_path_of_the_webhook_is_never_logged(service, check, webhook, monkeypatch) -> None:
    azure = service("azure")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    chat = webhook([500])
    said = []
    for url in (f"http://127.0.0.1:{port}{SECRET}", f"http://user:secret@127.0.0.1:{port}{SECRET}", chat.url):
        azure.announce("Reboot")
        said.append(check(azure, "--verbose", "--notify", url))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    azure.announce("Reboot")
    said.append(check(azure, "--verbose", "--notify", f"http://hooks.example{SECRET}"))
    assert ["Notification failed" in done.logged for done in said] == [True] * 4
    assert not [done for done in said if "secret" in done.out + done.err]


def test_a_webhook_is_reached_through_the_systems_proxy_and_the_metadata_service_is_not(
    service, check, webhook, monkeypatch
) -> None:
    azure, chat = service("azure"), webhook()
    azure.announce("Reboot")
    with Proxy(chat.base) as proxy:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy.base)
        done = check(azure, "--notify", f"http://hooks.example{SECRET}")
    assert (done.status, done.logged) == (0, ["Incoming VM Event"])
    assert [post.target for post in proxy.posts] == [f"http://hooks.example{SECRET}"]
    assert [post.target for post in chat.posts] == [SECRET]
    assert chat.posts[0].body == proxy.posts[0].body


def test_without_news_nobody_is_told(service, check, webhook) -> None:
    azure, chat = service("azure"), webhook()
    check(azure, "--notify", chat.url)
    assert chat.posts == []
