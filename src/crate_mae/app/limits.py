"""Limits of what the server accepts and holds, and of what browsers may load: an ASGI application around another."""

import asyncio
import ipaddress
import logging
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from crate_mae.app.pictures import MAX_BYTES
from crate_mae.data.documents import parse_json
from crate_mae.errors import UserError, first_line

logger = logging.getLogger(__name__)

SMALL_BODY = 2**20  # holds a picture that was scaled down already
MAX_BODY = 4 * MAX_BYTES // 3 + SMALL_BODY  # base64 text takes 4/3 of the size of a picture
MOST_LARGE = 4  # larger requests at once, from their first megabyte until the response is sent; others wait
SECONDS_TO_WAIT = 30.0  # for one of those places
SECONDS_TO_SEND = 60.0  # for the body of a request
SECONDS_TO_RESPOND = 60.0  # after which a large request is no longer counted
MOST_CONNECTIONS = 256
CANNOT_PROCESS = "The app cannot process this request."
_MOST_DISCARDED = 8 * MAX_BODY  # of a request that is too large: a client reads the response when it has sent all
_JOIN = "/gradio_api/queue/join"
# The app, its scripts and styles; its requests and their responses; the heartbeat of open tabs, and what they ask after
# the server has been away.
_ALLOWED = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|heartbeat/[A-Za-z0-9]+|app_id|startup-events|info|theme\.css|reset|cancel)"
)
_LONG_WORD = re.compile(r"\S{65,}")  # longer than any word or path of a message
_HEADERS = {
    # Keeps browsers from loading anything from other hosts, and from sending anything there.
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class RequestLimits:
    """Accepts only the requests that the app itself makes, of limited size, number and time.

    Gradio can also store files, serve files and fetch from other hosts. The app needs none of it. It responds to
    requests that it cannot process with a status of 400 to 499 and a sentence.

    Args:
        app: an ASGI application.
        is_possible: whether the app's script could have made a call of these values.
        large: counts large requests; the handler removes a request from the count after responding.
        host: the name or address that the server listens on, which a request may name; see `is_own_host`.
    """

    def __init__(
        self,
        app: Any,
        is_possible: Callable[[Any], bool],
        large: "LargeRequests",
        host: str,
    ) -> None:
        self._app = app
        self._is_possible = is_possible
        self._large = large
        self._host = host

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})  # the app opens none
        elif (foreign := self._foreign_host(scope)) is not None:
            await _refuse(send, 421, f"{foreign!r} is not a name of this server: open the app at its IP address.")
        elif not _ALLOWED.fullmatch(scope["path"]):
            await _refuse(send, 404, "There is nothing here: the app is at /.")
        else:
            await self._handle(scope, receive, send)

    def _foreign_host(self, scope: Any) -> str | None:
        """Return the host that the request is addressed to, or that its page is from, unless it is this one."""
        for name, value in scope.get("headers", ()):
            text = value.decode("latin-1")
            if name == b"host" and not is_own_host(f"//{text}", self._host):
                return text
            if name == b"origin" and not is_own_host(text, self._host):
                return text
        return None

    async def _handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Read a request, check it, and let the application respond; large ones are counted meanwhile."""
        is_call = scope["path"] == _JOIN and scope.get("method", "POST") == "POST"
        is_large, is_waiting = False, False
        try:
            body = await self._read(receive)
            is_large = len(body) > SMALL_BODY
            if is_call:
                self._check_call(body)
            is_waiting = await self._respond(scope, _replay(body, receive), send) < 400 and is_call
        except _RefusedError as refused:
            await _refuse(send, refused.status, str(refused))
        finally:
            if is_large and not is_waiting:  # else the handler of uploads removes it
                self._large.remove()

    async def _read(self, receive: Any) -> bytes:
        """Read the whole body of a request; the rest of one that is refused is read too, and dropped."""
        body, size, more = bytearray(), 0, True
        refused: _RefusedError | None = None
        is_counted = is_complete = False  # counted as a large one
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                while more and size <= _MOST_DISCARDED:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _RefusedError(400, "The request ended before it was complete.")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if refused is None and SMALL_BODY < size <= MAX_BODY and not is_counted:
                        is_counted = await self._large.wait()
                    refused = refused or _why_refused(size, is_counted)
                    if refused is None:
                        body += part
                    else:
                        body.clear()
            if refused is not None:
                raise refused
            is_complete = True
        except TimeoutError as error:
            raise _RefusedError(408, f"This took longer than {SECONDS_TO_SEND:.0f} seconds to arrive.") from error
        finally:
            if is_counted and not is_complete:
                self._large.remove()
        return bytes(body)

    def _check_call(self, body: bytes) -> None:
        """Refuse what is not a call of one of the app's functions."""
        try:
            call = parse_json(body, "The request")
        except UserError as error:
            raise _RefusedError(400, first_line(error)) from error
        if not self._is_possible(call):
            raise _RefusedError(422, "The app does not send such requests.")

    async def _respond(self, scope: Any, receive: Any, send: Any) -> int:
        """Let the application respond, and return the status; if it fails, one line of the log gives the reason."""
        status = 0

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS.items()]}
            if status < 500:
                await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # of any library on the way
            logger.warning("A request to %r failed: %s", scope["path"], without_pictures(error))
            status = status or 500  # else the response has begun
        if status >= 500:
            raise _RefusedError(400, CANNOT_PROCESS)
        return status


def is_own_host(url: str, listening: str) -> bool:
    """Whether a URL names this server by an IP address, or by a name that only this machine's owner can give it.

    Any other name may be one that a foreign site has pointed at this address, so that its pages are allowed to read the
    responses (DNS rebinding).

    Args:
        url: with a host, such as "http://127.0.0.1:7860" or "//localhost".
        listening: the name or address that the server listens on.
    """
    try:
        name = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return False
    if name and name in {each.lower() for each in ("localhost", listening, socket.gethostname())}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def without_pictures(error: BaseException) -> str:
    """Describe an error for the log; values in its message, which may be a visitor's picture, are left out."""
    return f"{type(error).__name__}: {_LONG_WORD.sub('[...]', first_line(error))}"


class LargeRequests:
    """Counts the large requests that are held at once, from the first megabyte on."""

    def __init__(self) -> None:
        self._begun: deque[float] = deque()
        self._lock = threading.Lock()  # requests come in the event loop, and their handlers are threads

    def add(self) -> bool:
        """Count one more; return False if there are as many as may be."""
        with self._lock:
            while self._begun and time.monotonic() - self._begun[0] > SECONDS_TO_RESPOND:
                self._begun.popleft()  # whose response failed, or was for another function
            if len(self._begun) >= MOST_LARGE:
                return False
            self._begun.append(time.monotonic())
            return True

    async def wait(self) -> bool:
        """Count one more when there is a place; return False if there is none for too long."""
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while not (added := self.add()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)  # places are freed by threads
        return added

    def remove(self) -> None:
        """Count one less."""
        with self._lock:
            if self._begun:
                self._begun.popleft()


class _RefusedError(Exception):
    """A request that is refused with a status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def _why_refused(size: int, is_counted: bool) -> _RefusedError | None:
    """The error for a body of this size so far that is too large, or that is large where as many are held as may be."""
    if size > MAX_BODY:
        return _RefusedError(413, f"This is larger than the {MAX_BODY // 2**20} MB that the app accepts.")
    if size > SMALL_BODY and not is_counted:
        return _RefusedError(429, "The app is busy with other pictures: try again in a few seconds.")
    return None


def _replay(body: bytes, receive: Any) -> Any:
    """Return a `receive` that delivers the body first, and then whatever arrives."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return waiting.pop() if waiting else await receive()

    return next_message


async def _refuse(send: Any, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *_HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})
