"""The page of the theory: self-contained, with every figure and every measured number in its place."""

import dataclasses
import re
from io import BytesIO

import pytest
from PIL import Image

from crate_mae.drawing.style import encode
from crate_mae.interpret.claims import attention, denoising, ista, signal_to_noise
from crate_mae.interpret.claims.common import Spread, number
from crate_mae.interpret.claims.report import CLAIMS, measure_theory, write_html
from tests.html_tags import Tags


@pytest.fixture(scope="module")
def results():
    return measure_theory(0, draws=1)


@pytest.fixture(scope="module")
def pictures(results):
    return {name: encode(claim.draw(results.claims[name]), "png") for name, claim in CLAIMS.items()}


def test_numbers_are_written_with_their_spread():
    assert number(Spread(0.5, 0.25)) == "0.50 ± 0.25"
    assert number(Spread(-0.5, 0.001)) == "−0.500 ± 0.001"
    assert number(Spread(0.0, 0.0)) == "0.000 ± 0.000"
    assert number(Spread(1.25e-7, 0.0)) == "1.2·10^−7 ± 0"


def test_the_page_is_self_contained(results, pictures):
    page = write_html(results, pictures)
    tags = Tags(page)
    assert len(tags.sources) == len(pictures) == 5
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert {link[1:] for link in tags.links if link.startswith("#")} == set(tags.ids) == set(pictures)
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    assert "{" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_the_page_reports_what_was_measured(results):
    found = results.claims["denoising"]
    point = next(point for point in found.by_noise if point.noise_std == 0.2)
    section = denoising.explain(found)
    assert number(point.cosine["all"]) in section.found[0]
    changed = dataclasses.replace(point, cosine={**point.cosine, "all": Spread(0.1234, 0.02)})
    other = dataclasses.replace(found, by_noise=tuple(changed if p is point else p for p in found.by_noise))
    assert "0.12 ± 0.02" not in section.found[0]
    assert "0.12 ± 0.02" in denoising.explain(other).found[0]


def test_the_page_reports_which_step_was_measured(results):
    found = results.claims["attention"]
    section = attention.explain(found)
    assert section.title == "Attention keeps one of the two terms of the gradient step"
    point = next(point for point in found.orthogonal if point.radius == 0.3)
    sentence = next(text for text in section.found if text.startswith("Cosine with"))
    for step in ("restored, s = 1", "restored, s = p^-1/2", "published, s = 1", "published, s = p^-1/2"):
        assert number(point.descent[step]) in sentence
    assert "downhill at 7 of 7 distortions, the published one at 0" in sentence
    assert number(point.descent["published, s = p^-1/2"]) in section.glance


def test_the_page_reports_whether_a_claim_holds(results):
    found = results.claims["signal_to_noise"]
    none = tuple(dataclasses.replace(curve, layers_held=0) for curve in found.curves)
    whole = tuple(dataclasses.replace(curve, layers_held=found.layers) for curve in found.curves)
    glances = [signal_to_noise.explain(dataclasses.replace(found, curves=curves)).glance for curves in (none, whole)]
    assert glances[0].count("at no noise level") == 3
    assert glances[1].count("at 7 noise levels (largest σ = 1)") == 3


def test_figures_are_pictures_and_the_same_each_time(results, pictures):
    assert set(pictures) == set(results.claims)
    for name, picture in pictures.items():
        assert encode(CLAIMS[name].draw(results.claims[name]), "png") == picture
        with Image.open(BytesIO(picture)) as image:
            assert image.width > 1200
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    first, second = (encode(ista.draw(results.claims["ista"]), "pdf") for _ in range(2))
    assert first == second
    assert first.startswith(b"%PDF")
