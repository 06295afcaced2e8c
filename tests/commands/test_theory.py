"""The command `theory`: its files, a self-contained page with every measured number in its place, and its errors."""

import dataclasses
import importlib
import io
import re
from contextlib import redirect_stdout

import pytest
from PIL import Image

from crate_mae.cli import main
from crate_mae.drawing.style import encode
from crate_mae.errors import UserError
from crate_mae.interpret.claims import attention, denoising, report, signal_to_noise
from crate_mae.interpret.claims.common import Spread, number
from tests.html_tags import Tags

theory = importlib.import_module("crate_mae.commands.reports").theory
FILES = {"theory.html", "theory.json", *(f"{name}.{kind}" for name in report.CLAIMS for kind in ("png", "pdf"))}


@pytest.fixture(scope="module")
def results():
    return report.measure_theory(draws=1)


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    """The folder that the command has written, which was there and empty, and what it printed."""
    out, printed = tmp_path_factory.mktemp("empty"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(report, "measure_theory", lambda seed: dataclasses.replace(results, seed=seed))
        main(["theory", "--out", str(out), "--seed", "3"])
    return out, printed.getvalue()


def test_it_writes_a_page_numbers_and_figures(written):
    out, text = written
    assert str(out / "theory.html") in text
    assert {path.name for path in out.iterdir()} == FILES
    assert "--seed 3" in (out / "theory.html").read_text(encoding="utf-8")


def test_numbers_are_written_with_their_spread():
    assert number(Spread(0.5, 0.25)) == "0.50 ± 0.25"
    assert number(Spread(-0.5, 0.001)) == "−0.500 ± 0.001"
    assert number(Spread(0.0, 0.0)) == "0.000 ± 0.000"
    assert number(Spread(1.25e-7, 0.0)) == "1.2·10^−7 ± 0"


def test_the_page_is_self_contained(written):
    page = (written[0] / "theory.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert len(tags.sources) == len(report.CLAIMS) == 5
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert {link[1:] for link in tags.links if link.startswith("#")} == set(tags.ids) == set(report.CLAIMS)
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


def test_figures_are_pictures_and_the_same_each_time(written, results):
    out, _ = written
    for name, claim in report.CLAIMS.items():
        picture = (out / f"{name}.png").read_bytes()
        figure = claim.draw(results.claims[name])
        assert encode(figure, "png") == picture
        with Image.open(io.BytesIO(picture)) as image:
            assert image.format == "PNG"
            assert image.width > 1200
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50
        document = (out / f"{name}.pdf").read_bytes()
        assert document.startswith(b"%PDF")
        assert name != "ista" or encode(figure, "pdf") == document


def test_overwrite_replaces_files_and_keeps_others(results, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "measure_theory", lambda seed: dataclasses.replace(results, seed=seed))
    monkeypatch.setattr(report, "encode", lambda _, kind: kind.encode())  # drawing takes most of the time
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "theory.html").write_text("old")
    assert theory(out=tmp_path, overwrite=True, quiet=True) == tmp_path / "theory.html"
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "checked" in (tmp_path / "theory.html").read_text(encoding="utf-8")


def test_a_folder_with_files_is_refused(crate_mae_command, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, error = crate_mae_command("theory", "--out", tmp_path)
    assert code == 2
    assert "is not empty" in error
    assert "--overwrite" in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused(overwrite, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        theory(out=tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(UserError, match="--seed is -1"):
        theory(out=tmp_path / "out", seed=-1)
    assert not (tmp_path / "out").exists()
