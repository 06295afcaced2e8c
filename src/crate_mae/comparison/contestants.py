"""The models of a comparison, all resolved for the same images, and the images themselves."""

from dataclasses import dataclass

import torch

from crate_mae.comparison.options import Options
from crate_mae.costs.trial import StepSettings
from crate_mae.data import BadImage, ImageSource, UnreadableImage, same_images
from crate_mae.data.base import occurring_classes, refuse_unreadable
from crate_mae.data.transforms import Preparation
from crate_mae.errors import UserError, and_more
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.extract import Extraction
from crate_mae.evaluation.probes import refuse_small_classes
from crate_mae.models.autoencoder import MaskedAutoencoder, build
from crate_mae.models.config import ModelConfig
from crate_mae.models.features import DEFAULT_LAYER
from crate_mae.training.images import open_named
from crate_mae.training.options import PretrainOptions
from crate_mae.training.randomness import Purpose, derive_seed
from crate_mae.training.resolve import resolve_pretraining

NEIGHBOURS = 20


@dataclass(frozen=True)
class Contestant:
    """A model as it will be trained.

    Attributes:
        name: of the preset.
        config: of a run, in which steps, learning rate, seed and precision are still to be settled.
        model: what is built.
        augmentation: of training images.
    """

    name: str
    config: PretrainOptions
    model: ModelConfig
    augmentation: Preparation

    def fresh(self, seed: int) -> MaskedAutoencoder:
        """The model with the weights that a run of this seed begins with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, Purpose.WEIGHTS))
            return build(self.model).eval()

    def step_settings(self, precision: str) -> StepSettings:
        """What a training step of this model needs to know."""
        c = self.config
        return StepSettings(
            batch_size=c.batch_size,
            mask_ratio=c.mask_ratio,
            weight_decay=c.weight_decay,
            clip_grad=c.clip_grad,
            precision=precision,
        )


@dataclass(frozen=True, kw_only=True)
class Images:
    """What is trained and measured on.

    Attributes:
        train: pretrained on, and what the probes learn from.
        val: measured on.
        train_name: opens the first from any folder.
        val_name: opens the second.
        classes: how many the labels tell apart; 0 if there are no probes.
        why_no_probes: a sentence, or empty.
    """

    train: ImageSource
    val: ImageSource
    train_name: str
    val_name: str
    classes: int
    why_no_probes: str


def open_images(options: Options) -> Images:
    """Open both, and see whether their labels fit.

    Raises:
        UserError: if there is no such data, both are the same, a probe could not be fitted to the labels, or too many
            validation images cannot be read, which would come out after all training.
    """
    (train, train_name), (val, val_name) = open_named(options.train), open_named(options.val)
    if same_images(train, val):
        raise UserError(
            f"--train and --val are the same images ({train.name}), so models would be asked what they were told.\n"
            "Give images that no contestant is trained on with --val."
        )
    _check_readable(val)
    unlabelled = [source.name for source in (train, val) if source.labels is None]
    if not unlabelled:
        _check_classes(train, val)
    why = f"{' and '.join(unlabelled)} without labels: only completions are measured." if unlabelled else ""
    classes = 0 if unlabelled else len(occurring_classes(train))
    return Images(train=train, val=val, train_name=train_name, val_name=val_name, classes=classes, why_no_probes=why)


def _check_readable(val: ImageSource) -> None:
    bad = []
    for i in range(len(val)):
        try:
            val.read(i)
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
    refuse_unreadable(val, bad, Extraction().max_bad, held_out=True)


def resolve_contestants(options: Options, images: Images) -> list[Contestant]:
    """Fill in what is open, from the images and the machine.

    Raises:
        UserError: for a mistake in the options, or models that take images of different sizes.
    """
    contestants = []
    for name in options.models:
        resolved = resolve_pretraining(options.pretraining(name, steps=1), 1)
        task = resolved.build(resolved.config)
        contestants.append(Contestant(name, resolved.config, task.model.config, task.transform()))
    sizes = {contestant.name: contestant.model.image_size for contestant in contestants}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {height} x {width}" for name, (height, width) in sizes.items())
        raise UserError(
            f"The models take images of different sizes ({listed}), on which no scores compare.\n"
            "Give one size for all with --image-size."
        )
    if images.classes:
        for contestant in contestants:
            _check_features(contestant, extraction(options))
    return contestants


def extraction(options: Options) -> Extraction:
    """How the probes get their features."""
    layer = DEFAULT_LAYER if options.probe_layer is None else options.probe_layer
    return Extraction(layers=(layer,), pooling=options.pooling, workers=options.workers)


def _check_features(contestant: Contestant, wanted: Extraction) -> None:
    """Raise a `UserError` for a layer or pooling that the encoder does not have."""
    backbone = open_backbone(contestant.fresh(0))
    wanted.layer_numbers(backbone)
    wanted.pooling_of(backbone)


def _check_classes(train: ImageSource, val: ImageSource) -> None:
    """Find out before the training, not after it, that a probe cannot be fitted."""
    known, shown = occurring_classes(train), occurring_classes(val)
    if strange := [name for name in shown if name not in known]:
        raise UserError(
            f"{val.name} has classes that {train.name} lacks: {and_more(strange)}.\n"
            "Training and validation images must be of the same classes, with the same names."
        )
    if len(known) < 2:
        raise UserError(f"All images of {train.name} are of one class ({known[0]}): there is nothing to tell apart.")
    if len(train) < NEIGHBOURS:
        raise UserError(
            f"{train.name} has {len(train)} labelled images, but the k-NN probe asks {NEIGHBOURS} neighbours."
        )
    assert train.labels is not None, "it has classes"
    refuse_small_classes(train.labels, 2, train.classes)
