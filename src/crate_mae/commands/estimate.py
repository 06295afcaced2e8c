"""`crate-mae estimate`: what a pretraining run needs, before there is a machine to run it on."""

from crate_mae.commands.console import print_json, takes
from crate_mae.costs.estimate import Estimate, EstimateOptions, Load, estimate_run
from crate_mae.drawing.text import duration, plural
from crate_mae.terminal import open_console


@takes(EstimateOptions)
def estimate(options: EstimateOptions) -> Estimate:
    """Estimate what a pretraining run needs: parameters, operations, memory, bytes to send, and time.

    Nothing is measured: a step is simulated on tensors without values, which takes seconds and little memory for any
    size of model and number of devices. The assumptions are printed with the numbers; docs/planning.md explains them
    and compares the estimates with measurements.

    Returns:
        The numbers, by name: `.parameters`, `.training_flops`, `.copies.memory_cuda`, `.sharded`, `.assumptions`, ...

    Raises:
        UserError: that lists all mistakes in the options.
    """
    found = estimate_run(options)
    if options.json:
        print_json(found.to_dict())
        return found
    console = open_console()
    for name, lines in _rows(found).items():
        for number, line in enumerate(lines):
            console.print_text(f"{'' if number else name:<14} {line}")
    console.print_text("\n".join(["", *(f"- {assumption}" for assumption in found.assumptions)]))
    return found


def _rows(found: Estimate) -> dict[str, list[str]]:
    """The lines of each row of the table, by the row's name."""
    c = found.circumstances
    height, width = found.image_size
    rows = {
        "model": [f"{found.model}, {height} x {width} pixels, {c.mask_ratio:.0%} hidden, {c.precision}"],
        "parameters": [
            f"{found.parameters:,} = {found.encoder_parameters:,} encoder + {found.decoder_parameters:,} decoder; "
            f"in addition {found.fixed:,} fixed numbers of position embeddings"
        ],
        "an image": [
            f"{found.training_flops / 1e9:.4g} GFLOP in training; forward {found.encoder_flops / 1e9:.4g} encoder + "
            f"{found.decoder_flops / 1e9:.4g} decoder"
        ],
        "batch": [f"{c.batch_size:,} images = {c.batch_size // c.devices:,} x {plural(c.devices, 'device')}"],
        "activations": [
            f"{_gib(found.activation_bytes)} saved for the backward pass of a device's images on a CPU, "
            f"{_gib(found.activation_bytes - found.attention_bytes)} on a GPU"
        ],
    }
    if c.devices == 1:
        rows["one device"] = _load_lines(found, found.copies)
    else:
        rows |= {"DDP": _load_lines(found, found.copies), "FSDP": _load_lines(found, found.sharded)}
    if c.flops_per_s is None:
        rows["time"] = [
            "needs --flops-per-s, the speed that one device reaches in training: the operations of an image times the "
            "images per second of a run on it; `crate-mae doctor` prints the most that this CPU could reach"
        ]
    return rows


def _load_lines(found: Estimate, load: Load) -> list[str]:
    """Memory, traffic and time if the run is divided in one of the two ways."""
    c = found.circumstances
    cpu = "" if load.memory_cpu is None else f", {_gib(load.memory_cpu)} on a CPU"
    lines = [f"{_gib(load.memory_cuda)} of a GPU{cpu}; {_gib(load.state_bytes)} are weights, gradients and moments"]
    if c.devices > 1:
        lines.append(f"{load.sync_bytes / 1e9:.4g} GB to send, per device and step")
    seconds, whole = load.step_seconds, found.run_seconds(load)
    if seconds is not None and whole is not None:
        epoch = _time(seconds * found.steps_per_epoch)
        lines += [
            f"{seconds:.4g} s a step: {load.compute_seconds:.4g} computing, {load.sync_seconds:.4g} sending",
            f"{epoch} an epoch of {found.steps_per_epoch:,} steps, {_time(whole)} for {plural(c.epochs, 'epoch')}",
        ]
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    """Format a duration, in days if it is longer than two."""
    return f"{seconds / 86400:,.1f} days" if seconds > 2 * 86400 else duration(seconds)
