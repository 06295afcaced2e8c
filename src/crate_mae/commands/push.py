"""`crate-mae push`: upload a trained model to the Hugging Face Hub."""

from typing import Any, Literal

from crate_mae.commands.console import computes
from crate_mae.errors import UserError


@computes
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
    """Upload a trained model to the Hugging Face Hub, with a model card made from its run.

    The files are those of `crate-mae export` with the same options. README.md is the card: data, options, results,
    licence, and how to load the model. The account is that of `hf auth login`. This library reads models of --format hf
    and safetensors as hf:user/name.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, or the name of a model.
        repository: Name of the repository, user/name, created if necessary; files with the same names are replaced.
        format: Format of the files; see `crate-mae export`.
        part: encoder, or full: with the decoder, or the head of a classifier; by default full, and encoder for timm.
        private: Create the repository as a private one.
        revision: Branch to upload to.
        license: Licence of the weights, such as mit or cc-by-nc-4.0; by default none is named.

    Returns:
        The address of the upload.

    Raises:
        UserError: for a mistake in the options or the model, without a network, or if the Hub refuses.
    """
    import re
    import tempfile
    from pathlib import Path

    from crate_mae.commands.export import check_options, print_without_head
    from crate_mae.terminal import open_console

    part = part or ("encoder" if format == "timm" else "full")
    check_options(format, part)
    # Checked before anything is loaded; the Hub checks again.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository} is not the name of a Hub repository: it must look like user/name.")
    from crate_mae.deployment.card import LICENSE, provenance
    from crate_mae.deployment.formats import write
    from crate_mae.deployment.hub import upload
    from crate_mae.models.weights import load

    net = model if hasattr(model, "encoder") else load(model)
    facts = provenance(model) | ({LICENSE: license} if license else {})
    with tempfile.TemporaryDirectory() as scratch:
        write(net, Path(scratch), format, part, facts=facts)
        address = upload(Path(scratch), repository, private=private, revision=revision)
    console = open_console()
    console.print(f"Uploaded {net.config.name}: {address}", soft_wrap=True, markup=False)
    print_without_head(console, net, part)
    return address
