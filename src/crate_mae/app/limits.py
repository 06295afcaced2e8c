"""Limits of what the server accepts, and of what browsers may load: an ASGI application around another."""

import re
from typing import Any

from crate_mae.app.pictures import MAX_BYTES

MAX_BODY = 2 * MAX_BYTES  # of a request: base64 text takes 4/3 of the size of a picture
# The app, its scripts and styles; its requests and their responses; the heartbeat of open tabs.
_ALLOWED = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|heartbeat/[A-Za-z0-9]+|startup-events|info|theme\.css|reset|cancel)"
)
_HEADERS = {
    # Keeps browsers from loading anything from other hosts, and from sending anything there.
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class RequestLimits:
    """Accepts only the requests that the app itself makes, of at most `MAX_BODY` bytes.

    Gradio can also store files, serve files and fetch from other hosts. The app needs none of it.

    Args:
        app: an ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not _ALLOWED.fullmatch(scope["path"]):
            await _refuse(send, 404, "There is nothing here: the app is at /.")
        elif (body := await _read(receive)) is None:
            await _refuse(send, 413, f"This is larger than the {MAX_BODY // 2**20} MB that the app accepts.")
        else:
            await self._app(scope, _replay(body, receive), _with_headers(send))


async def _read(receive: Any) -> bytes | None:
    """Read the whole body of a request; return None, and stop reading, if it is too large."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Any) -> Any:
    """Return a `receive` that delivers the body first, and then whatever arrives."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return waiting.pop() if waiting else await receive()

    return next_message


def _with_headers(send: Any) -> Any:
    async def send_more(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS.items()]}
        await send(message)

    return send_more


async def _refuse(send: Any, status: int, sentence: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *_HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})
