"""Tensors from files of others: read without running code, and only if they are those of the model that is described.

A few bytes can describe a model of any size, so that a description is compared with the names and shapes in a file of
weights before a model is built or a number is read: first its number of layers, then, without memory, all tensors.
"""

import argparse
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from crate_mae.data.documents import read_json
from crate_mae.errors import UserError, and_more
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.classifier import Classifier, initialised
from crate_mae.models.config import CONFIG_FILE, LAYER_SETTINGS, WEIGHTS_FILE, Config, ModelConfig, encoder_config
from crate_mae.models.devices import without_memory
from crate_mae.models.encoder import build_encoder
from crate_mae.models.monotone import refuse_earlier_layers
from crate_mae.models.timm_models import CONFIGS
from crate_mae.private_torch import COMPILED, uncompiled_name

_FLOATS = {"F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
_PREFIXES = ("module.", "model.", f"{COMPILED}.")  # of data parallelism, of trainers, of torch.compile
_NUMBERS = ("num_heads", "scale", "eps", "step_size", "threshold", "steps", "ista_skip")  # that layers compute with
_MOST_LAYERS, _LARGEST_ARGUMENT = 200, 2**16  # of networks of timm


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a dictionary of tensors on the CPU, from safetensors or a PyTorch file.

    PyTorch files are pickles and are opened with `weights_only=True`, which refuses anything but tensors, plain
    containers, and the `argparse.Namespace` of options that MAE's training code, and so the official one, leaves beside
    them. A dictionary under "model" or "state_dict" is unwrapped. A file that several processes wrote in parts is named
    as if it were whole; see `stream_tensors`.

    Raises:
        UserError: for a file that is missing, cut short, or holds anything else.
    """
    if not path.is_file() and has_tensors(path):
        return dict(stream_tensors(path))
    if not path.is_file():
        raise UserError(f"There is no weights file at {path}.")
    if path.suffix == ".safetensors":
        with _explain_damage(path):
            return load_file(path)
    _refuse_packed(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of pickles raises exceptions of any kind for a damaged file
        raise UserError(
            f"{path} cannot be read as a file of tensors: it is damaged, or holds Python objects, which could run code."
            "\nConvert it to safetensors with the program that made it."
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    is_named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not is_named or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} does not hold a dictionary from names to tensors.")
    if wrong := [name for name, value in content.items() if not _is_whole(value)]:
        raise UserError(f"{path} holds {wrong[0]} without all of its numbers, as a sparse or an expanded tensor.")
    return content


def _refuse_packed(path: Path) -> None:
    """PyTorch does not compress its files; one that is compressed may unpack to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
    except Exception:  # not a zip archive: an old PyTorch file, or a damaged one, which is reported when it is read
        return
    if packed:
        raise UserError(f"{path} holds compressed files, which PyTorch does not write. Save it again with torch.save.")


def _is_whole(value: Tensor) -> bool:
    """Whether a tensor has memory for each of its numbers: one of a few bytes can claim any shape."""
    if value.layout != torch.strided or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def without_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by their names in the model itself, and the prefixes that wrappers had put before all of them."""
    found: list[str] = []
    names = dict(tensors)
    while prefix := next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): value for name, value in names.items()}
        found.append(prefix)
    return names, found


def described_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that a safetensors file of weights, whole or in parts, says it holds: names and shapes, no values.

    Returns:
        Tensors on the device "meta", which have no memory.

    Raises:
        UserError: for a file or part that is missing or damaged, or tensors that are not weights as they are, such as
            the 8-bit formats, which mean something only with scales of their own.
    """
    found: dict[str, Tensor] = {}
    for part in _parts_of(path):
        with _explain_damage(part), safe_open(part, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                described = file.get_slice(name)
                if described.get_dtype() not in _FLOATS:
                    raise _no_weights(part, name, described.get_dtype())
                found[name] = torch.empty(described.get_shape(), device="meta")
    return found


def stream_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, whole or in parts, read one after another.

    Raises:
        UserError: for a file or part that is missing or damaged.
    """
    for part in _parts_of(path):
        with _explain_damage(part), safe_open(part, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                yield name, file.get_tensor(name)


def _parts_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = index_of(path)
    try:
        names = read_json(index)["weight_map"].values()
        # Paths in the index are reduced to names, so that only files beside it are read.
        parts = [path.with_name(Path(name).name) for name in dict.fromkeys(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is missing or damaged: {error}.") from error
    if missing := [part for part in parts if not part.is_file()]:
        raise UserError(f"There is no weights file at {missing[0]}.")
    return parts


def index_of(path: Path) -> Path:
    """The file that lists which part of `path` holds which tensor, if it was written in parts: Hugging Face's layout.

    Its parts are called `model-00001-of-00002.safetensors` and so on.
    """
    return path.with_name(f"{path.name}.index.json")


def has_tensors(path: Path) -> bool:
    """Whether a file of tensors is there, in one piece or in parts."""
    return path.is_file() or index_of(path).is_file()


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read as safetensors: {error}.\nIt may be cut short, or not be safetensors at all."
        ) from error


def refuse_other_types(tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise a `UserError` for tensors of another type than the four in which weights are stored as they are."""
    for name, value in tensors.items():
        if value.dtype not in _FLOATS.values():
            raise _no_weights(where, name, str(value.dtype).removeprefix("torch."))


def refuse_broken(tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise a `UserError` for numbers that are not finite."""
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise UserError(
            f"{where} holds numbers that are not finite, in {len(broken)} tensor(s) such as {broken[0]}.\n"
            "Nothing can be computed with it: take an earlier checkpoint of the run, or another model."
        )


def _no_weights(where: Path | str, name: str, kind: str) -> UserError:
    return UserError(
        f"{where} holds {name} as {kind}, but weights must be float32, float64, float16 or bfloat16.\n"
        "Convert it with the program that made it."
    )


def refuse_misfits(path: Path, config: Config, *, whole: bool = False) -> None:
    """Compare a file of weights with a configuration before a model is built, or a number of the file is read.

    Both may come from others: a configuration of a million layers would take hours to build.

    Args:
        path: the file.
        config: the configuration.
        whole: whether an autoencoder's file must hold all of it, not its encoder alone.

    Raises:
        UserError: if the file holds another model, tensors that are not weights, or is damaged.
    """
    found, whose = described_tensors(path), f"{CONFIG_FILE} and the settings describe"
    if wrong := _other_depths(found, encoder_config(config)):
        raise UserError(f"{path} holds the weights of another model than {whose}:\n{wrong}.")
    wanted = tensors_of(config)
    if not whole and isinstance(config, ModelConfig) and not any(name.startswith("decoder.") for name in found):
        wanted = {name: value for name, value in wanted.items() if name.startswith("encoder.")}
    refuse_other_tensors(found, wanted, str(path), whose)


def _other_depths(found: Mapping[str, Tensor], config: ModelConfig, encoder: str = "encoder.") -> str:
    """Where a file of weights has another number of layers than a configuration: a model's size, but for its tensors'.

    Names of the encoder's tensors begin with `encoder` in the file.
    """
    depths = {encoder: config.depth}
    if any(name.startswith("decoder.") for name in found):
        depths["decoder."] = config.decoder_depth
    wrong = []
    for part, depth in depths.items():
        blocks = f"{part}blocks."
        layers = len({name.removeprefix(blocks).split(".")[0] for name in found if name.startswith(blocks)})
        if layers != depth:
            wrong.append(f"the {part.strip('.') or 'encoder'} has {layers} layers, not {depth:,}")
    return "; ".join(wrong)


def tensors_of(config: Config) -> dict[str, Tensor]:
    """The names and shapes of a model's tensors, without memory."""
    with without_memory():
        return initialised(config).state_dict()


def refuse_other_numbers(model: MaskedAutoencoder | Classifier) -> None:
    """Raise a `UserError` if a layer was changed to compute with other numbers than the model's configuration says."""
    parts = {uncompiled_name(name): part for name, part in model.named_modules()}
    with without_memory():
        described = initialised(model.config)
    for name, part in described.named_modules():
        for key in _NUMBERS:
            wanted, found = getattr(part, key, None), getattr(parts.get(name), key, None)
            if isinstance(wanted, int | float) and found != wanted:  # the scale of compressing layers is a method
                setting = "ista_steps" if key == "steps" else key
                load = f", or load the model with this setting: crate_mae.load(MODEL, {setting}=...)"
                or_load = load if setting in LAYER_SETTINGS else ""
                raise UserError(
                    f"{name}.{key} of this model is {found}, but its config describes {wanted}: a copy would compute "
                    f"another function.\nChange it back{or_load}."
                )


def refuse_other_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str, whose: str) -> None:
    """Raise a `UserError` if tensors are not those of the wanted names and shapes.

    Args:
        found: the tensors.
        wanted: those of the model.
        where: the tensors were found.
        whose: the wanted ones are, such as "its config describes".
    """
    refuse_other_types(found, where)
    refuse_earlier_layers(found, where)
    if hint := _other_layers(found, wanted):
        raise UserError(f"{where} {hint}")
    if problems := misfits(found, wanted):
        raise UserError(f"{where} holds the weights of another model than {whose}:\n{problems}.")


def _other_layers(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The error message if one of the two has published layers and the other has not; else empty."""
    kinds = [
        "compressing or monotone" if any(name.endswith("attn.log_scale") for name in tensors) else "published"
        for tensors in (found, wanted)
        if any("attn.subspaces.weight" in name for name in tensors)
    ]
    if len(kinds) < 2 or kinds[0] == kinds[1]:
        return ""
    return (
        f"holds the weights of {kinds[0]} layers, but {CONFIG_FILE} and the settings describe {kinds[1]} ones.\n"
        "The two compute different functions: the setting `layer` has to be that of the model which was trained."
    )


def misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Where two dictionaries of tensors differ in names or shapes, in words; empty if they do not."""
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    return and_more(problems, 3, "; ")


def refuse_timm_misfits(folder: Path, description: Mapping[str, Any]) -> None:
    """Compare the arguments in a folder of timm's layout with its weights, before timm builds a model from them.

    The description is `config.json`. Weights of our encoders are in `model.safetensors`, those of networks of timm
    itself in any file.

    Raises:
        UserError: if the arguments describe another model than that of the weights, or one that is too large.
    """
    name, arguments = description.get("architecture"), description.get("model_args") or {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise UserError(f"{folder}/config.json does not name an architecture of timm and its arguments.")
    if name in CONFIGS:
        _refuse_other_encoder(folder / WEIGHTS_FILE, CONFIGS[name], arguments)
        return
    if wrong := [key for key, value in arguments.items() if _is_large(key, value)]:
        raise UserError(f"{folder}/config.json: {wrong[0]} of {name} is larger than in any network.")
    try:
        with without_memory():
            numbers = sum(value.numel() for value in timm.create_model(name, **arguments, num_classes=0).parameters())
    except Exception:  # timm raises many kinds: it says what is wrong when it opens the folder
        return
    stored = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if numbers > stored:
        raise UserError(f"{folder} describes a {name} of {numbers:,} numbers, but holds only {stored:,} bytes.")


def _refuse_other_encoder(path: Path, like: ModelConfig, arguments: Mapping[str, Any]) -> None:
    """Compare the arguments of one of our encoders with a file of its weights."""
    names = {"img_size": "image_size", "drop_path_rate": "drop_path"}
    known = {names.get(key, key): key for key in like.encoder_arguments()}
    config = like.replace(**{setting: arguments[key] for setting, key in known.items() if key in arguments})
    found = described_tensors(path)
    problems = _other_depths(found, config, "")
    if not problems:
        options = {"patch_norm": True} if arguments.get("patch_norm") else {}
        with without_memory():
            problems = misfits(found, build_encoder(config, **options).state_dict())
    if problems:
        raise UserError(f"{path} holds the weights of another encoder than {CONFIG_FILE} describes: {problems}.")


def _is_large(key: str, value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > _MOST_LAYERS or any(_is_large(key, item) for item in value)
    if isinstance(value, dict):
        return any(_is_large(f"{key}.{name}", item) for name, item in value.items())
    most = _MOST_LAYERS if "depth" in key or "layers" in key else _LARGEST_ARGUMENT
    return isinstance(value, (int, float)) and not -most <= value <= most
