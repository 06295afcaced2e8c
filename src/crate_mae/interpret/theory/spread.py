"""Numbers over several draws, and where the draws come from."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of the population, 0 for one draw) over draws."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """That of the values, of which there is at least one."""
        return cls(statistics.fmean(values), statistics.pstdev(values))


def spreads(rows: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """The spread of every key, over rows with the same keys."""
    return {key: Spread.of([row[key] for row in rows]) for key in rows[0]}


def generator(seed: int, draw: int) -> torch.Generator:
    """The source of randomness of a draw: the same in every experiment, so that what they vary is all that varies."""
    return torch.Generator().manual_seed(seed * 1000 + draw)


def cosine(x: Tensor, y: Tensor) -> float:
    """<X, Y> / (||X|| ||Y||), the matrices taken as vectors."""
    return ((x * y).sum() / (torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))).item()


def relative_error(x: Tensor, exact: Tensor) -> float:
    """||X - exact|| / ||exact||."""
    return (torch.linalg.vector_norm(x - exact) / torch.linalg.vector_norm(exact)).item()
