"""`crate-mae recipes`: tested sets of options."""


def recipes(name: str | None = None) -> list[str]:
    """List the recipes that `crate-mae pretrain --recipe` takes, or print one with its results.

    Args:
        name: A recipe, to print its options, the images it was tested on, its results and its duration.

    Returns:
        The names of all recipes.

    Raises:
        UserError: for an unknown name.
    """
    from rich.table import Table

    from crate_mae.terminal import open_console
    from crate_mae.training.recipes import describe_recipe, list_recipes, recipe_text

    console = open_console()
    if name is not None:
        console.print(recipe_text(name), end="", soft_wrap=True, markup=False)
    else:
        table = Table("recipe", "for", box=None)
        for known in list_recipes():
            table.add_row(known, describe_recipe(known))
        console.print(table)
        console.print("Print one completely: crate-mae recipes NAME", markup=False)
    return list_recipes()
