"""Images from anywhere, prepared in the same way each time, and pictures of the results."""

from crate_mae.data.base import NO_LABEL, EncodedSource, ImageSource
from crate_mae.data.dataset import BadImage, Batch, ImageDataset, Sample, collate
from crate_mae.data.decode import UnreadableImage, to_channels, to_tensor
from crate_mae.data.facts import ImageFacts, channel_statistics, describe_images, suggest_model
from crate_mae.data.pictures import save_picture_grid
from crate_mae.data.report import DataReport, check
from crate_mae.data.sources import open_source
from crate_mae.data.transforms import evaluation_transform, pretrain_transform

__all__ = [
    "NO_LABEL",
    "BadImage",
    "Batch",
    "DataReport",
    "EncodedSource",
    "ImageDataset",
    "ImageFacts",
    "ImageSource",
    "Sample",
    "UnreadableImage",
    "channel_statistics",
    "check",
    "collate",
    "describe_images",
    "evaluation_transform",
    "open_source",
    "pretrain_transform",
    "save_picture_grid",
    "suggest_model",
    "to_channels",
    "to_tensor",
]
