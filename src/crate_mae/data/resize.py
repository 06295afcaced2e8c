"""A copy of a data set with smaller images, so that large files are decoded once and not in every epoch.

It is a data set of its own, which is written once and then named in a command, and not a cache behind a run: crops of
reduced images are not bit for bit those of the originals. A cache that is used where loading is slow would make the
results of a run depend on the speed of the machine, and on whether the cache was still there when the run was resumed.
"""

import io
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from crate_mae.data.base import EncodedSource, ImageSource, label_names, none_readable, refuse_unreadable
from crate_mae.data.dataset import default_workers, in_parallel
from crate_mae.data.decode import UNBOUNDED_MODES, UnreadableImage, channels_of, size_of, to_8_bits, to_channels
from crate_mae.data.documents import to_csv
from crate_mae.data.files import reason_of, refuse_existing, whole_folder, write_whole
from crate_mae.data.numbers import MAX_BAD
from crate_mae.data.results import BadImage
from crate_mae.data.sources import METADATA, METADATA_COLUMNS, FolderSource
from crate_mae.errors import UserError

PARQUET_FILE = "images.parquet"
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
_JPEG = {"quality": 95, "subsampling": 0}  # 0: colour is stored at full resolution
_ROWS = 100  # in a row group

_Files = Iterator[tuple[int, bytes, str | None]]  # number of an image, and what `resized` returns


def resize_images(
    source: ImageSource,
    out: Path,
    size: int,
    *,
    workers: int | None = None,
    max_bad: float = MAX_BAD,
    on_image: Callable[[], None] | None = None,
) -> list[BadImage]:
    """Write a copy of a source in which no shorter side is longer than `size`, whole or not at all; see `resized`.

    The copy of a folder is a folder with the same sub-folders and file names, up to suffixes; labels that a table in
    the folder gives are written to a `metadata.csv`. Every other source is copied into one parquet file in the layout
    of Hugging Face, with its labels and the names of its classes.

    Images are read by `workers` processes, by default one less than there are cores, at most 8. `on_image` is called
    after each image, for a progress bar.

    Returns:
        the images that cannot be read, which are left out.

    Raises:
        UserError: if `out` exists, lies in the folder of the images, or cannot be written; or if more than the share
            `max_bad` of the images cannot be read.
    """
    refuse_existing(out, "give a new folder")
    if isinstance(source, FolderSource) and out.resolve().is_relative_to(source.root.resolve()):
        raise UserError(
            f"{out} lies in the folder of the images ({source.root}), where the copies would be read as images too.\n"
            "Give a folder outside of it."
        )
    bad: list[BadImage] = []
    processes = default_workers() if workers is None else workers

    def readable() -> _Files:
        for i, found in enumerate(in_parallel(partial(resized, source, size=size), len(source), processes)):
            if isinstance(found, BadImage):
                bad.append(found)
                refuse_unreadable(source, bad, max_bad)
            else:
                yield i, *found
            if on_image is not None:
                on_image()
        if len(bad) == len(source):
            raise none_readable(f"None of {len(bad)} images", bad[0])

    try:
        with whole_folder(out, replace=False) as folder:
            if isinstance(source, FolderSource):
                _write_folder(source, readable(), folder)
                files = len(source) - len(bad) + (source.table is not None)
            else:
                _write_parquet(source, readable(), folder / PARQUET_FILE)
                files = 1
            if sum(entry.is_file() for entry in folder.rglob("*")) != files:
                raise UserError(f"Files were removed from {folder} while it was written, so {out} was not made.")
    except OSError as error:
        raise UserError(f"Cannot write {out}: {reason_of(error)}.") from error
    return bad


def resized(source: ImageSource, i: int, size: int) -> tuple[bytes, str | None]:
    """Reduce image i with the resampling of training, bicubic with antialiasing, until its shorter side is `size`.

    A file whose shorter side is `size` or less is copied byte for byte. Of the others, those that were compressed with
    loss become JPEG of quality 95 without subsampling, all others PNG. Grey images of more than 8 bits keep 16, after
    the values of `ImageSource.value_range` have become 0 and 65535 where they have 32 bits or are floats. Transparent
    parts become white, as in training. Orientation is applied, and other metadata is lost.

    Returns:
        the content of the file, and the suffix of its new name; None for a file that is copied as it is.

    Raises:
        UnreadableImage: if it cannot be read.
        UserError: for a number of channels that no image file has.
    """
    picture = source.picture(i)
    is_small = min(size_of(picture)) <= size
    unbounded = isinstance(picture, Image.Image) and picture.mode in UNBOUNDED_MODES
    if is_small and isinstance(source, EncodedSource) and not unbounded:
        return source.content(i), None
    image = to_channels(source.read(i) if unbounded else picture, channels_of(picture))
    if not is_small:
        image = v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)(image)
    file = io.BytesIO()
    is_lossy = isinstance(picture, Image.Image) and picture.format in _LOSSY
    try:
        _to_pillow(image).save(file, "JPEG" if is_lossy else "PNG", **(_JPEG if is_lossy else {}))
    except OSError as error:  # more pixels a side than the format can have
        raise UnreadableImage(source.location(i), f"its reduced copy cannot be saved ({error})") from error
    return file.getvalue(), ".jpg" if is_lossy else ".png"


def lossless_size(image_size: tuple[int, int], min_crop: float) -> int:
    r"""The shorter side from which no crop of training is enlarged: $\max(h, w, \lceil\sqrt{4 h w / (3 s)}\rceil)$.

    The smallest crop takes the share s (`min_crop`) of an image of at least this side squared, and its aspect is at
    most 4/3 times narrower or wider than that of the target (`pretrain_transform`); so it is h pixels high and w wide.
    A crop of such an aspect that does not fit into the image has its whole height or width.
    """
    return max(*image_size, math.ceil(math.sqrt(4 * image_size[0] * image_size[1] / (3 * min_crop))))


def _to_pillow(image: Image.Image | Tensor) -> Image.Image:
    if not isinstance(image, Tensor):
        return image
    if image.shape[0] not in (1, 3):
        raise UserError(f"Images of {image.shape[0]} channels cannot be written as files: those have 1 or 3.")
    if image.is_floating_point() and image.shape[0] == 1:
        return Image.fromarray((image[0].clamp(0, 1) * 65535).round().numpy().astype(np.uint16))
    return to_8_bits(image)


def _write_folder(source: FolderSource, images: _Files, folder: Path) -> None:
    taken: set[str] = set()
    written: list[tuple[int, str]] = []
    for i, content, suffix in images:
        path = PurePosixPath(source.images[i])
        name = str(path if suffix is None else path.with_suffix(suffix))
        while name.lower() in taken:  # a.heic and a.jpg, side by side
            name += suffix or path.suffix
        taken.add(name.lower())
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        written.append((i, name))
    if source.table is not None and (labels := label_names(source)):
        write_whole(folder / METADATA, to_csv(METADATA_COLUMNS, ((name, labels[i]) for i, name in written)))


def _write_parquet(source: ImageSource, images: _Files, file: Path) -> None:
    labels, classes = source.labels, source.classes
    features: dict[str, object] = {"image": {"_type": "Image"}}
    columns = {"image": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}
    if labels is not None:
        columns["label"] = pa.int64()
        features["label"] = (
            {"_type": "ClassLabel", "names": classes} if classes else {"_type": "Value", "dtype": "int64"}
        )
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([*columns.items()], metadata=metadata)

    # Compressed images do not become smaller by compressing them once more.
    with pq.ParquetWriter(file, schema, compression="none") as writer:
        while rows := list(islice(images, _ROWS)):
            encoded = [{"bytes": content, "path": source.location(i)} for i, content, _ in rows]
            numbers = {} if labels is None else {"label": [int(labels[i]) for i, _, _ in rows]}
            writer.write_table(pa.table({"image": encoded, **numbers}, schema=schema))
