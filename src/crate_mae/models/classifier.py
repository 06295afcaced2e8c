"""The classifier that fine-tuning trains: an encoder, its tokens made into one vector, and a linear map to classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.data.transforms import evaluation_transform
from crate_mae.errors import UserError
from crate_mae.models.autoencoder import build, check_images
from crate_mae.models.config import ModelConfig, config_from_dict
from crate_mae.models.encoder import MaskedEncoder
from crate_mae.models.features import OneImage, apply_to_images, pool

HeadPooling = Literal["cls", "mean", "cls+mean"]

DEFAULT_HEAD_POOLING: HeadPooling = "cls+mean"
_HEAD_STD = 2e-5  # MAE's: all classes begin equally likely, and the first gradients of the encoder are small


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Everything needed to build a classifier again.

    Attributes:
        encoder: of the autoencoder that this encoder comes from. Settings of its decoder are kept, and not used.
        classes: names of the classes, in the order of the logits.
        pooling: how tokens become one vector; see `features.pool`.

    Raises:
        UserError: for fewer than two classes, two of one name, or an unknown pooling.
    """

    architecture: ClassVar[str] = "classifier"

    encoder: ModelConfig
    classes: tuple[str, ...]
    pooling: HeadPooling = DEFAULT_HEAD_POOLING

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise UserError(f"A classifier needs two or more distinct classes, but has {', '.join(self.classes)}.")
        if self.pooling not in get_args(HeadPooling):
            raise UserError(f'pooling is "{self.pooling}", but must be one of {", ".join(get_args(HeadPooling))}.')

    @property
    def name(self) -> str:
        """The encoder's name, for reports."""
        return self.encoder.name

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.encoder.image_size

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.encoder.in_chans

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted from each channel."""
        return self.encoder.mean

    @property
    def std(self) -> tuple[float, ...]:
        """What each channel is then divided by."""
        return self.encoder.std

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form from which `from_dict` makes an equal configuration."""
        return {
            "architecture": self.architecture,
            "classes": list(self.classes),
            "pooling": self.pooling,
            "encoder": self.encoder.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClassifierConfig:
        """The inverse of `to_dict`.

        Raises:
            UserError: for settings that are unknown, missing or do not fit.
        """
        settings = {key: value for key, value in values.items() if key != "architecture"}
        classes, encoder = settings.get("classes"), settings.get("encoder")
        whole = set(settings) == {"classes", "pooling", "encoder"}
        if not (whole and _is_names(classes) and isinstance(encoder, dict)):
            raise UserError("A classifier is described by its classes (a list of names), pooling and encoder alone.")
        return cls(encoder=config_from_dict(encoder), classes=tuple(classes or ()), pooling=settings["pooling"])

    def replace(self, **settings: Any) -> ClassifierConfig:
        """A copy whose encoder has other settings; see `ModelConfig.replace`."""
        return dataclasses.replace(self, encoder=self.encoder.replace(**settings))


class Prediction(NamedTuple):
    """The result of `Classifier.predict`, one entry per image.

    Attributes:
        classes: name of the most probable class.
        probabilities: of all classes, in the order of the configuration.
    """

    classes: list[str]
    probabilities: Float[Tensor, "b k"]


class Classifier(nn.Module):
    """Images to logits: features of all tokens, pooled, normalised where patches were averaged, and mapped to classes.

    The encoder's own final norm stays where it is, so that its features are those of the pretrained model. A mean over
    patches is shorter than its terms, and gets a LayerNorm of its own before the head, as MAE's `fc_norm`; the class
    token alone goes to the head as it is, as in MAE.

    Args:
        encoder: a backbone with a class token.
        config: what it is built from; `build_classifier` makes both fit.
    """

    def __init__(self, encoder: MaskedEncoder, config: ClassifierConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        features = encoder.num_features * len(config.pooling.split("+"))
        self.norm = nn.LayerNorm(features, eps=1e-6) if "mean" in config.pooling else nn.Identity()
        self.head = nn.Linear(features, len(config.classes))
        nn.init.trunc_normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "b c hh ww"]) -> Float[Tensor, "b k"]:
        """Logits of the k classes.

        Args:
            images: normalised images of the configured size.

        Raises:
            UserError: for images of another size than the model's.
        """
        check_images(images, self.config)
        tokens = self.encoder.forward_features(images)
        return self.head(self.norm(pool(tokens, self.encoder.num_prefix_tokens, self.config.pooling)))

    def predict(self, images: OneImage | Sequence[OneImage], *, batch_size: int = 64) -> Prediction:
        """Classify images in memory or in files.

        Images are converted, scaled to cover the model's size, centre-cropped and normalised, as in evaluation. The
        model is in `eval()` while it runs.

        Args:
            images: one image or several; see `MaskedAutoencoder.embed`.
            batch_size: images that are classified at once.

        Raises:
            UserError: for an image that cannot be read (named), or an item that is not an image.
        """
        c = self.config
        transform = evaluation_transform(c.image_size, c.in_chans, c.mean, c.std)
        logits = apply_to_images(self.forward, self, transform, images, batch_size)
        return Prediction([c.classes[i] for i in logits.argmax(dim=1).tolist()], logits.softmax(dim=1))

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the encoder."""
        return list(self.encoder.blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute layers again in the backward pass, which saves memory; timm's contract."""
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, besides one-dimensional ones, that weight decay should skip."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Timm's patterns that assign parameters to layers: the encoder's; the head is the last layer."""

        def inside(pattern: str) -> str:
            return rf"^encoder\.(?:{pattern.removeprefix('^')})"

        return {
            part: inside(patterns) if isinstance(patterns, str) else [(inside(p), *rest) for p, *rest in patterns]
            for part, patterns in self.encoder.group_matcher(coarse).items()
        }


def build_classifier(config: ClassifierConfig) -> Classifier:
    """Build the classifier that a configuration describes, with random weights."""
    return Classifier(build(config.encoder).encoder, config)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
