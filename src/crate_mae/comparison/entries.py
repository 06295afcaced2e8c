"""The entries of a comparison: models for the same images, what a step of each costs, and how its budget is spent."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from crate_mae.comparison.options import Budget, CompareOptions, alternatives
from crate_mae.costs.memory import step_memory
from crate_mae.costs.trial import StepSettings, TrialStep
from crate_mae.data import ImageSource, refuse_shared_images
from crate_mae.data.base import align_classes, read_all, refuse_unreadable
from crate_mae.errors import UserError
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.extract import Extraction
from crate_mae.evaluation.probes import refuse_small_classes
from crate_mae.models.autoencoder import MaskedAutoencoder, build
from crate_mae.models.config import NEIGHBOURS, ModelConfig
from crate_mae.models.features import DEFAULT_LAYER
from crate_mae.training.images import open_named
from crate_mae.training.options import PretrainOptions
from crate_mae.training.preflight import faster_precision, loading_seconds, multiplies_in_bfloat16, seconds_with_loading
from crate_mae.training.pretraining import augmentation
from crate_mae.training.randomness import Purpose, derive_seed
from crate_mae.training.resolve import resolve_pretraining

_ROUNDS = 11
_LEAST_ROUNDS = 3
_MOST_SECONDS = 60.0  # of all rounds, once there are enough of them


@dataclass(frozen=True)
class Entry:
    """A network as it will be trained, if the search chooses it among the alternatives of its entry.

    Attributes:
        named: the entry as it is named in the options, with all alternatives.
        name: of the preset, with the settings of this network.
        config: of a run of one step, from which its other runs differ in steps, learning rate, seed and precision.
        model: the configuration of the network.
    """

    named: str
    name: str
    config: PretrainOptions
    model: ModelConfig

    def build(self, seed: int) -> MaskedAutoencoder:
        """The model with the random initialisation of a run with this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, Purpose.WEIGHTS))
            return build(self.model).eval()

    def step_settings(self, precision: str) -> StepSettings:
        """The settings of a training step of this model."""
        c = self.config
        return StepSettings(
            batch_size=c.batch_size,
            mask_ratio=c.mask_ratio,
            weight_decay=c.weight_decay,
            clip_grad=c.clip_grad,
            precision=precision,
        )


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images that entries are trained and measured on.

    Attributes:
        train: for pretraining and for fitting the probes.
        val: to measure on.
        train_name: name that opens `train` from any folder.
        val_name: the same for `val`.
        classes: number of classes of the labels; 0 if there are no probes.
        why_no_probes: a sentence, or empty.
    """

    train: ImageSource
    val: ImageSource
    train_name: str
    val_name: str
    classes: int
    why_no_probes: str


def open_images(options: CompareOptions) -> Images:
    """Open both data sets, and check that their labels fit together.

    Raises:
        UserError: if there is no such data, both are the same, a probe cannot be fitted to the labels, or too many
            validation images cannot be read, which would otherwise only be found after all training.
    """
    (train, train_name), (val, val_name) = open_named(options.train), open_named(options.val)
    refuse_shared_images(train, val, "--train", "models would be measured on images that they were trained on")
    _, bad = read_all(val, range(len(val)), lambda _image: None)
    refuse_unreadable(val, bad, Extraction().max_bad, measured="validation images")
    unlabelled = [source.name for source in (train, val) if source.labels is None]
    classes = 0 if unlabelled else _check_classes(train, val)
    why = f"{' and '.join(unlabelled)} without labels: only completions are measured." if unlabelled else ""
    return Images(train=train, val=val, train_name=train_name, val_name=val_name, classes=classes, why_no_probes=why)


def resolve_entries(options: CompareOptions, images: Images) -> list[Entry]:
    """Configure every network of every entry, with open options set from the images and the machine.

    Raises:
        UserError: for a mistake in the options, or models that take images of different sizes.
    """
    entries = []
    for named in options.models:
        for name in alternatives(named):
            config, model, _ = resolve_pretraining(options.pretraining(name), 1)
            entries.append(Entry(named, name, config, model))
    for entry, other in itertools.pairwise(entries):
        if entry.named == other.named and _task(entry.model) != _task(other.model):
            raise UserError(
                f"{entry.name} and {other.name} complete different patches, so the search cannot choose between them "
                "by their losses.\nMake them entries of their own, or give alternatives of other settings."
            )
    sizes = {entry.name: entry.model.image_size for entry in entries}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {height} x {width}" for name, (height, width) in sizes.items())
        raise UserError(
            f"The models take images of different sizes ({listed}), so their scores cannot be compared.\n"
            "Give one size for all with --image-size."
        )
    if images.classes:
        wanted = extraction(options)
        for entry in entries:
            backbone = open_backbone(entry.build(0))
            wanted.layer_numbers(backbone)  # both raise for a layer or pooling that the encoder does not have
            wanted.pooling_of(backbone)
    return entries


def _task(model: ModelConfig) -> tuple[object, ...]:
    """What the loss of a model depends on besides its predictions."""
    return model.image_size, model.patch_size, model.norm_pix_loss


def extraction(options: CompareOptions) -> Extraction:
    """The settings of feature extraction for the probes."""
    layer = DEFAULT_LAYER if options.probe_layer is None else options.probe_layer
    return Extraction(layers=(layer,), pooling=options.pooling, workers=options.workers)


def _check_classes(train: ImageSource, val: ImageSource) -> int:
    """The number of classes, after checking before the training that the probes can be fitted."""
    classes = align_classes(train, val)
    if len(train) < NEIGHBOURS:
        raise UserError(f"{train.name} has {len(train)} labelled images, but the k-NN probe needs {NEIGHBOURS}.")
    assert train.labels is not None, "it has classes"
    refuse_small_classes(train.labels[train.labels >= 0], 2, train.classes)  # -1: an image that cannot be read
    return len(classes)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The measured costs of one entry.

    Attributes:
        parameters: trainable parameters of encoder and decoder.
        encoder_parameters: those of the encoder alone, which the probes use.
        encoder_flops: of encoding one image with nothing hidden.
        training_flops: of one image in training, forward and backward.
        precision: of training.
        step_seconds: one step with its images in memory, the median over rounds.
        loading_seconds: to read and prepare the images of a step, by all loader processes together.
        memory: peak memory of a step in bytes; None if unknown.
    """

    parameters: int
    encoder_parameters: int
    encoder_flops: float
    training_flops: float
    precision: str
    step_seconds: float
    loading_seconds: float
    memory: int | None

    def seconds_per_step(self, workers: int) -> float:
        """Seconds of a step with its images."""
        return seconds_with_loading(self.step_seconds, self.loading_seconds, workers)


def measure_costs(entries: Sequence[Entry], train: ImageSource, device: torch.device) -> list[Costs]:
    """Measure the costs of all entries on this machine, with their steps timed in turns.

    Args:
        entries: with the same batch size and number of loader processes.
        train: their training images.
        device: where they are trained.
    """
    wanted = entries[0].config.precision
    able = ["float32", "bfloat16"] if multiplies_in_bfloat16(device) else ["float32"]
    tried = able if wanted == "auto" else [wanted]
    trials = {(e.name, p): TrialStep(e.model, e.step_settings(p), device) for e in entries for p in tried}
    seconds = dict(zip(trials, seconds_in_turns(list(trials.values())), strict=True))
    config = entries[0].config
    per_image = loading_seconds(train, augmentation(config, entries[0].model))
    loading = per_image * config.batch_size / max(1, config.workers)
    costs = []
    for entry in entries:
        trial, times = trials[entry.name, tried[0]], {p: seconds[entry.name, p] for p in tried}
        precision = tried[0] if len(tried) == 1 else faster_precision(**times)
        memory = step_memory(entry.model, entry.step_settings(precision), device, entry.config.threads)
        batch, model = entry.config.batch_size, trial.model
        costs.append(
            Costs(
                parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                encoder_parameters=sum(p.numel() for p in model.encoder.parameters() if p.requires_grad),
                encoder_flops=trial.encoder_flops() / batch,
                training_flops=trial.training_flops() / batch,
                precision=precision,
                step_seconds=times[precision],
                loading_seconds=loading,
                memory=memory,
            )
        )
    return costs


def seconds_in_turns(trials: Sequence[Callable[[], float]]) -> list[float]:
    """The median seconds of each trial, run in turns so that a busy machine slows all of them alike."""
    for trial in trials:
        trial()
        trial()
    times: list[list[float]] = [[] for _ in trials]
    started = time.perf_counter()
    for number in range(_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - started > _MOST_SECONDS:
            break
        for trial, seconds in zip(trials, times, strict=True):
            seconds.append(trial())
    return [statistics.median(seconds) for seconds in times]


@dataclass(frozen=True)
class BudgetPlan:
    """How one entry spends its budget.

    Attributes:
        first_rate: learning rate per 256 images that is tried first; `next_rate` chooses the following ones.
        tries: number of learning rates to try; 0 uses the first without a search.
        search_steps: steps of each try.
        final_steps: steps of the final run of each seed.
    """

    first_rate: float
    tries: int
    search_steps: int
    final_steps: int


def plan_budget(
    budget: Budget, entry: Entry, costs: Costs, *, tries: int, share: float, networks: int = 1
) -> BudgetPlan:
    """Divide the budget of an entry into the steps of the search and of the final run.

    Args:
        budget: of every entry.
        entry: the network that would be trained.
        costs: of this network.
        tries: number of learning rates to try; 1 means no search for it.
        share: of the budget for the search, divided equally among networks and tries.
        networks: number of alternatives of the entry.

    Raises:
        UserError: if the budget is too small.
    """
    name, config = entry.name, entry.config
    per_step = {
        "steps": 1.0,
        "minutes": costs.seconds_per_step(config.workers) / 60,
        "flops": costs.training_flops * config.batch_size,
    }[budget.kind]
    steps = int(budget.amount / per_step)
    if steps < 1:
        raise UserError(
            f"--budget {budget} is too small for one step of {name}, which takes {budget.kind}={per_step:.3g}."
        )
    searched = tries * networks
    if searched == 1:
        return BudgetPlan(config.lr, tries=0, search_steps=0, final_steps=steps)
    search = int(steps * share / searched)
    if search < 1 or steps - searched * search < 1:
        rates = f"{tries} learning rates" if tries > 1 else "one learning rate"
        what = rates if networks == 1 else f"{networks} networks with {rates} each"
        advice = "skip the search with --lr-search 1" if networks == 1 else "fewer alternatives"
        raise UserError(
            f"--budget {budget} gives {name} {steps} step(s): too few for a search over {what} with "
            f"{share:.0%} of them.\nGive a larger budget, or {advice}"
        )
    return BudgetPlan(config.lr, tries, search, steps - searched * search)
