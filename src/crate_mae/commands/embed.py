"""`crate-mae embed`: features of images, for search, clustering or a classifier."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from crate_mae.commands.console import (
    check_seed,
    computes,
    extract_with_progress,
    print_bad,
    print_random_initialisation,
    refuse_existing,
)
from crate_mae.data.files import output_path
from crate_mae.errors import UserError
from crate_mae.training.options import Data

if TYPE_CHECKING:
    from crate_mae.evaluation.extract import Features


@dataclass(frozen=True)
class Embedding:
    """Result of `embed`.

    Attributes:
        path: of the file.
        images: number of images with features.
        size: numbers per image; with pooling "tokens", numbers per token.
        bad: the images that could not be read, with reasons.
    """

    path: Path
    images: int
    size: int
    bad: list[tuple[str, str]]


@computes
def embed(
    model: Data,
    data: Data,
    *,
    out: Annotated[Path | str, Parameter(alias="-o")],
    pooling: Literal["cls", "mean", "cls+mean", "tokens"] | None = None,
    layer: int | None = None,
    normalize: bool = False,
    whiten: Path | str | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    max_bad: float = 0.01,
    cache: bool = True,
    seed: int = 0,
    overwrite: bool = False,
) -> Embedding:
    """Save features of images: one vector per image, without masking.

    The suffix of the file decides the format. If labels and class names are known, they are saved with the features.

    - .parquet: columns file, label, class and feature (a list of one length; of tokens, a list of lists).
    - .csv: columns file, label, class, f0, f1, ...
    - .npz: arrays features, labels, files and classes.
    - .safetensors: tensors features and labels; files and classes as JSON in the metadata.
    - .npy: features only, in the order of the images.

    Images that cannot be read are listed and left out. Features are float32, and kept in memory until they are written.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, the name of a model (random
            initialisation), timm:NAME, or pixels; :untrained after it means random initialisation.
        data: Any form of data that `crate-mae pretrain` takes.
        out: File to write: .parquet, .npz, .npy, .csv or .safetensors.
        pooling: The class token, the mean of patches, both concatenated, or all patches; by default cls+mean, or mean
            for a network without a class token.
        layer: Layer of the encoder from 0, or negative from the end; by default -1. The final norm is applied to
            every layer.
        normalize: Scale each vector to length 1.
        whiten: Whiten features, for search by cosine: a .safetensors file with the transform. If it exists, it is
            applied, as to queries; if not, it is fitted on these images, applied and written.
        batch_size: Images per batch.
        workers: Processes that load images; by default one less than the number of cores, at most 8.
        max_bad: Largest share of unreadable images.
        cache: Keep features in the user's cache folder, and reuse them if nothing has changed.
        seed: Seed of random initialisation.
        overwrite: Replace an existing file.

    Returns:
        The path of the file, and what it contains.

    Raises:
        UserError: for a mistake in the options, data or model; no file is written then.
    """
    import dataclasses

    from crate_mae.data import open_source
    from crate_mae.evaluation.backbones import open_backbone
    from crate_mae.evaluation.embeddings import (
        Whitening,
        check_feature_file,
        describe_alike,
        unit_length,
        write_features,
    )
    from crate_mae.evaluation.extract import Extraction
    from crate_mae.models.features import DEFAULT_LAYER
    from crate_mae.terminal import open_console

    check_seed(seed)
    out = output_path("--out", out)
    check_feature_file(out, pooling)
    refuse_existing(out, overwrite=overwrite)
    extraction = Extraction(
        layers=(DEFAULT_LAYER if layer is None else layer,),
        pooling=pooling,
        batch_size=batch_size,
        workers=workers,
        max_bad=max_bad,
        cache=cache,
    )
    transform = None if whiten is None else _whitening_file(whiten, pooling)
    source = open_source(data)
    backbone = open_backbone(model, seed=seed)
    console = open_console()
    features = extract_with_progress(console, backbone, source, extraction)[0]
    hint = describe_alike(features)
    if transform is not None:
        is_new = not transform.exists()
        whitening = Whitening.fitted(features, backbone) if is_new else Whitening.read(transform)
        features, hint = whitening.of(features, backbone), None
        if is_new:
            whitening.save(transform)
        how = f"fitted on these images and saved: {transform}. Give it for queries too" if is_new else f"as {transform}"
        console.print(f"Whitened, {how}.", soft_wrap=True, markup=False)
    if normalize:
        features = dataclasses.replace(features, values=unit_length(features.values))
    write_features(features, out)
    print_bad(console, features.bad)
    if backbone.is_random:
        print_random_initialisation(console, backbone.name)
    console.print(_summary(features, out), soft_wrap=True, markup=False)
    if hint:
        console.print(hint, soft_wrap=True, markup=False)
    bad = [(image.location, image.reason) for image in features.bad]
    return Embedding(out, len(features.values), features.values.shape[-1], bad)


def _whitening_file(path: Path | str, pooling: str | None) -> Path:
    """Check the path of a transform, before anything is computed."""
    path = output_path("--whiten", path)
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"--whiten {path} must name a .safetensors file.")
    if pooling == "tokens":
        raise UserError("--whiten is for one vector per image, not for --pooling tokens.")
    return path


def _summary(features: "Features", out: Path) -> str:
    size = features.values.shape[-1]
    each = f"{features.values.shape[1]} tokens of {size}" if features.values.ndim == 3 else str(size)
    images = f"{len(features.values):,} images, {each} numbers each"
    return f"Saved {out}: {images} ({features.pooling} of layer {features.layer})."
