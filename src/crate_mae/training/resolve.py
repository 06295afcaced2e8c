"""Fill in the options that are open, from the model, the data and the machine, and report all mistakes at once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from crate_mae.data import (
    ImageFacts,
    ImageSource,
    channel_statistics,
    cheaper_model,
    describe_images,
    finetune_transform,
    suggest_model,
)
from crate_mae.data.dataset import default_workers
from crate_mae.drawing.text import plural
from crate_mae.errors import UserError
from crate_mae.models.config import CrateConfig, ModelConfig, encoder_config
from crate_mae.models.masking import check_mask_ratio
from crate_mae.models.presets import list_bundled, list_models, preset
from crate_mae.models.transfer import resized_config
from crate_mae.models.weights import (
    description_in,
    folder_of,
    is_encoder_of_transformers,
    is_untrained,
    load,
    load_autoencoder,
    load_encoder_folder,
    read_config,
)
from crate_mae.options import LARGEST, Mistakes, option_name, origin
from crate_mae.training.finetuning import Finetuning
from crate_mae.training.images import open_images, open_labelled
from crate_mae.training.options import (
    MODEL_OPTIONS,
    FinetuneOptions,
    OptionsT,
    PretrainOptions,
    RunOptions,
    check,
    given_settings,
)
from crate_mae.training.pretraining import Pretraining
from crate_mae.training.processes import processes_here
from crate_mae.training.recipes import is_from_recipe
from crate_mae.training.report import choose_trackers
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.task import BuildTask

UNKNOWN_STEPS = 10**6  # of a run whose length in minutes is not fitted to its speed yet
_CONVERTIBLE = (1, 3)  # numbers of channels


def resolve(
    options: RunOptions, processes: int, newest: Path | None, *, data_changed: bool = False
) -> tuple[RunOptions, BuildTask]:
    """Fill in every option of either command that is open, from the data and the machine.

    A run with a checkpoint (`newest`) no longer needs the model that it began with. For `data_changed` see
    `images.open_images`.

    Returns:
        the options, in which only `precision` may still be "auto" and `checkpoint_epochs` 0, which the probe decides;
        and a function that builds the task, with weights from torch's global generator.

    Raises:
        UserError: with all mistakes.
    """
    if isinstance(options, FinetuneOptions):
        return _resolve_finetuning(options, processes, newest)
    assert isinstance(options, PretrainOptions), "there is no other kind"
    config, _, build = resolve_pretraining(options, processes, newest, data_changed=data_changed)
    return config, build


def resolve_pretraining(
    options: PretrainOptions, processes: int, newest: Path | None = None, *, data_changed: bool = False
) -> tuple[PretrainOptions, ModelConfig, BuildTask]:
    """See `resolve`; also returns what the model is, which needs no task."""
    # On the command line, words of a setting's name are joined by dashes like those of an option.
    settings = {key.replace("-", "_"): value for key, value in (options.model_settings or {}).items()}
    options, mistakes = _checked(replace(options, model_settings=settings))
    if (options.mean is None) != (options.std is None):
        mistakes.append("--mean and --std belong together: give both or neither.")
    images = facts = model = weights = None
    with mistakes.collected():
        record = RunDirectory(Path(options.out)).held_out()
        images = open_images(options.data, options.val, record, data_changed=data_changed)
        options = with_length(options, len(images.train), processes, mistakes, has_begun=newest is not None)
        facts = None if mistakes else describe_images(images.train)
    with mistakes.collected():
        start, weights = _start(options, newest)
        model = _pretraining_model(options, start, images.train if images and facts else None, facts)
        if newest is not None and (begun := _autoencoder_config(newest)).name == model.name:
            # Use the checkpoint's architecture even if this version defines the preset differently; changed options
            # are refused by name.
            model = begun.replace(**{key: getattr(model, key) for key in MODEL_OPTIONS})
        if not mistakes.concern("mask_ratio"):
            check_mask_ratio(options.mask_ratio, math.prod(model.grid_size))
    mistakes.raise_if_any()
    assert images is not None and facts is not None and model is not None

    is_models = options.model is not None and (start is None or options.model != start.name)
    size_from = "the model" if is_models else f"the images' median of {facts.height} x {facts.width}"
    config = replace(
        with_machine(options, processes),
        origins={"image_size": size_from} | (options.origins or {}),
        data=images.train_name,
        init_from=None if options.init_from is None else _full_model_name(options.init_from),
        val=images.held_out_name,
        model=model.name,
        **{name: getattr(model, setting) for setting, name in MODEL_OPTIONS.items()},
        lr=options.lr or default_base_lr(model, options.batch_size),
        monitor_steps=options.monitor_steps
        or max(options.steps // 20, min(len(images.train) // options.batch_size, 100)),
    )
    return config, model, lambda config: Pretraining(config, images, model, weights)


def _resolve_finetuning(
    options: FinetuneOptions, processes: int, newest: Path | None
) -> tuple[FinetuneOptions, BuildTask]:
    options, mistakes = _checked(options)
    images = model = weights = size = None
    with mistakes.collected():
        share = 1.0 if mistakes else options.labels
        images = open_labelled(options.train, options.val, share, options.seed)
        options = with_length(options, len(images.train), processes, mistakes, has_begun=newest is not None)
    with mistakes.collected():
        model, weights, size = _initialisation(options, images.train if images else None, newest)
    mistakes.raise_if_any()
    assert images is not None and model is not None

    config = replace(
        with_machine(options, processes),
        train=images.train_name,
        val=images.held_out_name,
        model=_full_model_name(options.model),
        image_size=size,
        lr=options.lr or default_finetune_lr(options.batch_size),
        monitor_steps=options.monitor_steps
        or math.ceil(len(images.held_out) / len(images.train)) * (len(images.train) // options.batch_size),
    )
    return config, lambda config: Finetuning(config, images, model, weights)


def default_base_lr(model: ModelConfig, batch_size: int) -> float:
    """Learning rate per 256 images, which `scaled_lr` then multiplies: c sqrt(256 / batch).

    The rate that a step has in the end grows with the root of the batch, as fits Adam.

    With the isometric initialisation c is 1.8e-3, and less for layers wider than 512. That is 9e-4 for a step of 64
    images, which gave the lowest loss of three rates at width 512; 8e-4 was used at width 256. For compressing and
    monotone layers c is three times that: the better of these two at width 512, 64 images a step and 1,000 steps
    (`results/monotone_layers`). No higher rate and no other width was tried.

    With the official initialisation, with which gradients are small and uneven at first, and for ViT-MAE, c is
    1.5e-4 (768 / d): at width 768 MAE's 1.5e-4 for a batch of 256, and near the published CRATE-MAE's 3e-5 for one of
    4096. At width 192 the rates for batches of 64 and 256 were tried, and four times the latter, which learns nothing
    (`docs/log.md`).
    """
    if isinstance(model, CrateConfig) and model.init == "isometric":
        c = (1.8e-3 if model.layer == "published" else 5.4e-3) * min(1.0, 512 / model.embed_dim)
    else:
        c = 1.5e-4 * (768 / model.embed_dim)
    return c * math.sqrt(256 / batch_size)


def default_finetune_lr(batch_size: int) -> float:
    """Learning rate of the head per 256 images, 1.5e-3 sqrt(256 / batch), which `scaled_lr` then multiplies.

    The rate that a step has in the end grows with the root of the batch, as fits Adam; at a batch of 1024 it is near
    that of MAE. Tried at width 192 with batches of 32 on 500 images, one run each: a quarter of this was no different
    within the noise, three times this clearly worse.
    """
    return 1.5e-3 * math.sqrt(256 / batch_size)


def _checked(options: OptionsT) -> tuple[OptionsT, Mistakes]:
    """The options with their trackers, and the mistakes so far."""
    mistakes = check(options)
    with mistakes.collected():
        options = replace(options, trackers=choose_trackers(options.trackers, origin(options, "trackers")))
    return options, mistakes


def default_batch_size(images: int, share: int) -> int:
    """The largest power of two up to 256 with at least 64 steps per epoch, but not below 32 while that leaves 8.

    A hundred epochs of a few thousand images would be too few steps to learn from if each took 256. A batch must divide
    evenly by `share`: processes times accumulated micro-batches.
    """
    most = min(256, images // 8, max(32, images // 64))
    batch = 2 ** int(math.log2(max(1, most)))
    return max(1, batch // share) * share


def with_length(
    options: OptionsT, images: int, processes: int, mistakes: Mistakes, *, has_begun: bool = False
) -> OptionsT:
    """Fill in batch size, number of steps and warm-up; with `mistakes`, old or new, the options stay as they are.

    Of a run that has begun, perhaps with epochs of another length, the length of the warm-up has been checked.
    """
    if mistakes.concern("batch_size", "accumulation"):
        return options
    inseparable = 2 if mistakes.concern("mixup", "cutmix") else options.inseparable
    share = options.accumulation * processes * inseparable
    batch = options.batch_size or default_batch_size(images, share)
    if batch > images >= share and is_from_recipe(options, "batch_size"):
        fewer = f"{images:,} training images, fewer than the recipe's {batch:,}"
        options = replace(options, origins={**(options.origins or {}), "batch_size": fewer})
        batch = default_batch_size(images, share)
    if wrong := _batch_mistake(options, batch, images, processes, inseparable):
        mistakes.append(wrong)
    if mistakes:
        return options
    steps_per_epoch = images // batch
    steps = options.steps or steps_per_epoch * (options.epochs or options.usual_epochs)
    if options.minutes is not None:
        steps = UNKNOWN_STEPS
    warmup_epochs = options.warmup_epochs
    if warmup_epochs is None:
        warmup_epochs = round(options.usual_warmup * steps / steps_per_epoch, 4)
    if not has_begun and round(warmup_epochs * steps_per_epoch) >= steps:
        mistakes.append(
            f"--warmup-epochs {warmup_epochs:g}{origin(options, 'warmup_epochs')} must be shorter than the run of "
            f"{steps / steps_per_epoch:g} epochs."
        )
    if steps * options.accumulation > LARGEST:
        mistakes.append(f"A run of {steps:,} steps exceeds the maximum of 2^63 - 1 micro-batches: make it shorter.")
    log_steps = options.log_steps or max(1, min(50, steps // 200))
    return replace(
        options, batch_size=batch, epochs=None, steps=steps, warmup_epochs=warmup_epochs, log_steps=log_steps
    )


def _batch_mistake(options: RunOptions, batch: int, images: int, processes: int, inseparable: int) -> str | None:
    """Why a batch cannot be taken from the images, or divided."""
    accumulation, share = options.accumulation, options.accumulation * processes * inseparable
    what, of = f"A batch of {batch}{origin(options, 'batch_size')}", origin(options, "accumulation")
    pairs = without = ""
    if inseparable > 1:
        mixed = f"Mixup{origin(options, 'mixup')} and CutMix{origin(options, 'cutmix')}"
        pairs, without = f" in pairs, as {mixed} need", ", or --mixup 0 --cutmix 0"
    parts = f"{plural(processes, 'process')} x {accumulation} accumulated micro-batches{of}{pairs}"
    if share > images:
        return (
            f"At least {share} images are needed for {parts}, but there are {images} to train on: use fewer "
            f"processes or a smaller --accumulation{without}."
        )
    if batch > images:
        most = images // share * share
        return f"{what} is larger than the {images} training images: the most is --batch-size {most}."
    if batch % share:
        nearest = max(share, round(batch / share) * share)
        return f"{what} cannot be divided among {parts}: take --batch-size {nearest}{without}."
    return None


def with_cheaper_model(options: OptionsT, config: RunOptions, why: str) -> OptionsT | None:
    """Options with a model for smaller images; None if the model was not chosen by their size, or there is none.

    `config` are the same options, filled in; `why` is what the plan names as the origin of the image size.
    """
    chosen = {"model", "model_settings", "init_from", "image_size"} & options.given().keys()
    if chosen or not isinstance(config, PretrainOptions) or (cheaper := cheaper_model(config.model)) is None:
        return None
    name, size = cheaper
    origins = {**(options.origins or {}), "image_size": why}
    return replace(options, model=name, image_size=size, origins=origins)


def with_machine(options: OptionsT, processes: int) -> OptionsT:
    """Fill in how many processes load images, how many threads compute, and 0 for an open `checkpoint_epochs`."""
    workers = options.workers
    if workers is None:
        workers = default_workers(processes_here(processes))
    threads = options.threads or torch.get_num_threads()
    return replace(options, workers=workers, threads=threads, checkpoint_epochs=options.checkpoint_epochs or 0)


def _start(
    options: PretrainOptions, newest: Path | None
) -> tuple[ModelConfig, dict[str, Tensor] | None] | tuple[None, None]:
    """The model that `--init-from` names, and its weights until the run has its own: those of its newest checkpoint."""
    if options.init_from is None:
        return None, None
    if newest is not None:
        return _autoencoder_config(newest), None
    if is_untrained(str(options.init_from)):
        if (config := RunDirectory(Path(options.out)).config_file).exists():
            raise UserError(
                f"The run in {options.out} was interrupted before its first checkpoint, and {config} has it start from "
                f"{options.init_from}, which names a random initialisation.\n"
                "Every run starts from one: write `init_from: null` there and resume, or start a new run without it."
            )
        raise UserError(
            f"--init-from {options.init_from} names a random initialisation, which every run starts from: leave it "
            "out, or name a trained model."
        )
    model = load_autoencoder(options.init_from)
    return model.config, model.state_dict()


def _autoencoder_config(folder: Path) -> ModelConfig:
    config = read_config(folder)
    assert isinstance(config, ModelConfig), "runs of pretraining have no classes"
    return config


def _pretraining_model(
    options: PretrainOptions, start: ModelConfig | None, train: ImageSource | None, facts: ImageFacts | None
) -> ModelConfig:
    """The model's configuration; without images (because of other mistakes) it is only checked for mistakes."""
    if taken := [key for key in options.model_settings if key in MODEL_OPTIONS]:
        raise UserError(f"Give {option_name(MODEL_OPTIONS[taken[0]])} instead of a model setting.")
    channels = options.channels or (3 if facts is None else facts.channels)
    suggested, side = suggest_model(facts, options.image_size)
    if start is not None and options.model in (None, start.name):
        size = side if options.image_size is None else options.image_size
        config = resized_config(start, (size, size) if isinstance(size, int) else size)
    else:
        config = preset(options.model or suggested)
    config = config.replace(**options.model_settings, **{**given_settings(options), "in_chans": channels})
    return config if train is None or options.mean is not None else _with_measured_statistics(config, train)


def _with_measured_statistics(config: ModelConfig, train: ImageSource) -> ModelConfig:
    """A configuration with the mean and deviation of the images' own channels, unless these are red, green and blue."""
    if config.in_chans == 3:
        return config
    mean, std = channel_statistics(train, config.in_chans)
    return config.replace(mean=tuple(round(x, 4) for x in mean), std=tuple(round(x, 4) for x in std))


def _initialisation(
    options: FinetuneOptions, train: ImageSource | None, newest: Path | None
) -> tuple[ModelConfig, dict[str, Tensor] | None, tuple[int, int]]:
    """The model whose encoder to begin with, the encoder's weights, and the size of images to change it to.

    Without images (because of other mistakes) it is only checked for mistakes.
    """
    name, weights = str(options.model), None
    if name.startswith("timm:"):
        raise UserError(
            f"{name} cannot be fine-tuned here: MODEL is a run folder, a folder with a model, hf:user/name, "
            "or a name from `crate-mae models`."
        )
    channels = 3 if train is None else describe_images(train).channels
    if newest is not None:
        config = encoder_config(read_config(newest))
    elif name in list_models():
        config = preset(name).replace(in_chans=channels)
        config = config if train is None else _with_measured_statistics(config, train)
    else:
        described = description_in(folder := folder_of(name))
        alone = is_encoder_of_transformers(described)
        loaded = load_encoder_folder(folder, described["settings"]) if alone else load(name)
        config, weights = encoder_config(loaded.config), loaded.encoder.state_dict()
    if train is not None and channels != config.in_chans and not {channels, config.in_chans} <= set(_CONVERTIBLE):
        raise UserError(
            f"{name} takes images of {config.in_chans} channels, but those of {train.name} have {channels}.\n"
            "Only grey and colour are converted into each other: give a model that was made for these images."
        )
    config = config.replace(drop_path=options.drop_path)
    size = config.image_size if options.image_size is None else options.image_size
    resized = config.replace(image_size=size)  # refuses a size that its patches do not divide
    if weights is None:
        config = resized
    # Refuses a RandAugment policy that timm does not understand.
    finetune_transform(resized.image_size, config.in_chans, config.mean, config.std, rand_augment=options.rand_augment)
    return config, weights, resized.image_size


def _full_model_name(model: str | Path) -> str:
    """A name by which the same model is found from any folder."""
    name = str(model)
    is_name = name in (*list_models(), *list_bundled()) or name.startswith("hf:")
    return name if is_name else str(Path(name).expanduser().resolve())
