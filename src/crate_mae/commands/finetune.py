"""`crate-mae finetune`: teach a pretrained model, or a fresh one, the classes of labelled images."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crate_mae.commands.pretrain import Data, ImageSize, Names

if TYPE_CHECKING:
    from crate_mae.training.run import Run
else:
    Run = Any  # cyclopts evaluates annotations, and `--help` must not import torch for one


def finetune(
    model: str | Path,
    *,
    train: Data,
    val: Data,
    out: Path | str,
    labels: float = 1.0,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    min_lr: float = 0.0,
    warmup_epochs: float | None = None,
    weight_decay: float = 0.05,
    layer_decay: float = 0.75,
    clip_grad: float = 1.0,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    label_smoothing: float = 0.1,
    rand_augment: str = "rand-m9-mstd0.5-inc1",
    min_crop: float = 0.2,
    flip: bool = True,
    drop_path: float = 0.1,
    ema: float = 0.9999,
    pooling: Literal["cls", "mean", "cls+mean"] = "cls+mean",
    image_size: ImageSize = None,
    seed: int = 0,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    accumulation: int = 1,
    compile: bool = False,  # noqa: A002  # PyTorch's own name for it
    grad_checkpointing: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    max_bad: float = 0.01,
    checkpoint_minutes: float = 10.0,
    checkpoint_epochs: int | None = None,
    log_steps: int | None = None,
    monitor_steps: int | None = None,
    trackers: Names = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> Run:
    """Train a classifier on labelled images, from a pretrained encoder or from scratch.

    All layers learn. The model is measured on all validation images as it learns, and in the end `out` holds the one
    that did best. Since these images have chosen it, its accuracy on them is a little optimistic: for a number to
    publish, measure it on a third set, or take the accuracy of the last row of metrics.csv.

    Everything is checked before a file is written. If `out` is a run already, it is resumed where it stopped: options
    left at their defaults are then taken from that run, and others must be the same.

    Args:
        model: A run folder, a folder with model.safetensors and config.json, hf:user/name, or a name from
            `crate-mae models`, which means fresh weights.
        train: Labelled images: a folder with a folder for each class, .parquet, .tar shards, hf:name, digits:train ...
        val: Labelled images of the same classes, to measure on and to choose the best model by.
        out: The folder of the run.
        labels: Share of the training images to use, of each class alike; the seed chooses them.
        epochs: Passes over these images. 50 if neither --epochs nor --steps is given.
        steps: Optimizer steps, instead of epochs.
        batch_size: Images per step, over all processes and micro-batches. By default 256, less for few images.
        lr: Learning rate of the head per 256 images; it is scaled by batch_size / 256. By default 1.5e-3, more for
            batches of less than 256.
        min_lr: Learning rate at the end of the cosine, per 256 images.
        warmup_epochs: Epochs of linear warm-up. By default 10% of the run.
        weight_decay: Decoupled weight decay of AdamW; norms, biases and tokens are spared.
        layer_decay: The learning rate of each layer is that of the next, times this.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        mixup: How much two images are mixed (the parameter of a Beta distribution); 0 for never.
        cutmix: Likewise for a box cut out of one and pasted into the other; steps use one or the other.
        label_smoothing: Part of each target that is spread over all classes.
        rand_augment: timm's RandAugment policy; "" for none.
        min_crop: Smallest share of an image that a random crop takes.
        flip: Mirror half of the images; wrong for writing.
        drop_path: Stochastic depth of the encoder's last layer.
        ema: Decay of a running average of the weights, which is what is measured and kept; it forgets faster at the
            beginning. 0 for none.
        pooling: What the head sees: the class token, the mean over patches, or both.
        image_size: Pixels, or HEIGHTxWIDTH. By default the model's; positions are interpolated.
        seed: Of the head (and of fresh weights), the choice of labels, the order and the augmentation.
        precision: By default whichever is faster here, measured.
        accumulation: Micro-batches per step, to save memory.
        compile: Compile the model with torch.compile.
        grad_checkpointing: Compute layers again in the backward pass, to save memory.
        workers: Processes that load images. By default one less than there are cores, at most 8.
        threads: CPU threads that compute. By default PyTorch's choice.
        max_bad: Largest share of unreadable images before the run stops.
        checkpoint_minutes: Save at least this often.
        checkpoint_epochs: Save every so many epochs. By default as many as take about a minute.
        log_steps: Steps between rows of metrics.csv. By default about 200 rows, and at most 50 steps.
        monitor_steps: Steps between validations. By default an epoch, or as many epochs as it takes to train on as many
            images as are validated on.
        trackers: Such as tensorboard or wandb. By default TensorBoard if installed; --no-trackers for none.
        dry_run: Only check and show the plan.
        quiet: Show nothing.

    Returns:
        The run: `.path`, `.config`, `.model()` (the best one), `.metrics()`.

    Raises:
        UserError: for every mistake in the options at once, or a reason to stop that can be mended.
        RunStopped: after Ctrl-C or SIGTERM, when everything has been saved.
    """
    options = {key: value for key, value in locals().items() if key not in ("out", "dry_run", "quiet")}
    from crate_mae.training.start import start

    defaults = {key: parameter.default for key, parameter in inspect.signature(finetune).parameters.items()}
    return start("finetune", Path(out), options, defaults, dry_run=dry_run, quiet=quiet)
