"""Recipes: options of pretraining that were tried together, one YAML file each, with their results.

The files are in the folder `recipes` beside this module. `description` says what a recipe is for; the comment below it
states on which images it was tried, its result and how long it took.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from crate_mae.errors import UserError, did_you_mean
from crate_mae.training.options import LENGTHS, PretrainOptions, RunOptions

_FOLDER = Path(__file__).parent / "recipes"


def list_recipes() -> list[str]:
    """The names that `--recipe` takes."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """A recipe's file, comments and all.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    if name not in list_recipes():
        hint = did_you_mean(name, list_recipes(), similarity=0.4)
        raise UserError(f"Unknown recipe {name}.{hint} Available recipes: {', '.join(list_recipes())}.")
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


class Recipe(NamedTuple):
    """A recipe: what it is for, in a sentence, and its options."""

    description: str
    options: dict[str, Any]


def read_recipe(name: str) -> Recipe:
    """A recipe, without its comments."""
    options = yaml.safe_load(recipe_text(name))
    return Recipe(options.pop("description"), options)


def is_from_recipe(options: RunOptions, name: str) -> bool:
    """Whether an option has its value from a recipe."""
    recipe = getattr(options, "recipe", None)
    return recipe is not None and (options.origins or {}).get(name) == _origin(recipe)


def _origin(recipe: str) -> str:
    return f"the recipe {recipe}"


def with_recipe(options: PretrainOptions) -> PretrainOptions:
    """Options with those of their recipe, if they name one, in place of those that are not given.

    Settings of the model are merged one by one. A length given as `epochs`, `steps` or `minutes` replaces the
    recipe's.
    """
    if options.recipe is None:
        return options
    recipe = read_recipe(options.recipe).options
    given = options.given()
    if set(LENGTHS) & given.keys():
        recipe = {key: value for key, value in recipe.items() if key not in LENGTHS}
    if "model_settings" in given and "model_settings" in recipe:
        given["model_settings"] = {**recipe["model_settings"], **given["model_settings"]}
    origins = dict.fromkeys(recipe, _origin(options.recipe)) | (options.origins or {})
    return dataclasses.replace(options, **{**recipe, **given, "origins": origins})
