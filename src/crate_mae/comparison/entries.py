"""The entries of a comparison: models configured for the same images; and the images."""

from dataclasses import dataclass

import torch

from crate_mae.comparison.options import CompareOptions
from crate_mae.costs.trial import StepSettings
from crate_mae.data import BadImage, ImageSource, UnreadableImage, refuse_shared_images
from crate_mae.data.base import align_classes, refuse_unreadable
from crate_mae.data.transforms import Preparation
from crate_mae.errors import UserError
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
class Entry:
    """A model as it will be trained.

    Attributes:
        name: of the preset, with its settings.
        config: of its runs, in which steps, learning rate, seed and precision are still open.
        model: the configuration of the network.
        augmentation: prepares training images.
    """

    name: str
    config: PretrainOptions
    model: ModelConfig
    augmentation: Preparation

    def build(self, seed: int) -> MaskedAutoencoder:
        """The model with the random initialisation of a run with this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, Purpose.WEIGHTS))
            return build(self.model).eval()

    def step_settings(self, precision: str) -> StepSettings:
        """The settings of a training step of this model."""
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
    """The images that entries are trained and measured on.

    Attributes:
        train: for pretraining and for fitting the probes.
        val: to measure on.
        train_name: name that opens `train` from any folder.
        val_name: the same for `val`.
        classes: number of classes of the labels; 0 if there are no probes.
        why_no_probes: a sentence, or empty.
    """

    train: ImageSource
    val: ImageSource
    train_name: str
    val_name: str
    classes: int
    why_no_probes: str


def open_images(options: CompareOptions) -> Images:
    """Open both data sets, and check that their labels fit together.

    Raises:
        UserError: if there is no such data, both are the same, a probe cannot be fitted to the labels, or too many
            validation images cannot be read, which would otherwise only be found after all training.
    """
    (train, train_name), (val, val_name) = open_named(options.train), open_named(options.val)
    refuse_shared_images(train, val, "--train", "models would be measured on images that they were trained on")
    _check_readable(val)
    unlabelled = [source.name for source in (train, val) if source.labels is None]
    classes = 0 if unlabelled else _check_classes(train, val)
    why = f"{' and '.join(unlabelled)} without labels: only completions are measured." if unlabelled else ""
    return Images(train=train, val=val, train_name=train_name, val_name=val_name, classes=classes, why_no_probes=why)


def _check_readable(val: ImageSource) -> None:
    bad = []
    for i in range(len(val)):
        try:
            val.read(i)
        except UnreadableImage as error:
            bad.append(BadImage(error.location, error.reason))
    refuse_unreadable(val, bad, Extraction().max_bad, held_out=True)


def resolve_entries(options: CompareOptions, images: Images) -> list[Entry]:
    """Configure every model, with open options set from the images and the machine.

    Raises:
        UserError: for a mistake in the options, or models that take images of different sizes.
    """
    entries = []
    for name in options.models:
        resolved = resolve_pretraining(options.pretraining(name, steps=1), 1)
        task = resolved.build(resolved.config)
        entries.append(Entry(name, resolved.config, task.model.config, task.transform()))
    sizes = {entry.name: entry.model.image_size for entry in entries}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {height} x {width}" for name, (height, width) in sizes.items())
        raise UserError(
            f"The models take images of different sizes ({listed}), so their scores cannot be compared.\n"
            "Give one size for all with --image-size."
        )
    if images.classes:
        for entry in entries:
            _check_features(entry, extraction(options))
    return entries


def extraction(options: CompareOptions) -> Extraction:
    """The settings of feature extraction for the probes."""
    layer = DEFAULT_LAYER if options.probe_layer is None else options.probe_layer
    return Extraction(layers=(layer,), pooling=options.pooling, workers=options.workers)


def _check_features(entry: Entry, wanted: Extraction) -> None:
    """Raise a `UserError` for a layer or pooling that the encoder does not have."""
    backbone = open_backbone(entry.build(0))
    wanted.layer_numbers(backbone)
    wanted.pooling_of(backbone)


def _check_classes(train: ImageSource, val: ImageSource) -> int:
    """The number of classes, after checking before the training that the probes can be fitted."""
    classes = align_classes(train, val)
    if len(train) < NEIGHBOURS:
        raise UserError(f"{train.name} has {len(train)} labelled images, but the k-NN probe needs {NEIGHBOURS}.")
    assert train.labels is not None, "it has classes"
    refuse_small_classes(train.labels, 2, train.classes)
    return len(classes)
