"""The task of fine-tuning: learn the classes of labelled images, from a pretrained encoder or from scratch."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.data.mixup import Mixup, mixup_target
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import AdamW

from crate_mae.data import BadImage, ImageSource, Part, finetune_transform, readable_batches
from crate_mae.data.base import refuse_unreadable
from crate_mae.data.dataset import global_generators_seeded
from crate_mae.data.files import PYTHON_OBJECT
from crate_mae.data.transforms import Preparation
from crate_mae.drawing.text import plural
from crate_mae.errors import UserError
from crate_mae.models.autoencoder import build
from crate_mae.models.classifier import Classifier
from crate_mae.models.config import ClassifierConfig, ModelConfig
from crate_mae.models.features import transform_of
from crate_mae.training.images import RunImages
from crate_mae.training.optimizer import adamw
from crate_mae.training.options import OF_ONE_LENGTH, FinetuneOptions, given_words
from crate_mae.training.processes import ignore_stop_requests
from crate_mae.training.randomness import Purpose, derive_seed
from crate_mae.training.task import BEST, StepLoss, Task, measuring

BETAS = (0.9, 0.999)  # those of MAE's fine-tuning
_VALIDATED_AT_ONCE = 64
_TOP = 5


@final
class Finetuning(Task[FinetuneOptions]):
    """Learns classes; measured on all validation images, by the averaged weights where an average is kept.

    Training and validation images have the same classes. Of the autoencoder `model`, the encoder is trained, with its
    `weights` or, with None, a random initialisation. If it takes images of another size than the run, positions are
    interpolated.

    Raises:
        UserError: if the validation images cannot be read.
    """

    measures: ClassVar[tuple[str, ...]] = ("val_loss", "val_accuracy", "val_accuracy_top5")
    score: ClassVar[str] = "val_accuracy"
    learns_labels: ClassVar[bool] = True

    def __init__(
        self,
        config: FinetuneOptions,
        images: RunImages,
        model: ModelConfig,
        weights: Mapping[str, Tensor] | None,
    ) -> None:
        assert images.train.classes is not None, "labelled images have classes"
        classes = tuple(images.train.classes)
        encoder = build(model).encoder
        if weights is not None:
            encoder.load_state_dict(weights)
        resized = model.replace(image_size=config.image_size)
        if resized.image_size != model.image_size:
            encoder.set_input_size(img_size=resized.image_size)
        described = ClassifierConfig(encoder=resized, classes=classes, pooling=config.pooling)
        super().__init__(config, images, Classifier(encoder, described))
        self.ema = config.ema
        self.mixing = Mixing(
            config.mixup,
            config.cutmix,
            label_smoothing=config.label_smoothing,
            num_classes=len(classes),
            seed=config.seed,
        )
        self.validation, self.bad_held_out = self._readable(images.held_out)

    def transform(self) -> Preparation:
        """Random crops and flips, then RandAugment."""
        c, m = self.config, self.model.config
        return finetune_transform(
            m.image_size, m.in_chans, m.mean, m.std, min_crop=c.min_crop, flip=c.flip, rand_augment=c.rand_augment
        )

    def optimizer(self, model: Any) -> AdamW:
        """AdamW, with smaller learning rates for earlier layers."""
        groups = param_groups_layer_decay(
            model,
            self.config.weight_decay,
            no_weight_decay_list=model.no_weight_decay(),
            layer_decay=self.config.layer_decay,
        )
        return adamw(groups, BETAS)

    def step_loss(self, step: int) -> StepLoss:
        """Cross entropy with the classes of mixed images."""

        def loss(
            model: nn.Module, images: Float[Tensor, "b c hh ww"], labels: Int[Tensor, "b"], _part: slice
        ) -> Float[Tensor, ""]:
            mixed, targets = self.mixing(step, images, labels)
            return F.cross_entropy(model(mixed).float(), targets)

        return loss

    def measure(self, model: Any, step: int) -> dict[str, float]:  # noqa: ARG002  # as in `Task`
        """Measure loss and accuracy, in float32."""
        total, sums = len(self.validation), {"val_loss": 0.0, "val_accuracy": 0.0}
        if len(model.config.classes) > _TOP:
            sums["val_accuracy_top5"] = 0.0
        device = model.head.weight.device
        with measuring(model):
            for batch in self._batches(self.validation):
                if batch.bad:
                    raise UserError(f"A validation image can no longer be read: {batch.bad[0].location}.")
                logits, labels = model(batch.images.to(device)).float(), batch.labels.to(device)
                sums["val_loss"] += float(F.cross_entropy(logits, labels, reduction="sum"))
                sums["val_accuracy"] += int((logits.argmax(dim=1) == labels).sum())
                if "val_accuracy_top5" in sums:
                    sums["val_accuracy_top5"] += int((logits.topk(_TOP).indices == labels[:, None]).sum())
        return {key: value / total for key, value in sums.items()}

    def describe(self) -> dict[str, str]:
        """Describe images, model, input, augmentation and learning rates."""
        c, m = self.config, self.model.config
        share = f" ({c.labels:.3g} of its labels)" if c.labels < 1 else ""
        height, width = m.image_size
        return {
            "images": f"{len(self.images.train):,} of {c.train}{share}; all {len(self.validation):,} of {c.val} to "
            "validate on",
            "model": f"{c.model}, {self.num_parameters / 1e6:.2f} M parameters; {len(m.classes)} classes from "
            f"{c.pooling} tokens",
            "input": f"{height} x {width} pixels, {plural(m.in_chans, 'channel')}",
            "augmentation": f"crops of {c.min_crop:.0%} or more{', flips' if c.flip else ''}, "
            f"{c.rand_augment or 'no RandAugment'}, Mixup {c.mixup:g}, CutMix {c.cutmix:g}",
            "layers": f"learning rate x {c.layer_decay:g} from each to the one before it",
        }

    def describe_result(self, rows: Sequence[Mapping[str, float | None]]) -> str:
        """Describe the last and the best accuracy.

        The best is counted anew where a run went on with other validation images, or lost its best model.
        """
        measured = [row for row in rows if row[BEST] is not None]
        if not measured:
            return "Accuracy has not been measured yet."
        last = measured[-1]
        *_, best = itertools.takewhile(lambda row: row[BEST] == last[BEST], reversed(measured))
        return (
            f"Accuracy on validation images: {last['val_accuracy']:.2%} now; {best['val_accuracy']:.2%} at step "
            f"{best['step']:,.0f}, the best."
        )

    def shorter_commands(self) -> list[str]:
        """The command for a run of half an hour."""
        c, run = self.config, self.directory.path
        if c.is_from_python:
            return []
        given = given_words(c, {"model", *OF_ONE_LENGTH})
        return [shlex.join(["crate-mae", "finetune", str(c.model), "--out", f"{run}-30min", "--minutes", "30", *given])]

    def describe_use(self) -> list[str]:
        """Describe which model was kept, and how to use it."""
        run = self.directory.path
        images = "IMAGES" if self.config.val.startswith(PYTHON_OBJECT) else shlex.quote(self.config.val)
        return [
            f"{run} holds the best model. It was selected on these images, so its accuracy on others may be lower.",
            f"Predict images:   crate-mae predict {shlex.quote(str(run))} {images} --out predictions.csv",
            f'From Python:      model = crate_mae.load("{run.as_posix()}")',
        ]

    def _readable(self, source: ImageSource) -> tuple[ImageSource, list[BadImage]]:
        """Separate the images that can be read from those that cannot."""
        indices: list[int] = []
        bad: list[BadImage] = []
        for batch in self._batches(source):
            indices += batch.indices.tolist()
            bad += batch.bad
        refuse_unreadable(source, bad, self.config.max_bad, measured="validation images")
        return Part(source, np.array(indices, dtype=np.int64)), bad

    def _batches(self, source: ImageSource) -> Any:
        return readable_batches(
            source,
            transform_of(self.model.config),
            _VALIDATED_AT_ONCE,
            workers=self.config.workers,
            worker_init=ignore_stop_requests,
        )


class Mixing:
    """timm's Mixup and CutMix of neighbours: image 2i of the global batch with image 2i + 1, all with the same share.

    timm mixes the first image of a batch with the last, the second with the last but one, and so on, which depends on
    where a batch is divided into micro-batches. Neighbours stay together as long as every micro-batch has an even
    number of images. The share, and for CutMix the box, is drawn once a step. Arguments are those of `FinetuneOptions`.
    """

    def __init__(self, mixup: float, cutmix: float, *, label_smoothing: float, num_classes: int, seed: int) -> None:
        self.mixes = mixup > 0 or cutmix > 0
        self.seed = seed
        self._mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)

    def __call__(
        self, step: int, images: Float[Tensor, "b c hh ww"], labels: Int[Tensor, "b"]
    ) -> tuple[Float[Tensor, "b c hh ww"], Float[Tensor, "b k"]]:
        """Mix images, which changes their order; the targets are the shares of the classes in each."""
        if not self.mixes:
            return images, mixup_target(labels, self._mixup.num_classes, smoothing=self._mixup.label_smoothing)
        count = len(images)
        even = torch.arange(0, count, 2, device=images.device)
        order = torch.cat([even, even.flip(0) + 1])  # 0 2 4 5 3 1: timm then mixes 0 with 1, 2 with 3, 4 with 5
        with global_generators_seeded(derive_seed(self.seed, Purpose.MIX, step) % 2**32):
            return self._mixup(images[order], labels[order])
