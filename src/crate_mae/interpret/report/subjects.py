"""What a report measures: the model, other networks on the same images, and other images."""

from typing import Any

from crate_mae.data import ImageSource, open_source, same_images
from crate_mae.data.facts import warn_of_copies
from crate_mae.drawing.text import plural
from crate_mae.errors import UserError
from crate_mae.interpret.measure import Opened, open_measurable, untrained_twin
from crate_mae.interpret.report.options import InspectOptions
from crate_mae.interpret.tokens import grid_size
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.config import CrateConfig, Layer, ModelConfig
from crate_mae.models.tracing import layers_of

# What figures and tables call the subjects, in the order of columns and of colours.
LABELS = {
    "model": "the model",
    "random": "random initialisation",
    "baseline": "baseline",
    "random_baseline": "random baseline",
    "other": "other images",
    "train": "training images",
}
UNTRAINED = ("random", "random_baseline")  # networks that are not audited by themselves
NETWORKS = ("model", "random", "baseline", "random_baseline")  # subjects that are networks, not other images

Subjects = dict[str, tuple[Opened, ImageSource]]  # networks and the images that they are measured on, by `LABELS`


def open_subjects(settings: InspectOptions) -> tuple[Subjects, dict[str, str]]:
    """Open every model and source of the settings, before anything is measured.

    Returns:
        The subjects, and the reasons why others are left out.

    Raises:
        UserError: for a mistake in a model or in data, weights that are not finite, held-out images that are the
            training images, or a model that cannot hide patches if it should.
    """
    data = open_source(settings.data)
    model = open_measurable(settings.model, settings.seed)
    found: Subjects = {"model": (model, data)}
    left_out: dict[str, str] = {}
    _add_twin(found, "random", model, settings.seed, left_out)
    if settings.baseline is None:
        left_out["baseline"] = "no model was given with --baseline"
    else:
        baseline = open_measurable(settings.baseline, settings.seed)
        found["baseline"] = baseline, data
        if baseline.backbone.is_random:
            left_out[LABELS["random_baseline"]] = "the baseline itself has random initialisation"
        else:
            _add_twin(found, "random_baseline", baseline, settings.seed, left_out)
    for key, other in (("other", settings.other_data), ("train", settings.train_data)):
        if other is None:
            left_out[LABELS[key]] = f"none were given with --{key}-data"
        else:
            found[key] = model, open_source(other)
    _refuse_same(found)
    for opened, _ in found.values():
        _refuse_unfit(opened, settings.mask_ratio)
    return found, left_out


def _add_twin(found: Subjects, key: str, network: Opened, seed: int, left_out: dict[str, str]) -> None:
    """Add the same network with random initialisation as a control, or the reason why there is none."""
    twin = untrained_twin(network, seed + 1)
    if twin is None:
        left_out[LABELS[key]] = f"the configuration of a {network.name} from Python is not known"
    else:
        found[key] = twin, found["model"][1]


def _refuse_same(found: Subjects) -> None:
    """Raise a `UserError` if the images of a control are those of the model; warn of those that are copies."""
    _, data = found["model"]
    for key in ("other", "train"):
        if key in found and same_images(data, found[key][1]):
            raise UserError(
                f"--{key}-data are the same images as DATA ({data.name}), so there is nothing to compare.\n"
                f"Give other images with --{key}-data, or leave it out."
            )
        if key in found:
            warn_of_copies(found[key][1], data, f"--{key}-data", "DATA")


def _refuse_unfit(model: Opened, mask_ratio: float | None) -> None:
    """Raise a `UserError` for a network that cannot be measured as asked."""
    if mask_ratio is not None and not isinstance(model.net, MaskedAutoencoder):
        raise UserError(f"{model.name} cannot hide patches: leave out --mask-ratio, or leave out that model.")
    for name, value in model.net.state_dict().items():
        if not value.isfinite().all():
            raise UserError(
                f"The weights of {model.name} hold NaN or infinity, first in {name}.\n"
                "Such a model cannot be measured: take an earlier checkpoint of the run."
            )


def describe(model: Opened) -> dict[str, str]:
    """Lines of a table about a model, by their names."""
    parameters = sum(parameter.numel() for parameter in model.net.parameters())
    lines = {"Model": model.name}
    if model.backbone.is_random:
        lines["Weights"] = "random initialisation: nothing was learned yet"
    if isinstance(model.net, MaskedAutoencoder):
        lines |= _of_autoencoder(model.net)
    else:
        lines |= _of_encoder(model)
    return {**lines, "Parameters": f"{parameters:,}"}


def tokens_of(model: Opened) -> str:
    """Image size, patches and width in a few words, for telling whether rates of two networks compare."""
    encoder: Any = model.backbone.encoder
    height, width = model.backbone.image_size
    grid = grid_size(encoder)
    patches = f", {grid[0] * grid[1]} patches" if grid else ""
    return f"{height} × {width} pixels{patches}, width {encoder.num_features}"


def _of_autoencoder(net: MaskedAutoencoder) -> dict[str, str]:
    c = net.config
    kind = "CRATE-MAE" if isinstance(c, CrateConfig) else "ViT-MAE"
    lines = {
        "Architecture": f"{kind} ({c.name})",
        "Images": _images(c.image_size, c.in_chans),
        "Patches": f"{net.num_patches} of {c.patch_size} × {c.patch_size} pixels, and a class token",
        "Encoder": _part(c.depth, c.embed_dim, c.num_heads),
        "Decoder": _part(c.decoder_depth, c.decoder_embed_dim, c.decoder_num_heads),
        "Hidden patches": _hidden(c),
        "Targets": "pixels normalised patch by patch" if c.norm_pix_loss else "pixels as they are",
    }
    return lines | (_of_crate(c) if isinstance(c, CrateConfig) else {})


_LAYERS: dict[Layer, str] = {
    "published": "as published",
    "compressing": "compressing: a theorem guarantees that attention compresses",
    "monotone": "monotone: theorems guarantee that attention compresses and sparse coding lowers its objective",
}


def _of_crate(c: CrateConfig) -> dict[str, str]:
    is_tied = c.layer != "published" or c.output_projection == "tied"
    initialisation = "isometric" if c.init == "isometric" else "as in the official code"
    lines = {
        "Layers": _LAYERS[c.layer],
        "Output projection": "tied to the subspaces, W_k = U_k" if is_tied else "free, as in the official code",
        "Sparse coding": f"step size η = {c.step_size:g}, threshold λ = {c.threshold:g}",
        "Initialisation": initialisation,
    }
    if c.ista_skip:
        lines["Sparse coding"] += ", with a skip connection"
    if c.overcomplete > 1:
        lines["Sparse coding"] += f", {c.overcomplete} times overcomplete (CRATE-α)"
    return lines


def _of_encoder(model: Opened) -> dict[str, str]:
    encoder: Any = model.backbone.encoder
    layers = layers_of(encoder)
    attention = getattr(next(iter(layers.values())), "attn", None)
    heads = getattr(attention, "num_heads", None)
    return {
        "Architecture": f"{type(encoder).__name__}, an encoder without a decoder",
        "Images": _images(model.backbone.image_size, model.backbone.in_chans),
        "Encoder": _part(len(layers), encoder.num_features, heads),
    }


def _images(size: tuple[int, int], channels: int) -> str:
    return f"{size[0]} × {size[1]} pixels, {plural(channels, 'channel')}"


def _part(depth: int, width: int, heads: int | None) -> str:
    text = f"{plural(depth, 'layer')} of width {width}"
    return text if heads is None else f"{text}, {plural(heads, 'head')} of dimension {width // heads}"


def _hidden(c: ModelConfig) -> str:
    if c.mask_tokens == "encoder":
        return "replaced by mask tokens in the encoder"
    return "not seen by the encoder; replaced by mask tokens in the decoder"
