"""A comparison from end to end: its files, that it is fair, and that it continues after being stopped."""

import csv
import json
import math
import shutil
from importlib.metadata import version

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from crate_mae.comparison.entries import BudgetPlan, Costs, open_images, resolve_entries
from crate_mae.comparison.options import CompareOptions
from crate_mae.comparison.report import RULE
from crate_mae.comparison.runs import ComparisonDirectory, Planned, Trainer
from crate_mae.errors import DivergedError, UserError
from crate_mae.models.weights import load
from crate_mae.training.config import differences, load_config
from crate_mae.training.start import start

CRATE, VIT = "crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8"


def read_csv(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_entry_spends_its_budget_and_no_more(compared):
    for name in (CRATE, VIT):
        searches = sorted((compared.path / "runs" / name).glob("search-*"))
        assert [load_config(run / "config.yaml").steps for run in searches] == [2, 2]
        finals = sorted((compared.path / "runs" / name).glob("seed-*"))
        assert [run.name for run in finals] == ["seed-0", "seed-1"]
        assert [load_config(run / "config.yaml").steps for run in finals] == [6, 6]


def test_runs_differ_in_model_learning_rate_and_seed_alone(compared):
    runs = [load_config(file) for file in sorted(compared.path.glob("runs/*/seed-*/config.yaml"))]
    differing = {line.partition(":")[0] for run in runs for line in differences(runs[0], run)}
    # The two families differ by design in where mask tokens come in.
    assert differing <= {"model", "lr", "seed", "mask_tokens"}
    assert {"model", "seed"} <= differing
    assert runs[0].mask_ratio == 0.75 and not runs[0].flip and runs[0].min_crop == 0.6


def test_the_learning_rate_is_that_of_the_lowest_held_out_loss_of_the_training_images(compared):
    for result in compared.results:
        losses = result.search_losses
        assert result.rate == min(losses, key=losses.get)
        for rate, loss in losses.items():
            run = compared.path / "runs" / result.name / f"search-{rate:.3g}"
            assert read_csv(run / "metrics.csv")[-1]["held_out_loss"] == str(loss)
            assert load_config(run / "config.yaml").val is None  # so they are taken out of the training images
        final = load_config(compared.path / "runs" / result.name / "seed-0" / "config.yaml")
        assert final.lr == result.rate


def test_the_table_has_a_row_for_each_entry_and_control(compared):
    rows = read_csv(compared.path / "table.csv")
    kinds = [(row["model"], row["weights"]) for row in rows]
    assert kinds == [(CRATE, "trained"), (CRATE, "random"), (VIT, "trained"), (VIT, "random"), ("pixels", "none")]
    for row in rows:
        assert 0.2 < float(row["linear_mean"]) <= 1
        assert 0 < float(row["knn_mean"]) <= 1
        assert bool(row["psnr_mean"]) == (row["weights"] == "trained")
    crate, vit = rows[0], rows[2]
    assert int(crate["parameters"]) < int(vit["parameters"])
    for row in (crate, vit):
        assert int(row["steps"]) == 6 and int(row["steps_search"]) == 4 and int(row["images_seen"]) == 150
        expected = float(row["training_flops_per_image"]) * 25 * 10
        assert float(row["training_flops"]) == pytest.approx(expected)
        assert float(row["linear_low"]) <= float(row["linear_mean"]) <= float(row["linear_high"])
        assert float(row["images_per_second"]) > 0
        assert int(row["peak_memory_bytes"]) == 7 * 2**20


def test_scores_of_seeds_are_summarised_with_their_spread(compared):
    row = read_csv(compared.path / "table.csv")[0]
    a, b = (scores["linear"] for scores in compared.results[0].scores.values())
    assert float(row["linear_mean"]) == pytest.approx((a + b) / 2)
    assert float(row["linear_std"]) == pytest.approx(abs(a - b) / math.sqrt(2))


def test_every_seed_is_in_a_table_of_its_own(compared):
    rows = read_csv(compared.path / "seeds.csv")
    assert [(row["model"], row["weights"], row["seed"]) for row in rows] == [
        (model, weights, seed) for model in (CRATE, VIT) for weights in ("trained", "random") for seed in "01"
    ]
    assert float(rows[1]["linear"]) == compared.results[0].scores[1]["linear"]


def test_the_notes_explain_where_the_first_is_behind_and_how_to_read_it(compared):
    text = (compared.path / "table.md").read_text(encoding="utf-8")
    assert compared.notes[0].startswith(f"{CRATE} is behind {VIT} in: ")
    assert compared.notes[1].startswith(f"{CRATE} is ahead of {VIT} in: ")
    for result in compared.results:
        assert f"{result.name}: the best learning rate" in text  # of two, one is always at the edge
    for words in (
        "lies at the edge",
        f"{CRATE} at the encoder, {VIT} at the decoder",
        "counted as 2",
        "random initialisation",
        "raw pixels",
        "never by the validation images",
        "paired",
    ):
        assert words in text
    first_line = text.splitlines()[2]
    assert first_line.startswith("**The linear probe: raw pixels ")
    assert first_line.index(f"{VIT} with random initialisation ") < first_line.rindex(f", {CRATE} ")
    behind, ahead = compared.notes[:2]
    first, other = (result.scores for result in compared.results)
    first_psnr, other_psnr = (sum(score["psnr"] for score in scores.values()) for scores in (first, other))
    assert ("PSNR" in ahead) == (first_psnr > other_psnr)
    assert ("PSNR" in behind) == (first_psnr < other_psnr)


def test_the_random_control_is_the_network_before_its_first_step(compared):
    options = CompareOptions((CRATE, VIT), out="", **plan_options(compared))
    entry = resolve_entries(options, open_images(options))[0]
    run = compared.path / "runs" / CRATE / "seed-1"
    trained = load(run)
    initial = entry.build(1)
    moved = [(a - b).abs().max() for a, b in zip(trained.parameters(), initial.parameters(), strict=True)]
    other = [(a - b).abs().max() for a, b in zip(trained.parameters(), entry.build(0).parameters(), strict=True)]
    # Six steps at this rate move no weight by more than 0.02; weights of another seed are elsewhere.
    assert max(moved) < 0.02 < max(other)


def test_the_figures_are_not_empty(compared):
    for name in ("figure.png", "curves.png"):
        with Image.open(compared.path / name) as picture:
            assert picture.width > 1000
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 50


def test_the_plan_has_everything_needed_to_repeat_it(compared, digits):
    plan = yaml.safe_load((compared.path / "comparison.yaml").read_text(encoding="utf-8"))
    assert {key: plan["options"][key] for key in digits} == digits
    assert plan["options"]["budget"] == "steps=10" and plan["options"]["models"] == [CRATE, VIT]
    assert plan["entries"][CRATE]["model"]["in_chans"] == 1
    assert plan["entries"][CRATE]["threads"] == 1
    assert plan["entries"][VIT]["plan"]["final_steps"] == 6
    assert plan["environment"]["packages"]["torch"] == version("torch")
    assert plan["rule"] == RULE and RULE in "\n".join(compared.notes)


def test_a_stopped_comparison_continues(compared, compare, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(compared.path, out)
    # As if it had been killed in the last run: that one, the scores, and everything later are missing.
    shutil.rmtree(out / "runs" / VIT / "seed-1")
    for name in ("scores.json", "table.csv", "table.md", "figure.png", "curves.png"):
        (out / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    plan = yaml.safe_load((out / "comparison.yaml").read_text(encoding="utf-8"))
    plan["contestants"] = plan.pop("entries")  # as the first version wrote it
    ComparisonDirectory(out).save_plan(plan)
    monkeypatch.setattr("crate_mae.comparison.compare.measure_costs", None)  # would fail if it were timed again
    again = compare(out)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    name = f"runs/{VIT}/seed-1/model.safetensors"
    redone, first = load_file(out / name), load_file(compared.path / name)
    assert all(torch.equal(redone[key], first[key]) for key in first)
    assert [result.scores for result in again.results] == [result.scores for result in compared.results]
    assert len(read_csv(out / "table.csv")) == 5


def test_a_seed_that_diverges_is_left_out_and_named(compared, compare, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(compared.path, out)
    (out / "runs" / CRATE / "seed-0" / "environment.json").unlink()  # so that this run is finished again, with
    monkeypatch.setattr("crate_mae.training.run_directory.installed_version", lambda _package: "2.6.0")

    def diverging(options, **progress):
        if (options.model, options.seed, options.steps) == (VIT, 1, 6):
            raise DivergedError("the loss is nan")
        return start(options, **progress)

    monkeypatch.setattr("crate_mae.comparison.runs.start", diverging)
    crate, vit = compare(out).results
    assert list(crate.scores) == [0, 1] and list(vit.scores) == [0]
    text = (out / "table.md").read_text(encoding="utf-8")
    assert f"{VIT} diverged with seed 1, which its scores leave out." in text
    assert "not all made in the same environment (PyTorch 2.6.0, " in text
    seeds = [(row["model"], row["weights"], row["seed"]) for row in read_csv(out / "seeds.csv")]
    assert (CRATE, "trained", "1") in seeds and (VIT, "trained", "1") not in seeds


def test_a_folder_with_other_options_is_refused(compared, compare):
    before = sorted(compared.path.rglob("*"))
    with pytest.raises(UserError, match=r"comparison with other options:\n  budget: steps=10 -> steps=12\n"):
        compare(compared.path, budget="steps=12")
    with pytest.raises(UserError, match="models: "):
        compare(compared.path, VIT, CRATE)
    assert sorted(compared.path.rglob("*")) == before


def test_a_dry_run_reports_the_plan_and_writes_nothing(compare, tmp_path, capsys):
    compare(tmp_path / "dry", budget="steps=20", quiet=False, dry_run=True)
    text = capsys.readouterr().out
    assert f"{CRATE}: 0.23 M parameters" in text
    assert "search 2 x 4 steps, final run 12 steps for each of 2 seeds" in text
    assert "nothing has been written" in text
    assert not (tmp_path / "dry").exists()


def test_a_plan_as_json_is_what_comparison_yaml_would_hold(compare, tmp_path, capsys):
    comparison = compare(tmp_path / "dry", budget="steps=20", quiet=False, dry_run=True, json=True)
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert plan == json.loads(json.dumps(comparison.plan))
    assert plan["entries"][CRATE]["plan"]["final_steps"] == 12 and plan["options"]["budget"] == "steps=20"
    assert "nothing has been written" in captured.err
    with pytest.raises(UserError, match=r"^--json prints the plan of a dry run: add --dry-run, or leave out --json\.$"):
        compare(tmp_path / "dry", json=True)


def test_without_labels_completions_alone_are_measured(compare, tmp_path, capsys):
    images = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(90)]
    options = {"budget": "steps=2", "lr_search": 1, "seeds": 1, "batch_size": 20, "norm_pix_loss": True}
    shallow = f"{CRATE}?depth=1&layer=monotone"
    comparison = compare(tmp_path / "out", CRATE, shallow, train=images[:60], val=images[60:], **options, quiet=False)
    assert load(tmp_path / "out" / "runs" / f"{CRATE},depth=1,layer=monotone" / "seed-0").config.depth == 1
    assert comparison.table[0] == ["", CRATE, shallow]
    assert "No probes: " in capsys.readouterr().out.partition("final run, seed 0")[0]  # not only when all is trained
    rows = read_csv(tmp_path / "out" / "table.csv")
    assert [row["weights"] for row in rows] == ["trained", "trained"]
    assert "linear_mean" not in rows[0] and float(rows[0]["psnr_mean"]) > 0
    text = "\n".join(comparison.notes)
    assert "without labels: only completions are measured" in text
    assert "brightness and contrast of each completed patch come from the original" in text
    assert "One run each: there is no spread" in text
    assert "One seed cannot tell models apart by less than the spread of seeds" in text
    titles = [row[0] for row in comparison.table]
    assert "completion: PSNR of hidden patches, own statistics" in titles
    assert not any("probe" in title for title in titles)


def test_the_search_chooses_among_networks_with_as_many_trials_for_each_entry(compare, digits, tmp_path):
    named = f"{CRATE}?depth=1|2", f"{VIT}?depth=1|2"
    unlabelled = {part: [torch.rand(1, 8, 8) for _ in range(30)] for part in digits}
    comparison = compare(
        tmp_path / "out", *named, budget="steps=16", search_share=0.5, batch_size=10, seeds=1, **unlabelled
    )
    plan = yaml.safe_load((tmp_path / "out" / "comparison.yaml").read_text(encoding="utf-8"))
    assert plan["options"]["models"] == list(named)
    assert [name.partition("?")[2] for name in plan["entries"]] == ["depth=1", "depth=2"] * 2
    for result, name in zip(comparison.results, (CRATE, VIT), strict=True):
        trials = result.trials
        assert [trial.planned.entry.name for trial in trials] == [
            f"{name}?depth={depth}" for depth in (1, 2) for _ in range(2)
        ]
        best = min(trials, key=lambda trial: trial.loss)
        assert (result.name, result.rate) == (best.planned.entry.name, best.rate)
        assert list(result.search_losses) == [trial.rate for trial in trials if trial.planned.entry.name == result.name]
        runs = sorted((tmp_path / "out" / "runs").glob(f"{name},*/*"))
        steps = {run.name[:4]: load_config(run / "config.yaml").steps for run in runs}
        assert (len(runs), steps) == (5, {"sear": 2, "seed": 8})  # the whole budget, and no more
        per_step = {trial.planned.entry.name: trial.planned.costs.training_flops * 10 for trial in trials}
        assert result.training_flops == pytest.approx(4 * sum(per_step.values()) + 8 * per_step[result.name])
        row = next(row for row in read_csv(tmp_path / "out" / "table.csv") if row["model"] == result.name)
        assert (row["steps_search"], row["steps"]) == ("8", "8")
        note = next(note for note in comparison.notes if note.startswith(f"{result.name} was chosen by its held-out"))
        assert all(f"{name}?depth={depth} " in note for depth in (1, 2))
    assert "a search over 2 networks and 2 learning rates for each" in "\n".join(comparison.notes)


def test_a_rate_that_diverges_is_the_worst(compared, tmp_path, monkeypatch):
    monkeypatch.setattr("crate_mae.comparison.runs.next_rate", lambda losses, first: 1e30 if losses else first)
    options = CompareOptions((CRATE, VIT), out="", **plan_options(compared))
    entry = resolve_entries(options, open_images(options))[0]
    lines = []
    trainer = Trainer(options, ComparisonDirectory(tmp_path), lines.append)
    costs = compared.results[0].costs
    assert isinstance(costs, Costs)
    good, bad = trainer.search(Planned(entry, costs, BudgetPlan(1e-3, 2, 8, 1)))
    assert (good.rate, bad.rate) == (1e-3, 1e30)
    assert math.isfinite(good.loss) and good.minutes > 0
    assert (bad.loss, bad.minutes) == (math.inf, 0)
    assert f"{CRATE}: diverged at learning rate 1e+30" in lines


def plan_options(compared):
    plan = yaml.safe_load((compared.path / "comparison.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in plan["options"].items() if key != "models"}
