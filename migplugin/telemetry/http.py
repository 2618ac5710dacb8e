"""A small HTTP server for probes, on a daemon thread named `http` with an event loop of its own.

It must answer when the agent's own loop is stuck, since that is what /healthz is asked about; so it
shares nothing with that loop and its pages are plain callables that read values. It is no web server:
GET and HEAD of a few fixed paths, one answer a connection, and whoever sends too much, too slowly or
too often is cut off. Where the address cannot be had, the agent works on without it.
"""

import asyncio
import contextlib
import errno
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 8192
MAX_CONNECTIONS = 32
WITHIN = 5.0  # a connection, from its first byte to its end
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 30.0

_PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


@dataclass(frozen=True, slots=True)
class Page:
    """An answer: HTTP status, body and its type."""

    status: int
    body: bytes
    content_type: str = "application/json"


def verdict(ok: bool, reason: str) -> Page:
    """A probe's answer: 200 or 503, and one line of JSON that says why."""
    return Page(200 if ok else 503, json.dumps({"ok": ok, "reason": reason}).encode() + b"\n")


class HttpServer:
    """Serves `pages`, by path, at `host` (empty: every address) and `port` (0: any free one) until `close`.

    `port` is the one in use, 0 until there is one. Pages are called in the thread, one at a time.
    """

    def __init__(self, host: str, port: int, pages: Mapping[str, Callable[[], Page]]) -> None:
        self.port = 0
        self._address = (host, port)
        self._pages = pages
        self._tasks: dict[asyncio.Task[None], None] = {}  # oldest first
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stops listening; what is being answered is cut off."""
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(1.0)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except Exception:
            log.exception("the probes have ended")

    async def _serve(self) -> None:
        listener = await self._listen()
        if listener is None:
            return
        self.port = listener.getsockname()[1]
        log.info("probes", extra={"host": self._address[0] or "*", "port": self.port})
        with listener:
            listener.setblocking(False)
            self._accept_from(listener)
            await self._closing.wait()
            self._loop.remove_reader(listener)

    async def _listen(self) -> socket.socket | None:
        """A listening socket, None when closed meanwhile. Says once why there is none yet."""
        pause, said = SHORTEST_PAUSE, False
        while not self._closing.is_set():
            try:
                return _bind(*self._address)
            except OSError as exc:
                if not said:
                    host, port = self._address
                    log.warning(
                        "no address for the probes, will try again",
                        extra={"address": f"{host or '*'}:{port}", "reason": exc.strerror or str(exc)},
                    )
                said = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return None

    def _accept_from(self, listener: socket.socket) -> None:
        self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # No file descriptor left, perhaps. It would be reported again at once, and for as long.
            self._loop.remove_reader(listener)
            self._loop.call_later(SHORTEST_PAUSE, self._accept_from, listener)
            return
        if len(self._tasks) >= MAX_CONNECTIONS:
            # A probe is answered at once: whoever holds on to a connection must not keep it out.
            oldest = next(iter(self._tasks))
            del self._tasks[oldest]
            oldest.cancel()
        connection.setblocking(False)
        task = self._loop.create_task(self._connection(connection))
        self._tasks[task] = None

        def ended(task: asyncio.Task[None]) -> None:
            # Here and not in the task, which may be cancelled before it begins.
            self._tasks.pop(task, None)
            connection.close()

        task.add_done_callback(ended)

    async def _connection(self, connection: socket.socket) -> None:
        # Whoever asked may be gone, or too slow.
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(WITHIN):
                head = b""
                while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES:
                    part = await self._loop.sock_recv(connection, MAX_HEAD_BYTES - len(head))
                    if not part:
                        return
                    head += part
                await self._loop.sock_sendall(connection, self._answer(head))

    def _answer(self, head: bytes) -> bytes:
        if b"\r\n\r\n" in head:
            method, page = self._page(head)
        else:
            method, page = "GET", _plain(431)
        lines = [
            f"HTTP/1.1 {page.status} {_PHRASES[page.status]}",
            f"Content-Type: {page.content_type}",
            f"Content-Length: {len(page.body)}",
            "Cache-Control: no-store",
            "Connection: close",
        ]
        if page.status == 405:
            lines.append("Allow: GET, HEAD")
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == "HEAD" else page.body)

    def _page(self, head: bytes) -> tuple[str, Page]:
        """The method, and the answer to a request that begins with `head`."""
        words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return "GET", _plain(400)
        method, path = words[0], words[1].partition("?")[0]
        page = self._pages.get(path)
        if page is None:
            return method, _plain(404)
        if method not in {"GET", "HEAD"}:
            return method, _plain(405)
        try:
            return method, page()
        except Exception:
            log.exception("a page failed", extra={"path": path})
            return method, _plain(500)


def _plain(status: int) -> Page:
    return Page(status, f"{_PHRASES[status].lower()}\n".encode(), "text/plain; charset=utf-8")


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; for an empty `host` on IPv6 and IPv4, or on what there is. Raises OSError."""
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=MAX_CONNECTIONS
        )
    except (OSError, ValueError) as exc:
        if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
            raise
        return socket.create_server(("", port), backlog=MAX_CONNECTIONS)
