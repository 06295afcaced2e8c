"""`crate-mae export`: a trained model for use elsewhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from crate_mae.errors import UserError

Format = Literal["safetensors", "timm", "hf", "onnx", "pt2"]
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "hf": ("transformers",)}


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the folder.
        format: of the files.
        part: "encoder" or "full".
        bytes: size of the weights or graph.
        largest_difference: between what was written and the model, with `verify`; else None.
    """

    path: Path
    format: str
    part: str
    bytes: int
    largest_difference: float | None


def export(
    model: Any,
    *,
    out: Annotated[Path | str, Parameter(alias="-o")],
    format: Format = "safetensors",  # noqa: A002  # what everybody calls it
    part: Literal["encoder", "full"] | None = None,
    verify: bool = False,
    tolerance: float = 1e-4,
    int8: bool = False,
    license: str | None = None,  # noqa: A002  # as the Hugging Face Hub calls it
) -> Exported:
    """Write a trained model for use elsewhere, and try it there.

    - safetensors: this library's own files; the encoder alone goes into timm's layout.
    - timm: the encoder, for `timm.create_model("local-dir:...")` and transformers' AutoModel, after `import crate_mae`.
    - hf: for transformers' AutoModel, AutoModelForPreTraining and AutoModelForImageClassification, after `import
      crate_mae`.
    - onnx: a graph for onnxruntime and other programs. It needs no Python.
    - pt2: a graph for `torch.export.load`. It needs PyTorch alone.

    Graphs are folded for inference: the ISTA operator I + eta (D - D^T D) is a weight, not computed at every call. The
    batch is free, and so is the image size of encoders and classifiers, in whole patches. README.md in the folder says
    what goes in and what comes out. The folder is written whole or not at all.

    Args:
        model: a run folder, a folder with model.safetensors and config.json, hf:user/name, or a model's name.
        out: the folder to make. It must not be there, or be empty.
        format: see above.
        part: encoder, or full: with the decoder, or the head of a classifier. By default full in safetensors and hf,
            and encoder elsewhere.
        verify: run what was written with the program it is for, on noise and on photographs, and print the largest
            difference from the model. Above the tolerance the folder is taken away again.
        tolerance: largest absolute difference that is accepted. The outputs are of the size of 1 to 20. With int8 it is
            not applied.
        int8: of an encoder in ONNX, weights as 8-bit integers (dynamic quantisation): a quarter of the size.
        license: of the weights, for the card, such as mit or cc-by-nc-4.0. By default the card names none.

    Returns:
        The folder, and the largest difference if it was measured.

    Raises:
        UserError: for a mistake in the options or the model, an export that differs, or a missing package.
    """
    from rich.console import Console

    from crate_mae.data.files import refuse_used_folder
    from crate_mae.models.weights import load
    from crate_mae.training.files import whole_folder

    out = Path(out)
    part = part or ("full" if format in ("safetensors", "hf") else "encoder")
    refuse_used_folder(out)
    check_options(format, part, int8=int8)
    from crate_mae.deployment import formats, verification
    from crate_mae.deployment.card import LICENSE
    from crate_mae.deployment.provenance import provenance

    net = model if hasattr(model, "encoder") else load(model)
    facts = provenance(model) | ({LICENSE: license} if license else {})
    difference = None
    with whole_folder(out) as folder:
        size = formats.write(net, folder, format, part, int8=int8, facts=facts)
        if verify:
            difference = verification.largest_difference(net, part, formats.runner(net, folder, format, part))
            if not int8:
                verification.check_difference(difference, tolerance)
    console = Console(highlight=False)
    console.print(f"Saved {out}: {net.config.name}, {part}, {format}, {size / 1e6:.1f} MB.", soft_wrap=True)
    if difference is not None:
        console.print(f"Largest difference from the model: {difference:.2g}.", soft_wrap=True)
    return Exported(out, format, part, size, difference)


def check_options(format: Format, part: str, *, int8: bool = False) -> None:  # noqa: A002
    """Raise a `UserError` for what does not go together, or a package that is not there."""
    import importlib.util

    if format == "timm" and part == "full":
        raise UserError("timm knows encoders alone: take --part encoder, or --format hf for all of the model.")
    if int8 and (format, part) != ("onnx", "encoder"):
        raise UserError("--int8 is for encoders in ONNX: --format onnx --part encoder.")
    if missing := [name for name in _PACKAGES.get(format, ()) if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format {format} needs {' and '.join(missing)}: pip install 'crate-mae[{format}]'")
