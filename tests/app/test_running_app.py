"""The app as it runs: requests over HTTP, and visitors in Chromium, in wide and narrow windows.

Both are in one file since both want a server, which takes long to start.
"""

import base64
import io
import json
import re
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
WAIT = 60_000  # milliseconds, on a machine with much else to do
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


class Visit:
    """A page that is open: what is on it, and what it asked for."""

    def __init__(self, tab):
        self.tab = tab
        self.asked = []
        self.questions = 0
        self.complaints = []
        self.is_cut_off = False
        tab.set_default_timeout(WAIT)
        tab.on("request", self.note)
        tab.on("console", self.complain)
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))

    def note(self, request):
        self.asked.append(request.url)
        self.questions += "queue/join" in request.url

    def complain(self, line):
        if line.type == "error" and not self.is_cut_off:
            self.complaints.append(line.text)

    def picture(self, place):
        """The picture at a place, as pixels."""
        return pixels(self.tab.locator(place).first.get_attribute("src"))

    def mask(self):
        marks = self.tab.locator("#painter .cells button").evaluate_all("all => all.map(e => e.ariaPressed)")
        return np.array([mark == "true" for mark in marks]).reshape(8, 8)

    def centre(self, place, number):
        box = self.tab.locator(f"{place} .cells button").nth(number).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def save(self, link):
        """The file that the first such link saves."""
        with self.tab.expect_download() as download:
            self.tab.locator(link).first.click()
        return download.value.path()

    def changes(self, place, action):
        """Do something, and wait until the pictures of a part of the page are others."""
        pictures = "place => Array.from(document.querySelectorAll(place + ' img')).map(e => e.src).join()"
        before = self.tab.evaluate(pictures, place)
        action()
        self.tab.wait_for_function(f"([place, before]) => ({pictures})(place) !== before", arg=[place, before])


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(int)


@pytest.fixture
def visit(chromium, served):
    opened = []

    def come(width=1280, height=900, **options):
        tab = chromium.new_page(viewport={"width": width, "height": height}, **options)
        opened.append(Visit(tab))
        tab.goto(served.url)
        tab.wait_for_selector("#inside .heads img", timeout=WAIT)
        tab.wait_for_selector("#painter .cells button", timeout=WAIT)
        return opened[-1]

    yield come
    for each in opened:
        each.tab.close()
        assert each.complaints == []
        assert {re.split("[/:]", url)[3] for url in each.asked if not url.startswith("data:")} == {"127.0.0.1"}


def test_a_visitor_hides_completes_and_looks_inside(visit, as_file, served):
    page = visit()
    first_mask = page.mask()
    assert first_mask.sum() == 48

    red = Image.new("RGB", (90, 60), "red")
    red.paste("blue", (45, 0, 90, 60))
    file = {"name": "two.png", "mimeType": "image/png", "buffer": as_file(red)}
    page.changes("#completed", lambda: page.tab.set_input_files("#chooser input", file))
    original = page.picture("#completed img")
    assert original.shape == (32, 32, 3)
    assert original[16, 2].tolist() == [255, 0, 0]
    assert original[16, -2].tolist() == [0, 0, 255]
    assert np.array_equal(page.picture("#picker img"), original)

    page.changes("#completed", lambda: page.tab.get_by_role("button", name="Another mask").click())
    assert page.mask().sum() == 48
    assert (page.mask() != first_mask).any()

    def stroke():
        shown = int(np.flatnonzero(~page.mask().ravel())[0])
        page.tab.mouse.move(*page.centre("#painter", shown))
        page.tab.mouse.down()
        page.tab.mouse.move(*page.centre("#painter", shown // 8 * 8), steps=4)
        page.tab.mouse.move(*page.centre("#painter", shown // 8 * 8 + 7), steps=9)
        page.tab.mouse.up()

    before = page.mask()
    page.changes("#completed", stroke)
    row = int(np.flatnonzero(~before.ravel())[0]) // 8
    after = before.copy()
    after[row] = True
    assert np.array_equal(page.mask(), after)
    masked = page.picture("#completed figure:nth-of-type(2) img")
    assert (masked[row * 4 : row * 4 + 4] == masked[row * 4, 0]).all()

    old_heads = page.picture("#inside .heads img")
    page.tab.locator("#picker").scroll_into_view_if_needed()
    page.changes("#inside", lambda: page.tab.mouse.click(*page.centre("#picker", 9)))
    assert (page.picture("#inside .heads img") != old_heads).any()
    assert page.tab.locator("#picker [aria-pressed=true]").get_attribute("aria-label") == "patch in row 2, column 2"

    slider, panel = page.tab.get_by_label("Layer of the encoder").last, page.tab.locator("#inside svg").first
    assert panel.locator("text[font-weight='600']").all_text_contents()[1:] == ["2"]
    page.changes("#inside", lambda: slider.fill("0"))
    assert "layer 0 of 0 to 2" in page.tab.locator("#inside").inner_text()
    assert panel.locator("text[font-weight='600']").all_text_contents()[1:] == ["0"]

    # The change of the atom follows the layer, the mask and its own controls.
    amount, atom = (
        page.tab.get_by_label("Change, in standard deviations").last,
        page.tab.get_by_role("spinbutton", name="Atom", exact=True),
    )
    page.tab.wait_for_selector("#changed:has-text('layer 0, atom')")
    completed = page.picture("#changed figure:nth-of-type(2) img")
    assert np.array_equal(completed, page.picture("#completed figure:nth-of-type(3) img"))
    page.changes("#changed", lambda: atom.fill("17"))
    page.tab.wait_for_selector("#changed:has-text('layer 0, atom 17 of 0 to 511')")
    page.changes("#changed", lambda: amount.fill("20"))
    assert "atom 17 by +20 standard deviations" in page.tab.locator("#changed").inner_text()
    changed = page.picture("#changed figure:nth-of-type(3) img")
    is_hidden = np.kron(page.mask(), np.ones((4, 4), dtype=bool))
    assert (changed[is_hidden] != completed[is_hidden]).any()
    assert np.array_equal(changed[~is_hidden], completed[~is_hidden])
    page.changes("#changed", lambda: page.tab.get_by_role("button", name="Another mask").click())
    assert served.noted() == []


def test_two_models_are_compared_and_pictures_saved(visit):
    page = visit()
    page.tab.get_by_label("Compare with").click()
    page.changes(
        "#completed", lambda: page.tab.get_by_role("option", name="the same model, random initialisation").click()
    )
    scores = page.tab.locator("#completed .score").all_inner_texts()
    assert page.questions == 1
    trained, untrained = (float(score.removesuffix(" dB")) for score in scores)
    assert trained > untrained
    assert page.tab.locator("#inside .heads").count() == 2
    assert page.tab.locator("#inside .summary li").count() == 2
    for link, shape in (
        ("#completed .result .save", None),
        ("#completed figcaption .save", (32, 32)),
        ("#inside .result .save", None),
    ):
        with Image.open(page.save(link)) as saved:
            assert saved.format == "PNG"
            assert shape in (None, saved.size)
            assert saved.width >= 32
    assert page.save("#inside .curves .save").read_text(encoding="utf-8").startswith("<svg")


def test_a_drawing_starts_with_nothing_hidden(visit):
    page = visit()
    page.changes("#completed", lambda: page.tab.get_by_role("button", name="Show all").click())
    assert not page.mask().any()
    assert "Nothing is hidden" in page.tab.locator("#completed").inner_text()
    page.changes("#completed", lambda: page.tab.locator("#painter .cells button").nth(27).click())
    assert np.flatnonzero(page.mask().ravel()).tolist() == [27]
    page.changes("#completed", lambda: page.tab.locator("#painter .cells button").nth(27).click())
    assert not page.mask().any()


def test_invalid_files_are_explained_and_the_picture_stays(visit, as_file, tmp_path):
    page = visit()
    before = page.picture("#completed img")
    for name, content, words in (
        ("text.png", b"no picture at all", "cannot be read as a PNG"),
        ("large.png", b"\0" * (12 * 2**20 + 1), "larger than 12 MB"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read as a PNG"),
        ("dot.png", as_file(Image.new("RGB", (1, 1))), "1 x 1 pixels"),
        ("dot.png", as_file(Image.new("RGB", (1, 1))), "1 x 1 pixels"),
    ):
        page.tab.evaluate("document.querySelector('#chooser .message').innerText = ''")
        (tmp_path / name).write_bytes(content)
        page.tab.set_input_files("#chooser input", tmp_path / name)
        shown = "words => document.querySelector('#chooser .message').innerText.includes(words)"
        page.tab.wait_for_function(shown, arg=words)
    assert np.array_equal(page.picture("#completed img"), before)
    page.changes("#completed", lambda: page.tab.locator("#chooser .examples button").nth(1).click())
    assert not page.tab.locator("#chooser .message").is_visible()


@pytest.mark.parametrize(("width", "touch"), [(1280, False), (390, True)])
def test_it_fits_the_window_and_works_by_keyboard_and_finger(width, touch, visit):
    page = visit(width, 850, has_touch=touch, color_scheme="dark")
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert page.tab.locator("h1").count() == 1
    page.tab.wait_for_function("!document.body.classList.contains('dark')")
    page.tab.evaluate("document.body.classList.add('dark')")  # as Gradio does it, at a time of its own
    page.tab.wait_for_function("!document.body.classList.contains('dark')")
    grid = page.tab.locator("#painter .cells").bounding_box()
    assert grid["x"] >= 0
    assert grid["width"] == pytest.approx(grid["height"], abs=1)
    assert grid["width"] >= 280
    before = page.mask()
    cell = page.tab.locator("#painter .cells button").nth(0)
    page.changes("#completed", cell.tap if touch else lambda: cell.press(" "))
    assert (page.mask() != before).ravel().tolist() == [True] + 63 * [False]


def test_a_quick_stroke_has_no_gaps_and_one_that_scrolls_paints_nothing(visit):
    page = visit(390, 844, has_touch=True, is_mobile=True)
    page.changes("#completed", lambda: page.tab.get_by_role("button", name="Show all").click())
    page.tab.locator("#painter").evaluate("place => place.scrollIntoView()")
    fingers = page.tab.context.new_cdp_session(page.tab)

    def swipe(start, end, parts=1):
        (left, top), (right, bottom) = page.centre("#painter", start), page.centre("#painter", end)
        touch = lambda kind, *points: fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})  # noqa: E731
        touch("touchStart", {"x": left, "y": top})
        for part in range(1, parts + 1):
            share = part / parts
            touch("touchMove", {"x": left + share * (right - left), "y": top + share * (bottom - top)})
        touch("touchEnd")

    page.changes("#completed", lambda: swipe(16, 23))
    assert np.flatnonzero(page.mask().ravel()).tolist() == list(range(16, 24))
    completed = page.tab.locator("#completed figure:nth-of-type(3) img").bounding_box()
    assert completed["y"] + completed["height"] <= 844  # in sight below the picture to paint on

    scrolled = page.tab.evaluate("window.scrollY")
    swipe(60, 4, parts=12)
    page.tab.wait_for_function("before => window.scrollY > before + 100", arg=scrolled)
    assert page.mask().sum() == 8


def test_sliders_are_reset_and_numbers_out_of_range_explained(visit):
    page = visit()
    share, layer = (page.tab.get_by_label(f"number input for {name}") for name in ("Share", "Layer"))
    resets = page.tab.get_by_label("Reset to default value")
    page.changes("#completed", lambda: share.fill("0.5"))
    assert page.mask().sum() == 32
    page.changes("#completed", resets.first.click)
    assert page.mask().sum() == 48
    page.changes("#inside", lambda: layer.fill("0"))
    page.changes("#inside", resets.nth(1).click)
    assert "layer 2 of 0 to 2" in page.tab.locator("#inside").inner_text()
    for box, number, place, words in (
        (share, "7", "#completed", "must be from 0.05 to 0.95"),
        (layer, "9", "#inside", "must be a whole number from 0 to 2"),
        (page.tab.get_by_label("Seed"), "-4", "#completed", "The seed must be a whole number"),
    ):
        box.fill(number)
        page.tab.wait_for_selector(f"{place} .notice:has-text('{words}')")


def test_the_page_comes_back_with_the_server(visit):
    page = visit()
    page.is_cut_off = True
    page.tab.evaluate("window.isOld = true")
    page.tab.route("**/gradio_api/**", lambda route: route.abort())
    page.tab.get_by_role("button", name="Another mask").click()
    page.tab.wait_for_selector("text=Connection")
    page.tab.unroute("**/gradio_api/**")
    page.tab.wait_for_function("!window.isOld")
    page.tab.wait_for_selector("#painter .cells button")
    page.is_cut_off = False
    page.changes("#completed", lambda: page.tab.get_by_role("button", name="Another mask").click())


def test_links_say_what_they_save(visit):
    names = visit().tab.locator(".save").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert len(set(names)) == len(names) == 12
    assert all(name.startswith("save ") and name.endswith((".png", ".svg")) for name in names)
