"""Some images of a source: what is held out, chosen, or readable."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from crate_mae.data.base import ImageSource


class Part(ImageSource):
    """Some images of a source, as a source of their own.

    Args:
        whole: the source.
        indices: which of its images.
        labels: one per image of the part, in place of the source's; without them the part has none.
        classes: what these labels stand for.
    """

    def __init__(
        self,
        whole: ImageSource,
        indices: Int[np.ndarray, "n"],
        *,
        labels: Int[np.ndarray, "n"] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(whole.name, labels, classes if labels is not None else whole.classes)
        self._whole = whole
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, i: int) -> Image.Image | Tensor:
        """Image i of the part."""
        return self._whole.read(int(self._indices[i]))

    def location(self, i: int) -> str:
        """Where image i of the part is."""
        return self._whole.location(int(self._indices[i]))
