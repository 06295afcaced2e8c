"""`crate-mae push`: a trained model to the Hugging Face Hub."""

from typing import Any, Literal

from crate_mae.errors import UserError


def push(
    model: Any,
    repository: str,
    *,
    format: Literal["hf", "safetensors", "timm"] = "hf",  # noqa: A002  # as in `export`
    part: Literal["encoder", "full"] | None = None,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,  # noqa: A002
) -> str:
    """Upload a trained model to the Hugging Face Hub, with a card made from its run.

    The files are those that `crate-mae export` writes with the same options; README.md is the card: data, recipe,
    results, licence, and how to load it. The account is the one of `hf auth login`. To be read as hf:user/name by this
    library it takes --format hf or safetensors.

    Args:
        model: a run folder, a folder with model.safetensors and config.json, or a model's name.
        repository: user/name. It is made if it is not there; files of the same names are replaced.
        format: see `crate-mae export`.
        part: encoder, or full: with the decoder, or the head of a classifier. By default full, and encoder in timm.
        private: make the repository private, if it is new.
        revision: the branch.
        license: of the weights, such as mit or cc-by-nc-4.0. By default the card names none.

    Returns:
        Where it can be seen.

    Raises:
        UserError: for a mistake in the options or the model, without a network, or if the Hub refuses.
    """
    import re
    import tempfile
    from pathlib import Path

    from rich.console import Console

    from crate_mae.commands.export import check_options

    part = part or ("encoder" if format == "timm" else "full")
    check_options(format, part)
    # Checked before anything is loaded; the Hub has the last word.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository} is not the name of a Hub repository: it must look like user/name.")
    from crate_mae.deployment.card import LICENSE
    from crate_mae.deployment.formats import write
    from crate_mae.deployment.hub import upload
    from crate_mae.deployment.provenance import provenance
    from crate_mae.models.weights import load

    net = model if hasattr(model, "encoder") else load(model)
    facts = provenance(model) | ({LICENSE: license} if license else {})
    with tempfile.TemporaryDirectory() as scratch:
        write(net, Path(scratch), format, part, facts=facts)
        address = upload(Path(scratch), repository, private=private, revision=revision)
    Console(highlight=False).print(f"Uploaded {net.config.name}: {address}", soft_wrap=True, markup=False)
    return address
