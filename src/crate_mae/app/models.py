"""The models of the app: loaded once, and used by one visitor at a time."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from crate_mae.data.dataset import default_generator_seeded
from crate_mae.errors import UserError
from crate_mae.models.autoencoder import MaskedAutoencoder, build
from crate_mae.models.weights import is_untrained, load_autoencoder

_SEED = 0  # of random initialisation


@dataclass(frozen=True)
class AppModel:
    """A model in `eval()` mode, on the CPU.

    Attributes:
        name: as the user wrote it.
        net: the model.
        is_random: whether its weights are a random initialisation.
        lock: held while the model is traced, since tracing adds hooks to it.
    """

    name: str
    net: MaskedAutoencoder
    is_random: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of rows and columns of patches."""
        return self.net.grid_size

    @cached_property
    def untrained(self) -> "AppModel":
        """The same network with random initialisation."""
        with default_generator_seeded(_SEED):
            return AppModel(f"{self.name}, untrained", build(self.net.config).eval(), is_random=True)


def open_models(names: Sequence[str]) -> dict[str, AppModel]:
    """Load models by name, in order; repeated names are loaded once.

    Raises:
        UserError: for a model that cannot be loaded, has no decoder, or takes neither grey nor colour images.
    """
    found = {}
    for name in map(str, names):
        with default_generator_seeded(_SEED):
            net = load_autoencoder(name)
        if net.config.in_chans not in (1, 3):
            raise UserError(
                f"{name} takes images of {net.config.in_chans} channels, but the app has only grey and colour ones."
            )
        found[name] = AppModel(name, net, is_random=is_untrained(name))
    return found
