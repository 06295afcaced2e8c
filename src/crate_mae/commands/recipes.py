"""`crate-mae recipes`: options that were tried together."""


def recipes(name: str | None = None) -> list[str]:
    """List the recipes that `crate-mae pretrain --recipe` takes, or show one with what it gave.

    Args:
        name: A recipe, to see its options, on what it was tried, what it gave and how long that took.

    Returns:
        The names of all recipes.

    Raises:
        UserError: for an unknown name.
    """
    from rich.console import Console
    from rich.table import Table

    from crate_mae.training.recipes import describe_recipe, list_recipes, recipe_text

    console = Console(highlight=False)
    if name is not None:
        console.print(recipe_text(name), end="", soft_wrap=True, markup=False)
    else:
        table = Table("recipe", "for", box=None)
        for known in list_recipes():
            table.add_row(known, describe_recipe(known))
        console.print(table)
        console.print("See one whole: crate-mae recipes NAME", markup=False)
    return list_recipes()
