"""What the server lets in, and what it has browsers refuse: an ASGI application around another."""

import re
from typing import Any

from crate_mae.app.uploads import MAX_BYTES

MAX_BODY = 2 * MAX_BYTES  # of a question: a picture as text takes 4/3 of its size
# The page, its scripts and styles; its questions and their answers; the sign that somebody is still there.
_OPEN = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|heartbeat/[A-Za-z0-9]+|startup-events|info|theme\.css|reset|cancel)"
)
_HEADERS = {
    # With this a browser loads nothing from another host, and sends nothing there.
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class Gate:
    """Lets through what the page itself asks for, in questions of at most `MAX_BODY` bytes.

    Gradio can also store files, hand out files, and fetch from other hosts. The page needs none of it.

    Args:
        app: an ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not _OPEN.fullmatch(scope["path"]):
            await _refuse(send, 404, "There is nothing here: the page is at /.")
        elif (body := await _read(receive)) is None:
            await _refuse(send, 413, f"This is larger than the {MAX_BODY // 2**20} MB that the page takes.")
        else:
            await self._app(scope, _replay(body, receive), _with_headers(send))


async def _read(receive: Any) -> bytes | None:
    """The whole body of a request; None if it is too large, of which no more is read."""
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
    """A `receive` that gives the body, and then whatever comes."""
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
