"""The server over HTTP: many visitors at once, invalid requests, and no files written."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crate_mae.app.compute import complete_picture, mask_text, seeded_mask
from crate_mae.app.pictures import to_png, to_uri
from crate_mae.app.responses import completion_component

httpx = pytest.importorskip("httpx", reason="comes with Gradio: pip install '.[app]'")
BUNDLED = "crate_mae_micro_monotone_cifar10"
CONTROLS = [
    "picture",
    "model",
    "beside",
    "mask",
    "mask_ratio",
    "seed",
    "layer",
    "patch",
    "atom",
    "amount",
]  # in their order
CHOICES = [BUNDLED, "no other model"]


def ask(url, name, data, event_data=None, session="one"):
    """The answer of a handler, as the page's own script would ask for it."""
    with httpx.Client(base_url=url, timeout=120) as client:
        parts = client.get("/config").json()["dependencies"]
        number = next(each["id"] for each in parts if each["api_name"] == name)
        question = {"data": data, "event_data": event_data, "fn_index": number, "session_hash": session}
        if client.post("/gradio_api/queue/join", json=question).status_code == 422:
            return False, None
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as answers:
            for line in answers.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed":
                    return message["success"], message["output"]
    raise AssertionError("the server said nothing")


def controls(picture, mask, **changes):
    values = {"mask_ratio": 0.75, "seed": 0, "layer": 0, "patch": 0, "atom": 0, "amount": 10, **changes}
    return [to_uri(to_png(picture)), *CHOICES, mask, *values.values()]


def test_twenty_visitors_at_once_get_their_own_pictures(served, models):
    net = models[BUNDLED].net
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(20)]
    masks = [seeded_mask(net, 0.5, seed) for seed in range(20)]
    together = threading.Barrier(20)

    def visit(i):
        together.wait()
        return ask(served.url, "completed", controls(pictures[i], mask_text(masks[i])), session=f"visitor{i}")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(visit, range(20)))
    for (succeeded, output), picture, mask in zip(answers, pictures, masks, strict=True):
        assert succeeded
        assert completion_component(BUNDLED, complete_picture(net, picture, mask)) in output["data"][0]
    assert served.noted() == []


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("completed", {"mask": "0" * 64}, "Nothing is hidden"),
        ("completed", {"mask": "01"}, "mask does not fit"),
        ("completed", {"picture": "http://elsewhere/a.png"}, "There is no picture"),
        ("completed", {"picture": "data:text/plain;base64,aGVsbG8="}, "cannot be read as a PNG"),
        ("random", {"seed": -3}, "The seed must be"),
        ("random", {"seed": None}, "The seed must be"),
        ("random", {"seed": 1.5}, "The seed must be"),
        ("random", {"mask_ratio": 0.01}, "The share to hide must be from 0.05 to 0.95"),
        ("random", {"mask_ratio": None}, "The share to hide must be"),
        ("inside", {"layer": 10**6}, "The layer must be a whole number from 0 to 2"),
        ("inside", {"layer": -1}, "The layer must be"),
        ("inside", {"layer": None}, "The layer must be"),
        ("changed", {"layer": -1}, "The layer must be"),
        ("changed", {"atom": 512}, "There is no atom 512 in layer 0: its code has 512, 0 to 511"),
        ("changed", {"atom": -1}, "The atom must be a whole number"),
        ("changed", {"atom": None}, "The atom must be a whole number"),
        ("changed", {"atom": 1.5}, "The atom must be a whole number"),
        ("changed", {"amount": 21}, "The change must be from -20 to 20"),
        ("changed", {"amount": None}, "The change must be from -20 to 20"),
        ("changed", {"mask": "0" * 64}, "Nothing is hidden"),
        ("upload", {}, "There is no picture"),
        ("clear", {}, "Nothing is hidden"),
    ],
)
def test_an_invalid_request_is_answered_with_an_explanation(name, changes, words, served, photograph):
    values = controls(photograph, "1" * 64)
    for key, value in changes.items():
        values[CONTROLS.index(key)] = value
    succeeded, output = ask(served.url, name, values, session=f"bad{name}{len(words)}")
    assert succeeded
    assert words in json.dumps(output["data"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("random", {"mask_ratio": "x"}),
        ("inside", {"layer": [1]}),
        ("changed", {"atom": "x"}),
        ("changed", {"amount": "x"}),
        ("switch", {"model": "another"}),
    ],
)
def test_requests_that_the_app_cannot_make_are_refused(name, change, served, photograph):
    values = controls(photograph, "1" * 64)
    for key, value in change.items():
        values[CONTROLS.index(key)] = value
    succeeded, _ = ask(served.url, name, values, session=f"odd{name}")
    assert not succeeded


@pytest.mark.parametrize("patch", [10**9, "x", None])
def test_a_patch_that_does_not_exist_is_the_last_or_the_middle(patch, served, photograph):
    succeeded, output = ask(served.url, "inside", controls(photograph, "1" * 64, patch=patch), session=f"odd{patch}")
    assert succeeded
    assert ("row 8, column 8" if patch == 10**9 else "row 5, column 1") in output["data"][0]


def test_files_are_neither_accepted_nor_served(served):
    upload = httpx.post(f"{served.url}/gradio_api/upload", files={"files": ("a.png", b"1234")})
    assert upload.status_code == 404
    assert httpx.get(f"{served.url}/gradio_api/file=/etc/hostname").status_code == 404
    large = httpx.post(f"{served.url}/gradio_api/queue/join", content=b" " * (25 * 2**20))
    assert large.status_code == 413
    assert served.noted() == []


def test_it_listens_on_this_machine_only(served):
    port = int(served.url.rpartition(":")[2])
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"}:
        with socket.socket() as other:
            other.settimeout(5)
            assert other.connect_ex((address, port)) != 0
    table = Path("/proc/net/tcp")
    if not table.exists():
        pytest.skip("the table of sockets is Linux's")
    table = table.read_text(encoding="ascii").splitlines()
    listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening
