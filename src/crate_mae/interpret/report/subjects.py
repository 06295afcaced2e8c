"""What a report looks at: the model, and its controls: other networks on the same images, and other images."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from crate_mae.data import ImageSource, open_source
from crate_mae.errors import UserError
from crate_mae.interpret.measure import Opened, fresh_twin, open_measurable
from crate_mae.interpret.report.settings import Settings
from crate_mae.models.autoencoder import MaskedAutoencoder

# The order is that of columns and of colours.
LABELS = {
    "model": "the model",
    "random": "random weights",
    "baseline": "baseline",
    "random_baseline": "random baseline",
    "other": "other images",
    "train": "training images",
}
UNTRAINED = ("random", "random_baseline")  # whose audit is in that of the trained networks
NETWORKS = ("model", "random", "baseline", "random_baseline")  # those with weights of their own


@dataclass(frozen=True)
class Subject:
    """A network on a source of images.

    Attributes:
        key: one of `LABELS`.
        opened: the network.
        source: the images.
    """

    key: str
    opened: Opened
    source: ImageSource

    @property
    def label(self) -> str:
        """What figures and tables call it."""
        return LABELS[self.key]

    @property
    def has_own_network(self) -> bool:
        """Whether it stands for a network, and not for the model on other images."""
        return self.key in NETWORKS


def open_subjects(settings: Settings) -> tuple[dict[str, Subject], dict[str, str]]:
    """Open everything that is named, before anything is measured.

    Returns:
        The subjects by key, and why the others are left out.

    Raises:
        UserError: for a mistake in a model or in data, weights that are not finite, held-out images that are the
            training images, or a model that cannot hide patches if it should.
    """
    data = open_source(settings.data)
    model = open_measurable(settings.model, settings.seed)
    found = {"model": Subject("model", model, data)}
    left_out: dict[str, str] = {}
    _add_twin(found, "random", model, settings.seed, left_out)
    if settings.baseline is None:
        left_out["baseline"] = "no model was given with --baseline"
    else:
        baseline = open_measurable(settings.baseline, settings.seed)
        found["baseline"] = Subject("baseline", baseline, data)
        if baseline.backbone.is_fresh:
            left_out[LABELS["random_baseline"]] = "the baseline has random weights itself"
        else:
            _add_twin(found, "random_baseline", baseline, settings.seed, left_out)
    for key, other in (("other", settings.other_data), ("train", settings.train_data)):
        if other is None:
            left_out[LABELS[key]] = f"none were given with --{key}-data"
        else:
            found[key] = Subject(key, model, open_source(other))
    _refuse_same(found)
    for subject in found.values():
        _refuse_unfit(subject.opened, settings.mask_ratio)
    return found, left_out


def _add_twin(found: dict[str, Subject], key: str, network: Opened, seed: int, left_out: dict[str, str]) -> None:
    """The same network with fresh weights as a control, or the reason why there is none."""
    twin = fresh_twin(network, seed + 1)
    if twin is None:
        left_out[LABELS[key]] = f"nobody can tell how a {network.name} from Python is built anew"
    else:
        found[key] = Subject(key, twin, found["model"].source)


def _refuse_same(found: dict[str, Subject]) -> None:
    """Raise a `UserError` where what should be a control is the thing itself."""
    data = found["model"].source
    for key in ("other", "train"):
        if key not in found:
            continue
        other = found[key].source
        fingerprint = data.fingerprint()
        if other is data or (fingerprint is not None and fingerprint == other.fingerprint()):
            raise UserError(
                f"--{key}-data are the same images as DATA ({data.name}), so there would be nothing to compare.\n"
                f"Give other images with --{key}-data, or leave it out."
            )


def _refuse_unfit(model: Opened, mask_ratio: float | None) -> None:
    """Raise a `UserError` for a network that cannot be measured as asked."""
    if mask_ratio is not None and not isinstance(model.net, MaskedAutoencoder):
        raise UserError(f"{model.name} cannot hide patches: leave out --mask-ratio, or leave out that model.")
    for name in _not_finite(model.net):
        raise UserError(
            f"The weights of {model.name} hold NaN or infinity, first in {name}.\n"
            "Nothing can be said of such a model: take an earlier checkpoint of the run."
        )


def _not_finite(net: nn.Module) -> Iterator[str]:
    return (name for name, value in net.state_dict().items() if not value.isfinite().all())
