"""One HTTP request and its reply, within a time and a size.

http.client follows no redirect and asks no proxy, so what is sent goes to the host that
is named and nowhere else.
"""

import contextlib
import dataclasses
import functools
import http.client
import math
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Self

SCHEMES = {"http": 80, "https": 443}


class Failed(Exception):
    """An exchange that came to nothing. Says nothing of what was sent or received."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Target:
    """Where to ask."""

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> "Target":
        """Raises:
        ValueError: it is no plain http or https address. Begins with 'url' and never
          repeats it: it may hold a password, or be the key in the wrong place.
        """
        # Not only where they belong: 'me:password@host' has no scheme to be parsed by.
        if set("@?#") & set(url):
            raise ValueError(
                "url holds a user name, a password, a query or a fragment; give "
                "http://HOST:PORT/v1, and the key in an environment variable"
            )
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
            (parts.hostname or "").encode("idna")
        except ValueError:
            raise ValueError("url is no address; give http://HOST:PORT/v1") from None
        printable = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in SCHEMES or not parts.hostname or not printable:
            raise ValueError("url must be http://HOST:PORT/v1 or https://HOST/v1")
        port = SCHEMES[parts.scheme] if port is None else port
        secure = parts.scheme == "https"
        return cls(secure, parts.hostname, port, parts.path.rstrip("/"))


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back: status, the body of a 200, and the Retry-After header."""

    status: int
    body: bytes = b""
    retry_after: str = ""


class Deadline:
    """Shuts a connection down when its time is over, whatever it is waiting for.

    A socket's own timeout is for one read or write: a server that sends a byte a
    second never meets it. Looking up a host's name is the one thing that this does not
    end; the resolver has limits of its own.
    """

    def __init__(self, seconds: float):
        self._ends = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.over = False
        self._timer = threading.Timer(seconds, self.end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_) -> None:
        self._timer.cancel()
        with self._lock:
            self._socket = None

    @property
    def left_s(self) -> float:
        return max(0.001, self._ends - time.monotonic())

    def watch(self, watched: socket.socket) -> None:
        """Takes the place of what was watched before."""
        with self._lock:
            self._socket = watched
            if self.over:
                _shut(watched)

    def end(self) -> None:
        with self._lock:
            self.over = True
            if self._socket is not None:
                _shut(self._socket)


def post(
    target: Target,
    body: bytes,
    headers: Mapping[str, str],
    max_bytes: int,
    deadline: Deadline,
) -> Reply:
    """Sends a request and reads its reply; the body of a 200 alone.

    Raises:
      Failed: 'timeout', 'refused', 'network' or 'too_large'.
    """
    try:
        with contextlib.ExitStack() as open_things:
            connection = http.client.HTTPConnection(target.host, target.port)
            if target.secure:
                connection.default_port = SCHEMES["https"]
            connection.sock = _connected(target, deadline, open_things)
            connection.request("POST", target.path, body, dict(headers))
            response = open_things.enter_context(connection.getresponse())
            reply = _read(response, max_bytes)
    except (OSError, http.client.HTTPException) as error:
        # `from None`: what the error holds may quote what was sent or received.
        raise Failed(_reason(error, deadline)) from None
    if deadline.over:
        raise Failed("timeout")
    return reply


def _connected(
    target: Target, deadline: Deadline, open_things: contextlib.ExitStack
) -> socket.socket:
    """A connection to the first of the host's addresses that takes it."""
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    refusal: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        plain = open_things.enter_context(socket.socket(family, kind, protocol))
        plain.settimeout(deadline.left_s)
        deadline.watch(plain)
        try:
            plain.connect(address)
        except OSError as error:
            refusal = error
            continue
        if not target.secure:
            return plain
        secured = _context().wrap_socket(
            plain, server_hostname=target.host, do_handshake_on_connect=False
        )
        open_things.enter_context(secured)
        deadline.watch(secured)
        secured.do_handshake()
        return secured
    raise refusal


@functools.cache
def _context() -> ssl.SSLContext:
    """Reads the system's certificates, which takes a while."""
    return ssl.create_default_context()


def _read(response: http.client.HTTPResponse, max_bytes: int) -> Reply:
    if response.status != 200:
        waits = response.getheader("Retry-After") or ""
        return Reply(response.status, retry_after=waits)
    body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise Failed("too_large")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return Reply(200, body)


def _reason(error: Exception, deadline: Deadline) -> str:
    if deadline.over or isinstance(error, TimeoutError):
        return "timeout"
    return "refused" if isinstance(error, ConnectionRefusedError) else "network"


def _shut(watched: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not SSLSocket's own, which takes from the reader what it is reading with.
        socket.socket.shutdown(watched, socket.SHUT_RDWR)


def seconds(retry_after: str) -> float:
    """What a Retry-After header asks for; 0 if it is no whole number of seconds."""
    text = retry_after.strip()
    if not (text.isascii() and text.isdecimal()):
        return 0.0
    return float(text) if len(text) < 10 else math.inf
