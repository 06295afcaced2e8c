"""The formats of `crate-mae export`: what is written into a folder, and what runs it there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from crate_mae.deployment import graphs, quantization, verification
from crate_mae.deployment.card import card
from crate_mae.models.timm_folders import write_encoder
from crate_mae.models.weights import WEIGHTS_FILE, Model, save

Format = Literal["safetensors", "timm", "hf", "onnx", "pt2"]
Part = Literal["encoder", "full"]


def write(
    model: Model, folder: Path, kind: Format, part: Part, *, int8: bool = False, facts: Mapping[str, str] | None = None
) -> int:
    """Fill a folder with a model in one format.

    Args:
        model: the model.
        folder: an empty folder.
        kind: the format.
        part: what of the model.
        int8: weights as 8-bit integers, of an encoder in ONNX.
        facts: where the model comes from; see `provenance`.

    Returns:
        The size of the weights or graph in bytes.

    Raises:
        UserError: if the model does something that the format cannot say.
    """
    graph = graphs.graph_class(model, part)
    if kind == "hf":
        from crate_mae.deployment.huggingface.folders import write_pretrained

        write_pretrained(model, folder, part, facts=facts)
        return (folder / WEIGHTS_FILE).stat().st_size
    outputs, note, written = graph.outputs, "", WEIGHTS_FILE
    if kind in ("onnx", "pt2"):
        path = graphs.write_graph(graph(model).eval(), model, folder, kind)
        written = path.name
        if int8:
            quantization.quantize(path)
            note = quantization.NOTE
    elif part == "encoder":
        kind = "timm"
        write_encoder(model, folder)
        outputs = ("tokens",)
    else:
        save(model, folder)
    text = card(model.config, kind, part, inputs=graph.inputs, outputs=outputs, facts=facts, note=note)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return (folder / written).stat().st_size


def runner(model: Model, folder: Path, kind: Format, part: Part) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What runs an exported folder, with the program it is for: from inputs by name to outputs by name."""
    if kind == "onnx":
        return verification.onnx_runner(folder)
    if kind == "pt2":
        outputs: Any = graphs.graph_class(model, part).outputs
        return verification.pt2_runner(folder, outputs)
    if kind == "hf":
        from crate_mae.deployment.huggingface.folders import runner as pretrained_runner

        return pretrained_runner(model, folder, part)
    if part == "encoder":
        return verification.timm_runner(folder)
    return verification.ours_runner(folder, part)
