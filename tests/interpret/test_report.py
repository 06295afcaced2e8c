"""The report of a model: whole in itself, with every control, and the same numbers on the page as in the files."""

import csv
import io
import json
import re

import pytest
import torch
from PIL import Image

import crate_mae
from crate_mae.drawing.text import html, number, percent, signed
from crate_mae.interpret.audit import SYMBOLS
from crate_mae.interpret.report import inspection as inspection_module
from crate_mae.interpret.report.findings import STAND_IN_LIMITS
from crate_mae.interpret.report.html import REPORT_FILE, plan_figures, report_files
from crate_mae.interpret.report.inspection import Training, inspect_model
from crate_mae.interpret.report.options import InspectOptions
from tests.html_tags import Tags

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_depth": 2, "in_chans": 1}
SECTIONS = {"model", "findings", "layers", "audit", "weights", "attention", "tokens", "atoms", "left-out"}
FIGURES = {
    "glance",
    *(
        "completions",
        "subspace_rates",
        "within_layers",
        "mixing",
        "rates",
        "sparsity",
        "ranks",
        "information",
        "weights",
    ),
    *("inverses", "heads", "saliency", "foregrounds", "token_colours", "neighbours", "atoms"),
}


def settings():
    torch.manual_seed(0)
    noise = [torch.rand(1, 9, 7, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    return InspectOptions(
        model=crate_mae.create_model("crate_mae_nano_patch2_8", **SMALL),
        baseline=crate_mae.create_model("vit_mae_nano_patch2_8", **(SMALL | {"embed_dim": 12})),
        data="digits:test",
        out="",
        other_data=noise,
        train_data="digits:train",
        count=7,
        probe_images=61,
    )


def inspect_small():
    """With two draws of untrained networks: most of the time would go into more of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection_module, "UNTRAINED_DRAWS", 2)
        return inspect_model(settings(), training=Training(lines={"Steps": "<none> & few"}, mask_ratio=0.5))


@pytest.fixture(scope="module")
def inspection():
    return inspect_small()


@pytest.fixture(scope="module")
def files(inspection):
    return report_files(inspection)


@pytest.fixture(scope="module")
def page(files):
    return files[REPORT_FILE]


def test_the_page_loads_nothing(page):
    tags = Tags(page)
    assert len(tags.sources) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert all(link.startswith("#") for link in tags.links)
    assert not re.search(r"<(script|link|iframe|object|embed)|@import|url\(|https?://|\son\w+=", page)
    assert not re.search(r"[{}]|nan\b|None", re.sub(r"<style>.*?</style>|base64,[^\"]*", "", page, flags=re.DOTALL))


def test_sections_and_answers_are_there_and_linked(page):
    tags = Tags(page)
    assert set(tags.ids) >= SECTIONS
    assert len(set(tags.ids)) == len(tags.ids)
    assert {link[1:] for link in tags.links} == set(tags.ids)
    for words in (
        "the model",
        "random initialisation",
        "baseline",
        "other images",
        "training images",
        "&lt;none&gt; &amp; few",
    ):
        assert words in page


def test_every_figure_is_explained_and_saved_twice(files, page):
    names = {name.removeprefix("figures/").removesuffix(".png") for name in files if name.endswith(".png")}
    assert names == FIGURES
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, flags=re.DOTALL)
    assert len(captions) == len(FIGURES)
    assert all(len(re.findall(r"\.(?=\s|$)", caption)) == 2 for caption in captions)
    for name in FIGURES:
        assert files[f"figures/{name}.pdf"].startswith(b"%PDF")
        with Image.open(io.BytesIO(files[f"figures/{name}.png"])) as picture:
            assert picture.width >= 1400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_the_files_hold_the_numbers_of_the_page(inspection, files, page):
    content = json.loads(files["measures.json"])
    keys = ["model", "random", "baseline", "random_baseline", "other", "train"]
    assert [subject["subject"] for subject in content["subjects"]] == keys
    assert [subject["images"] for subject in content["subjects"]] == [7, 7, 7, 7, 5, 7]
    table = list(csv.DictReader(io.StringIO(files["measures.csv"])))
    audit = list(csv.DictReader(io.StringIO(files["audit.csv"])))
    assert len(table) == sum(len(subject["rows"]) for subject in content["subjects"])
    assert len(audit) == sum(len(subject["audit"]) for subject in content["subjects"])
    for subject, found in zip(content["subjects"], inspection.measured, strict=True):
        rates = [
            row["mean"]
            for row in subject["rows"]
            if (row["part"], row["measure"], row["point"]) == ("encoder", "subspace_rate", "z_half")
        ]
        lines = [r for r in table if (r["subject"], r["measure"], r["point"]) == (found.key, "gini", "z_next")]
        assert [float(line["mean"]) for line in lines if line["part"] == "encoder"] == [
            row.mean for row in found.find("gini", "z_next")
        ]
        if rates:
            assert html(f"{number(rates[0])} → {number(rates[-1])}") in page
    assert content["versions"]["torch"] in page
    assert [f"{value:.1f}" for value in content["completions"]["psnr"]] == [
        f"{value:.1f}" for value in inspection.examples.psnr
    ]


def test_every_claim_about_every_layer_has_a_symbol_its_control_and_its_numbers(inspection, page):
    section = page[page.index('id="audit"') : page.index('id="weights"')]
    rows = inspection.model.measures.audit
    cells = re.findall(
        r'<td class="(\w+)" title[^>]*>(.)<br>(\d+%|pooled)<br><span class="small">(.*?)</span>', section
    )
    expected = [row for part in ("encoder", "decoder") for row in rows if row.part == part]
    assert [(cell[0], cell[1]) for cell in cells] == [
        ("fails" if row.status == "does not hold" else row.status, SYMBOLS[row.status]) for row in expected
    ]
    assert [cell[2] for cell in cells] == [
        "pooled" if row.share_of_images is None else percent(row.share_of_images) for row in expected
    ]
    assert [cell[3] for cell in cells] == [row.closest_control for row in expected]
    assert all(html(f"{signed(row.margin_low)} to {signed(row.margin_high)}") in section for row in rows)


def test_the_first_figure_has_the_two_steps_beside_their_best_controls(inspection, page):
    (figure,) = plan_figures(inspection)["glance"]
    encoder = [row for row in inspection.model.measures.audit if (row.tokens, row.part) == ("all", "encoder")]
    for panel, claim in zip(*figure.draw.args, ("compress", "lasso"), strict=True):
        rows, (best, own, *_) = [row for row in encoder if row.claim == claim], panel.lines
        assert rows and own.y == [row.after for row in rows]
        assert [y - row.after for y, row in zip(best.y, rows, strict=True)] == pytest.approx([r.margin for r in rows])
    assert 0 < page.index("each step should lie below its best control") < page.index("At a glance")


def test_untrained_networks_are_controls_of_the_trained_ones_alone(inspection):
    audits = {found.key: found.measures.audit for found in inspection.measured}
    assert {key for key, rows in audits.items() if rows} == {"model", "other", "train"}
    assert all(row.learned is not None for row in audits["model"])
    assert all(row.learned is None for row in (*audits["other"], *audits["train"]))


def test_the_model_without_mixing_is_in_the_files_and_on_the_page(inspection, files, page):
    use = inspection.attention_use
    assert [(u.part, u.layer) for u in use] == [
        ("", None),
        *(("encoder", layer) for layer in (0, 1, None)),
        *(("decoder", layer) for layer in (0, 1, None)),
    ]
    assert (use[0].change, use[0].change_low) == (0, 0)
    assert all((u.accuracy is None) == (u.part == "decoder") for u in use)
    table = list(csv.DictReader(io.StringIO(files["attention.csv"])))
    assert [float(row["loss"]) for row in table] == [u.loss for u in use]
    assert json.loads(files["measures.json"])["attention_use"][1]["change"] == use[1].change
    assert html(number(use[3].loss)) in page and "Without mixing in the encoder" in page


def test_atoms_are_in_the_files_and_their_numbers_in_the_caption(inspection, files, page):
    table = list(csv.DictReader(io.StringIO(files["atoms.csv"])))
    assert [(row["subject"], int(row["index"]), row["chosen"], float(row["change"])) for row in table] == [
        ("model", atom.index, atom.chosen, atom.change) for atom in inspection.atoms.atoms
    ]
    known = [float(row["cosine"]) for row in table if row["cosine"] and row["random_cosine"]]
    assert known and all(-1 <= cosine <= 1 for cosine in known)
    assert f"linear response is {sum(known) / len(known):.3f} (mean over {len(known)} atoms)" in page


def test_a_black_box_baseline_is_drawn_and_told(inspection, page):
    (panels,) = plan_figures(inspection)["layers"][0].draw.args
    labels = [[line.label for line in panel.lines] for panel in panels]
    assert {"baseline (stand-in)", "random baseline (stand-in)"} < set(labels[2])
    assert "baseline" not in {label for panel in labels for label in panel}
    assert "With random initialisation that stand-in" in page
    assert html(STAND_IN_LIMITS) in page


def test_probes_are_rows_of_networks_alone(inspection):
    accuracies = {found.key: found.find("probe_accuracy") for found in inspection.measured}
    assert {key: len(rows) for key, rows in accuracies.items()} == {
        "model": 2,
        "random": 2,
        "baseline": 2,
        "random_baseline": 2,
        "other": 0,
        "train": 0,
    }
    assert all(row.n == 61 and 0 <= row.mean <= 1 for rows in accuracies.values() for row in rows)
    assert max(row.mean for row in accuracies["model"]) > 0.3  # of ten classes


def test_controls_differ_in_what_they_should(inspection):
    model, random, baseline, random_baseline, other, train = inspection.measured
    for measure in ("output_cosine", "dictionary_coherence"):
        assert model.find(measure) == other.find(measure) == train.find(measure)
        assert model.find(measure) != random.find(measure)
    assert model.find("coding_rate", "z_next") != train.find("coding_rate", "z_next")
    assert baseline.find("coding_rate", "z_next") != random_baseline.find("coding_rate", "z_next")
    # From Python: nobody knows of the training of model and baseline.
    assert [found.is_random for found in (model, random, baseline, random_baseline)] == [False, True, False, True]


def test_a_shortage_of_images_is_said(inspection, page):
    assert any("5 images" in note and "instead of 7" in note for note in inspection.notes)
    assert "5 were measured" in page


def test_the_same_seed_makes_the_same_report(inspection):
    again = inspect_small()
    assert again.to_json() == inspection.to_json()
    assert again.examples.psnr == inspection.examples.psnr
    assert inspection.examples.mask_ratio == 0.5


def test_the_command_says_how_to_make_it_again(page):
    found = InspectOptions(model="a model", data="b", out="", train_data="c", mask_ratio=0.5, count=3, seed=4)
    assert found.command() == (
        "crate-mae inspect 'a model' b --out DIR --train-data c --count 3 --mask-ratio 0.5 --probe-images 2000 --seed 4"
    )
    assert "--count 7 --probe-images 61 --seed 0" in page
