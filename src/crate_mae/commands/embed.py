"""`crate-mae embed`: features of images, for search, clustering or a classifier."""

from dataclasses import KW_ONLY, MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crate_mae.commands.console import (
    check_seed,
    new_file,
    print_bad,
    print_if_random,
    progress,
    takes,
)
from crate_mae.data.results import BadImage
from crate_mae.errors import UserError
from crate_mae.models.config import Pooling
from crate_mae.options import Data, OutputPath, option, same_as
from crate_mae.terminal import CleanConsole, open_console
from crate_mae.training.options import RunOptions

if TYPE_CHECKING:
    from crate_mae.data import ImageSource
    from crate_mae.evaluation.backbones import Backbone
    from crate_mae.evaluation.extract import Extraction, Features


@dataclass(frozen=True)
class FeatureOptions:
    """The options of all commands that extract features."""

    model: Data = option(
        MISSING,
        "A run folder, a folder with model.safetensors and config.json, hf:user/name, the name of a model (random "
        "initialisation), timm:NAME, or pixels; append :untrained for random initialisation.",
    )
    _: KW_ONLY
    seed: int = option(0, "Seed of random initialisation.")
    batch_size: int = option(256, "Images per batch.")
    workers: int | None = same_as(RunOptions, "workers")
    max_bad: float = same_as(RunOptions, "max_bad", "Maximum share of unreadable images.")
    cache: bool = option(True, "Cache features in the user's cache folder and reuse them if nothing has changed.")
    overwrite: bool = option(False, "Replace an existing file.")

    def extraction(self, layers: Any, pooling: Any) -> "Extraction":
        """These options as `evaluation.extract` takes them, which checks them."""
        from crate_mae.evaluation.extract import Extraction

        return Extraction(
            layers=layers if isinstance(layers, str) else (layers,),
            pooling=pooling,
            batch_size=self.batch_size,
            workers=self.workers,
            max_bad=self.max_bad,
            cache=self.cache,
        )


@dataclass(frozen=True)
class EmbedOptions(FeatureOptions):
    """The options of `embed`."""

    data: Data = option(MISSING, "Any form of data that `crate-mae pretrain` takes.")
    _: KW_ONLY
    out: OutputPath = option(MISSING, "File to write: .parquet, .npz, .npy, .csv or .safetensors.")
    pooling: Pooling | None = option(
        None,
        "The class token, the mean of patches, both concatenated, or all patches; by default cls+mean, or mean for a "
        "network without a class token.",
    )
    layer: int | None = option(
        None,
        "Layer of the encoder from 0, or negative from the end; by default -1. The final norm is applied to every "
        "layer.",
    )
    normalize: bool = option(False, "Scale each vector to length 1.")
    whiten: Path | str | None = option(
        None,
        "Whiten features for cosine-similarity search, with the transform in this .safetensors file. If the file "
        "exists, it is applied (to queries); otherwise, it is fitted on these images and saved.",
    )


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
    bad: list[BadImage]


@takes(EmbedOptions)
def embed(options: EmbedOptions) -> Embedding:
    """Save features of images: one vector per image, without masking.

    The suffix of the file decides the format. If labels and class names are known, they are saved with the features.

    - .parquet: columns file, label, class and feature (a list of one length; of tokens, a list of lists).
    - .csv: columns file, label, class, f0, f1, ...
    - .npz: arrays features, labels, files and classes.
    - .safetensors: tensors features and labels; files and classes as JSON in the metadata.
    - .npy: features only, in the order of the images.

    Images that cannot be read are listed and left out. Features are float32, and kept in memory until they are written.

    Returns:
        The path of the file, and what it contains.

    Raises:
        UserError: for a mistake in the options, data or model; no file is written then.
    """
    from crate_mae.data import open_source
    from crate_mae.evaluation.backbones import open_backbone
    from crate_mae.evaluation.embeddings import check_feature_file, describe_alike, unit_length, write_features
    from crate_mae.models.features import DEFAULT_LAYER

    check_seed(options.seed)
    out = new_file("--out", options.out, overwrite=options.overwrite)
    check_feature_file(out, options.pooling)
    extraction = options.extraction(DEFAULT_LAYER if options.layer is None else options.layer, options.pooling)
    transform = None
    if options.whiten is not None:
        transform = new_file("--whiten", options.whiten, ".safetensors", overwrite=True)  # one that exists is applied
        if options.pooling == "tokens":
            raise UserError("--whiten is for one vector per image, not for --pooling tokens.")
        if transform.resolve() == out.resolve():
            raise UserError(
                f"--whiten and --out are both {out}: the features would replace the whitening. Name two files."
            )
    source = open_source(options.data)
    backbone = open_backbone(options.model, seed=options.seed)
    console = open_console()
    features = extract_with_progress(console, backbone, source, extraction)[0]
    hint = describe_alike(features) if transform is None else None
    if transform is not None:
        features = _whitened(console, features, backbone, transform)
    if options.normalize:
        features = replace(features, values=unit_length(features.values))
    write_features(features, out)
    print_bad(console, features.bad)
    print_if_random(console, backbone.name, backbone.is_random)
    console.print_text(_summary(features, backbone, out))
    if hint:
        console.print_text(hint)
    return Embedding(out, len(features.values), features.values.shape[-1], list(features.bad))


def extract_with_progress(
    console: CleanConsole, backbone: "Backbone", source: "ImageSource", extraction: "Extraction"
) -> "list[Features]":
    """`evaluation.extract.extract` with a progress bar."""
    from crate_mae.evaluation.extract import extract

    with progress(console, f"Encoding {source.name}", len(source)) as advance:
        return extract(backbone, source, replace(extraction, on_images=advance))


def _whitened(console: CleanConsole, features: "Features", backbone: "Backbone", transform: Path) -> "Features":
    """Apply the transform of a file; if there is none yet, fit and save it."""
    from crate_mae.evaluation.embeddings import Whitening

    if transform.exists():
        whitened = Whitening.read(transform).of(features, backbone)
        console.print_text(f"Whitened, as {transform}.")
        return whitened
    whitening = Whitening.fitted(features, backbone)
    whitening.save(transform)
    console.print_text(
        f"Fitted the whitening on these images and saved it: {transform}. Pass it with --whiten for queries, too."
    )
    return whitening.of(features, backbone)


def _summary(features: "Features", backbone: "Backbone", out: Path) -> str:
    from crate_mae.evaluation.backbones import RawPixels

    is_pixels = isinstance(backbone.encoder, RawPixels)
    size = features.values.shape[-1]
    each = f"{features.values.shape[1]} tokens of {size}" if features.values.ndim == 3 else str(size)
    images = f"{len(features.values):,} images, {each} numbers each"
    what = "their pixels" if is_pixels else f"{features.pooling} of layer {features.layer}"
    return f"Saved {out}: {images} ({what})."
