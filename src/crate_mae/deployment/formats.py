"""The formats of `crate-mae export`: what is written into a folder, what runs it there, and whether both agree."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from crate_mae.data import evaluation_transform
from crate_mae.deployment import graphs
from crate_mae.deployment.card import card
from crate_mae.errors import UserError, first_line
from crate_mae.models.classifier import Classifier
from crate_mae.models.config import WEIGHTS_FILE
from crate_mae.models.features import evaluating, pool
from crate_mae.models.masking import hide_all_but
from crate_mae.models.timm_models import write_encoder
from crate_mae.models.weights import Model, load, save

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
        from crate_mae.deployment.huggingface.modeling import pretrained

        pretrained(model, part, facts).save_pretrained(folder)
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


def runner(model: Model, folder: Path, kind: Format, part: Part) -> Callable[[dict[str, Tensor]], Outputs]:
    """A function that runs an exported folder in the program it is for, from inputs to outputs by name."""
    if kind == "onnx":
        return onnx_runner(folder)
    if kind == "pt2":
        return _pt2_runner(folder, graphs.graph_class(model, part).outputs)
    if kind == "hf":
        return _transformers_runner(model, folder, part)
    if part == "encoder":
        encoder: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return lambda inputs: {"tokens": encoder.forward_features(inputs["images"])}
    written = load(folder)
    return lambda inputs: reference(written, part, inputs)


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
        if isinstance(model, Classifier):
            return {"logits": model(images)}
        return {"prediction": model(images, mask=_mask(model, inputs)).prediction}


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


def _pt2_runner(folder: Path, outputs: tuple[str, ...]) -> Callable[[dict[str, Tensor]], Outputs]:
    """Run an exported program with PyTorch alone."""
    program = torch.export.load(folder / graphs.PT2_FILE).module()

    def run(inputs: dict[str, Tensor]) -> Outputs:
        values = program(**inputs)
        return dict(zip(outputs, values if isinstance(values, tuple) else (values,), strict=True))

    return run


def _transformers_runner(model: Model, folder: Path, part: Part) -> Callable[[dict[str, Tensor]], Outputs]:
    """Run a folder with transformers."""
    import transformers
    from transformers.utils import logging

    is_classifier = isinstance(model, Classifier)
    kind: Any = transformers.AutoModelForImageClassification if is_classifier else transformers.AutoModelForPreTraining
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        net = (transformers.AutoModel if part == "encoder" else kind).from_pretrained(folder)
    finally:
        if had_progress_bar:
            logging.enable_progress_bar()

    def run(inputs: dict[str, Tensor]) -> Outputs:
        images = inputs["images"]
        if part == "encoder":
            output = net(images)
            return {"tokens": output.last_hidden_state, "embedding": output.pooler_output}
        if is_classifier:
            return {"logits": net(images).logits}
        return {"prediction": net(images, bool_masked_pos=_mask(model, inputs)).logits}

    return run


def _mask(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The mask among the inputs of an autoencoder's graph, or of the visible patches among them."""
    return inputs["mask"] if "mask" in inputs else hide_all_but(inputs["visible"], model.num_patches)


def check_difference(difference: float, tolerance: float) -> None:
    """Raise a `UserError` for a difference that is larger than the tolerance, or not a number."""
    if not difference <= tolerance:
        raise UserError(
            f"What was exported differs from the model by up to {difference:.2g}; --tolerance is {tolerance:g}.\n"
            "Nothing was kept. Please report this, with the output of `crate-mae doctor`."
        )
