"""Images for a model in transformers, prepared as this library prepares them."""

from typing import Any

import torch
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from crate_mae.data.transforms import evaluation_transform
from crate_mae.data.wrapped import DatasetSource
from crate_mae.deployment.huggingface.configuration import CrateMAEConfig
from crate_mae.models.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig


class CrateMAEImageProcessor(BaseImageProcessor):
    """Scale an image to cover the model's size (bicubic), cut out the centre, normalise: `evaluation_transform`.

    transformers' own processors scale in other ways, so that features would not be those of `crate-mae embed`.

    Args:
        size: height and width.
        image_mean: per channel, in [0, 1].
        image_std: per channel, in [0, 1].
        options: what every image processor of transformers takes.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # as transformers has it

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.size = dict(size) if size else {"height": 224, "width": 224}
        self.image_mean = [float(value) for value in image_mean or IMAGENET_MEAN]
        self.image_std = [float(value) for value in image_std or IMAGENET_STD]

    @classmethod
    def for_model(cls, config: ModelConfig) -> "CrateMAEImageProcessor":
        """The processor of a model's images."""
        height, width = config.image_size
        size = {"height": height, "width": width}
        return cls(size=size, image_mean=list(config.mean), image_std=list(config.std))

    def preprocess(self, images: Any, *_more: Any, return_tensors: str | None = "pt", **_options: Any) -> BatchFeature:
        """Prepare images.

        Args:
            images: one image or a list: Pillow images, arrays or tensors; or a tensor or array of several.
            return_tensors: "pt", "np", or None.

        Raises:
            UserError: for anything but an image, or for other channels.
        """
        items = _items(images)
        source = DatasetSource(items, "images")
        size = (self.size["height"], self.size["width"])
        transform = evaluation_transform(size, len(self.image_mean), self.image_mean, self.image_std)
        pixels = torch.stack([transform(source.read(i)) for i in range(len(items))])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


def _items(images: Any) -> list[Any]:
    several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    return [*images] if several else [images]


AutoImageProcessor.register(
    CrateMAEConfig,
    image_processor_classes={"pil": CrateMAEImageProcessor, "torchvision": CrateMAEImageProcessor},
    exist_ok=True,
)
