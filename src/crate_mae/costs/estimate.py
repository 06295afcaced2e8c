"""Estimate what a pretraining run needs on any number of devices: counted, not measured.

Imports PyTorch when something is estimated, so that the command line can use these types.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, Literal, no_type_check

from crate_mae.models.config import ModelConfig
from crate_mae.models.presets import preset
from crate_mae.options import JSON_HELP, LARGEST, Pixels, Range, check_ranges, option, same_as
from crate_mae.training.options import PretrainOptions, given_settings

if TYPE_CHECKING:
    from torch import nn

    from crate_mae.costs.trial import StepSettings
    from crate_mae.models.autoencoder import MaskedAutoencoder

_FLOAT = 4  # bytes; weights, gradients and moments are float32 in either precision
_BFLOAT16 = 2
_NUMBERS = 4  # per weight: the weight, its gradient, and AdamW's two moments
_AT_THE_PEAK = 3  # of them, when the backward pass begins: gradients replace activations
_IMAGENET_1K = 1_281_167
_PUBLISHED_EPOCHS = 800
# Tensors of more images have more numbers than PyTorch counts.
_TO_TEN_MILLION = Range(lambda x: 1 <= x <= 10_000_000, "a whole number from 1 to 10,000,000")
_COUNTED = Range(lambda x: 1 <= x <= LARGEST, f"a whole number from 1 to {LARGEST:,}")
_SPEED = Range(lambda x: x > 0, "more than 0, and finite")
_NO_CIRCUMSTANCES = ("model", "image_size", "channels", "json")  # options that an `Estimate` has itself, or not at all


@no_type_check  # values come from users: `checked_config` reports all wrong ones together
@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """The options of `crate_mae.estimate`."""

    model: str = option(MISSING, "A name from `crate-mae models`.")
    batch_size: int = option(MISSING, "Images per step, over all devices.", _TO_TEN_MILLION)
    image_size: Pixels = option(None, "Pixels, or HEIGHTxWIDTH; by default the model's.")
    channels: int = option(None, "Channels of the images; by default 3.")
    mask_ratio: float = same_as(PretrainOptions, "mask_ratio")
    precision: Literal["float32", "bfloat16"] = option("bfloat16", "Precision of matrix products.")
    devices: int = option(1, "Number of GPUs, or processes, that share each batch.", _TO_TEN_MILLION)
    flops_per_s: float = option(
        None,
        "Operations per second that one device reaches in training, such as 60e12. Without it, times are not "
        "estimated.",
        _SPEED,
    )
    link_bytes_per_s: float = option(
        None, "Bytes per second that one device sends to the others, such as 100e9.", _SPEED
    )
    images: int = option(_IMAGENET_1K, "Number of images in an epoch; by default that of ImageNet-1K.", _COUNTED)
    epochs: int = option(_PUBLISHED_EPOCHS, "Number of epochs; by default that of the CRATE-MAE paper.", _COUNTED)
    json: bool = option(False, JSON_HELP)

    def checked_config(self) -> ModelConfig:
        """The configuration of the model.

        Raises:
            UserError: for all mistakes in the options.
        """
        from crate_mae.models.masking import check_mask_ratio

        mistakes = check_ranges(self)
        if not mistakes.concern("batch_size", "devices", "images", "epochs"):
            mistakes += self._contradictions()
        with mistakes.collected():
            config = preset(self.model).replace(**given_settings(self))
            if not mistakes.concern("mask_ratio"):
                check_mask_ratio(self.mask_ratio, math.prod(config.grid_size))
        mistakes.raise_if_any()
        return config

    def _contradictions(self) -> Iterator[str]:
        if self.batch_size % self.devices:
            nearest = max(1, round(self.batch_size / self.devices)) * self.devices
            yield (
                f"A batch of {self.batch_size} cannot be divided among {self.devices} devices: "
                f"use --batch-size {nearest}."
            )
        if self.batch_size > self.images:
            yield f"A batch of {self.batch_size} is larger than the {self.images} images of --images."
        if self.devices > 1 and self.flops_per_s is not None and self.link_bytes_per_s is None:
            yield "The time on several devices needs --link-bytes-per-s beside --flops-per-s."


@dataclass(frozen=True, kw_only=True)
class Load:
    """What each device needs if a run is divided in one of the two ways.

    Attributes:
        state_bytes: weights, gradients and AdamW's moments.
        memory_cpu: peak memory of a process on a CPU in bytes; None for FSDP, which is not used on CPUs.
        memory_cuda: peak memory of all tensors on a GPU in bytes, where attention keeps no n x n matrices.
        sync_bytes: bytes that a device sends, and receives, in a step.
        compute_seconds: of a step; None if the speed of a device is unknown.
        sync_seconds: of a step; None likewise.
    """

    state_bytes: int
    memory_cpu: int | None
    memory_cuda: int
    sync_bytes: int
    compute_seconds: float | None
    sync_seconds: float | None

    @property
    def step_seconds(self) -> float | None:
        """Time of a step if computing and sending do not overlap."""
        if self.compute_seconds is None or self.sync_seconds is None:
            return None
        return self.compute_seconds + self.sync_seconds


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs.

    Attributes:
        model: its name.
        image_size: height and width in pixels.
        circumstances: the options that the estimate was made for.
        parameters: number of trained parameters, of encoder and decoder.
        encoder_parameters: those of the encoder.
        decoder_parameters: all others, including the mask token.
        fixed: numbers that are not trained: position embeddings.
        encoder_flops: operations of the encoder in the forward pass of one image.
        decoder_flops: operations of the decoder in it.
        training_flops: operations of one image in a training step, forward and backward.
        activation_bytes: what the forward pass of one device's images saves for the backward pass on a CPU.
        attention_bytes: the part of it for n x n attention matrices, which a GPU does not save.
        copies: every device has a whole copy of the model (DDP).
        sharded: every device has its share of the model (FSDP).
        steps_per_epoch: full batches in one pass over the images.
        assumptions: sentences that state what the numbers assume.
    """

    model: str
    image_size: tuple[int, int]
    circumstances: EstimateOptions
    parameters: int
    encoder_parameters: int
    decoder_parameters: int
    fixed: int
    encoder_flops: float
    decoder_flops: float
    training_flops: float
    activation_bytes: int
    attention_bytes: int
    copies: Load
    sharded: Load
    steps_per_epoch: int
    assumptions: tuple[str, ...]

    def run_seconds(self, load: Load) -> float | None:
        """Time of all epochs if the run is divided in one of the two ways."""
        seconds = load.step_seconds
        return None if seconds is None else seconds * self.steps_per_epoch * self.circumstances.epochs

    def to_dict(self) -> dict[str, Any]:
        """Convert to what JSON can hold, including the times of the whole run."""
        values = dataclasses.asdict(self)
        for name in _NO_CIRCUMSTANCES:
            del values["circumstances"][name]
        for way in ("copies", "sharded"):
            load = getattr(self, way)
            values[way] |= {"step_seconds": load.step_seconds, "run_seconds": self.run_seconds(load)}
        return values


def estimate_run(options: EstimateOptions) -> Estimate:
    """Estimate what a run needs.

    Raises:
        UserError: for all mistakes in the options.
    """
    from crate_mae.costs.memory import memory_estimate
    from crate_mae.costs.trial import StepSettings, step_flops
    from crate_mae.models.autoencoder import build_without_memory

    c, config = options, options.checked_config()
    share = c.batch_size // c.devices
    settings = StepSettings(
        batch_size=share,
        mask_ratio=c.mask_ratio,
        weight_decay=PretrainOptions.weight_decay,
        clip_grad=PretrainOptions.clip_grad,
        precision=c.precision,
    )
    model = build_without_memory(config)
    parameters, encoder = _numbers(model), _numbers(model.encoder)
    encoder_flops, forward_flops, training_flops = step_flops(config, settings)
    memory = memory_estimate(config, settings)
    attention = attention_bytes(config, settings)
    cuda = memory.tensors - attention
    buffers = parameters * _FLOAT if c.devices > 1 else 0  # of DDP for gradients, kept between steps
    return Estimate(
        model=config.name,
        image_size=config.image_size,
        circumstances=c,
        parameters=parameters,
        encoder_parameters=encoder,
        decoder_parameters=parameters - encoder,
        fixed=sum(table.numel() for table in model.buffers()),
        encoder_flops=encoder_flops / share,
        decoder_flops=(forward_flops - encoder_flops) / share,
        training_flops=training_flops / share,
        activation_bytes=memory.saved,
        attention_bytes=attention,
        copies=Load(
            state_bytes=_NUMBERS * parameters * _FLOAT,
            memory_cpu=memory.resident + buffers,
            memory_cuda=cuda + buffers,
            **_times(c, training_flops, 2 * parameters * _FLOAT),
        ),
        sharded=Load(
            state_bytes=_NUMBERS * parameters * _FLOAT // c.devices,
            memory_cpu=None,
            memory_cuda=cuda + _more_on_shards(c, parameters, model),
            **_times(c, training_flops, 3 * parameters * _FLOAT),
        ),
        steps_per_epoch=c.images // c.batch_size,
        assumptions=tuple(_assumptions(c)),
    )


def attention_bytes(config: ModelConfig, settings: "StepSettings") -> int:
    """Bytes of n x n attention matrices saved on a CPU: one per image, head and layer; none if attention is fused."""
    from crate_mae.models.config import CrateConfig
    from crate_mae.models.masking import visible_patches

    if isinstance(config, CrateConfig) and config.layer != "published":
        each = _FLOAT  # in either precision: see `theory.compression.BalancedAttention`
    elif settings.precision == "float32":  # fused: see `theory.attention.ssa`; timm's attention is set to do the same
        return 0
    else:
        each = _BFLOAT16
    patches = config.grid_size[0] * config.grid_size[1]
    encoded = visible_patches(patches, settings.mask_ratio) if config.mask_tokens == "decoder" else patches
    sides = ((config.depth, config.num_heads, encoded), (config.decoder_depth, config.decoder_num_heads, patches))
    numbers = sum(depth * heads * (1 + tokens) ** 2 for depth, heads, tokens in sides)
    return settings.batch_size * numbers * each


def _times(c: EstimateOptions, flops: int, exchanged_bytes: int) -> dict[str, Any]:
    """Bytes that a device sends, and seconds of computing and of sending, in a step."""
    sync = exchanged_bytes * (c.devices - 1) // c.devices
    compute = None if c.flops_per_s is None else flops / c.flops_per_s
    sending = None if compute is None else sync / c.link_bytes_per_s if c.link_bytes_per_s else 0.0
    return {"sync_bytes": sync, "compute_seconds": compute, "sync_seconds": sending}


def _more_on_shards(c: EstimateOptions, parameters: int, model: "MaskedAutoencoder") -> int:
    """Bytes that FSDP adds: fewer for what is sharded, more for two layers that are gathered at a time."""
    if c.devices == 1:
        return 0
    largest = max(_numbers(block) for part in (model.encoder, model.decoder) for block in part.blocks)
    return 2 * largest * _FLOAT - _AT_THE_PEAK * parameters * _FLOAT * (c.devices - 1) // c.devices


def _numbers(part: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _assumptions(c: EstimateOptions) -> Iterator[str]:
    yield "Operations are those of matrix products alone; a multiplication with its addition is 2."
    yield "Weights, gradients and both moments of AdamW are float32, in either precision."
    yield (
        "Memory is the peak of a step of PyTorch on a CPU, in which every tensor was counted. That of a GPU is without "
        "the n x n matrices of attention, and without what its allocator and libraries keep in addition."
    )
    if c.devices > 1:
        yield "DDP keeps buffers for gradients between steps, and sends and receives 2 (N - 1) / N of their size."
        yield "FSDP gathers weights forward and backward and scatters gradients: 3 (N - 1) / N; two layers are whole."
        yield "All devices are equally fast, and so are the links between them."
    if c.flops_per_s is not None:
        yield "Nothing overlaps: a step computes at --flops-per-s, then sends. Training never waits for images."
        yield "AdamW, checkpoints and measurements take no time."
