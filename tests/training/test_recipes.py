"""Recipes are options of `pretrain` that fit it, and options given beside one win."""

import pytest

from crate_mae.commands.about import recipes
from crate_mae.commands.train import pretrain
from crate_mae.errors import UserError
from crate_mae.training.options import PretrainOptions, saved_options
from crate_mae.training.recipes import list_recipes, read_recipe, recipe_text, with_recipe

OPTIONS = {*saved_options(PretrainOptions), "epochs"}


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_fits_pretrain_and_describes_itself(name):
    description, options = read_recipe(name)
    assert options.keys() <= OPTIONS - {"data"}
    assert description.endswith(".")


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_plans_a_run_on_digits(name, tmp_path, monkeypatch):
    """Their own images are larger; the settings still have to fit each other."""
    monkeypatch.setattr("crate_mae.training.preflight._seconds_per_step", lambda *_: (1.0, True))
    size = 32 if "patch4" in recipe_text(name) else 8
    if "patch16" in recipe_text(name):
        size = 224
    if "init_from" in recipe_text(name):
        size = 64
    short = {"steps": 9, "warmup_epochs": 0.0, "dry_run": True, "quiet": True}
    run = pretrain("digits", out=tmp_path / "run", recipe=name, image_size=size, **short)
    assert run.config.steps == 9
    assert not (tmp_path / "run").exists()


def test_a_recipe_for_more_images_than_there_are_gets_a_batch_that_fits_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("crate_mae.training.preflight._seconds_per_step", lambda *_: (1.0, True))
    small = {"model": "crate_mae_nano_visible_patch2_8", "out": tmp_path / "run", "dry_run": True, "epochs": 1}
    run = pretrain("digits:train", recipe="imagenet", **small)
    assert (run.config.batch_size, run.config.steps) == (32, 44)
    assert "32 (from 1,425 training images, fewer than the recipe's 4,096)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="A batch of 4096 is larger than the 1425 training images"):
        pretrain("digits:train", recipe="imagenet", batch_size=4096, **small)


def test_options_beside_a_recipe_win():
    options = with_recipe(PretrainOptions("digits", out="run", recipe="digits", batch_size=25, steps=7))
    assert (options.batch_size, options.mask_ratio, options.flip) == (25, 0.5, False)
    assert (options.steps, options.epochs) == (7, None)


def test_settings_of_the_model_are_merged(monkeypatch):
    monkeypatch.setattr(
        "crate_mae.training.recipes.recipe_text",
        lambda _: "description: A test.\nmodel_settings: {threshold: 0.1, depth: 3}",
    )
    options = with_recipe(PretrainOptions("digits", out="run", recipe="any", model_settings={"depth": 2}))
    assert options.model_settings == {"threshold": 0.1, "depth": 2}


def test_an_unknown_recipe_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"Unknown recipe digit\. Did you mean digits"):
        pretrain("digits", out=tmp_path / "run", recipe="digit")
    assert not (tmp_path / "run").exists()


def test_the_command_lists_and_shows(capsys):
    assert recipes() == list_recipes()
    assert read_recipe("digits").description in capsys.readouterr().out
    recipes("digits")
    assert capsys.readouterr().out == recipe_text("digits")
