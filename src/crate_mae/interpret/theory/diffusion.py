"""Fourth claim: the step forward structures tokens, and the same step with a minus sign undoes it."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from crate_mae.interpret.theory.spread import Spread, generator
from crate_mae.theory import coherence, orthonormal_bases, project, sample_mixture, structured_diffusion


@dataclass(frozen=True, kw_only=True)
class DiffusionRun:
    """One example, over draws.

    Attributes:
        name: of the example.
        together: whether R^c is that of all tokens at once, or of each token alone.
        d: dimension.
        h: number of lines.
        coherence: of the lines.
        step_size: kappa.
        steps: forward, and again in reverse.
        forward: mean angle (degrees) between a token and the nearest line, before the first step and after each.
        reverse: the same on the way back.
        own: mean angle between a token and the line that it came from, on the way forward.
        distance: mean distance between a token and the nearest line, on the way forward.
        norm: mean norm of the tokens on the way forward.
        missed: distance of the reverse's end from the start, as a share of the way that was gone, by number of steps
            into which the same way was cut.
        paths: of the first draw, forward then reverse, to be drawn: time x tokens x d.
        bases: of the first draw.
    """

    name: str
    together: bool
    d: int
    h: int
    coherence: float
    step_size: float
    steps: int
    forward: tuple[Spread, ...]
    reverse: tuple[Spread, ...]
    own: tuple[Spread, ...]
    distance: tuple[Spread, ...]
    norm: tuple[Spread, ...]
    missed: dict[int, Spread]
    paths: tuple[tuple[tuple[float, ...], ...], ...]
    bases: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """All examples, with what they have in common."""

    draws: int
    tokens: int
    noise_std: float
    eps: float
    runs: tuple[DiffusionRun, ...]


def measure_diffusion(seed: int = 0, draws: int = 5, *, tokens: int = 80) -> Diffusion:
    """Lines in the plane, at right angles and at 60 degrees, and three lines in space; each token alone or all at once.

    The distortion is chosen in favour of the claim: 1/a is twice the noise's variance for a token alone.
    """
    noise_std = 0.2
    eps = 2**0.5 * noise_std
    angle = math.pi / 3
    oblique = torch.tensor([[[1.0], [0.0]], [[math.cos(angle)], [math.sin(angle)]]], dtype=torch.float64)
    upright = torch.eye(2, dtype=torch.float64).unsqueeze(-1)
    examples = [
        ("two lines at right angles", upright, False),
        ("two lines at right angles", upright, True),
        ("two lines at 60 degrees", oblique, False),
        ("three lines in space", None, False),
    ]
    runs = tuple(_example(seed, draws, name, u, together, tokens, noise_std, eps) for name, u, together in examples)
    return Diffusion(draws=draws, tokens=tokens, noise_std=noise_std, eps=eps, runs=runs)


def _example(
    seed: int,
    draws: int,
    name: str,
    fixed: Tensor | None,
    together: bool,
    tokens: int,
    noise_std: float,
    eps: float,
    steps: int = 40,
) -> DiffusionRun:
    # kappa = 1/a per unit of time: the rate of many tokens is flatter by their number.
    way = 3 * eps**2 * (tokens if together else 1)
    forwards, reverses, owns, distances, norms, missed = [], [], [], [], [], []
    paths, bases = torch.empty(0), torch.empty(0)
    for draw in range(draws):
        source = generator(seed, draw)
        u = orthonormal_bases(3, 3, 1, source) if fixed is None else fixed
        sample = sample_mixture(tokens, u, noise_std, source)
        there, back = _there_and_back(sample.tokens, u, way, steps, eps, together)
        forwards.append([_angles(z, u).amin(-1).mean().item() for z in there])
        reverses.append([_angles(z, u).amin(-1).mean().item() for z in back])
        own = sample.labels.unsqueeze(-1)
        owns.append([_angles(z, u).gather(-1, own).mean().item() for z in there])
        distances.append([_distance(z, u) for z in there])
        norms.append([torch.linalg.vector_norm(z, dim=-1).mean().item() for z in there])
        cuts = {n: _there_and_back(sample.tokens, u, way, n, eps, together) for n in (steps // 4, steps, 4 * steps)}
        missed.append({n: _missed(*both) for n, both in cuts.items()})
        if draw == 0:
            paths, bases = torch.cat([there, back[1:]]), u
    return DiffusionRun(
        name=name,
        together=together,
        d=bases.shape[1],
        h=bases.shape[0],
        coherence=coherence(bases).item(),
        step_size=way / steps,
        steps=steps,
        forward=_by_step(forwards),
        reverse=_by_step(reverses),
        own=_by_step(owns),
        distance=_by_step(distances),
        norm=_by_step(norms),
        missed={n: Spread.of([row[n] for row in missed]) for n in missed[0]},
        paths=tuple(tuple(tuple(token) for token in moment) for moment in paths.tolist()),
        bases=tuple(tuple(line) for line in bases.squeeze(-1).tolist()),
    )


def _there_and_back(
    z: Float[Tensor, "n d"], u: Float[Tensor, "h d p"], way: float, steps: int, eps: float, together: bool
) -> tuple[Float[Tensor, "t n d"], Float[Tensor, "t n d"]]:
    there = structured_diffusion(z, u, step_size=way / steps, steps=steps, eps=eps, together=together)
    back = structured_diffusion(there[-1], u, step_size=-way / steps, steps=steps, eps=eps, together=together)
    return there, back


def _missed(there: Float[Tensor, "t n d"], back: Float[Tensor, "t n d"]) -> float:
    return (torch.linalg.vector_norm(back[-1] - there[0]) / torch.linalg.vector_norm(there[-1] - there[0])).item()


def _angles(z: Float[Tensor, "n d"], u: Float[Tensor, "h d 1"]) -> Float[Tensor, "n h"]:
    """Angle in degrees between every token and every line: it does not fall merely because tokens shrink."""
    inside = project(z, u).squeeze(-1).mT
    outside = (z.square().sum(-1, keepdim=True) - inside.square()).clamp_min(0).sqrt()
    return torch.rad2deg(torch.atan2(outside, inside.abs()))


def _distance(z: Float[Tensor, "n d"], u: Float[Tensor, "h d 1"]) -> float:
    away = torch.linalg.vector_norm(z, dim=-1) * _angles(z, u).amin(-1).deg2rad().sin()
    return away.mean().item()


def _by_step(rows: list[list[float]]) -> tuple[Spread, ...]:
    return tuple(Spread.of(list(values)) for values in zip(*rows, strict=True))
