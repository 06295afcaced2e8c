"""Limits of the server, without a server."""

import asyncio

import pytest

from crate_mae.app import limits
from crate_mae.app.limits import RequestLimits


async def echo(scope, receive, send):
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": body})


def ask(path, *parts):
    """Status, headers, body, and how many parts of the question were read."""
    messages = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]
    answers = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        answers.append(message)

    asyncio.run(RequestLimits(echo)({"type": "http", "path": path}, receive, send))
    start, body = answers
    return start["status"], dict(start["headers"]), body["body"], len(parts) - len(messages)


@pytest.mark.parametrize(
    "path", ["/", "/config", "/assets/index-1.js", "/gradio_api/queue/join", "/gradio_api/heartbeat/a1"]
)
def test_requests_of_the_app_are_accepted_and_get_headers(path):
    status, headers, body, _ = ask(path, b"one ", b"two")
    assert (status, body) == (200, b"one two")
    assert headers[b"x-own"] == b"1"
    assert b"default-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=http://elsewhere",
        "/gradio_api/run/completed",
        "/gradio_api/call/completed",
        "/gradio_api/component_server",
        "/gradio_api/deep_link",
        "/gradio_api/process_recording",
        "/login",
        "/monitoring",
        "//",
        "/config/../gradio_api/upload",
    ],
)
def test_other_addresses_are_not_found(path):
    status, _, body, read = ask(path, b"x")
    assert status == 404
    assert b"the app is at /" in body
    assert read == 0


def test_a_request_that_is_too_large_is_not_read_completely(monkeypatch):
    monkeypatch.setattr(limits, "MAX_BODY", 100)
    assert ask("/gradio_api/queue/join", b"a" * 100)[0] == 200
    status, _, _, read = ask("/gradio_api/queue/join", *[b"a" * 60] * 5)
    assert (status, read) == (413, 2)
