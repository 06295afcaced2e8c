"""What a run of pretraining asks for, on any number of devices, before there are any: counted, not measured."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from crate_mae.costs.counting import forward_flops, masked_encoder_flops, training_flops
from crate_mae.costs.foretold import build_without_memory, foretell_memory
from crate_mae.costs.trial import StepSettings
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.config import ModelConfig
from crate_mae.models.masking import visible_patches
from crate_mae.training.options import option_name

_FLOAT = 4  # bytes; weights, gradients and moments are float32 in either precision
_NUMBERS = 4  # for every weight: itself, its gradient, and AdamW's two moments
_AT_THE_PEAK = 3  # of them, when the backward pass begins: gradients come as activations go
_SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a run's cost depends on beside its model.

    Attributes:
        batch_size: images per step, over all devices.
        mask_ratio: share of hidden patches.
        precision: float32 or bfloat16.
        devices: that share the batch.
        flops_per_s: that one device reaches in training; None if not known.
        link_bytes_per_s: that one device sends to the others; None if not known.
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
        """A sentence for each value that cannot be."""
        wrong = []
        for key in ("batch_size", "devices", "images", "epochs"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                wrong.append(key)
                yield f"{option_name(key)} is {value}, but must be a whole number of at least 1."
        for key in ("flops_per_s", "link_bytes_per_s"):
            if (value := getattr(self, key)) is not None and not value > 0:
                yield f"{option_name(key)} is {value}, but must be more than 0."
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
                f"take --batch-size {nearest}."
            )
        if self.batch_size > self.images:
            yield f"A batch of {self.batch_size} is larger than the {self.images} images of --images."
        if self.devices > 1 and self.flops_per_s is not None and self.link_bytes_per_s is None:
            yield "The time on several devices needs --link-bytes-per-s beside --flops-per-s."


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of each device in one of the two ways to divide a run.

    Attributes:
        state_bytes: weights, gradients and AdamW's moments.
        memory_cpu: bytes of a process at the worst moment of a step on a CPU; None where that is not run.
        memory_cuda: bytes of all tensors at that moment on a GPU, where attention keeps no n x n matrices.
        sync_bytes: that a device sends, and receives, in a step.
        compute_seconds: of a step; None if the speed of a device is not known.
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
        """Computing, then sending: what a step takes if nothing overlaps."""
        if self.compute_seconds is None or self.sync_seconds is None:
            return None
        return self.compute_seconds + self.sync_seconds


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run asks for.

    Attributes:
        model: its name.
        image_size: height and width in pixels.
        circumstances: what was asked.
        parameters: that are trained, encoder and decoder.
        encoder_parameters: those of the encoder.
        decoder_parameters: all others, the mask token among them.
        fixed: numbers that are not trained: tables of positions.
        encoder_flops: of the forward pass of one image, by the encoder.
        decoder_flops: by the decoder.
        training_flops: of one image in a training step, forward and backward.
        activation_bytes: what the forward pass of one device's images saves for the backward pass, on a CPU.
        attention_bytes: the part of it that attention saves as n x n matrices, which a GPU does not.
        copies: every device with a whole copy of the model (DDP).
        sharded: every device with its share of the model (FSDP).
        steps_per_epoch: full batches in one pass.
        assumptions: sentences that the numbers rest on.
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
        """All epochs, divided in one of the two ways."""
        return (
            None if load.step_seconds is None else load.step_seconds * self.steps_per_epoch * self.circumstances.epochs
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, with the times of the whole run."""
        values = dataclasses.asdict(self)
        for way in ("copies", "sharded"):
            load = getattr(self, way)
            values[way] |= {"step_seconds": load.step_seconds, "run_seconds": self.run_seconds(load)}
        return values


def estimate_run(config: ModelConfig, circumstances: Circumstances) -> Estimate:
    """Count what a run asks for.

    Args:
        config: of the model.
        circumstances: without mistakes.
    """
    c = circumstances
    share = c.batch_size // c.devices
    settings = StepSettings(
        batch_size=share, mask_ratio=c.mask_ratio, weight_decay=0.05, clip_grad=1.0, precision=c.precision
    )
    model = build_without_memory(config)
    parameters, encoder = _numbers(model), _numbers(model.encoder)
    counts = (masked_encoder_flops, forward_flops, training_flops)
    masked, forward, training = (count(config, settings) for count in counts)
    memory, attention = foretell_memory(config, settings), membership_bytes(config, settings)
    cuda = memory.tensors - attention
    copies, sharded = _more_on_copies(c, parameters), _more_on_shards(c, parameters, model)
    loads = (
        Load(
            state_bytes=_NUMBERS * parameters * _FLOAT,
            memory_cpu=memory.resident + copies,
            memory_cuda=cuda + copies,
            **_times(c, training, 2 * parameters * _FLOAT),
        ),
        Load(
            state_bytes=_NUMBERS * parameters * _FLOAT // c.devices,
            memory_cpu=None,
            memory_cuda=cuda + sharded,
            **_times(c, training, 3 * parameters * _FLOAT),
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
        encoder_flops=masked / share,
        decoder_flops=(forward - masked) / share,
        training_flops=training / share,
        activation_bytes=memory.saved,
        attention_bytes=attention,
        copies=loads[0],
        sharded=loads[1],
        steps_per_epoch=c.images // c.batch_size,
        assumptions=tuple(_assumptions(c)),
    )


def membership_bytes(config: ModelConfig, settings: StepSettings) -> int:
    """What attention saves as n x n matrices on a CPU: one for every image, head and layer, or none if it is fused."""
    if settings.precision == "float32":  # see `theory.attention.ssa`; timm's attention is told to do the same
        return 0
    patches = config.grid_size[0] * config.grid_size[1]
    encoded = visible_patches(patches, settings.mask_ratio) if config.mask_tokens == "decoder" else patches
    sides = ((config.depth, config.num_heads, encoded), (config.decoder_depth, config.decoder_num_heads, patches))
    numbers = sum(depth * heads * (1 + tokens) ** 2 for depth, heads, tokens in sides)
    return settings.batch_size * numbers * _SIZES[settings.precision]


def _times(c: Circumstances, flops: int, sent_by_all_but_one: int) -> dict[str, Any]:
    """The bytes that a device sends, and the seconds of computing and of sending."""
    sync = sent_by_all_but_one * (c.devices - 1) // c.devices
    compute = None if c.flops_per_s is None else flops / c.flops_per_s
    sending = None if compute is None else sync / c.link_bytes_per_s if c.link_bytes_per_s else 0.0
    return {"sync_bytes": sync, "compute_seconds": compute, "sync_seconds": sending}


def _more_on_copies(c: Circumstances, parameters: int) -> int:
    """Bytes that DDP adds to those of one process alone: room for gradients, kept between steps."""
    return parameters * _FLOAT if c.devices > 1 else 0


def _more_on_shards(c: Circumstances, parameters: int, model: MaskedAutoencoder) -> int:
    """Bytes that FSDP adds: less of what is kept, and two layers that are whole for the time being."""
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
        "Memory is that of the worst moment of a step as PyTorch works on a CPU, of which every tensor was followed; a "
        "GPU's is without the n x n matrices of attention and without what its allocator and libraries keep besides."
    )
    if c.devices > 1:
        yield "DDP keeps room for gradients between steps, and sends 2 (N - 1) / N of them: as much as it gets."
        yield "FSDP gathers weights forward and backward and scatters gradients: 3 (N - 1) / N; two layers are whole."
        yield "All devices are equally fast, and so are the links among them."
    if c.flops_per_s is not None:
        yield "Nothing overlaps: a step computes at --flops-per-s, then sends. Images are always there in time."
        yield "AdamW, checkpoints and measurements take no time."
