"""The formats of `crate-mae export`: what is written into a folder, what runs it there, and whether both agree."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from crate_mae.data import evaluation_transform
from crate_mae.deployment import graphs
from crate_mae.deployment.card import card
from crate_mae.errors import UserError, first_line
from crate_mae.models.features import evaluating, pool
from crate_mae.models.weights import WEIGHTS_FILE, Model, load, save, write_encoder

Format = Literal["safetensors", "timm", "hf", "onnx", "pt2"]
Part = Literal["encoder", "full"]
Outputs = dict[str, Tensor]
_ANY_SIZE = ("hf", "onnx", "pt2")  # whose encoders and classifiers take images of any size in whole patches


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
        UserError: if the format cannot express what the model does.
    """
    graph = graphs.graph_class(model, part)
    if kind == "hf":
        from crate_mae.deployment.huggingface.modeling import write_pretrained

        write_pretrained(model, folder, part, facts=facts)
        return (folder / WEIGHTS_FILE).stat().st_size
    outputs, note, written = graph.outputs, "", WEIGHTS_FILE
    if kind in ("onnx", "pt2"):
        path = graphs.write_graph(graph(model).eval(), model, folder, kind)
        written = path.name
        if int8:
            graphs.quantize(path)
            note = graphs.INT8_NOTE
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
        return onnx_runner(folder)
    if kind == "pt2":
        outputs: Any = graphs.graph_class(model, part).outputs
        return pt2_runner(folder, outputs)
    if kind == "hf":
        from crate_mae.deployment.huggingface.modeling import runner as pretrained_runner

        return pretrained_runner(model, folder, part)
    if part == "encoder":
        return timm_runner(folder)
    return ours_runner(folder, part)


def sample_images(c: Any) -> Float[Tensor, "b c hh ww"]:
    """Two images of noise, and crops of the two photographs that scikit-learn has, for a configuration."""
    from sklearn.datasets import load_sample_images

    transform = evaluation_transform(c.image_size, c.in_chans, c.mean, c.std)
    photographs = [transform(Image.fromarray(pixels)) for pixels in load_sample_images().images]
    noise = torch.randn(2, c.in_chans, *c.image_size, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, torch.stack(photographs)])


@torch.no_grad()
def largest_difference(model: Model, folder: Path, kind: Format, part: Part) -> float:
    """Largest absolute difference between our outputs and those of an exported folder, over all test images.

    It runs on all images at once, then on one and, if it takes images of any size, on higher and wider ones: a batch
    or image size that was fixed by mistake fails here.

    Raises:
        UserError: if it does not run.
    """
    graph, run = graphs.graph_class(model, part), runner(model, folder, kind, part)
    images = sample_images(model.config)
    cases = [(model, images), (model, images[-1:])]
    if kind in _ANY_SIZE and graph.inputs == ("images",):
        other = _resized(model)
        cases.append((other, sample_images(other.config)))
    largest = 0.0
    for ours, batch in cases:
        inputs = graphs.example_inputs(graph, ours, batch)
        try:
            found = run(inputs)
        except Exception as error:  # each program has exceptions of its own, some with pages of text
            count, _, height, width = batch.shape
            raise UserError(
                f"What was exported does not run on {count} images of {height} x {width} pixels: {first_line(error)}\n"
                "Nothing was kept. Please report this, with the output of `crate-mae doctor`."
            ) from error
        expected = reference(ours, part, inputs)
        for name, value in found.items():
            largest = max(largest, float((value - expected[name]).abs().max()))
    return largest


def _resized(model: Model) -> Model:
    """A copy of a model for images that are a patch higher and two patches wider."""
    copied: Any = copy.deepcopy(model)
    patch = copied.encoder.patch_embed.patch_size[0]
    height, width = copied.config.image_size
    copied.config = copied.config.replace(image_size=(height + patch, width + 2 * patch))
    copied.encoder.set_input_size(copied.config.image_size)
    return copied


def reference(model: Model, part: str, inputs: dict[str, Tensor]) -> Outputs:
    """The outputs of this library, by the model that is not folded."""
    images = inputs["images"]
    with evaluating(model):
        if part == "encoder":
            tokens = model.encoder.forward_features(images)
            return {"tokens": tokens, "embedding": pool(tokens, model.encoder.num_prefix_tokens)}
        net: Any = model
        if "mask" in inputs:
            return {"prediction": net(images, mask=inputs["mask"]).prediction}
        if "visible" in inputs:
            mask = torch.ones(len(images), net.num_patches, dtype=torch.bool)
            mask.scatter_(1, inputs["visible"], False)
            return {"prediction": net(images, mask=mask).prediction}
        return {"logits": net(images)}


def onnx_runner(folder: Path, file: str = graphs.ONNX_FILE) -> Callable[[dict[str, Tensor]], Outputs]:
    """Run an ONNX file with onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> Outputs:
        values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


def pt2_runner(folder: Path, outputs: tuple[str, ...]) -> Callable[[dict[str, Tensor]], Outputs]:
    """Run an exported program with PyTorch alone."""
    program = torch.export.load(folder / graphs.PT2_FILE).module()

    def run(inputs: dict[str, Tensor]) -> Outputs:
        values = program(**inputs)
        return dict(zip(outputs, values if isinstance(values, tuple) else (values,), strict=True))

    return run


def timm_runner(folder: Path) -> Callable[[dict[str, Tensor]], Outputs]:
    """Run an encoder with timm."""
    import timm

    encoder: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda inputs: {"tokens": encoder.forward_features(inputs["images"])}


def ours_runner(folder: Path, part: str) -> Callable[[dict[str, Tensor]], Outputs]:
    """Load what was written, and run it with this library."""
    model = load(folder)
    return lambda inputs: reference(model, part, inputs)


def check_difference(difference: float, tolerance: float) -> None:
    """Raise a `UserError` for a difference that is larger than the tolerance, or not a number."""
    if not difference <= tolerance:
        raise UserError(
            f"What was exported differs from the model by up to {difference:.2g}; --tolerance is {tolerance:g}.\n"
            "Nothing was kept. Please report this, with the output of `crate-mae doctor`."
        )
