"""Reports of what is odd: too little data, empty data, broken weights, other networks."""

import math

import numpy as np
import pytest
import timm
import torch

import crate_mae
from crate_mae.data import open_source
from crate_mae.errors import UserError
from crate_mae.interpret.foregrounds import CONTROLS
from crate_mae.interpret.report import inspection as inspection_module
from crate_mae.interpret.report.html import draw_figures, plan_figures, write_html
from crate_mae.interpret.report.inspection import inspect_model
from crate_mae.interpret.report.options import InspectOptions


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Untrained draws take the time, and are tested elsewhere."""
    monkeypatch.setattr(inspection_module, "UNTRAINED_DRAWS", 1)


def report(**options):
    """An inspection and its page, with empty pictures in place of the drawn ones."""
    inspection = inspect_model(
        InspectOptions(**({"data": "digits:test", "out": "", "count": 3, "probe_images": 0} | options))
    )
    plan = plan_figures(inspection)
    pictures = {figure.name: b"" for figures in plan.values() for figure in figures}
    page = write_html(inspection, plan, pictures)
    inspection.to_json()  # which refuses NaN
    return inspection, plan, page


def labelled(labels):
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 255, (8, 8), dtype=np.uint8), label) for label in labels]


def test_one_image_has_no_intervals_and_no_neighbours(build):
    inspection, plan, page = report(model=build(), count=1)
    assert "With only one image, there are no intervals" in page
    assert "neighbours of tokens" in inspection.left_out
    assert [figure.name for figure in plan["tokens"]] == ["token_colours"]
    assert "no claim holds in any layer" in page
    assert "shows no clear change in all 3 forms" in page


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_constant_images_make_a_report(build, fill):
    inspection, _, page = report(model=build(), data=[torch.full((1, 8, 8), fill)] * 4)
    assert "At a glance" in page
    assert all(math.isfinite(row.mean) for found in inspection.measured for row in found.measures.rows)


def test_tokens_that_are_all_zero_make_a_report(build):
    model = build()
    for layer in model.encoder.blocks:
        layer.ista.threshold = 1e6
    inspection, plan, page = report(model=model)
    assert {row.mean for row in inspection.model.find("dead_coordinates")} == {1.0}
    assert "100%" in page
    draw_figures(plan)


@pytest.mark.parametrize("name", ["mask_token", "encoder.patch_embed.proj.weight", "decoder.pred.bias"])
def test_weights_that_are_not_finite_are_named(build, name):
    model = build()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = math.nan
    with pytest.raises(UserError, match=rf"hold NaN or infinity, first in {name}"):
        report(model=model)


def test_fewer_images_than_asked_for_are_enough(build):
    images = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    inspection, _, page = report(model=build(), data=images, count=5)
    assert inspection.model.measures.images == 2
    assert "list contains 2 images: 2 were measured instead of 5" in page


def test_a_model_without_subspaces_has_what_is_left(build):
    inspection, plan, page = report(model=build("vit_mae_nano_patch2_8"))
    names = [figure.name for figures in plan.values() for figure in figures]
    assert "weights" not in names
    titles = ("R^c as in the official code (nats)", "R^c of unit-length projections (nats)")
    for figure, title in zip(plan["layers"], titles, strict=False):  # of which there is the stand-in alone
        ((panel,),) = figure.draw.args
        assert panel.title == title
        assert all(line.dashed for line in panel.lines)
    assert "so these are of its stand-in, and nothing predicts where squares should lie" in page
    assert {
        "subspace_rates",
        "within_layers",
        "rates",
        "sparsity",
        "ranks",
        "information",
        "inverses",
        "heads",
        "completions",
    } <= set(names)
    assert "is not MSSA" in page
    assert "subspace rates, the model" in page  # among what is left out
    assert "random" in {found.key for found in inspection.measured}


def test_a_network_from_python_has_no_decoder_and_no_twin():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        depth=2,
        num_classes=0,
        class_token=False,
        global_pool="avg",
    )
    inspection, plan, page = report(model=model)
    assert {"random initialisation", "completions", "attention maps, the model"} <= set(inspection.left_out)
    assert plan["model"] == [] and [figure.name for figure in plan["attention"]] == ["foregrounds"]
    assert "Not measured: " in page
    with pytest.raises(UserError, match="cannot hide patches"):
        report(model=model, mask_ratio=0.5)


def test_a_timm_baseline_cannot_be_masked(build):
    with pytest.raises(UserError, match="timm:vit_tiny_patch16_224:untrained cannot hide patches"):
        report(model=build(), baseline="timm:vit_tiny_patch16_224:untrained", mask_ratio=0.5)


def test_masked_passes_are_measured(build):
    whole, hidden = (report(model=build(), mask_ratio=ratio) for ratio in (None, 0.5))
    assert whole[0].model.find("coding_rate", "z_next") != hidden[0].model.find("coding_rate", "z_next")
    assert "50% of the patches were hidden while layers were measured" in hidden[2]


def test_a_preset_is_known_to_be_fresh():
    inspection, _, page = report(model="crate_mae_nano_patch2_8")
    model, random = inspection.measured
    assert model.is_random and random.is_random
    assert model.find("output_cosine") != random.find("output_cosine")  # other seeds
    assert "both show what chance gives" in page


def test_a_classifier_is_measured_by_its_encoder(build):
    from crate_mae.models.classifier import Classifier
    from crate_mae.models.config import ClassifierConfig

    net = build(mean=(0.1,), std=(0.7,))
    classifier = Classifier(net.encoder, ClassifierConfig(encoder=net.config, classes=("a", "b"))).eval()
    inspection, _, _ = report(model=classifier)
    whole, _, _ = report(model=net)
    assert inspection.model.find("coding_rate", "z_next") == whole.model.find("coding_rate", "z_next")
    assert "random" in {found.key for found in inspection.measured}
    assert inspection.left_out["completions"] == "the model has no decoder"


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ([np.zeros((8, 8), dtype=np.uint8)] * 4, "has no labels"),
        (labelled([0, 1, 0, 1]), "have different classes:\nonly in digits:test: 2, 3, 4, 5, 6 and 3 more"),
        (labelled([*range(10), *range(9)]), "Class 9 has 1 training"),
    ],
)
def test_probes_that_cannot_be_fitted_are_left_out(build, train, reason):
    inspection, _, page = report(model=build(), train_data=train, probe_images=50)
    assert reason in inspection.left_out["linear probes"]
    assert "linear probes" in page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0, "seed": -1, "mask_ratio": 1.0, "probe_images": -2}, "--count is 0(.|\n)*--mask-ratio is 1.0"),
        ({"train_data": "digits:test"}, "--train-data are the same images"),
        ({"other_data": "digits:test"}, "--other-data are the same images"),
        ({"model": "pixels"}, "not a Vision Transformer"),
        ({"baseline": "no/such/model"}, "does not exist"),
        ({"data": "no/such/data"}, "does not exist"),
    ],
)
def test_mistakes_are_sentences(build, options, words):
    with pytest.raises(UserError, match=words):
        report(**({"model": build()} | options))


def test_copies_among_the_images_of_a_control_are_named(build, tmp_path, caplog):
    (tmp_path / "train").mkdir()
    for i in (3, 5):
        open_source("digits:test").picture(i).save(tmp_path / "train" / f"{i}.png")
    report(model=build(), train_data=tmp_path / "train")
    assert "2 of 297 images of DATA (digits:test) are also in --train-data" in caplog.text


def test_drawn_foregrounds_are_scored_for_every_network(build, tmp_path):
    from PIL import Image

    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        pixels = np.full((8, 8), 20, dtype=np.uint8)
        pixels[i : i + 4, 2:6] = 220
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray((pixels > 100).astype(np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    Image.new("L", (8, 8)).save(tmp_path / "images" / "4.png")
    (tmp_path / "masks" / "4.png").write_bytes(b"nothing")
    options = {"model": build(), "baseline": build("vit_mae_nano_patch2_8"), "data": str(tmp_path / "images")}
    options["count"] = 5
    inspection, plan, _ = report(**options, foregrounds=tmp_path / "masks", other_data="digits:test")
    scored = {found.key: found.find("foreground_iou", "component") for found in inspection.measured}
    assert {key: [row.n for row in rows] for key, rows in scored.items()} == {
        **{key: [4, 4] for key in ("model", "random", "baseline", "random_baseline")},
        "other": [],
    }
    drawn = next(figure for figure in plan["attention"] if figure.name == "foreground_scores")
    (panels,) = drawn.draw.args
    best = max(CONTROLS, key=lambda name: inspection.model.find("foreground_iou", name)[0].mean)
    labels = ["the model", "random initialisation", "baseline", "random baseline", f"{best}, the best control"]
    assert [line.label for line in panels[0].lines] == labels
    (note,) = (note for note in inspection.notes if "4.png" in note)
    assert note.startswith("1 of 5 masks of --foregrounds cannot be read")
    assert f"--foregrounds {tmp_path / 'masks'}" in inspection.settings.command()
    without, _, page = report(**options)
    assert "--foregrounds" in without.left_out["scores of foregrounds"] and "scores of foregrounds" in page
    with pytest.raises(UserError, match="neither a folder of masks nor"):
        report(**options, foregrounds=tmp_path / "nowhere")


def test_a_fresh_baseline_has_no_random_twin(build):
    inspection, _, _ = report(model=build(), baseline="vit_mae_nano_patch2_8")
    assert "random_baseline" not in {found.key for found in inspection.measured}
    assert "itself has random initialisation" in inspection.left_out["random baseline"]


def test_broken_images_are_listed(build, tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("L", (8, 8), 80 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "<broken>.png").write_bytes(b"nothing")
    _, _, page = report(model=build(), data=str(tmp_path), count=4)
    assert "&lt;broken&gt;.png" in page
    assert "contains 4 images (1 cannot be read): 3 were measured instead of 4" in page


def test_saved_models_are_opened_by_name(build, tmp_path):
    crate_mae.save(build(), tmp_path / "saved")
    inspection, _, page = report(model=str(tmp_path / "saved"))
    assert inspection.model.measures.model == str(tmp_path / "saved")
    assert not inspection.model.is_random
    assert str(tmp_path / "saved") in page
