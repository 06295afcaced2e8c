"""The classifier that fine-tuning trains: an encoder, its tokens made into one vector, and a linear map to classes."""

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.data.dataset import default_generator_seeded
from crate_mae.models.autoencoder import MaskedAutoencoder, build, check_images
from crate_mae.models.config import ClassifierConfig, Config, ModelConfig
from crate_mae.models.encoder import MaskedEncoder
from crate_mae.models.features import OneImage, apply_to_images, pool, transform_of

_HEAD_STD = 2e-5  # MAE's: all classes begin equally likely, and the first gradients of the encoder are small


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
        logits = apply_to_images(self.forward, self, transform_of(self.config), images, batch_size)
        return Prediction([self.config.classes[i] for i in logits.argmax(dim=1).tolist()], logits.softmax(dim=1))

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
    """Build the classifier that a configuration describes, with random initialisation."""
    return Classifier(build(config.encoder).encoder, config)


def initialised(config: Config) -> MaskedAutoencoder | Classifier:
    """An autoencoder or a classifier with random initialisation, from torch's global generator."""
    return build_classifier(config) if isinstance(config, ClassifierConfig) else build(config)


@overload
def untrained(config: ModelConfig, seed: int) -> MaskedAutoencoder: ...
@overload
def untrained(config: Config, seed: int) -> MaskedAutoencoder | Classifier: ...
def untrained(config: Config, seed: int) -> MaskedAutoencoder | Classifier:
    """The network of a configuration with the random initialisation of a seed, in `eval()` mode."""
    with default_generator_seeded(seed):
        return initialised(config).eval()
