"""`crate-mae viz`: pictures of what a model sees, and of what its layers do.

The first of them, `viz reconstruction`, is the function of `crate-mae reconstruct`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from crate_mae.commands.console import check_seed, computes, new_file, print_bad, print_if_random
from crate_mae.data.files import write_whole
from crate_mae.data.numbers import check_whole
from crate_mae.data.results import BadImage
from crate_mae.errors import UserError
from crate_mae.options import Data, OutputPath
from crate_mae.terminal import open_console

if TYPE_CHECKING:
    from crate_mae.evaluation.backbones import Backbone
    from crate_mae.evaluation.reconstruction import ReadImages


@dataclass(frozen=True)
class Picture:
    """What a command of `viz` saved.

    Attributes:
        path: of the picture.
        images: locations of its images, in order; empty for a sample of many.
    """

    path: Path
    images: list[str]


@computes
def viz_attention(
    model: Data,
    images: Data,
    *,
    out: OutputPath,
    layer: int = -1,
    stride: int | None = None,
    count: int = 8,
    seed: int = 0,
    overwrite: bool = False,
) -> Picture:
    """Show what the class token attends to: attention to each patch, of each head and of all heads together.

    Nothing is hidden. An image of another size is scaled and cropped to the model's. "60% of that" are the fewest
    patches that hold 60% of the attention of all heads.

    A smaller stride shows the model each image many times, shifted by less than a patch, and puts the maps together:
    with patches of 16 pixels, a stride of 4 makes 4 x 4 times as many places, in 16 passes.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, a model's name (random
            initialisation), or timm:NAME of a Vision Transformer with a class token.
        images: An image, a folder of images, or any other form of data that `crate-mae pretrain` takes.
        out: Picture to write, a .png or .pdf file.
        layer: Layer of the encoder from 0, or negative from the end.
        stride: Stride of the maps in pixels; must divide the patch size. By default, the patch size.
        count: Number of images, evenly spaced among all.
        seed: Seed of random initialisation.
        overwrite: Replace an existing picture.

    Returns:
        The picture's path, and which images it shows.

    Raises:
        UserError: for a mistake in the options, images or model; no file is written then.
    """
    path = new_file("--out", out, ".png", ".pdf", overwrite=overwrite)
    backbone, read = _open(model, images, count, seed)

    from crate_mae.interpret.attention import class_attention
    from crate_mae.interpret.pictures import draw_attention
    from crate_mae.interpret.tokens import to_pictures

    found = class_attention(backbone.encoder, read.images, layer=layer, stride=stride)
    pictures = to_pictures(read.images, backbone.mean, backbone.std)
    figure = draw_attention(pictures, found.heads.numpy(), found.saliency.numpy())
    return _save(figure, path, backbone, read.bad, read.locations)


@computes
def viz_pca(
    model: Data,
    images: Data,
    *,
    out: OutputPath,
    layer: int = -1,
    joint: bool = False,
    count: int = 8,
    seed: int = 0,
    overwrite: bool = False,
) -> Picture:
    """Show tokens as colours: their first three principal components as red, green and blue.

    Patches of like colours have like tokens. Each image has its own components, unless they are joint.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, a model's name (random
            initialisation), or timm:NAME.
        images: An image, a folder of images, or any other form of data that `crate-mae pretrain` takes.
        out: Picture to write, a .png or .pdf file.
        layer: Layer of the encoder from 0, or negative from the end. The final norm is applied to every layer.
        joint: Use the same components for all images, so that a colour means the same in every image.
        count: Number of images, evenly spaced among all.
        seed: Seed of random initialisation.
        overwrite: Replace an existing picture.

    Returns:
        The picture's path, and which images it shows.

    Raises:
        UserError: for a mistake in the options, images or model; no file is written then.
    """
    path = new_file("--out", out, ".png", ".pdf", overwrite=overwrite)
    backbone, read = _open(model, images, count, seed)

    from crate_mae.interpret.pictures import draw_token_colours
    from crate_mae.interpret.tokens import encode_patches, to_pictures, token_colours, token_grid

    patches = encode_patches(backbone.encoder, read.images, layer)
    grid = token_grid(backbone.encoder, backbone.image_size, patches.shape[1], layer)
    found = token_colours(patches, grid, joint=joint)
    pictures = to_pictures(read.images, backbone.mean, backbone.std)
    figure = draw_token_colours(pictures, found.pictures, found.explained)
    return _save(figure, path, backbone, read.bad, read.locations)


@computes
def viz_layers(
    model: Data,
    data: Data,
    *,
    out: OutputPath,
    control: Literal["random"] | None = None,
    count: int = 256,
    seed: int = 0,
    overwrite: bool = False,
) -> Picture:
    """Show what each layer does: subspace rate before and after its steps, sparsity, and ranks of tokens and features.

    A white-box layer is meant to lower the subspace rate of the tokens (by MSSA) and to make them sparse (by ISTA).
    Measured on whole images. A Vision Transformer has neither subspaces nor codes: it shows its ranks, and the rate of
    its heads' values as a stand-in for the subspace rate.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, a model's name (random
            initialisation), or timm:NAME of a Vision Transformer.
        data: Any form of data that `crate-mae pretrain` takes.
        out: Picture to write, a .png or .pdf file.
        control: Also draw the same model with random initialisation.
        count: Maximum number of images to measure; if there are more, a sample that depends on the seed is used.
        seed: Seed for the sample and random initialisation.
        overwrite: Replace an existing picture.

    Returns:
        The picture's path.

    Raises:
        UserError: for a mistake in the options, data or model; no file is written then.
    """
    path = new_file("--out", out, ".png", ".pdf", overwrite=overwrite)
    check_seed(seed)
    from crate_mae.interpret.curves import draw_layers
    from crate_mae.interpret.measure import measure_layers, open_measurable, untrained_twin

    opened = open_measurable(model, seed)
    twin = None
    if control is not None:
        twin = untrained_twin(opened, seed + 1)  # other weights than those of a model with random initialisation
        if twin is None:
            raise UserError(f"The configuration of a {opened.name} from Python is not known: leave out --control.")
    with open_console().status("Measuring the layers"):
        found = measure_layers(opened, data, count=count, seed=seed, audited=False)
        beside = [] if twin is None else measure_layers(twin, data, count=count, seed=seed, audited=False).rows
    figure = draw_layers(found.rows, beside)
    backbone = replace(opened.backbone, name=opened.name)
    return _save(figure, path, backbone, found.bad, [], note=f", of {found.images:,} images")


@computes
def viz_atoms(
    model: Data,
    data: Data,
    *,
    out: OutputPath,
    layer: int = -1,
    atoms: Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True, negative=())] = None,
    count: int = 256,
    seed: int = 0,
    overwrite: bool = False,
) -> Picture:
    """Show single atoms of a layer's sparse code: the patches that activate them, and what the decoder draws for them.

    A row for each atom has the mean patch, weighted by the atom's activation; where on the image it is active; its
    strongest patches in their surroundings, at most one of each image; and how the completion changes when it is raised
    by one standard deviation in all visible patches, with 75% of the patches hidden.

    If contributions of atoms simply added up, that change would be the linear response, and their cosine 1. It is
    compared with the cosine in random directions of the code, in which the step is as long.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, or a model's name (random
            initialisation); with a decoder.
        data: Any form of data that `crate-mae pretrain` takes.
        out: Picture to write, a .png or .pdf file.
        layer: Layer of the encoder from 0, or negative from the end.
        atoms: Indices of atoms, from 0; by default, the four with the most energy and four random others.
        count: Maximum number of images to measure; if there are more, a sample that depends on the seed is used.
        seed: Seed for the sample, random atoms, directions, masks and random initialisation.
        overwrite: Replace an existing picture.

    Returns:
        The picture's path.

    Raises:
        UserError: for a mistake in the options, data or model, such as a layer or an atom that does not exist; no file
            is written then.
    """
    path = new_file("--out", out, ".png", ".pdf", overwrite=overwrite)
    check_seed(seed)
    check_whole("--count", count)
    from crate_mae.data import open_source
    from crate_mae.evaluation.reconstruction import read_sample
    from crate_mae.interpret.atoms import measure_atoms
    from crate_mae.interpret.measure import open_measurable
    from crate_mae.interpret.pictures import draw_atoms

    source, opened = open_source(data), open_measurable(model, seed)
    read = read_sample(source, opened.backbone.transform(), count, seed)
    with open_console().status("Measuring atoms"):
        found = measure_atoms(opened.net, read.images, layer=layer, atoms=atoms, seed=seed)
    backbone = replace(opened.backbone, name=opened.name)
    return _save(draw_atoms(found), path, backbone, read.bad, [], note=f", of {len(read.images):,} images")


def _open(model: Any, images: Any, count: int, seed: int) -> "tuple[Backbone, ReadImages]":
    """The model, and some images that can be read."""
    from crate_mae.data import open_source
    from crate_mae.data.base import evenly_spaced_first
    from crate_mae.evaluation.backbones import open_backbone
    from crate_mae.evaluation.reconstruction import read_images

    check_seed(seed)
    check_whole("--count", count)
    source = open_source(images)
    backbone = open_backbone(model, seed=seed)
    return backbone, read_images(source, backbone.transform(), evenly_spaced_first(len(source), count), count)


def _save(
    figure: Any, path: Path, backbone: "Backbone", bad: Iterable[BadImage], locations: list[str], note: str = ""
) -> Picture:
    """Write a picture of images, and report it."""
    from crate_mae.drawing.style import encode

    write_whole(path, encode(figure, "pdf" if path.suffix.lower() == ".pdf" else "png"))
    console = open_console()
    print_bad(console, bad)
    print_if_random(console, backbone.name, backbone.is_random)
    console.print_text(f"Saved {path}{note}")
    return Picture(path, locations)
