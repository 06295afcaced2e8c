"""Results of reading images. Does not import PyTorch, so that the command line can use these types."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class BadImage(NamedTuple):
    """An image that could not be read."""

    location: str
    reason: str


class ImageFacts(NamedTuple):
    """Facts about a sample of the images of a source that can be read.

    Attributes:
        channels: 1 if every image of the sample is grey, otherwise the most frequent count above that.
        height: median in pixels.
        width: median in pixels.
    """

    channels: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Result of `check`. Sizes are (smallest, median, largest) in pixels; empty where no image can be read.

    Attributes:
        name: of the source.
        images: number of images of the source.
        checked: number of images that were read.
        classes: number of images of each class in the whole source; None without labels.
        heights: smallest, median and largest height.
        widths: smallest, median and largest width.
        channels: the number that a model for these images should take.
        modes: number of images of each pixel mode ("RGB", "L", "I;16", ...; "3 x uint8" for tensors).
        formats: number of images of each file format ("JPEG", ...).
        bad: the unreadable images, with reasons.
        left_out: number of files that are not read as images, by suffix, and of folders of the system.
        values: the smallest and the largest value of each mode, over all channels, as they are stored.
        grey_colour: number of colour images in which red, green and blue are the same in every pixel.
        ranges: for images of the modes I (32 bits) and F (float) the values that become 0 and 1; see
            `ImageSource.value_range`.
        duplicates: locations of images with identical bytes, group by group.
        mean: per channel, in [0, 1]; see `channel_statistics`.
        std: per channel, in [0, 1].
        suggested_model: a preset that fits the size.
        suggested_image_size: its image size.
    """

    name: str
    images: int
    checked: int
    classes: dict[str, int] | None
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    channels: int | None
    modes: dict[str, int]
    formats: dict[str, int]
    bad: tuple[BadImage, ...]
    left_out: dict[str, int]
    values: dict[str, tuple[float, float]]
    grey_colour: int
    ranges: dict[str, tuple[float, float]]
    duplicates: tuple[tuple[str, ...], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    suggested_model: str | None
    suggested_image_size: int | None

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name, for JSON: each of `bad` with the keys location and reason."""
        return {**asdict(self), "bad": [image._asdict() for image in self.bad]}
