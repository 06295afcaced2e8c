"""Model configurations: everything needed to rebuild a model."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal, get_args

from crate_mae.errors import UserError, did_you_mean, install_command

Initialization = Literal["official", "isometric"]
Layer = Literal["published", "compressing", "monotone"]
HeadPooling = Literal["cls", "mean", "cls+mean"]
Pooling = Literal[HeadPooling, "tokens"]

DEFAULT_HEAD_POOLING: HeadPooling = "cls+mean"

# Settings are also read from files of others: these limits hold for all.
LARGEST = {
    "image_size": 2**16,
    "patch_size": 2**10,
    "in_chans": 2**12,
    "embed_dim": 2**16,
    "decoder_embed_dim": 2**16,
    "depth": 1000,
    "decoder_depth": 1000,
    "num_heads": 2**12,
    "decoder_num_heads": 2**12,
    "overcomplete": 64,
    "mlp_ratio": 64,
    "drop_path": 1,
    "step_size": 1_000_000,
    "threshold": 1_000_000,
    "ista_steps": 100,
    "mean": 1_000_000,
    "std": 1_000_000,
}
MOST_PATCHES = 2**18
LONGEST_TEXT = 256  # of a name

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
LIBRARY = "crate-mae"
FORMAT_VERSION = 1  # a description without one is of version 1
MODEL_TYPE = "crate_mae"  # in transformers
MONOTONE_STEPS = 2  # of sparse coding, by default
NOT_WRITTEN_DOWN = {"ista_steps": 1}  # settings of layers in descriptions that are older than these settings

MASK_RATIO = 0.75  # share of patches to hide, by default
NEIGHBOURS = 20  # whose votes count in k-NN, by default, as in DINO
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # as timm has them; this file imports nothing that takes time
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The settings that CRATE-MAE and ViT-MAE share.

    Attributes:
        name: the preset's name, kept for reports.
        image_size: height and width in pixels.
        patch_size: side of the square patches in pixels; it must divide both.
        in_chans: image channels.
        embed_dim: width of the encoder.
        depth: encoder layers.
        num_heads: encoder heads.
        decoder_embed_dim: width of the decoder; 0 means the encoder's.
        decoder_depth: decoder layers.
        decoder_num_heads: decoder heads; 0 means the encoder's.
        mask_tokens: whether mask tokens come in before the encoder, or only before the decoder.
        norm_pix_loss: whether targets are patches normalised by their own mean and standard deviation.
        drop_path: stochastic depth of the encoder's last layer, growing linearly from 0.
        mean: what is subtracted from each channel of images in [0, 1]; empty means ImageNet's, or 0.5 if not RGB.
        std: what each channel is then divided by; empty likewise.

    Raises:
        UserError: naming every setting that does not fit, at once.
    """

    architecture: ClassVar[str]
    _derived: ClassVar[tuple[str, ...]]  # of each configuration: the settings that were not given; no field of its own
    _of: ClassVar[Mapping[str, tuple[str, ...]]] = {"in_chans": ("mean", "std")}  # what is derived anew with a setting

    name: str = "custom"
    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int = 0
    decoder_depth: int
    decoder_num_heads: int = 0
    mask_tokens: Literal["encoder", "decoder"] = "encoder"
    norm_pix_loss: bool = False
    drop_path: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if mistakes := list(_wrong_types(self)) or list(_too_large(self)):
            raise UserError(f"Model {str(self.name)[:LONGEST_TEXT]}: " + "\n".join(mistakes))
        derived = {key: value for key, value in self._usual().items() if not getattr(self, key)}
        for key, value in {**derived, "_derived": tuple(derived)}.items():
            object.__setattr__(self, key, value)  # the way into a frozen dataclass
        if mistakes := list(self._mistakes()):
            raise UserError(f"Model {self.name}: " + "\n".join(mistakes))

    def _usual(self) -> dict[str, Any]:
        """Settings that depend on others unless they are given."""
        rgb = self.in_chans == 3
        return {
            "decoder_embed_dim": self.embed_dim,
            "decoder_num_heads": self.num_heads,
            "mean": IMAGENET_MEAN if rgb else (0.5,) * self.in_chans,
            "std": IMAGENET_STD if rgb else (0.5,) * self.in_chans,
        }

    def _mistakes(self) -> Iterator[str]:
        hh, ww = self.image_size
        counts = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "decoder_depth")
        counts += ("decoder_embed_dim", "decoder_num_heads")  # by now, 0 has become the encoder's
        wrong = [f"{key} is {value}" for key in counts if (value := getattr(self, key)) < 1]
        if wrong:
            yield f"{' and '.join(wrong)}, but must be at least 1."
            return
        if hh < 1 or ww < 1 or hh % self.patch_size or ww % self.patch_size:
            near = max(self.patch_size, round(max(hh, ww) / self.patch_size) * self.patch_size)
            yield (
                f"patches of {self.patch_size} pixels do not divide images of {hh} x {ww}; "
                f"take an image size that is a multiple of {self.patch_size}, such as {near}."
            )
        elif (patches := (hh // self.patch_size) * (ww // self.patch_size)) > MOST_PATCHES:
            yield f"{hh} x {ww} pixels in patches of {self.patch_size} are {patches:,}, but at most {MOST_PATCHES:,}."
        sides = (("", self.embed_dim, self.num_heads), ("decoder_", self.decoder_embed_dim, self.decoder_num_heads))
        for side, width, heads in sides:
            if width % heads:
                yield f"{side}embed_dim {width} is not a multiple of {side}num_heads {heads}."
            if width % 4:
                yield f"{side}embed_dim {width} is not a multiple of 4, which sine-cosine positions need."
        if self.norm_pix_loss and self.patch_size**2 * self.in_chans < 2:
            yield "a patch of one number has no deviation to normalise by: leave norm_pix_loss out, or enlarge patches."
        if self.mask_tokens not in ("encoder", "decoder"):
            yield f'mask_tokens is "{self.mask_tokens}", but must be "encoder" or "decoder".'
        if not 0.0 <= self.drop_path < 1.0:
            yield f"drop_path is {self.drop_path}, but must be at least 0 and less than 1."
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_chans:
                yield f"{key} has {len(values)} values for {self.in_chans} channels."
        if any(value <= 0 for value in self.std):
            yield f"std is {self.std}, but must be positive."

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def encoder_arguments(self) -> dict[str, Any]:
        """What the encoder is built from, JSON-able and by timm's names: see `encoder.encoder_of`."""
        return {
            "img_size": list(self.image_size),
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "drop_path_rate": self.drop_path,
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form from which `config_from_dict` makes an equal configuration."""
        return {"architecture": self.architecture, **dataclasses.asdict(self)}

    def replace(self, **settings: Any) -> ModelConfig:
        """A copy with other settings; what was not given, but derived from other settings, is derived again.

        A decoder's width or heads that were given stay, also if they are the encoder's. Statistics of channels are
        derived again whenever the number of channels changes, and the number of ISTA steps with the kind of layers.

        `image_size` may be one number for a square, and sequences may be lists.

        Raises:
            UserError: for a setting this architecture does not have.
        """
        settings = _tuples(settings)
        check_settings(type(self), settings)
        changed = [
            names for key, names in self._of.items() if settings.get(key, getattr(self, key)) != getattr(self, key)
        ]
        again = {*self._derived, *chain.from_iterable(changed)}
        defaults = {key: getattr(type(self), key) for key in again}  # which mean "not given"
        return dataclasses.replace(self, **defaults | settings)


@dataclass(frozen=True, kw_only=True)
class CrateConfig(ModelConfig):
    """CRATE-MAE: the layers of `models.layers`, or those of `models.monotone`.

    Attributes:
        layer: "published", the layers of the official code; "compressing", whose attention provably compresses, which
            have no `output_projection` to choose; or "monotone", whose sparse coding provably lowers the lasso
            objective, too, which have no `ista_skip` and `overcomplete` either.
        step_size: eta of the ISTA step.
        threshold: lambda of the ISTA step.
        ista_steps: steps of sparse coding in monotone layers, which start from the all-zero code; 0 means the usual
            two. All other layers take one, from the tokens themselves.
        output_projection: MSSA's output projection: a "free" one with bias as in the official code, or the subspaces
            themselves ("tied") as in the derivation.
        ista_skip: whether the sparse code is added to its input instead of replacing it (not so officially).
        overcomplete: atoms of the encoder's dictionaries per dimension. Above 1, sparse coding is that of CRATE-alpha:
            two ISTA steps, and a dictionary of its own to read the codes out (not so officially).
        init: the initialisation: that of the official code, or one in which every layer begins near an isometry
            ("isometric", see `models.initialization`). The functions that can be learned are the same.
    """

    architecture: ClassVar[str] = "crate"
    _of: ClassVar[Mapping[str, tuple[str, ...]]] = {**ModelConfig._of, "layer": ("ista_steps",)}

    layer: Layer = "published"
    step_size: float = 0.1
    threshold: float = 0.5
    ista_steps: int = 0
    output_projection: Literal["free", "tied"] = "free"
    ista_skip: bool = False
    overcomplete: int = 1
    init: Initialization = "official"

    def encoder_arguments(self) -> dict[str, Any]:
        """Those of every encoder, and the settings of the layers."""
        return super().encoder_arguments() | {key: getattr(self, key) for key in (*LAYER_SETTINGS, "init")}

    def _usual(self) -> dict[str, Any]:
        return super()._usual() | {"ista_steps": MONOTONE_STEPS if self.layer == "monotone" else 1}

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.step_size <= 0:
            yield f"step_size is {self.step_size}, but must be positive."
        if self.overcomplete < 1:
            yield f"overcomplete is {self.overcomplete}, but must be at least 1."
        if self.ista_steps < 1:
            yield f"ista_steps is {self.ista_steps}, but must be at least 1."
        elif self.ista_steps > 1 and self.layer != "monotone":
            yield f"ista_steps is {self.ista_steps}, but only monotone layers take more than one: leave it."
        if self.threshold < 0:
            yield f"threshold is {self.threshold}, but must not be negative."
        if self.output_projection not in ("free", "tied"):
            yield f'output_projection is "{self.output_projection}", but must be "free" or "tied".'
        if self.layer not in SETTINGS_WITHOUT:
            yield f'layer is "{self.layer}", but must be "published", "compressing" or "monotone".'
        missing = [
            key
            for key in SETTINGS_WITHOUT.get(self.layer, ())
            if key != "ista_steps" and getattr(self, key) != getattr(CrateConfig, key)
        ]
        if missing:
            yield f'{self.layer} layers have no {" and no ".join(missing)}: leave it, or set layer to "published".'
        if self.init not in ("official", "isometric"):
            yield f'init is "{self.init}", but must be "official" or "isometric".'


LAYER_SETTINGS = ("layer", "step_size", "threshold", "ista_steps", "output_projection", "ista_skip", "overcomplete")
SETTINGS_WITHOUT: dict[str, tuple[str, ...]] = {  # layer: those of the settings that it does not have
    "published": ("ista_steps",),
    "compressing": ("ista_steps", "output_projection"),
    "monotone": ("output_projection", "ista_skip", "overcomplete"),
}


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """ViT-MAE (He et al. 2022), the baseline: timm's blocks, mask tokens only at the decoder.

    Attributes:
        mlp_ratio: hidden width of each block's MLP, as a multiple of the width.
    """

    architecture: ClassVar[str] = "vit"

    mask_tokens: Literal["encoder", "decoder"] = "decoder"
    mlp_ratio: float = 4.0

    def encoder_arguments(self) -> dict[str, Any]:
        """Those of every encoder, and the MLP's."""
        return super().encoder_arguments() | {"mlp_ratio": self.mlp_ratio}

    def _mistakes(self) -> Iterator[str]:
        yield from super()._mistakes()
        if self.mlp_ratio <= 0:
            yield f"mlp_ratio is {self.mlp_ratio}, but must be positive."


def check_settings(config_class: type[ModelConfig], settings: dict[str, Any]) -> None:
    """Raise a `UserError` for settings which `config_class` does not have, with the nearest names it has."""
    known = [field.name for field in dataclasses.fields(config_class)]
    for key in settings:
        if key not in known:
            hint = did_you_mean(key, known, '"{}"') or f" It has: {', '.join(known)}."
            raise UserError(f'A {config_class.architecture} model has no setting "{key}".{hint}')


def _of_encoder(setting: str, meaning: str) -> Any:
    """A property of a classifier that is a setting of its encoder."""
    return property(lambda config: getattr(config.encoder, setting), doc=meaning)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Everything needed to build a classifier again. Its name, and what it says of images, are its encoder's.

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

    name = _of_encoder("name", "The encoder's name, for reports.")
    image_size = _of_encoder("image_size", "Height and width of the images.")
    in_chans = _of_encoder("in_chans", "Channels of the images.")
    mean = _of_encoder("mean", "What is subtracted from each channel.")
    std = _of_encoder("std", "What each channel is then divided by.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form from which `config_of` makes an equal configuration."""
        return {
            "architecture": self.architecture,
            "classes": list(self.classes),
            "pooling": self.pooling,
            "encoder": self.encoder.to_dict(),
        }

    def replace(self, **settings: Any) -> ClassifierConfig:
        """A copy whose encoder has other settings; see `ModelConfig.replace`."""
        return dataclasses.replace(self, encoder=self.encoder.replace(**settings))


Config = ModelConfig | ClassifierConfig


def encoder_config(config: Config) -> ModelConfig:
    """The settings from which an autoencoder's or a classifier's encoder is built."""
    return config.encoder if isinstance(config, ClassifierConfig) else config


def config_of(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict` of a configuration, of an autoencoder or a classifier.

    Raises:
        UserError: for settings that are unknown, missing or do not fit.
    """
    if values.get("architecture") != ClassifierConfig.architecture:
        return config_from_dict(values)
    classes, encoder = values.get("classes"), values.get("encoder")
    is_whole = set(values) == {"architecture", "classes", "pooling", "encoder"}
    are_names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not (is_whole and are_names and isinstance(encoder, dict)):
        raise UserError("A classifier is described by its classes (a list of names), pooling and encoder alone.")
    return ClassifierConfig(encoder=config_from_dict(encoder), classes=tuple(classes or ()), pooling=values["pooling"])


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of `ModelConfig.to_dict`.

    Raises:
        UserError: for an unknown architecture, or settings that are unknown, missing or do not fit.
    """
    classes = {c.architecture: c for c in (CrateConfig, ViTConfig)}
    settings = _tuples(values)
    architecture = settings.pop("architecture", None)
    if not isinstance(architecture, str) or architecture not in classes:
        raise UserError(f'Unknown architecture "{str(architecture)[:100]}": it must be one of {", ".join(classes)}.')
    check_settings(classes[architecture], settings)
    if architecture == CrateConfig.architecture:
        settings = {**NOT_WRITTEN_DOWN, **settings}
    try:
        return classes[architecture](**settings)
    except TypeError as error:
        raise UserError(f"The model configuration does not fit: {error}.") from error


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """A configuration as a part of transformers' `config.json`."""
    return json.loads(json.dumps({"format_version": FORMAT_VERSION, **config.to_dict()}))


def config_from_settings(settings: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `settings_of`.

    Raises:
        UserError: for settings of a newer format, or that are unknown, missing or do not fit.
    """
    return config_from_dict(without_version(settings))


def without_version(values: Mapping[str, Any]) -> dict[str, Any]:
    """A description less its version.

    Raises:
        UserError: if the version is not known here.
    """
    version = values.get("format_version", 1)
    if not (_is_number(version, int) and 1 <= version <= FORMAT_VERSION):
        raise UserError(
            f"It has format version {version!r}, and this {LIBRARY} knows versions up to {FORMAT_VERSION}.\n"
            f"Get a newer version, and install it: {install_command()}"
        )
    return {key: value for key, value in values.items() if key != "format_version"}


def _wrong_types(config: ModelConfig) -> Iterator[str]:
    """Settings from files and people that are of another kind than their default, or than a number."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "image_size":
            is_right = isinstance(value, tuple) and len(value) == 2 and all(_is_number(item, int) for item in value)
            kind = "two whole numbers"
        elif field.name in ("mean", "std"):
            is_right = isinstance(value, tuple) and all(_is_number(item, (int, float)) for item in value)
            kind = "numbers, one per channel"
        elif field.type == "int":
            is_right, kind = _is_number(value, int), "a whole number"
        elif field.type == "float":
            is_right, kind = _is_number(value, (int, float)), "a number"
        else:
            is_right = isinstance(value, bool) == (field.type == "bool") and isinstance(value, (str, bool))
            kind = "true or false" if field.type == "bool" else "text"
            if isinstance(value, str) and len(value) > LONGEST_TEXT:
                is_right, kind = False, f"text of at most {LONGEST_TEXT} characters"
        if not is_right:
            yield f"{field.name} is {reprlib.repr(value)}, but must be {kind}."


def _too_large(config: ModelConfig) -> Iterator[str]:
    """Settings beyond every model that anybody trains: built, they would fill the memory or never end."""
    for name, most in LARGEST.items():
        value = getattr(config, name, 0)
        numbers = value if isinstance(value, tuple) else (value,)
        if wrong := [number for number in numbers if not -math.inf < number <= most]:  # NaN is neither
            yield f"{name} is {_short(wrong[0])}, but must be a number of at most {most:,}."


def _short(number: int | float) -> str:  # types are checked in tests, and an int is no float there
    """A number as text; one of many digits is not written out."""
    is_long = isinstance(number, int) and abs(number) >= 10**15
    return f"a number of {int(math.log10(abs(number))) + 1} digits" if is_long else f"{number:,}"


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # Python counts True as 1


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON, YAML and people write them, in the types of the fields."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    if isinstance(size := settings.get("image_size"), int):
        settings["image_size"] = (size, size)
    return settings
