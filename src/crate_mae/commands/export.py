"""`crate-mae export`, `push` and `convert`: trained models to and from other formats, and to the Hugging Face Hub."""

import importlib.util
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crate_mae.commands.console import computes, new_folder, print_if_random
from crate_mae.data.files import filled_folder, path_of
from crate_mae.deployment import Format
from crate_mae.errors import UserError, install_command, not_a_repository
from crate_mae.options import Numbers, OutputPath, Pixels
from crate_mae.terminal import CleanConsole, open_console

_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "hf": ("transformers",)}


@dataclass(frozen=True)
class Exported:
    """Result of `export`.

    Attributes:
        path: of the folder.
        format: of the files.
        part: "encoder" or "full".
        bytes: size of the weights or graph.
        largest_difference: between outputs of the export and of the model, with `verify`; else None.
    """

    path: Path
    format: str
    part: str
    bytes: int
    largest_difference: float | None


@computes
def export(
    model: Any,
    *,
    out: OutputPath,
    format: Format = "safetensors",  # noqa: A002  # the usual name
    part: Literal["encoder", "full"] | None = None,
    verify: bool = False,
    tolerance: float = 1e-4,
    int8: bool = False,
    license: str | None = None,  # noqa: A002  # as the Hugging Face Hub calls it
) -> Exported:
    """Export a trained model to another format, and verify the export.

    - safetensors: the files of this library; the encoder alone has the layout of timm.
    - torch: model.py, a single file of plain PyTorch with the whole forward pass, and its weights; it needs torch and
      safetensors. For encoders and classifiers with CRATE's layers, at the image size of the model.
    - timm: the encoder, for `timm.create_model("local-dir:...")` and transformers' AutoModel, after
      `import crate_mae.timm`.
    - hf: for transformers' AutoModel, AutoModelForPreTraining, AutoModelForImageClassification and AutoBackbone, after
      `import crate_mae.hf` or, where this library is not installed, with `trust_remote_code=True`: the code is beside
      the weights.
    - onnx: a graph for onnxruntime and other programs, which needs no Python.
    - pt2: a graph for `torch.export.load`, which needs PyTorch only.

    Graphs are folded for inference: the ISTA operator I + eta (D - D^T D) is a weight, not computed in every call.
    Graphs take any batch size, and those of encoders and classifiers any image size in whole patches. README.md in the
    folder describes inputs and outputs. The folder is written completely or not at all.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, or the name of a model.
        out: New or empty folder for the files.
        format: safetensors: files of this library; torch: one file of plain PyTorch; timm: the encoder for timm; hf:
            for transformers; onnx: a graph for onnxruntime; pt2: a graph for torch.export.load.
        part: encoder, or full (with the decoder or classifier head). By default, full for safetensors, hf and
            classifiers, and encoder for the others; timm supports only encoders, and torch does not support decoders.
        verify: Run the export in its target program on noise and photographs (also of another size, if the export takes
            any size), and print the largest difference from the model. If the difference exceeds the tolerance, the
            folder is removed.
        tolerance: With verify, maximum accepted absolute difference; outputs have magnitudes of 1 to 20. Ignored with
            int8.
        int8: Store weights of an encoder in ONNX as 8-bit integers (dynamic quantisation): a third to half of the size.
        license: Licence of the weights for the model card, such as mit or cc-by-nc-4.0; by default, none.

    Returns:
        The folder, and the largest difference if it was measured.

    Raises:
        UserError: for a mistake in the options or the model, an export that differs, or a missing package.
    """
    out = new_folder(out)
    _check_options(format, part, int8=int8)
    from crate_mae.deployment import formats
    from crate_mae.models.classifier import Classifier
    from crate_mae.models.weights import is_untrained, model_name

    net, facts = _opened(model, license)
    is_classifier = isinstance(net, Classifier)
    if part is None:
        has_all = format in ("safetensors", "hf") or (is_classifier and format != "timm" and not int8)
        part = "full" if has_all else "encoder"
    difference = None
    with filled_folder(out) as folder:
        size = formats.write(net, folder, format, part, int8=int8, facts=facts)
        if verify:
            difference = formats.largest_difference(net, folder, format, part)
            if not int8:
                formats.check_difference(difference, tolerance)
    console = open_console()
    console.print_text(f"Saved {out}: {net.config.name}, {part}, {format}, {size / 1e6:.1f} MB.")
    _print_without_head(console, net, part)
    print_if_random(console, model_name(model), is_untrained(model_name(model)))
    if difference is not None:
        console.print_text(f"Largest difference from the model: {difference:.2g}.")
    return Exported(out, format, part, size, difference)


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
        format: hf: for transformers; safetensors: files of this library; timm: the encoder for timm.
        part: encoder, or full (with the decoder or classifier head); by default, full, or encoder for timm.
        private: Create a private repository.
        revision: Branch to upload to.
        license: Licence of the weights, such as mit or cc-by-nc-4.0; by default, none.

    Returns:
        The address of the upload.

    Raises:
        UserError: for a mistake in the options or the model, without a network, or if the Hub refuses.
    """
    part = part or ("encoder" if format == "timm" else "full")
    _check_options(format, part)
    # Checked before anything is loaded; the Hub checks again.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise not_a_repository(repository)
    from crate_mae.deployment.formats import write
    from crate_mae.deployment.hub import upload

    net, facts = _opened(model, license)
    with tempfile.TemporaryDirectory() as scratch:
        write(net, Path(scratch), format, part, facts=facts)
        address = upload(Path(scratch), repository, private=private, revision=revision)
    console = open_console()
    console.print_text(f"Uploaded {net.config.name}: {address}")
    _print_without_head(console, net, part)
    return address


def _opened(model: Any, license: str | None) -> tuple[Any, dict[str, str]]:  # noqa: A002
    """A model, and the facts for its card about training and licence."""
    from crate_mae.deployment.card import LICENSE, provenance
    from crate_mae.models.weights import load

    net = model if hasattr(model, "encoder") else load(model)
    return net, provenance(model) | ({LICENSE: license} if license else {})


def _print_without_head(console: CleanConsole, model: Any, part: str) -> None:
    """Print that an encoder that was taken from a classifier does not classify."""
    from crate_mae.models.classifier import Classifier

    if isinstance(model, Classifier) and part == "encoder":
        console.print_text("It has no head: its outputs are features, not classes.")


def _check_options(format: Format, part: str | None, *, int8: bool = False) -> None:  # noqa: A002
    """Raise a `UserError` for options that exclude each other, or a missing package."""
    if format == "timm" and part == "full":
        raise UserError("timm takes encoders only: use --part encoder, or --format hf for the whole model.")
    if int8 and (format != "onnx" or part == "full"):
        raise UserError("--int8 is for encoders in ONNX: --format onnx --part encoder.")
    if missing := [name for name in _PACKAGES.get(format, ()) if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format {format} needs {' and '.join(missing)}: {install_command(format)}")


@dataclass(frozen=True)
class Converted:
    """Result of `convert`.

    Attributes:
        path: of the folder.
        found: description of the file.
        notes: what was removed, assumed or left out, and why.
    """

    path: Path
    found: str
    notes: list[str]


@computes
def convert(
    file: Path | str,
    *,
    out: OutputPath,
    num_heads: int | None = None,
    image_size: Pixels | None = None,
    threshold: float | None = None,
    norm_pix_loss: bool | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
) -> Converted:
    """Convert published weights to a model folder that every command accepts.

    - Files of the official CRATE-MAE (.pth, .pt, .safetensors), with or without the prefixes and wrappers of training,
      become a folder with model.safetensors and config.json.
    - Files of the official CRATE classifiers become their encoder in the layout of timm, for embed, eval and timm.
    - Folders of this library and of transformers become a folder of this library.

    Names and shapes of all tensors are checked. The command prints what it found, assumed and left out. Pickles are
    opened so that they cannot run code. The folder is written completely or not at all.

    Args:
        file: File or folder to convert.
        out: New or empty folder for the model.
        num_heads: Heads of the encoder and decoder, which official files do not contain; by default those of the
            published model of the same width.
        image_size: Pixels of the model's images, or HEIGHTxWIDTH; by default a square, from the position embeddings.
        threshold: lambda of the ISTA step; by default that of the official code: 0.5, and 0.1 for classifiers.
        norm_pix_loss: Whether the targets were normalised patches; by default no.
        mean: Mean that was subtracted from each channel; by default that of ImageNet.
        std: Standard deviation by which each channel was divided; by default that of ImageNet.

    Returns:
        The folder, a description of the file, and notes on the conversion.

    Raises:
        UserError: for a file that is damaged, unknown or does not fit, or a folder that is not empty.
    """
    from crate_mae.models.official import understand

    file, out = path_of("FILE", file), new_folder(out)
    if not file.exists():
        raise UserError(f"{file} does not exist.")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    given: dict[str, Any] = {"image_size": size, "threshold": threshold, "norm_pix_loss": norm_pix_loss}
    given |= {"mean": mean, "std": std}
    conversion = understand(file, num_heads, **{key: value for key, value in given.items() if value is not None})
    with filled_folder(out) as folder:
        conversion.write(folder)
    console = open_console()
    console.print_text(f"Found {conversion.found}.")
    for note in conversion.notes:
        console.print_text(f"  {note}")
    console.print_text(f"Saved {out}.")
    return Converted(out, conversion.found, conversion.notes)
