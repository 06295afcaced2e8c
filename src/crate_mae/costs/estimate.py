"""Estimate what a pretraining run needs on any number of devices: counted, not measured."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from crate_mae.costs.memory import memory_estimate
from crate_mae.costs.trial import StepSettings, step_flops
from crate_mae.models.autoencoder import MaskedAutoencoder, build_without_memory
from crate_mae.models.config import ModelConfig
from crate_mae.models.masking import visible_patches
from crate_mae.training.options import LARGEST, option_name

_MOST_AT_ONCE = 10_000_000  # images and devices: tensors of more have more numbers than PyTorch counts
_FLOAT = 4  # bytes; weights, gradients and moments are float32 in either precision
_NUMBERS = 4  # per weight: the weight, its gradient, and AdamW's two moments
_AT_THE_PEAK = 3  # of them, when the backward pass begins: gradients replace activations
_SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What the cost of a run depends on beside its model.

    Attributes:
        batch_size: images per step, over all devices.
        mask_ratio: share of hidden patches.
        precision: float32 or bfloat16.
        devices: number of devices that share the batch.
        flops_per_s: speed of one device in training; None if unknown.
        link_bytes_per_s: speed at which one device sends to the others; None if unknown.
        images: in an epoch.
        epochs: of the run.
    """

    batch_size: int
    mask_ratio: float
    precision: str
    devices: int
    flops_per_s: float | None
    link_bytes_per_s: float | None
    images: int
    epochs: int

    def mistakes(self) -> Iterator[str]:
        """Describe each invalid value in a sentence."""
        wrong = []
        for key in ("batch_size", "devices", "images", "epochs"):
            value = getattr(self, key)
            most = _MOST_AT_ONCE if key in ("batch_size", "devices") else LARGEST
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                wrong.append(key)
                yield f"{option_name(key)} is {value}, but must be a whole number from 1 to {most:,}."
        for key in ("flops_per_s", "link_bytes_per_s"):
            if (value := getattr(self, key)) is not None and not 0 < value < math.inf:
                yield f"{option_name(key)} is {value}, but must be more than 0, and finite."
        if not 0 < self.mask_ratio < 1:
            yield f"--mask-ratio is {self.mask_ratio}, but must be between 0 and 1."
        if self.precision not in _SIZES:
            yield f"--precision is {self.precision}, but must be one of {', '.join(_SIZES)}."
        if wrong:
            return
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
        circumstances: what the estimate was made for.
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
    circumstances: Circumstances
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
        return (
            None if load.step_seconds is None else load.step_seconds * self.steps_per_epoch * self.circumstances.epochs
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to what JSON can hold, including the times of the whole run."""
        values = dataclasses.asdict(self)
        for way in ("copies", "sharded"):
            load = getattr(self, way)
            values[way] |= {"step_seconds": load.step_seconds, "run_seconds": self.run_seconds(load)}
        return values


def estimate_run(config: ModelConfig, circumstances: Circumstances) -> Estimate:
    """Estimate what a run needs.

    Args:
        config: of the model.
        circumstances: for which `mistakes` finds none.
    """
    c = circumstances
    share = c.batch_size // c.devices
    settings = StepSettings(
        batch_size=share, mask_ratio=c.mask_ratio, weight_decay=0.05, clip_grad=1.0, precision=c.precision
    )
    model = build_without_memory(config)
    parameters, encoder = _numbers(model), _numbers(model.encoder)
    encoder_flops, forward_flops, training_flops = step_flops(config, settings)
    memory = memory_estimate(config, settings)
    attention = attention_bytes(config, settings)
    cuda = memory.tensors - attention
    copies = parameters * _FLOAT if c.devices > 1 else 0  # DDP's buffers for gradients, kept between steps
    sharded = _more_on_shards(c, parameters, model)
    loads = (
        Load(
            state_bytes=_NUMBERS * parameters * _FLOAT,
            memory_cpu=memory.resident + copies,
            memory_cuda=cuda + copies,
            **_times(c, training_flops, 2 * parameters * _FLOAT),
        ),
        Load(
            state_bytes=_NUMBERS * parameters * _FLOAT // c.devices,
            memory_cpu=None,
            memory_cuda=cuda + sharded,
            **_times(c, training_flops, 3 * parameters * _FLOAT),
        ),
    )
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
        copies=loads[0],
        sharded=loads[1],
        steps_per_epoch=c.images // c.batch_size,
        assumptions=tuple(_assumptions(c)),
    )


def attention_bytes(config: ModelConfig, settings: StepSettings) -> int:
    """Bytes of n x n attention matrices saved on a CPU: one per image, head and layer; none if attention is fused."""
    if settings.precision == "float32":  # fused: see `theory.attention.ssa`; timm's attention is set to do the same
        return 0
    patches = config.grid_size[0] * config.grid_size[1]
    encoded = visible_patches(patches, settings.mask_ratio) if config.mask_tokens == "decoder" else patches
    sides = ((config.depth, config.num_heads, encoded), (config.decoder_depth, config.decoder_num_heads, patches))
    numbers = sum(depth * heads * (1 + tokens) ** 2 for depth, heads, tokens in sides)
    return settings.batch_size * numbers * _SIZES[settings.precision]


def _times(c: Circumstances, flops: int, exchanged_bytes: int) -> dict[str, Any]:
    """Bytes that a device sends, and seconds of computing and of sending, in a step."""
    sync = exchanged_bytes * (c.devices - 1) // c.devices
    compute = None if c.flops_per_s is None else flops / c.flops_per_s
    sending = None if compute is None else sync / c.link_bytes_per_s if c.link_bytes_per_s else 0.0
    return {"sync_bytes": sync, "compute_seconds": compute, "sync_seconds": sending}


def _more_on_shards(c: Circumstances, parameters: int, model: MaskedAutoencoder) -> int:
    """Bytes that FSDP adds: fewer for what is sharded, more for two layers that are gathered at a time."""
    if c.devices == 1:
        return 0
    largest = max(_numbers(block) for part in (model.encoder, model.decoder) for block in part.blocks)
    return 2 * largest * _FLOAT - _AT_THE_PEAK * parameters * _FLOAT * (c.devices - 1) // c.devices


def _numbers(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def _assumptions(c: Circumstances) -> Iterator[str]:
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
