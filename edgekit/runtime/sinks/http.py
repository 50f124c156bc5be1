"""A small HTTP server for sinks that are looked at: the live page and the metrics.

Read-only (GET and HEAD) and bounded everywhere: connections, time to send a request, time to take a
reply. It serves loopback unless told otherwise; anywhere else a token is required.
"""

from __future__ import annotations

import contextlib
import hmac
import http.server
import ipaddress
import os
import re
import secrets
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgekit.errors import OutputError, UsageError, printable

TOKEN_VARIABLE = "EDGEKIT_TOKEN"
"""Environment variable with a token that stays the same from run to run."""
CONNECTIONS = 32
"""At a time; one more is answered 503."""
REQUEST_S = 5.0
"""A client that has not sent its request by then is disconnected."""
SEND_S = 10.0
"""So long a client may take for one piece of a reply."""
SEND_BUFFER = 128 << 10
"""Bytes the system may hold for a slow client: what waits there only grows old."""
CLOSE_S = 0.4
"""So long `close` lets replies end by themselves, and again after it cut them off."""
_POLL_S = 0.1

SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Reply:
    """body: bytes, or pieces that are sent one by one as they come; `done` is called after the last,
    however it ends."""

    body: bytes | Iterator[bytes]
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    done: Callable[[], None] = lambda: None


Route = Callable[[], Reply]


@dataclass(frozen=True)
class Address:
    """Where to listen: an IP address and a port, 0 for any free one."""

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Address:
        """`:8080` and `8080` (loopback), `HOST:8080`, `[::1]:8080`. Raises: UsageError."""
        form = "expected :PORT, HOST:PORT or [IPv6]:PORT with PORT 0 to 65535"
        shown = printable(text)
        match = re.fullmatch(r"(?:(?:\[(?P<v6>[^\[\]]*)\]|(?P<name>[^\[\]:]*)):)?(?P<port>[0-9]{1,5})", text)
        if not match or int(match["port"]) > 65535:
            raise UsageError(f"address {shown!r}: not usable, {form}. Try :8080")
        name = match["v6"] if match["v6"] is not None else match["name"] or "127.0.0.1"
        try:
            found = socket.getaddrinfo(name, int(match["port"]), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise UsageError(f"address {shown!r}: no such host {printable(name)!r}, {form}") from None
        first = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # localhost: IPv4, as browsers ask
        return Address(str(first[4][0]), int(match["port"]))

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def loopback(self) -> bool:
        return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback

    def reached_as(self) -> str:
        """The host part of a URL for it; of an address that means all interfaces, this machine's own."""
        host = self.host
        if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
            host = _own_address()
        return f"[{host}]" if ":" in host else host


def _own_address() -> str:
    """This machine's address on its main network (nothing is sent), else its name."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737): only the route is looked up
        return str(probe.getsockname()[0])
    return socket.gethostname()


def _token() -> str:
    """The token of this run. Raises: UsageError for one that is easy to guess or cannot be in a URL."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if token and not re.fullmatch(r"[A-Za-z0-9_-]{16,256}", token):
        raise UsageError(
            f"token in ${TOKEN_VARIABLE}: not usable, expected 16 to 256 letters, digits, '-' and '_'. "
            "Leave it out for a random one"
        )
    return token or secrets.token_urlsafe(24)


class Server:
    """Serves `routes` (path -> function that makes the reply) from `address` until `close`.

    url: what to open, with the token where one is needed.
    token: required unless the address is loopback: `?token=` (a page then keeps it as a cookie) or
        `Authorization: Bearer`. From $EDGEKIT_TOKEN, else random.

    On loopback the Host header must name this machine, so that a web site whose name was pointed here
    (DNS rebinding) reads nothing; requests that other sites' pages make are refused everywhere.

    Raises: UsageError for an address that is none; OutputError where it cannot listen.
    """

    def __init__(self, name: str, address: str, routes: Mapping[str, Route]) -> None:
        wanted = Address.parse(address)
        self.token = "" if wanted.loopback else _token()
        self.routes = dict(routes)
        try:
            self._tcp = _Tcp(wanted, self)
        except OSError as error:
            step = "Choose another port, or 0 for any free one" if wanted.port else "Choose another address"
            raise OutputError(
                f"sink {name}: cannot listen at {printable(address)}: {error.strerror or error}. {step}"
            ) from None
        self.address = Address(wanted.host, int(self._tcp.server_address[1]))
        query = f"?token={self.token}" if self.token else ""
        self.url = f"http://{wanted.reached_as()}:{self.address.port}/{query}"
        self._thread = threading.Thread(
            target=self._tcp.serve_forever, args=(_POLL_S,), name=f"edgekit {name}", daemon=True
        )
        self._thread.start()

    @property
    def cookie(self) -> str:
        """Cookies are shared by all ports of a host: the name keeps two servers apart."""
        return f"edgekit_{self.address.port}"

    def close(self) -> None:
        """Stop listening and end every reply, within two times `CLOSE_S`. Calling it again does nothing."""
        self._tcp.shutdown()
        self._thread.join(CLOSE_S)
        self._tcp.server_close()
        self._tcp.join(CLOSE_S)
        self._tcp.cut()
        self._tcp.join(CLOSE_S)


class _Tcp(socketserver.TCPServer):
    """A thread per connection, counted, so that all of them end."""

    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, address: Address, owner: Server) -> None:
        self.address_family = address.family
        self.owner = owner
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._late: dict[socket.socket, float] = {}
        super().__init__((address.host, address.port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(
            target=self._serve, args=(request, client_address), name="edgekit http", daemon=True
        )
        with self._lock:
            full = len(self._open) >= CONNECTIONS
            if not full:
                self._open[request] = thread
                self._late[request] = time.monotonic() + REQUEST_S
        if full:
            request.settimeout(0)
            with contextlib.suppress(OSError):
                request.send(
                    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 2\r\n\r\n"
                )
            self.shutdown_request(request)
        else:
            thread.start()

    def _serve(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError:  # the client went away
            pass
        finally:
            with self._lock:
                self._late.pop(request, None)
                self._open.pop(request, None)
            self.shutdown_request(request)

    def arrived(self, request: socket.socket) -> None:
        """Its request is there: from now on the time limit for sending counts."""
        with self._lock:
            self._late.pop(request, None)

    def service_actions(self) -> None:
        now = time.monotonic()
        with self._lock:
            for request, limit in list(self._late.items()):
                if now > limit:
                    del self._late[request]
                    _cut(request)

    def cut(self) -> None:
        with self._lock:
            for request in self._open:
                _cut(request)

    def join(self, timeout_s: float) -> None:
        limit = time.monotonic() + timeout_s
        with self._lock:
            threads = list(self._open.values())
        for thread in threads:
            thread.join(max(0.0, limit - time.monotonic()))


def _cut(request: socket.socket) -> None:
    """Wake up whoever reads from or writes to it; its own thread closes it."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request a connection: no state to guard between requests."""

    protocol_version = "HTTP/1.1"
    server: _Tcp

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request.settimeout(SEND_S)
        super().setup()

    def version_string(self) -> str:
        return "edgekit"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: a token may be in them."""

    def do_GET(self) -> None:
        self.server.arrived(self.request)
        owner = self.server.owner
        try:
            url = urllib.parse.urlsplit(self.path)
        except ValueError:  # a lone bracket is taken for half an IPv6 address
            self._send(Reply(b"not a path\n", status=400))
            return
        refusal = self._refusal(url)
        if refusal is not None:
            self._send(refusal)
        elif owner.token and url.path == "/" and _given(url):
            # the address bar, and what is shared from it, no longer shows the token
            cookie = f"{owner.cookie}={owner.token}; Path=/; HttpOnly; SameSite=Lax"
            self._send(Reply(b"", status=303, headers={"Location": "/", "Set-Cookie": cookie}))
        elif url.path in owner.routes:
            self._send(owner.routes[url.path]())
        else:
            self._send(Reply(b"no such page\n", status=404))

    do_HEAD = do_GET

    def _refusal(self, url: urllib.parse.SplitResult) -> Reply | None:
        """What is wrong with who asks, or None."""
        owner = self.server.owner
        site = self.headers.get("Sec-Fetch-Site", "none")
        if site not in ("none", "same-origin") and self.headers.get("Sec-Fetch-Mode") != "navigate":
            return Reply(b"not for pages of other sites\n", status=403)
        if not owner.token:
            if not _names_loopback(self.headers.get("Host", "")):
                return Reply(b"this address serves its own machine: open it as localhost\n", status=403)
            return None
        kind, _, bearer = self.headers.get("Authorization", "").partition(" ")
        tokens = [_given(url), _cookie(self.headers.get("Cookie", ""), owner.cookie)]
        tokens.append(bearer.strip() if kind.lower() == "bearer" else "")
        if any([hmac.compare_digest(t.encode(), owner.token.encode()) for t in tokens]):  # noqa: C419 - all, always
            return None
        text = b"a token is needed: open the address that edgekit printed, with ?token=...\n"
        return Reply(text, status=401, headers={"WWW-Authenticate": "Bearer"})

    def _send(self, reply: Reply) -> None:
        try:
            self.send_response(reply.status)
            for name, value in {**SECURITY, **reply.headers, "Content-Type": reply.content_type}.items():
                self.send_header(name, value)
            if isinstance(reply.body, bytes):
                self.send_header("Content-Length", str(len(reply.body)))
            self.send_header("Connection", "close")
            self.end_headers()
            if self.command == "HEAD":
                return
            for piece in [reply.body] if isinstance(reply.body, bytes) else reply.body:
                self.wfile.write(piece)
        finally:
            reply.done()


def _given(url: urllib.parse.SplitResult) -> str:
    return urllib.parse.parse_qs(url.query).get("token", [""])[0]


def _cookie(header: str, name: str) -> str:
    for item in header.split(";"):
        key, _, value = item.strip().partition("=")
        if key == name:
            return value
    return ""


def _names_loopback(host: str) -> bool:
    """Whether a Host header means this machine, at any port (a tunnel has its own)."""
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:]+)(:[0-9]{1,5})?", host)
    if not match:
        return False
    name = match[1].strip("[]").rstrip(".").lower()
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
