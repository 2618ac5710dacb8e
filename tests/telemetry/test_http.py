"""The small HTTP server through real sockets, and what the probes say through a clock of our own."""

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from migplugin.telemetry import http as module
from migplugin.telemetry.http import HttpServer, Page, verdict
from migplugin.telemetry.probes import STUCK_AFTER, Probes

PAGES: dict[str, Callable[[], Page]] = {
    "/yes": lambda: verdict(True, "all is well"),
    "/no": lambda: verdict(False, "something is not"),
    "/broken": lambda: 1 / 0,  # type: ignore[dict-item,return-value]
}


def until(claim: Callable[[], object], within: float = 5.0) -> None:
    end = time.monotonic() + within
    while not claim():
        assert time.monotonic() < end, "it never came true"
        threading.Event().wait(0.005)


@contextmanager
def serving(host: str = "127.0.0.1", port: int = 0) -> Iterator[HttpServer]:
    server = HttpServer(host, port, PAGES)
    server.start()
    try:
        until(lambda: server.port)
        yield server
    finally:
        server.close()


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with serving() as server:
        yield server


def ask(server: HttpServer, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def raw(server: HttpServer, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_a_verdict_is_a_status_and_one_line_of_json_with_the_reason(server: HttpServer) -> None:
    response, body = ask(server, "/yes?verbose")
    assert (response.status, response.getheader("Content-Type")) == (200, "application/json")
    assert body == b'{"ok": true, "reason": "all is well"}\n'
    response, body = ask(server, "/no")
    assert response.status == 503
    assert json.loads(body) == {"ok": False, "reason": "something is not"}


def test_head_is_answered_without_a_body(server: HttpServer) -> None:
    answer = raw(server, b"HEAD /yes HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 38" in head
    assert not body


def test_nothing_tells_which_program_answers(server: HttpServer) -> None:
    response, _ = ask(server, "/yes")
    assert response.getheader("Server") is None


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /other HTTP/1.1", b"404"),
        (b"GET /../etc/passwd HTTP/1.1", b"404"),
        (b"POST /yes HTTP/1.1", b"405"),
        (b"POST /other HTTP/1.1", b"404"),
        (b"DELETE /no HTTP/1.1", b"405"),
        (b"GET /yes", b"400"),
        (b"GET /yes HTTP/2.0", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\xfc", b"400"),
        (b"", b"400"),
    ],
)
def test_what_is_not_asked_properly_is_refused(
    server: HttpServer, request_line: bytes, status: bytes
) -> None:
    answer = raw(server, request_line + b"\r\n\r\n")
    assert answer.split(b" ", 2)[1] == status
    assert b"Connection: close" in answer


def test_a_head_that_is_too_long_is_refused_and_not_stored(server: HttpServer) -> None:
    answer = raw(server, b"GET /yes HTTP/1.1\r\nX: ".ljust(module.MAX_HEAD_BYTES, b"a"))
    assert answer.startswith(b"HTTP/1.1 431 ")


def test_who_asks_too_slowly_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WITHIN", 0.05)
    with serving() as server:
        assert raw(server, b"GET /yes HTTP/1.1\r\n") == b""


def test_whoever_holds_connections_open_keeps_no_probe_out_and_loses_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    with serving() as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(2)]
        until(lambda: len(server._tasks) == 2)
        assert ask(server, "/yes")[0].status == 200
        assert held[0].recv(1) == b""
        until(lambda: len(server._tasks) == 1)
        held[1].sendall(b"GET /yes HTTP/1.1\r\n\r\n")
        assert held[1].recv(12) == b"HTTP/1.1 200"
        for connection in held:
            connection.close()
        until(lambda: not server._tasks)
        assert ask(server, "/yes")[0].status == 200


def test_a_page_that_fails_is_a_500_and_told_in_the_log(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(server, "/broken")[0].status == 500
    assert "a page failed" in caplog.text
    assert ask(server, "/yes")[0].status == 200


def test_an_address_in_use_is_one_warning_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = HttpServer("127.0.0.1", port, PAGES)
        server.start()
        until(lambda: "no address for the probes" in caplog.text)
    until(lambda: server.port == port)
    assert ask(server, "/yes")[0].status == 200
    server.close()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    (reason,) = [record.__dict__["reason"] for record in warnings]
    assert "Address already in use" in reason


def test_closing_while_the_address_is_in_use_ends_the_thread() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        server = HttpServer("127.0.0.1", other.getsockname()[1], PAGES)
        server.start()
        server.close()
        assert not server._thread.is_alive()


def test_without_a_host_every_address_is_served() -> None:
    with serving(host="") as server:
        assert ask(server, "/yes")[0].status == 200
        if socket.has_dualstack_ipv6():
            socket.create_connection(("::1", server.port), timeout=5).close()


def test_the_server_lives_in_one_daemon_thread(server: HttpServer) -> None:
    ask(server, "/yes")
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "http"]
    assert thread.daemon


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_loop_that_does_not_turn_is_not_alive() -> None:
    clock = Clock()
    probes = Probes(clock)
    assert probes.alive().status == 200
    clock.now += STUCK_AFTER + 2
    assert probes.alive() == verdict(False, "the event loop has not turned for 12 s")


def test_a_grpc_server_that_does_not_answer_is_not_alive() -> None:
    probes = Probes(Clock())
    probes.serving(dict, lambda: ["nvidia.com/gpu"])
    assert probes.alive() == verdict(False, "no gRPC server answers for nvidia.com/gpu")


def test_ready_is_told_by_stage_then_by_resource() -> None:
    probes = Probes(Clock())
    probes.stage = "waiting for the node lock"
    assert probes.ready() == verdict(False, "waiting for the node lock")
    states = {"b": False, "a": True}
    probes.serving(lambda: states, tuple)
    assert probes.ready() == verdict(False, "the kubelet has not taken the list of b")
    states["b"] = True
    assert probes.ready() == verdict(True, "the kubelet has a, b")
    states.clear()
    assert probes.ready() == verdict(True, "nothing to serve")
    probes.serving(dict, tuple, lambda: "no libnvidia-ml")
    assert probes.ready() == verdict(True, "nothing to serve; the driver does not answer: no libnvidia-ml")
    probes.stopping()
    assert probes.ready() == verdict(False, "stopping")
