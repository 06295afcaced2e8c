"""What a model is, in words and numbers."""

from typing import Any

from crate_mae.drawing.text import plural
from crate_mae.interpret.measure import Opened
from crate_mae.interpret.report.examples import grid_size
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.config import CrateConfig, ModelConfig
from crate_mae.models.tracing import layers_of


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


def _of_crate(c: CrateConfig) -> dict[str, str]:
    is_tied = c.layer == "monotone" or c.output_projection == "tied"
    start = "isometric" if c.init == "isometric" else "as in the official code"
    lines = {
        "Layers": "monotone: that attention compresses is a theorem" if c.layer == "monotone" else "as published",
        "Output projection": "tied to the subspaces, W_k = U_k" if is_tied else "free, as in the official code",
        "Sparse coding": f"step size η = {c.step_size:g}, threshold λ = {c.threshold:g}",
        "Start of the weights": start,
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
        return "a mask token stands for them from the encoder on"
    return "the encoder does not see them; a mask token stands for them in the decoder"
