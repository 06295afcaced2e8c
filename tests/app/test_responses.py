"""The responses of the app, without a server."""

import base64
import dataclasses
import io
import re
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from crate_mae.app.compute import AppModel, Curves, fit_patch, measure_curves, open_models
from crate_mae.app.curves import MARKED, ChartLine, draw_curves, tick_values
from crate_mae.app.responses import (
    atom_response,
    completion_response,
    curves_component,
    file_stem,
    inside_response,
    notice,
)
from crate_mae.models.presets import create_model


@pytest.fixture(scope="module")
def untrained():
    return open_models(["crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8"])


def pictures(piece):
    found = re.findall(r'<img src="data:image/png;base64,([^"]+)"', piece)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")) for text in found]


def test_a_completion_shows_four_pictures_with_titles(untrained, photograph):
    model = untrained["crate_mae_nano_patch2_8"]
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 1] = True
    piece = completion_response(photograph, [model], mask)
    original, masked, completed, prediction = pictures(piece)
    assert (masked[:2, 2:4] == 128).all()
    assert (original[2:] == masked[2:]).all()
    assert (completed[:2, 2:4] == prediction[:2, 2:4]).all()
    assert (completed[2:] == original[2:]).all()
    assert (prediction[2:] == prediction[2, 0]).all()
    assert re.search(r"\d+\.\d dB", piece)
    assert re.search(r"1 of 16 patches were hidden. The squared error of the completion is .* that of flat", piece)
    assert piece.count("download=") == 5
    assert "Random initialisation" in piece
    assert "8 x 8 pixels in patches of 2 x 2" in piece
    assert "mean colour of the visible patches" in piece
    assert "Brightness" not in piece


def test_normalised_targets_are_mentioned(models, photograph):
    piece = completion_response(photograph, list(models.values()), torch.ones(8, 8, dtype=torch.bool))
    assert "Brightness and contrast come from the original" in piece
    assert "Random initialisation" not in piece


def test_two_models_with_different_grids_use_the_same_place(untrained, models, photograph):
    small, large = untrained["crate_mae_nano_patch2_8"], next(iter(models.values()))
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[3, 0] = True
    masked = pictures(completion_response(photograph, [small, large], mask))[5]
    assert (masked[24:, :8] == 128).all()
    assert not (masked[:24] == 128).all(-1).any()
    assert fit_patch(12, (4, 4), (8, 8)) == 7 * 8 + 1
    assert fit_patch(7 * 8 + 1, (8, 8), (4, 4)) == 12
    assert fit_patch(5, (2, 3), (2, 3)) == 5


def test_the_inside_has_tokens_heads_and_curves(untrained, photograph):
    model = untrained["crate_mae_nano_patch2_8"]
    piece = inside_response(photograph, [model], 2, 5)
    assert "layer 2 of 0 to 3" in piece
    assert [picture.shape[:2] for picture in pictures(piece)[:5]] == 5 * [(4, 4)]  # tokens and four heads
    assert piece.count('class="curves"') == 1
    assert "row 2, column 2" in piece
    assert piece.count('<i style="left:25.000%;top:25.000%') == 4
    assert piece.count(" download=") == 3
    assert piece != inside_response(photograph, [model], 3, 5)
    assert "layer 3 of 0 to 3" in inside_response(photograph, [model], 99, 5)


def test_a_transformer_has_a_note_instead_of_curves(untrained, photograph):
    piece = inside_response(photograph, [untrained["vit_mae_nano_patch2_8"]], 0, 0)
    assert "vit_mae_nano_patch2_8 has neither subspaces nor codes" in piece
    assert 'class="curves"' not in piece


def test_a_changed_atom_has_its_map_and_the_completion_before_and_after(untrained, photograph):
    model, mask = untrained["crate_mae_nano_patch2_8"], torch.ones(4, 4, dtype=torch.bool)
    mask[0] = False
    piece = atom_response(photograph, [model], mask, 2, 7, 20.0)
    assert "layer 2, atom 7 of 0 to 95" in piece
    assert "atom 7 by +20 standard deviations" in piece
    active, completed, changed, difference = pictures(piece)
    assert active.shape[:2] == (4, 4)
    assert completed.shape == changed.shape == difference.shape == (8, 8, 3)
    assert (completed != changed).any()
    assert (difference[:2] == 128).all()  # visible patches stay as they are
    assert piece.count(" download=") == 4
    still = pictures(atom_response(photograph, [model], mask, 2, 7, 0.0))
    assert (still[3] == 128).all()
    assert "layer 3, atom" in atom_response(photograph, [model], mask, 99, 7, 1.0)
    transformer = atom_response(photograph, [untrained["vit_mae_nano_patch2_8"]], mask, 0, 0, 1.0)
    assert "only the layers of CRATE have sparse codes" in transformer


def test_the_current_layer_is_marked_on_both_curves():
    curves = [("a", Curves([1.0, 2.0, 3.0], [0.5, 1.0, 2.0], [0.1, 0.2, 0.3], []))]
    drawn = [re.findall(r"<svg.*?</svg>", curves_component(curves, layer)) for layer in range(3)]
    assert [len(panels) for panels in drawn] == [2, 2, 2]
    for panel in range(2):
        found = [re.findall(rf'<rect x="([\d.]+)"[^>]*fill="{MARKED}"', panels[panel]) for panels in drawn]
        assert [len(places) for places in found] == [1, 1, 1]
        left, middle, right = (float(places[0]) for places in found)
        assert right - middle == pytest.approx(middle - left, abs=0.21)  # tenths are written
        assert right - middle > 50


def test_curves_are_at_their_heights_and_can_be_saved():
    line = ChartLine([0.0, 4.0, 2.0], "#000", "nats & so on")
    drawn = draw_curves("title <1>", [line], [("a" * 99, line)], 7)
    ElementTree.fromstring(drawn)  # what a file must be
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)][:3]
    assert heights[0] - heights[2] == pytest.approx(heights[2] - heights[1])
    assert heights[0] > heights[2] > heights[1]
    assert "layer 1: 4 nats &amp; so on" in drawn
    assert "a" * 50 not in drawn
    saved = re.search(
        r'href="data:image/svg\+xml,([^"]+)" download', curves_component([("a", Curves([1.0], [2.0], [0.5], []))], 0)
    )
    assert unquote(saved[1]).startswith("<svg")


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (967.0, [0, 200, 400, 600, 800, 1000]),
        (11.0, [0, 2.5, 5, 7.5, 10, 12.5]),
        (0.0, [0, 1]),
    ],
)
def test_ticks_are_round_and_reach_the_top(largest, ticks):
    assert tick_values(largest) == pytest.approx(ticks)


def test_statuses_of_the_claims_on_a_picture_name_the_closest_control(untrained, photograph):
    model = untrained["crate_mae_nano_patch2_8"]
    audit = measure_curves(model.net, photograph).audit
    assert {row.part for row in audit} == {"encoder"} and "sort" not in {row.claim for row in audit}
    piece = inside_response(photograph, [model], 0, 0)
    cells = re.findall(r"<td>([∎✓✗‼]) (.*?)</td>", piece)
    assert len(cells) == len(audit)
    for (symbol, text), row in zip(cells, audit, strict=True):
        assert (symbol == "✓") is (row.margin_share >= 0.01)
        assert row.closest_control in text
    theorem = dataclasses.replace(audit[0], status="theorem")
    broken = dataclasses.replace(audit[1], status="contradiction")
    drawn = curves_component([("a", Curves([1.0], [2.0], [0.5], [theorem, broken]))], 0)
    assert "∎ theorem; " in drawn and "‼ contradiction; " in drawn
    assert drawn.count(f"better than {theorem.closest_control}") == 2


def test_the_effect_of_a_layer_is_described_with_its_direction():
    curves = [("a", Curves([10.0, 20.0], [7.0, 21.0], [0.25, 0.5], []))]
    assert "in layer 0, attention lowers Rᶜ from 10 to 7 nats; 25% of the code" in curves_component(curves, 0)
    assert "in layer 1, attention raises Rᶜ from 20 to 21 nats; 50% of the code" in curves_component(curves, 9)


def test_damaged_weights_are_explained_in_place_of_the_pictures(untrained, photograph):
    damaged = create_model("crate_mae_nano_patch2_8").eval()
    with torch.no_grad():
        for parameter in damaged.parameters():
            parameter.fill_(torch.nan)
    both = [AppModel("damaged", damaged), untrained["crate_mae_nano_patch2_8"]]
    for piece in (
        completion_response(photograph, both, torch.ones(4, 4, dtype=torch.bool)),
        inside_response(photograph, both, 0, 0),
    ):
        assert 'role="alert"' in piece
        assert "finite" in piece
        assert len(pictures(piece)) >= 4


def test_names_are_escaped():
    assert notice("<script>") == '<p class="notice" role="alert">&lt;script&gt;</p>'
    assert file_stem('runs/my "best" <one>') == "runs_my_best_one"
    assert file_stem("///") == "model"
