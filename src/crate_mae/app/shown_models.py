"""The models that a page shows: loaded once, and asked by one visitor at a time."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from crate_mae.data.dataset import default_generator_seeded
from crate_mae.errors import UserError
from crate_mae.models.autoencoder import MaskedAutoencoder, build
from crate_mae.models.presets import list_models
from crate_mae.models.weights import load_autoencoder

_SEED = 0  # of fresh weights


@dataclass(frozen=True)
class ShownModel:
    """A model in `eval()` mode, on the CPU.

    Attributes:
        name: what the user called it.
        net: the model.
        is_fresh: whether its weights are random.
        turn: to be held while the model is looked into, which adds hooks to it for the time.
    """

    name: str
    net: MaskedAutoencoder
    is_fresh: bool = False
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.net.grid_size

    @cached_property
    def untrained(self) -> "ShownModel":
        """The same network with fresh weights."""
        with default_generator_seeded(_SEED):
            return ShownModel(f"{self.name}, untrained", build(self.net.config).eval(), is_fresh=True)


def open_models(names: Sequence[str]) -> dict[str, ShownModel]:
    """Load models by name, in order; a name that is given twice counts once.

    Raises:
        UserError: for a model that cannot be loaded, has no decoder, or takes neither grey nor colour pictures.
    """
    found = {}
    for name in map(str, names):
        with default_generator_seeded(_SEED):
            net = load_autoencoder(name)
        if net.config.in_chans not in (1, 3):
            raise UserError(
                f"{name} takes images of {net.config.in_chans} channels, and the page has only grey and colour ones."
            )
        found[name] = ShownModel(name, net, is_fresh=name in list_models())
    return found
