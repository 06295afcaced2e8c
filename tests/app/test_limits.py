"""Limits of the server, without a server."""

import asyncio
import socket

import pytest

from crate_mae.app import limits
from crate_mae.app.limits import RequestLimits, without_pictures


async def echo(scope, receive, send):
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": body})


def limited(app=echo, is_possible=lambda _: True, large=None, host="127.0.0.1"):
    return RequestLimits(app, is_possible, large or limits.LargeRequests(), host)


def ask(path, *parts, app=echo):
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

    asyncio.run(limited(app)({"type": "http", "path": path}, receive, send))
    start, body = answers
    return start["status"], dict(start["headers"]), body["body"], len(parts) - len(messages)


@pytest.mark.parametrize(
    "path",
    ["/", "/config", "/assets/index-1.js", "/gradio_api/reset", "/gradio_api/heartbeat/a1", "/gradio_api/app_id"],
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


def test_a_request_that_is_too_large_is_read_and_dropped(monkeypatch):
    monkeypatch.setattr(limits, "MAX_BODY", 100)
    assert ask("/gradio_api/reset", b"a" * 100)[0] == 200
    status, _, _, read = ask("/gradio_api/reset", *[b"a" * 60] * 5)
    assert (status, read) == (413, 5)
    monkeypatch.setattr(limits, "_MOST_DISCARDED", 150)
    assert ask("/gradio_api/reset", *[b"a" * 60] * 5)[3] == 3


async def fails(scope, receive, send):
    if scope["path"] == "/config":
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"Traceback"})
    raise RuntimeError("no\nstory")


@pytest.mark.parametrize("path", ["/config", "/gradio_api/cancel"])
def test_what_the_application_cannot_handle_is_the_fault_of_the_request(path, caplog):
    status, _, body, _ = ask(path, b"{}", app=fails)
    assert (status, body) == (400, b"The app cannot process this request.")
    assert [(record.exc_info, "RuntimeError: no" in record.getMessage()) for record in caplog.records] == [(None, True)]


@pytest.mark.parametrize("call", [b"", b"{", b"[" * 100_000, b"9" * 5000, b'{"data": "\\ud800"}', b"\xff"])
def test_a_call_that_is_not_json_is_refused(call):
    assert ask("/gradio_api/queue/join", call)[0] == 400


def test_a_request_that_breaks_off_or_takes_too_long_ends(monkeypatch):
    async def silent():
        await asyncio.sleep(60)

    async def gone():
        return {"type": "http.disconnect"}

    monkeypatch.setattr(limits, "SECONDS_TO_SEND", 0.05)
    for receive, status in ((silent, 408), (gone, 400)):
        answers = []

        async def send(message, answers=answers):
            answers.append(message)

        asyncio.run(limited()({"type": "http", "path": "/gradio_api/reset"}, receive, send))
        assert answers[0]["status"] == status


def test_few_large_requests_are_held_at_once(monkeypatch):
    """Large requests stay counted until the handler of uploads has responded to them; refused ones are not counted."""
    monkeypatch.setattr(limits, "SMALL_BODY", 10)
    monkeypatch.setattr(limits, "MAX_BODY", 1000)
    monkeypatch.setattr(limits, "SECONDS_TO_WAIT", 0.0)
    large = limits.LargeRequests()
    server = limited(is_possible=lambda call: call == {"a": 1}, large=large)

    def join(body, path="/gradio_api/queue/join"):
        answers = []

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            answers.append(message)

        asyncio.run(server({"type": "http", "path": path}, receive, send))
        return answers[0]["status"]

    call, forged = b'{"a":        1}', b'{"b":        1}'
    assert [join(body) for body in (forged, call, call, forged, call, call)] == [422, 200, 200, 422, 200, 200]
    assert join(call) == join(b"x" * 500, "/gradio_api/reset") == 429
    assert join(b'{"a": 1}') == 200
    large.remove()
    assert join(b"x" * 500, "/gradio_api/reset") == 200
    assert [join(call), join(call)] == [200, 429]
    monkeypatch.setattr(limits, "SECONDS_TO_RESPOND", -1.0)
    assert join(call) == 200


def test_a_large_request_waits_for_a_place(monkeypatch):
    monkeypatch.setattr(limits, "SMALL_BODY", 10)
    large = limits.LargeRequests()
    for _ in range(limits.MOST_LARGE):
        assert large.add()
    answers = []

    async def receive():
        return {"type": "http.request", "body": b"x" * 500}

    async def send(message):
        answers.append(message)

    async def free_a_place_while_it_waits():
        request = limited(large=large)({"type": "http", "path": "/gradio_api/reset"}, receive, send)
        waiting = asyncio.create_task(request)
        await asyncio.sleep(0)
        assert answers == []
        large.remove()
        await waiting

    asyncio.run(free_a_place_while_it_waits())
    assert answers[0]["status"] == 200


def test_a_large_request_that_is_cancelled_while_it_arrives_is_not_counted(monkeypatch):
    monkeypatch.setattr(limits, "SMALL_BODY", 10)
    large = limits.LargeRequests()
    parts = [{"type": "http.request", "body": b"x" * 500, "more_body": True}]

    async def receive():
        return parts.pop() if parts else await asyncio.sleep(60)

    async def cancel_while_it_arrives():
        request = limited(large=large)({"type": "http", "path": "/gradio_api/reset"}, receive, print)
        arriving = asyncio.create_task(request)
        await asyncio.sleep(0)
        arriving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await arriving

    asyncio.run(cancel_while_it_arrives())
    assert [large.add() for _ in range(limits.MOST_LARGE)] == [True] * limits.MOST_LARGE


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("host", "127.0.0.1:7860", 200),
        ("host", "localhost:1", 200),
        ("host", "[::1]:7860", 200),
        ("host", "192.168.1.7:7860", 200),
        ("host", "studio.example:7860", 200),  # what --host says
        ("host", socket.gethostname(), 200),
        ("host", "attacker.example:7860", 421),
        ("host", "127.0.0.1.attacker.example", 421),
        ("host", "[::1", 421),
        ("host", "", 421),
        ("origin", "http://127.0.0.1:7860", 200),
        ("origin", "http://attacker.example", 421),
        ("origin", "null", 421),
    ],
)
def test_a_foreign_host_is_refused(header, value, status):
    """Else a site could point its own name at this address, and read what the app answers (DNS rebinding)."""
    answers = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        answers.append(message)

    scope = {"type": "http", "path": "/config", "headers": [(header.encode(), value.encode())]}
    asyncio.run(limited(host="Studio.example")(scope, receive, send))
    assert answers[0]["status"] == status


def test_the_log_holds_no_picture():
    picture = "data:image/png;base64," + 50 * "iVBORw0KGgo"
    logged = without_pictures(ValueError(f"invalid literal for int() with base 10: '{picture}'"))
    assert logged == "ValueError: invalid literal for int() with base 10: [...]"
