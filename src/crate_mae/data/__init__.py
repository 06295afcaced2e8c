"""Image sources of all kinds, their preparation for a model, and pictures of results.

Names are imported when first used, as in `crate_mae` itself.
"""

from typing import TYPE_CHECKING

from crate_mae.lazy import lazy_names

if TYPE_CHECKING:
    from crate_mae.data.base import NO_LABEL, EncodedSource, ImageSource, Part, label_names, occurring_classes
    from crate_mae.data.dataset import Batch, ImageDataset, Sample, collate, readable_batches
    from crate_mae.data.decode import UnreadableImage, to_channels, to_tensor
    from crate_mae.data.facts import channel_statistics, check, describe_images, suggest_model
    from crate_mae.data.pictures import save_picture_grid
    from crate_mae.data.results import BadImage, DataReport, ImageFacts
    from crate_mae.data.sources import full_name, open_source, same_images
    from crate_mae.data.transforms import evaluation_transform, finetune_transform, pretrain_transform

_HOMES = {
    "NO_LABEL": "base",
    "BadImage": "results",
    "Batch": "dataset",
    "DataReport": "results",
    "EncodedSource": "base",
    "ImageDataset": "dataset",
    "ImageFacts": "results",
    "ImageSource": "base",
    "Part": "base",
    "Sample": "dataset",
    "UnreadableImage": "decode",
    "channel_statistics": "facts",
    "check": "facts",
    "collate": "dataset",
    "describe_images": "facts",
    "evaluation_transform": "transforms",
    "finetune_transform": "transforms",
    "full_name": "sources",
    "label_names": "base",
    "occurring_classes": "base",
    "open_source": "sources",
    "pretrain_transform": "transforms",
    "readable_batches": "dataset",
    "same_images": "sources",
    "save_picture_grid": "pictures",
    "suggest_model": "facts",
    "to_channels": "decode",
    "to_tensor": "decode",
}

__all__ = [
    "NO_LABEL",
    "BadImage",
    "Batch",
    "DataReport",
    "EncodedSource",
    "ImageDataset",
    "ImageFacts",
    "ImageSource",
    "Part",
    "Sample",
    "UnreadableImage",
    "channel_statistics",
    "check",
    "collate",
    "describe_images",
    "evaluation_transform",
    "finetune_transform",
    "full_name",
    "label_names",
    "occurring_classes",
    "open_source",
    "pretrain_transform",
    "readable_batches",
    "same_images",
    "save_picture_grid",
    "suggest_model",
    "to_channels",
    "to_tensor",
]

__getattr__ = lazy_names(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
