"""The formats of `crate-mae export`: what is written into a folder, what runs it there, and whether both agree.

Graphs run without this library, as ONNX, in 8-bit integers too, or as PyTorch's own programs (`.pt2`):

| graph of | inputs | outputs |
|---|---|---|
| an encoder | images b c hh ww | tokens b 1+n d; embedding b 2d: class token and mean of patches, as in `embed` |
| a classifier | images b c hh ww | logits b k |
| an autoencoder, mask tokens at the encoder | images b c hh ww, mask b n, true = hidden | prediction b n q |
| an autoencoder, mask tokens at the decoder | images b c hh ww, visible b keep: positions, int64 | prediction b n q |

The batch is free everywhere, and the image size, in whole patches, of encoders and classifiers: positions are
interpolated, as by timm's `dynamic_img_size`. How many patches are visible is free too.
"""

from __future__ import annotations

import copy
import logging
import runpy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import timm
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from crate_mae.deployment import Format
from crate_mae.deployment.card import card
from crate_mae.deployment.plain import CODE_FILE, write_plain
from crate_mae.errors import UserError, first_line
from crate_mae.models.autoencoder import MaskedAutoencoder, predict
from crate_mae.models.classifier import Classifier
from crate_mae.models.config import WEIGHTS_FILE, HeadPooling, encoder_config
from crate_mae.models.encoder import build_encoder
from crate_mae.models.features import evaluating, pool, transform_of
from crate_mae.models.layers import ISTA
from crate_mae.models.masking import hide_all_but, random_mask, visible_indices
from crate_mae.models.monotone import Compression
from crate_mae.models.tensors import refuse_broken, refuse_other_numbers
from crate_mae.models.timm_models import write_encoder
from crate_mae.models.weights import Model, load, save

Part = Literal["encoder", "full"]
Outputs = dict[str, Tensor]
ONNX_FILE = "model.onnx"
PT2_FILE = "model.pt2"
INT8_NOTE = (
    "Weights are 8-bit integers, and what goes into matrix products is rounded to 8 bits at run time. What that costs\n"
    "a linear probe of one small model is measured in `results/export_int8` of the library's repository."
)
_LARGEST_BATCH = 65536
_LARGEST_GRID = 1024
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
        UserError: if the format cannot express what the model does, or the model holds numbers that are not finite.
    """
    refuse_other_numbers(model)
    refuse_broken(model.state_dict(), "This model")
    graph = graph_class(model, part)
    if kind == "hf":
        from crate_mae.deployment.huggingface.modeling import pretrained

        pretrained(model, part, facts).save_pretrained(folder)
        return (folder / WEIGHTS_FILE).stat().st_size
    outputs, note, written = graph.outputs, "", WEIGHTS_FILE
    if kind in ("onnx", "pt2"):
        path = write_graph(graph(model).eval(), model, folder, kind)
        written = path.name
        if int8:
            quantize(path)
            note = INT8_NOTE
    elif kind == "torch":
        with evaluating(model):
            write_plain(model, folder, part)
        outputs = outputs[:1]
    elif part == "encoder":
        kind = "timm"
        write_encoder(model, folder)
        outputs = ("tokens",)
    else:
        save(model, folder)
    text = card(model.config, kind, part, inputs=graph.inputs, outputs=outputs, facts=facts or {}, note=note)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return (folder / written).stat().st_size


class EncoderGraph(nn.Module):
    """Images to tokens and their embedding."""

    inputs: ClassVar = ("images",)
    outputs: ClassVar = ("tokens", "embedding")

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder: Any = folded(any_size(model))
        self.patch_size = encoder_config(model.config).patch_size

    def forward(self, images: Float[Tensor, "b c hh ww"]) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b f"]]:
        """Normalised features of all tokens, class token first, and the embedding that `crate-mae embed` saves."""
        tokens = self.encoder.forward_features(in_whole_patches(images, self.patch_size))
        return tokens, pool(tokens, self.encoder.num_prefix_tokens)


class ClassifierGraph(nn.Module):
    """Images to logits."""

    inputs: ClassVar = ("images",)
    outputs: ClassVar = ("logits",)

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.encoder: Any = folded(any_size(model))
        self.patch_size = model.config.encoder.patch_size
        self.norm, self.head = model.norm, model.head
        self.pooling: HeadPooling = model.config.pooling

    def forward(self, images: Float[Tensor, "b c hh ww"]) -> Float[Tensor, "b k"]:
        """Logits of the classes."""
        tokens = self.encoder.forward_features(in_whole_patches(images, self.patch_size))
        return self.head(self.norm(pool(tokens, self.encoder.num_prefix_tokens, self.pooling)))


class MaskGraph(nn.Module):
    """Images and a mask to predicted patches; mask tokens come in before the encoder."""

    inputs: ClassVar = ("images", "mask")
    outputs: ClassVar = ("prediction",)

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = folded(model)

    def forward(self, images: Float[Tensor, "b c hh ww"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n q"]:
        """Predicted pixels of every patch, in the normalisation of the targets."""
        return predict(self.model, images, mask=mask)[1]


class VisibleGraph(nn.Module):
    """Images and their visible patches to predicted patches; mask tokens come in at the decoder.

    The input is their positions, since a graph must know how many there are before it reads any value of a mask.
    """

    inputs: ClassVar = ("images", "visible")
    outputs: ClassVar = ("prediction",)

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = folded(model)

    def forward(self, images: Float[Tensor, "b c hh ww"], visible: Int[Tensor, "b keep"]) -> Float[Tensor, "b n q"]:
        """Predicted pixels of every patch, in the normalisation of the targets."""
        return predict(self.model, images, visible=visible)[1]


def in_whole_patches(images: Float[Tensor, "b c hh ww"], patch_size: int) -> Float[Tensor, "b c hh ww"]:
    """The same images; of another size than whole patches, a graph cannot cut them into patches, and ends in an error.

    Without this, the graph's convolution would leave out the rows and columns that are no whole patch, without a word.
    """
    b, c, hh, ww = images.shape
    cut = images.reshape(b, c, hh // patch_size, patch_size, ww // patch_size, patch_size)
    return cut.reshape(b, c, hh, ww)


def any_size(model: Model) -> nn.Module:
    """The encoder of a model, for images of any size in whole patches."""
    encoder = build_encoder(encoder_config(model.config), dynamic_img_size=True)
    encoder.load_state_dict(model.encoder.state_dict())
    return encoder.eval()


def folded(model: nn.Module) -> Any:
    """A copy of a model for inference, in `eval()`, in which all that depends on weights alone is computed once.

    These are the orthogonal U and the bounded D of monotone layers, and the matrices of ISTA's steps; other layers stay
    as they are. The copy computes the same to rounding, takes no gradients of its weights, and is what an exporter
    should be given: its graph has no iterations for U and for the norm of D.
    """
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ISTA | Compression):
                setattr(parent, name, child.folded())
    return model.requires_grad_(False)


def graph_class(model: Model, part: str) -> Any:
    """The kind of graph that part of a model makes: its encoder, or all of it."""
    if part == "encoder":
        return EncoderGraph
    if isinstance(model, Classifier):
        return ClassifierGraph
    return MaskGraph if model.config.mask_tokens == "encoder" else VisibleGraph


def example_inputs(graph: Any, model: Model, images: Float[Tensor, "b c hh ww"]) -> dict[str, Tensor]:
    """Inputs of a graph, or of its class, by name: images and, for an autoencoder, which patches are hidden."""
    if len(graph.inputs) == 1:
        return {"images": images}
    assert isinstance(model, MaskedAutoencoder)
    # From one visible patch, a graph would conclude that it is always one: of three or more patches, two are visible.
    ratio = min(0.75, 1 - 2.5 / model.num_patches) if model.num_patches > 2 else 0.5
    mask = random_mask(len(images), model.num_patches, ratio, torch.Generator().manual_seed(0))
    return {"images": images, graph.inputs[1]: mask if graph.inputs[1] == "mask" else visible_indices(mask)}


def write_graph(graph: Any, model: Model, folder: Path, kind: str) -> Path:
    """Write a graph as ONNX ("onnx") or as an exported program ("pt2").

    Raises:
        UserError: if the format cannot express what the model does.
    """
    size = model.config.image_size
    images = torch.randn(2, model.config.in_chans, *size, generator=torch.Generator().manual_seed(0))
    inputs = example_inputs(graph, model, images)
    shapes = _free_dimensions(graph, model)
    path = folder / (ONNX_FILE if kind == "onnx" else PT2_FILE)
    try:
        if kind == "onnx":
            _write_onnx(graph, inputs, shapes, path)
        else:
            program = torch.export.export(graph, (), dict(inputs), dynamic_shapes=shapes)
            for module in program.graph_module.modules():
                for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                    node.meta.pop("stack_trace", None)  # paths of this machine
            torch.export.save(program, path)
    except UserError:
        raise
    except Exception as error:  # the exporters have exceptions of many kinds, with pages of text
        raise UserError(
            f"{model.config.name} cannot be exported as {kind}: {first_line(error)}\n"
            "--format safetensors or hf writes its weights as they are."
        ) from error
    return path


def _write_onnx(graph: Any, inputs: Mapping[str, Tensor], shapes: dict[str, Any], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program: Any = torch.onnx.export(
            graph,
            (),
            kwargs=dict(inputs),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamo=True,
            dynamic_shapes=shapes,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of this machine
    program.save(path, external_data=False)


def _free_dimensions(graph: Any, model: Model) -> dict[str, Any]:
    batch = Dim("batch", min=1, max=_LARGEST_BATCH)
    images: dict[int, Any] = {0: batch}
    if isinstance(graph, EncoderGraph | ClassifierGraph):
        patch = encoder_config(model.config).patch_size
        images |= {i: patch * Dim(name, min=1, max=_LARGEST_GRID) for i, name in ((2, "rows"), (3, "columns"))}
    shapes: dict[str, Any] = {"images": images}
    if "mask" in graph.inputs:
        shapes["mask"] = {0: batch}
    if "visible" in graph.inputs:
        assert isinstance(model, MaskedAutoencoder)
        shapes["visible"] = {0: batch}
        if model.num_patches > 2:  # of two, always one is visible
            shapes["visible"][1] = Dim("left", min=1, max=model.num_patches - 1)
    return shapes


def quantize(path: Path) -> None:
    """Replace an ONNX file by one with the weights of its matrix products as 8-bit integers, channel by channel.

    They are unsigned: on processors without VNNI, products of signed weights saturate. With a trained model on AVX2
    the largest difference of its tokens was 0.33 with unsigned weights, 0.51 with signed ones, and 0.94 with signed
    ones of 7 bits, which do not saturate; all three files are of one size.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        whole = path.rename(Path(scratch) / path.name)
        folded = whole.with_name("folded.onnx")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it advises what has been done
        try:
            # Makes a constant of the transpose of a constant: subspaces are used both ways, and what is computed from a
            # constant would stay in float32.
            quant_pre_process(whole, folded, skip_symbolic_shape=True, skip_onnx_shape=True)
            quantize_dynamic(
                folded, path, weight_type=QuantType.QUInt8, per_channel=True, op_types_to_quantize=["MatMul"]
            )
        finally:
            logging.disable(before)


def runner(model: Model, folder: Path, kind: Format, part: Part) -> Callable[[dict[str, Tensor]], Outputs]:
    """A function that runs an exported folder in the program it is for, from inputs to outputs by name."""
    if kind == "onnx":
        return onnx_runner(folder)
    if kind == "pt2":
        return _pt2_runner(folder, graph_class(model, part).outputs)
    if kind == "hf":
        return _transformers_runner(model, folder, part)
    if kind == "torch":
        net, output = runpy.run_path(str(folder / CODE_FILE))["load"](folder), graph_class(model, part).outputs[0]
        return lambda inputs: {output: net(inputs["images"])}
    if part == "encoder":
        encoder: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return lambda inputs: {"tokens": encoder.forward_features(inputs["images"])}
    written = load(folder)
    return lambda inputs: reference(written, part, inputs)


def sample_images(c: Any) -> Float[Tensor, "b c hh ww"]:
    """Two images of noise, and crops of the two photographs that scikit-learn has, for a configuration."""
    from sklearn.datasets import load_sample_images

    transform = transform_of(c)
    photographs = [transform(Image.fromarray(pixels)) for pixels in load_sample_images().images]
    noise = torch.randn(2, c.in_chans, *c.image_size, generator=torch.Generator().manual_seed(0))
    return torch.cat([noise, torch.stack(photographs)])


@torch.no_grad()
def largest_difference(model: Model, folder: Path, kind: Format, part: Part) -> float:
    """Largest absolute difference between our outputs and those of an exported folder, over all sample images.

    It runs on all images at once, then on one and, if it takes images of any size, on higher and wider ones: a batch
    or image size that was fixed by mistake fails here.

    Raises:
        UserError: if it does not run.
    """
    graph, run = graph_class(model, part), runner(model, folder, kind, part)
    images = sample_images(model.config)
    cases = [(model, images), (model, images[-1:])]
    if kind in _ANY_SIZE and graph.inputs == ("images",):
        other = _resized(model)
        cases.append((other, sample_images(other.config)))
    differences = []
    for ours, batch in cases:
        inputs = example_inputs(graph, ours, batch)
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
            differences.append((value - expected[name]).abs().max())
    return float(torch.stack(differences).max())  # not a number, if one of them is not: `max` of Python may lose it


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


def onnx_runner(folder: Path) -> Callable[[dict[str, Tensor]], Outputs]:
    """Run an ONNX file with onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / ONNX_FILE), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> Outputs:
        values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


def _pt2_runner(folder: Path, outputs: tuple[str, ...]) -> Callable[[dict[str, Tensor]], Outputs]:
    """Run an exported program with PyTorch alone."""
    program = torch.export.load(folder / PT2_FILE).module()

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
            "Nothing was kept. Differences above 1e-4 are not due to rounding: please report them, with the output of "
            "`crate-mae doctor`."
        )
