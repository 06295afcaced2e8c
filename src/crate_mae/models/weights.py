"""Models on disk: `model.safetensors` and `config.json` in a folder, and every form of MODEL that names one."""

import logging
import os
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from crate_mae.data.documents import read_json, to_json
from crate_mae.data.files import (
    DIGESTS_FILE,
    UNFINISHED,
    damage_of,
    flush_names,
    flush_to_disk,
    path_of,
    set_usual_mode,
)
from crate_mae.errors import UserError, first_line, not_a_repository
from crate_mae.models.autoencoder import MaskedAutoencoder, build
from crate_mae.models.checkpoints import newest_checkpoint
from crate_mae.models.classifier import Classifier, initialised
from crate_mae.models.config import (
    CONFIG_FILE,
    DEFAULT_HEAD_POOLING,
    FORMAT_VERSION,
    LIBRARY,
    MODEL_TYPE,
    WEIGHTS_FILE,
    ClassifierConfig,
    Config,
    config_from_settings,
    config_of,
    encoder_config,
    without_version,
)
from crate_mae.models.monotone import check_monotone
from crate_mae.models.presets import bundled_folder, create_model, list_bundled, list_models
from crate_mae.models.tensors import (
    has_tensors,
    read_tensors,
    refuse_broken,
    refuse_misfits,
    refuse_other_numbers,
    refuse_other_tensors,
    tensors_of,
)
from crate_mae.private_torch import uncompiled, uncompiled_name

logger = logging.getLogger(__name__)

_ENCODER_CLASS, _CLASSIFIER_CLASS = "CrateMAEModel", "CrateMAEForImageClassification"  # of transformers
_FILES = (CONFIG_FILE, WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json")
UNTRAINED = ":untrained"  # after any form of MODEL: the same network, randomly initialised

Model = MaskedAutoencoder | Classifier


def save(model: Model | nn.Module, folder: str | Path) -> None:
    """Write `model.safetensors` (encoder, and decoder or head) and `config.json` into a folder, whole or not at all.

    Existing files of these names are replaced. What `torch.compile` and data parallelism put around a model is left
    out.

    Raises:
        UserError: if `load` would refuse the files: for another kind of model, one whose layers were changed so that
            its configuration no longer describes it, or numbers that are not finite.
    """
    model = unwrapped(model)
    if not isinstance(model, Model):
        raise UserError(f"A {type(model).__name__} cannot be saved: only models of this library can.")
    if any(value.is_meta for value in model.state_dict().values()):
        raise UserError("This model is on the device meta: it has no weights to save.")
    state = {uncompiled_name(name): value for name, value in model.state_dict().items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    refuse_other_tensors(tensors, tensors_of(model.config), "This model", "its config describes")
    refuse_other_numbers(model)
    refuse_broken(tensors, "This model")
    save_tensors(tensors, model.config, folder)


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of `torch.compile` and data parallelism."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and (inner := uncompiled(model)) is not model:
            model = inner
        else:
            return model


def save_tensors(tensors: dict[str, Tensor], config: Config, folder: str | Path) -> None:
    """`save` for a state dict gathered elsewhere, such as from several processes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as scratch:
        save_config(config, Path(scratch))
        save_file(tensors, Path(scratch) / WEIGHTS_FILE, metadata={"format": "pt"})
        set_usual_mode(Path(scratch), Path(scratch) / WEIGHTS_FILE)
        (folder / DIGESTS_FILE).unlink(missing_ok=True)  # of the files that are replaced
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            flush_to_disk(Path(scratch) / name)
            os.replace(Path(scratch) / name, folder / name)  # noqa: PTH105  # atomic also where the target exists
        flush_names(folder)


def save_config(config: Config, folder: Path) -> None:
    """Write `config.json` alone, into a folder whose tensors are written by others."""
    description = {"library": LIBRARY, "format_version": FORMAT_VERSION, **config.to_dict()}
    (folder / CONFIG_FILE).write_text(to_json(description) + "\n", encoding="utf-8")


def load(model: str | Path, **settings: Any) -> Model:
    """Build a model from any form of MODEL, in `eval()` mode: an autoencoder, or a classifier if it was fine-tuned.

    Args:
        model: a run folder (of a run that is not finished, its newest checkpoint is taken) or any other folder with
            `model.safetensors` and `config.json`; the name of a preset (random initialisation) or of a trained model
            that comes with the library; or `hf:user/name`, a repository on the Hugging Face Hub with the same two
            files. Any of them but a preset, followed by `:untrained`, is the same network with random initialisation,
            from torch's global generator: the control for whether training has helped.
        settings: model settings to change, such as `norm_pix_loss`; those that change a tensor's shape are refused.

    Raises:
        UserError: if there is no such model, its files are damaged or do not belong together, or hold numbers that are
            not finite.
    """
    trained, has_suffix = without_untrained(str(model))
    if trained in list_models():
        if has_suffix:
            raise UserError(f"{trained} names a model without trained weights: leave {UNTRAINED} out.")
        return create_model(trained, **settings).eval()
    folder = _model_folder(trained)
    if has_suffix:
        return initialised(read_config(folder).replace(**settings)).eval()
    return _load_folder(folder, settings)


def without_untrained(model: str) -> tuple[str, bool]:
    """A form of MODEL without `:untrained` after it, and whether it was there."""
    has_suffix = model.endswith(UNTRAINED) and not Path(model).exists()
    return (model.removesuffix(UNTRAINED) if has_suffix else model), has_suffix


def is_untrained(model: str) -> bool:
    """Whether a form of MODEL names a random initialisation: a preset, or anything followed by `:untrained`."""
    name, has_suffix = without_untrained(model)
    return has_suffix or name in list_models()


def _model_folder(name: str) -> Path:
    """The folder with the two files of a trained model."""
    if name in list_bundled():
        return bundled_folder(name)
    folder = folder_of(name)
    if folder.is_file():
        official = f'crate_mae.from_official("{folder}", num_heads=...) and crate_mae.save'
        hint = f"For weights of the official code: {official}."
        if folder.name == WEIGHTS_FILE:
            hint = f"Name its folder instead: {folder.parent}"
        raise UserError(f"{folder} is a file, but a model is a folder with {WEIGHTS_FILE} and {CONFIG_FILE}.\n{hint}")
    if not (folder / CONFIG_FILE).exists():  # perhaps a run that is not finished
        folder = newest_checkpoint(folder, logger.warning) or folder
    there = {WEIGHTS_FILE: has_tensors(folder / WEIGHTS_FILE), CONFIG_FILE: (folder / CONFIG_FILE).is_file()}
    missing = [file for file, is_there in there.items() if not is_there]
    if missing:
        what = (
            f"has no {' and no '.join(missing)}" if folder.is_dir() else "does not exist and is not the name of a model"
        )
        raise UserError(
            f"{name} {what}.\nA model is a run folder, a folder with {WEIGHTS_FILE} and {CONFIG_FILE}, "
            "hf:user/name, or a name from `crate-mae models`."
        )
    return folder


def folder_of(model: str | Path) -> Path:
    """The folder that a form of MODEL names; that of hf:user/name is downloaded first.

    Raises:
        UserError: if the Hub has no such repository, or cannot be reached.
    """
    return _download(str(model)[3:]) if str(model).startswith("hf:") else path_of("MODEL", model)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    offline = "Offline, use a folder with the model's files, or a name from `crate-mae models`."
    try:
        return Path(snapshot_download(repository, allow_patterns=[*_FILES, "model-*.safetensors"]))
    except HFValidationError as error:
        raise not_a_repository(repository, "hf:") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"hf:{repository} is not on this machine, and the Hugging Face Hub cannot be reached.\n{offline}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"The Hugging Face Hub has no {repository}, or does not show it to you: check the name, or log in with "
            f"`hf auth login`.\n{offline}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"hf:{repository} cannot be downloaded from the Hugging Face Hub: {first_line(error)}\n{offline}"
        ) from error


def _load_folder(folder: Path, settings: dict[str, Any]) -> Model:
    _refuse_damaged(folder)
    stored = read_config(folder)
    config = stored.replace(**settings)
    kept, asked = (getattr(encoder_config(each), "layer", None) for each in (stored, config))  # None: blocks of timm
    if kept != asked:
        raise UserError(
            f"{folder} holds {kept} layers; {asked} ones compute another function of their weights.\n"
            f'Leave the setting layer, or train a model with layer="{asked}".'
        )
    path = folder / WEIGHTS_FILE
    refuse_misfits(path, config, whole=True)
    tensors = read_tensors(path)
    refuse_broken(tensors, str(path))
    model = initialised(config)
    model.load_state_dict(tensors)
    try:
        check_monotone(model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return model.eval()


def _refuse_damaged(folder: Path) -> None:
    """Raise a `UserError` if a file of the model differs from the digest that a run has written beside it."""
    damage = damage_of(folder, (CONFIG_FILE, *(path.name for path in folder.glob("model*"))))
    if damage is None:
        return
    if (folder / "config.yaml").exists():
        remedy = f"This writes it again, from the run's newest checkpoint: crate-mae resume {shlex.quote(str(folder))}"
    else:
        remedy = f"Take another checkpoint, or if you have changed the file yourself, delete {folder / DIGESTS_FILE}."
    raise UserError(f"The model in {folder} is damaged: {damage}.\n{remedy}")


def read_config(folder: Path) -> Config:
    """The configuration in a model folder.

    Raises:
        UserError: if `config.json` is damaged or was not written by this library.
    """
    path = folder / CONFIG_FILE
    values = read_json(path)
    if is_of_timm(values):
        raise UserError(
            f"{folder} holds an encoder alone, in timm's layout, and no decoder.\n"
            "`crate-mae embed` and `crate-mae eval` take it."
        )
    if is_encoder_of_transformers(values):
        raise UserError(
            f"{folder} holds an encoder alone, in transformers' layout, and no decoder.\n"
            "`crate-mae embed`, `crate-mae eval` and `crate-mae finetune` take it."
        )
    try:
        if _is_of_transformers(values):
            return _config_from_transformers(values)
        if not isinstance(values, dict) or values.get("library") != LIBRARY:
            raise UserError(f"it does not describe a {LIBRARY} model.")
        return config_of({key: value for key, value in without_version(values).items() if key != "library"})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def is_of_timm(values: Any) -> bool:
    """Whether `config.json` is in timm's layout."""
    return isinstance(values, dict) and "pretrained_cfg" in values and "library" not in values


def _is_of_transformers(values: Any) -> bool:
    """Whether `config.json` describes one of our models to transformers."""
    return (
        isinstance(values, dict) and values.get("model_type") == MODEL_TYPE and isinstance(values.get("settings"), dict)
    )


def is_encoder_of_transformers(values: Any) -> bool:
    """Whether that model is an encoder alone."""
    return _is_of_transformers(values) and values.get("architectures") == [_ENCODER_CLASS]


def _config_from_transformers(values: Mapping[str, Any]) -> Config:
    """The configuration of a model that transformers wrote.

    Raises:
        UserError: as `config_from_settings`, or for invalid labels.
    """
    config = config_from_settings(values["settings"])
    if values.get("architectures") != [_CLASSIFIER_CLASS]:
        return config
    labels = values.get("id2label")
    if not isinstance(labels, dict) or not all(str(key).isdecimal() for key in labels):
        raise UserError("A classifier of transformers needs id2label: from number to name of every class.")
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return ClassifierConfig(encoder=config, classes=names, pooling=values.get("pooling", DEFAULT_HEAD_POOLING))


def load_encoder_folder(folder: Path, settings: Mapping[str, Any]) -> MaskedAutoencoder:
    """The encoder of a folder that holds it alone, in transformers' layout, with a decoder of random initialisation.

    Args:
        folder: with the weights.
        settings: of the model, from the folder's `config.json`.

    Raises:
        UserError: if the weights are damaged, or not those of such an encoder.
    """
    config, path = config_from_settings(settings), folder / WEIGHTS_FILE
    refuse_misfits(path, config)
    tensors = read_tensors(path)
    refuse_broken(tensors, str(path))
    net = build(config)
    net.encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in tensors.items()})
    check_monotone(net.encoder)
    return net.eval()


def description_in(folder: Path) -> Any:
    """The contents of a folder's `config.json`; None without a readable one."""
    try:
        return read_json(folder / CONFIG_FILE)
    except UserError:
        return None


def load_autoencoder(model: str | Path | nn.Module) -> MaskedAutoencoder:
    """`load`, where a decoder is needed; a model from Python is taken as it is.

    Raises:
        UserError: if the model is a classifier.
    """
    loaded = _load_or_take(model)
    if isinstance(loaded, Classifier):
        raise UserError(
            f"{model_name(model)} is a classifier and has no decoder: name the run of `crate-mae pretrain` instead."
        )
    return loaded


def load_classifier(model: str | Path | nn.Module) -> Classifier:
    """`load`, where classes are needed; a model from Python is taken as it is.

    Raises:
        UserError: if the model is an autoencoder.
    """
    loaded = _load_or_take(model)
    if isinstance(loaded, MaskedAutoencoder):
        raise UserError(
            f"{model_name(model)} is an autoencoder and has no classes: fine-tune it first, with `crate-mae finetune`."
        )
    return loaded


def _load_or_take(model: str | Path | nn.Module) -> Model:
    if not isinstance(model, nn.Module):
        return load(model)
    model = unwrapped(model)
    if not isinstance(model, Model):
        raise UserError(f"A {type(model).__name__} is not a model of this library.")
    return model


def model_name(model: str | Path | nn.Module) -> str:
    """What reports and messages call a model: what the user wrote, or the class of a model from Python."""
    return type(unwrapped(model)).__name__ if isinstance(model, nn.Module) else str(model)
