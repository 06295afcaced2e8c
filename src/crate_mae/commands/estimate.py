"""`crate-mae estimate`: what a run asks for, before there is anything to run it on."""

from typing import TYPE_CHECKING, Any, Literal

from crate_mae.errors import UserError
from crate_mae.training.options import ImageSize

if TYPE_CHECKING:
    from crate_mae.costs.estimate import Estimate, Load
else:
    Estimate = Load = Any  # cyclopts evaluates annotations, and `--help` must not import torch for one

IMAGENET_1K = 1_281_167
PUBLISHED_EPOCHS = 800


def estimate(
    *,
    model: str,
    batch_size: int,
    image_size: ImageSize = None,
    channels: int | None = None,
    mask_ratio: float = 0.75,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    devices: int = 1,
    flops_per_s: float | None = None,
    link_bytes_per_s: float | None = None,
    images: int = IMAGENET_1K,
    epochs: int = PUBLISHED_EPOCHS,
    json: bool = False,
) -> Estimate:
    """Count what a run of pretraining asks for: parameters, operations, memory, bytes to send, and time.

    Nothing is measured: the model goes through a step without numbers, which takes seconds and little memory, for any
    size and number of devices. What the numbers rest on is printed with them; docs/planning.md explains it and
    compares it with measurements.

    Args:
        model: A name from `crate-mae models`.
        batch_size: Images per step, over all devices.
        image_size: Pixels, or HEIGHTxWIDTH. By default the model's.
        channels: Channels of the images. By default 3.
        mask_ratio: Share of hidden patches.
        precision: What matrix products are computed in.
        devices: GPUs, or processes, that share each batch.
        flops_per_s: Operations a second that one device reaches in training, such as 60e12. Without it there are no
            times.
        link_bytes_per_s: Bytes a second that one device sends to the others, such as 100e9.
        images: In an epoch. By default as many as ImageNet-1K has.
        epochs: Of the run. By default those of the CRATE-MAE paper.
        json: Print one JSON object instead of a table.

    Returns:
        The numbers, by name: `.parameters`, `.training_flops`, `.copies.memory_cuda`, `.sharded`, `.assumptions`, ...

    Raises:
        UserError: for every mistake in the options at once.
    """
    import json as encoder

    from rich.console import Console

    from crate_mae.costs.estimate import Circumstances, estimate_run
    from crate_mae.models.presets import preset

    circumstances = Circumstances(
        batch_size=batch_size,
        mask_ratio=mask_ratio,
        precision=precision,
        devices=devices,
        flops_per_s=flops_per_s,
        link_bytes_per_s=link_bytes_per_s,
        images=images,
        epochs=epochs,
    )
    mistakes = list(circumstances.mistakes())
    config = None
    try:
        changed = {"image_size": image_size, "in_chans": channels}
        config = preset(model).replace(**{key: value for key, value in changed.items() if value is not None})
    except UserError as error:
        mistakes.append(str(error))
    if mistakes or config is None:
        raise UserError("\n".join(mistakes))

    found = estimate_run(config, circumstances)
    shown = [encoder.dumps(found.to_dict(), indent=2)] if json else _lines(found)
    console = Console(highlight=False)
    for line in shown:
        console.print(line, soft_wrap=True, markup=False)
    return found


def _lines(found: Estimate) -> list[str]:
    """All numbers, and what they rest on."""
    c = found.circumstances
    height, width = found.image_size
    rows = [
        ("model", f"{found.model}, {height} x {width} pixels, {c.mask_ratio:.0%} hidden, {c.precision}"),
        (
            "parameters",
            f"{found.parameters:,} = {found.encoder_parameters:,} encoder + {found.decoder_parameters:,} decoder; "
            f"beside them {found.fixed:,} fixed numbers of positions",
        ),
        (
            "an image",
            f"{found.training_flops / 1e9:.4g} GFLOP in training; forward {found.encoder_flops / 1e9:.4g} encoder + "
            f"{found.decoder_flops / 1e9:.4g} decoder",
        ),
        ("batch", f"{c.batch_size:,} = {c.batch_size // c.devices:,} x {c.devices:,}"),
        (
            "activations",
            f"{_gib(found.activation_bytes)} saved for the backward pass of a device's images on a CPU, "
            f"{_gib(found.activation_bytes - found.attention_bytes)} on a GPU",
        ),
        *_lines_of(found, found.copies, "one device" if c.devices == 1 else "DDP"),
        *(_lines_of(found, found.sharded, "FSDP") if c.devices > 1 else []),
    ]
    if c.flops_per_s is None:
        rows.append(
            (
                "time",
                "needs --flops-per-s, what one device reaches in training: the operations of an image times the "
                "images per second of a run on it; `crate-mae doctor` gives the most that this CPU could reach",
            )
        )
    lines = [f"{name:<14} {text}" for name, text in rows]
    return [*lines, "", *(f"- {assumption}" for assumption in found.assumptions)]


def _lines_of(found: Estimate, load: Load, way: str) -> list[tuple[str, str]]:
    """Memory, traffic and time of one way to divide the run."""
    c = found.circumstances
    cpu = "" if load.memory_cpu is None else f", {_gib(load.memory_cpu)} on a CPU"
    rows = [
        (
            way,
            f"{_gib(load.memory_cuda)} of a GPU{cpu}; {_gib(load.state_bytes)} are weights, gradients and moments",
        )
    ]
    if c.devices > 1:
        rows.append(("", f"{load.sync_bytes / 1e9:.4g} GB to send, per device and step"))
    seconds, whole = load.step_seconds, found.run_seconds(load)
    if seconds is not None and whole is not None:
        rows += [
            ("", f"{seconds:.4g} s a step: {load.compute_seconds:.4g} computing, {load.sync_seconds:.4g} sending"),
            (
                "",
                f"{_time(seconds * found.steps_per_epoch)} an epoch of {found.steps_per_epoch:,} steps, {_time(whole)} "
                f"for {c.epochs:,}",
            ),
        ]
    return rows


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    """A length of time for people, in days where it takes some."""
    from crate_mae.training.progress import duration

    return f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else duration(seconds)
