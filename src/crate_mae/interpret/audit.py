"""Does each step of a layer do what it was derived to do? Claims, their controls, and the rule that judges them.

Every claim is about one step of one layer, and is measured on the same images before the step, after it, and after
each of its controls: what could replace the step without any derivation. `CLAIMS` is the whole table.

**The margin** of an image is by how much the step beats the best of its controls in that image, in the direction that
is claimed:

    margin_i = min over controls c of  sign (after_i - control_ci),    sign = +1 if the value is to rise, -1 to fall.

**A claim holds** in a layer if all of this is true:

1. the margin is positive in at least 95% of the images;
2. its mean is at least 1% of the mean value before the step;
3. the one-sided paired t-test of "the mean margin is positive" has p < 0.05 after Holm's correction over all claims
   and layers of the network on these tokens;
4. it was learned: that share of the value before the step is larger than in each of several random initialisations of
   the same network, on the same images (of claims about single images, the first of them). This condition does not
   apply to claims about the lasso, since an objective is defined by the network's own dictionary, and the all-zero code
   and relu(x) are all that it has to beat; nor to theorems, since a theorem holds for all weights, trained or not; nor
   if no random initialisations were measured.

Some claims are about all images at once (`Claim.pooled`). Their margin has no share of images; its spread is that of a
jackknife over groups of images, and the t-test has one degree of freedom less than there are groups.

Which control belongs to which claim is part of the claim. Collapse (uniform attention, plain shrinking) lowers R^c
more than any sorting does, so it is a control of the claim that a step sorts, at an equal fall of R^c, and not of the
claim that it compresses. A random move raises R^c more than any undoing of a compression does, so it is not a control
of the claim that the decoder decompresses.

**A theorem** is a claim that a layer lists in its attribute `theorems`: that the step is no worse than the first of the
claim's controls, for all weights and all tokens. If one image contradicts it, the module has a bug, and the status
is "contradiction". Its controls are measured all the same, and `AuditRow.holds` is whether it beats them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from scipy.stats import t as student_t
from torch import Tensor

from crate_mae.interpret.statistics import Part, Statistic, short_place, statistic

Tokens = Literal["all", "visible"]
Status = Literal["theorem", "holds", "does not hold", "contradiction"]

COMPRESS = "compress"
COMPRESS_NORMALISED = "compress_normalised"
COMPRESS_UNIT = "compress_unit"
SORT = "sort"
EXPAND = "expand"
EXPAND_LAYER = "expand_layer"
EXPAND_REDUCTION = "expand_reduction"
EXPAND_REDUCTION_LAYER = "expand_reduction_layer"
LASSO = "lasso"
LASSO_ZERO = "lasso_zero"
SPARSITY = "sparsity"
DECOMPRESS = "decompress"
DECOMPRESS_NORMALISED = "decompress_normalised"
DECOMPRESS_UNIT = "decompress_unit"

NO_CHANGE = "no change"
FLIPPED = "flipped sign"
NO_MIXING = "no mixing"
RANDOM_MOVE = "random move"
RANDOM_SUBSPACES = "random subspaces"
UNIFORM = "uniform attention"
SHRINKING = "plain shrinking"
RELU = "relu(x)"
ZERO = "all-zero code"
CONTROLS = {
    NO_CHANGE: "the tokens before the step",
    FLIPPED: "the step with its sign flipped",
    NO_MIXING: "the step without mixing tokens, P = I",
    RANDOM_MOVE: "a step in a random direction, with each token's step length",
    RANDOM_SUBSPACES: "the step in randomly rotated subspaces, with each token's step length",
    UNIFORM: "all tokens of an image move towards their mean, until R^c is the same as after the step",
    SHRINKING: "all tokens shrink by the same factor, until R^c is the same as after the step",
    RELU: "relu(x) instead of ISTA(x)",
    ZERO: "a code of zeros only",
}
_MOVES = (NO_CHANGE, FLIPPED, NO_MIXING, RANDOM_MOVE, RANDOM_SUBSPACES)
_REVERSES = (NO_CHANGE, FLIPPED, NO_MIXING, RANDOM_SUBSPACES)


class Claim(NamedTuple):
    """What a step is derived to do, and what it has to beat.

    Attributes:
        text: in words.
        sign: +1 if the step is to raise the value, -1 if it is to lower it.
        measure: what is measured, a key of `MEASURES`.
        controls: a theorem is about the first.
        pooled: whether the value is one of all images.
        is_learned: whether training must have brought it about, see the module's rule.
    """

    text: str
    sign: Literal[1, -1]
    measure: str
    controls: tuple[str, ...]
    pooled: bool = False
    is_learned: bool = True


SYMBOLS: dict[Status, str] = {"theorem": "∎", "holds": "✓", "does not hold": "✗", "contradiction": "‼"}
CLAIMS: dict[str, Claim] = {
    COMPRESS: Claim("Attention lowers R^c of tokens as they are", -1, "subspace_rate", _MOVES),
    COMPRESS_NORMALISED: Claim("Attention lowers R^c of normalised tokens", -1, "subspace_rate_normalised", _MOVES),
    COMPRESS_UNIT: Claim("Attention lowers R^c of unit-length projections", -1, "subspace_rate_unit", _MOVES),
    SORT: Claim(
        "Attention sorts: for an equal fall of R^c, R falls less than with uniform attention or shrinking",
        1,
        "pooled_rate",
        (NO_CHANGE, UNIFORM, SHRINKING),
        pooled=True,
    ),
    EXPAND: Claim("ISTA raises R of tokens of equal length", 1, "coding_rate_normalised", (NO_CHANGE, RELU)),
    EXPAND_LAYER: Claim("The layer raises R of tokens of equal length", 1, "coding_rate_normalised", (NO_CHANGE, RELU)),
    EXPAND_REDUCTION: Claim(
        "ISTA raises R - R^c of all images", 1, "pooled_rate_reduction", (NO_CHANGE, RELU), pooled=True
    ),
    EXPAND_REDUCTION_LAYER: Claim(
        "The layer raises R - R^c of all images", 1, "pooled_rate_reduction", (NO_CHANGE, RELU), pooled=True
    ),
    LASSO: Claim(
        "The code has a lower lasso objective than relu(x) and than the all-zero code",
        -1,
        "lasso_objective",
        (RELU, ZERO),
        is_learned=False,
    ),
    LASSO_ZERO: Claim(
        "The code has a lower lasso objective than the all-zero code", -1, "lasso_objective", (ZERO,), is_learned=False
    ),
    SPARSITY: Claim("ISTA makes more exact zeros than relu(x)", 1, "zero_fraction", (RELU,)),
    DECOMPRESS: Claim("The decoder's step raises R^c of tokens as they are", 1, "subspace_rate", _REVERSES),
    DECOMPRESS_NORMALISED: Claim(
        "The decoder's step raises R^c of normalised tokens", 1, "subspace_rate_normalised", _REVERSES
    ),
    DECOMPRESS_UNIT: Claim(
        "The decoder's step raises R^c of unit-length projections", 1, "subspace_rate_unit", _REVERSES
    ),
}

LEAST_SHARE_OF_IMAGES = 0.95
LEAST_MARGIN_SHARE = 0.01
LARGEST_P = 0.05
UNTRAINED_DRAWS = 5  # random initialisations of the network, by default
_ROUNDING = 1e-5  # of the value before: what a theorem may miss by in float32


class Measured(NamedTuple):
    """A claim in numbers, one an image; of a pooled claim that of all images first, then without each group of them.

    Attributes:
        before: the value before the step.
        after: the value after it.
        margins: by how much the step beats each control in the claimed direction.
        scale: what margins are shares of; the value before, unless that can be 0.
        is_theorem: whether the layer lists the claim as a theorem.
    """

    before: Float[Tensor, "r"]
    after: Float[Tensor, "r"]
    margins: Mapping[str, Float[Tensor, "r"]]
    scale: Float[Tensor, "r"]
    is_theorem: bool = False

    def changes_as_claimed(self) -> Bool[Tensor, "r"] | None:
        """In which images the value changes in the claimed direction; None without the control "no change"."""
        return self.margins[NO_CHANGE] > 0 if NO_CHANGE in self.margins else None


class MeasuredStep(NamedTuple):
    """Which step was measured on what.

    Attributes:
        tokens: "all" of whole images, or "visible": as in training, where the encoder sees visible patches alone.
        part: "encoder" or "decoder".
        layer: number of the layer, from 0.
    """

    tokens: Tokens
    part: Part
    layer: int


Claims = Mapping[MeasuredStep, Mapping[str, Measured]]  # of each layer, by claim


@dataclass(frozen=True)
class AuditRow:
    """One claim about one layer.

    Attributes:
        tokens: "all" or "visible", see `MeasuredStep`.
        part: "encoder" or "decoder".
        layer: number of the layer, from 0.
        claim: its key in `CLAIMS`.
        text: the claim in words.
        before: mean value before the step.
        after: mean value after it.
        closest_control: the control that came closest on average.
        margin: mean margin over the best control, in the unit of the value.
        margin_low: of its 95% interval (Student's t); None for one image.
        margin_high: of the same.
        margin_share: the mean margin as a share of the value before (of R before, where that is R - R^c).
        share_of_images: in which the margin is positive; None of a pooled claim.
        n: number of images, or of groups of images of a pooled claim.
        p_holm: of the t-test, corrected for all claims and layers on these tokens.
        untrained: largest margin share among the random initialisations; None without any.
        learned: whether the margin share is larger than theirs on the same images.
        holds: see the module's rule.
        status: "theorem", "holds" or "does not hold"; "contradiction" of a theorem that an image contradicts.
    """

    tokens: str
    part: str
    layer: int
    claim: str
    text: str
    before: float
    after: float
    closest_control: str
    margin: float
    margin_low: float | None
    margin_high: float | None
    margin_share: float
    share_of_images: float | None
    n: int
    p_holm: float
    untrained: float | None
    learned: bool | None
    holds: bool
    status: Status

    @property
    def is_met(self) -> bool:
        """Whether the claim is a theorem without a contradiction, or holds as measured."""
        return self.status in ("theorem", "holds")

    @property
    def place(self) -> str:
        """Such as "E0" and "D1, visible"."""
        return short_place(self.part, self.layer) + (", visible" if self.tokens == "visible" else "")

    @property
    def symbol(self) -> str:
        """Its status as a symbol."""
        return SYMBOLS[self.status]


def audit(layers: Claims, untrained: Sequence[Claims] = ()) -> list[AuditRow]:
    """Judge every claim about every layer, claim by claim.

    Args:
        layers: what was measured of the network.
        untrained: the same of random initialisations of it.
    """
    tested = [(place, key) for key in CLAIMS for place, found in layers.items() if key in found]
    p: dict[tuple[MeasuredStep, str], float] = {}
    for tokens in dict.fromkeys(place.tokens for place, _ in tested):
        family = [(place, key) for place, key in tested if place.tokens == tokens]
        p_values = [p_value(_best_margin(CLAIMS[key], layers[place][key])[1]) for place, key in family]
        p |= zip(family, holm(p_values), strict=True)
    return [
        _judge(place, key, layers[place][key], [draw[place][key] for draw in untrained], p[place, key])
        for place, key in tested
    ]


def by_claim(rows: Iterable[AuditRow]) -> dict[str, list[AuditRow]]:
    """Rows by claim, in the order of `CLAIMS`, each in the order of the layers."""
    rows = list(rows)
    return {key: found for key in CLAIMS if (found := [row for row in rows if row.claim == key])}


def margins_over(
    sign: int, after: Float[Tensor, "r"], controls: Mapping[str, Float[Tensor, "r"]]
) -> dict[str, Float[Tensor, "r"]]:
    """By how much a step beats each control: sign (after - control)."""
    return {name: sign * (after - control) for name, control in controls.items()}


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m p-values times m - i + 1, made monotone, at most 1.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    corrected, largest = [0.0] * len(p), 0.0
    for rank, number in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[number]))
        corrected[number] = largest
    return corrected


def p_value(margin: Statistic) -> float:
    """One-sided p-value of the t-test that a mean is positive; 1 for a single value."""
    if margin.spread is None:
        return 1.0
    if margin.spread == 0:
        return float(margin.mean <= 0)
    return float(student_t.sf(margin.mean * math.sqrt(margin.n) / margin.spread, margin.n - 1))


def jackknife(values: Float[Tensor, "r"]) -> Statistic:
    """A value of everything (first), with the spread that makes `Statistic.interval` its jackknife interval.

    The squared standard error is (g - 1)/g times the sum of squared deviations of the g values without one group each.
    """
    whole, without = float(values[0]), values[1:].double()
    g = len(without)
    if g < 2:
        return Statistic(whole, None, 1)
    return Statistic(whole, float(((g - 1) * (without - without.mean()).square().sum()).sqrt()), g)


def contradicts(key: str, found: Measured) -> bool:
    """Whether the step is worse than the first control in some image, beyond rounding."""
    margin = found.margins[CLAIMS[key].controls[0]]
    return bool((margin < -_ROUNDING * found.scale.abs().clamp_min(1.0)).any())


def _judge(place: MeasuredStep, key: str, found: Measured, draws: Sequence[Measured], p_holm: float) -> AuditRow:
    claim = CLAIMS[key]
    best, margin = _best_margin(claim, found)
    low, high = margin.interval()
    margin_share = _margin_share(claim, found)
    share_of_images = None if claim.pooled else float((best > 0).double().mean())
    learned = all(_margin_share(claim, found, len(draw.after)) > _margin_share(claim, draw) for draw in draws)
    holds = (
        (share_of_images is None or share_of_images >= LEAST_SHARE_OF_IMAGES)
        and margin_share >= LEAST_MARGIN_SHARE
        and p_holm < LARGEST_P
        and (learned or found.is_theorem or not claim.is_learned)
    )
    status: Status = "holds" if holds else "does not hold"
    if found.is_theorem:
        status = "contradiction" if contradicts(key, found) else "theorem"
    center = (lambda values: float(values[0])) if claim.pooled else (lambda values: float(values.double().mean()))
    return AuditRow(
        tokens=place.tokens,
        part=place.part,
        layer=place.layer,
        claim=key,
        text=claim.text,
        before=center(found.before),
        after=center(found.after),
        closest_control=min(found.margins, key=lambda name: center(found.margins[name])),
        margin=margin.mean,
        margin_low=None if margin.spread is None else low,
        margin_high=None if margin.spread is None else high,
        margin_share=margin_share,
        share_of_images=share_of_images,
        n=margin.n,
        p_holm=p_holm,
        untrained=max((_margin_share(claim, draw) for draw in draws), default=None),
        learned=learned if draws else None,
        holds=holds,
        status=status,
    )


def _best_margin(claim: Claim, found: Measured) -> tuple[Float[Tensor, "r"], Statistic]:
    """Margins over the best control, image by image, and their statistic."""
    best = torch.stack(list(found.margins.values())).amin(0)
    return best, jackknife(best) if claim.pooled else statistic(best)


def _margin_share(claim: Claim, found: Measured, images: int | None = None) -> float:
    """The mean margin as a share of the mean scale; of the first images alone, if the claim is about single images."""
    best, _ = _best_margin(claim, found)
    chosen = slice(1) if claim.pooled else slice(images)
    return float(best[chosen].double().mean() / found.scale[chosen].double().mean().abs().clamp_min(1e-12))
