"""Does each layer do what its derivation promises? Every claim is held to the same images before and after the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.evaluation.probes import wilson_interval
from crate_mae.interpret.layer_measures import (
    POINTS,
    SUBSPACE_RATES,
    SUBSPACES,
    has_subspaces,
    normalised,
    subspace_rates,
)
from crate_mae.interpret.statistics import Row, Statistic, find
from crate_mae.interpret.streaming import LayerMeasure, Values
from crate_mae.models.layers import ISTA, EncoderLayer, OvercompleteISTA
from crate_mae.theory.measures import gini, l1_to_l2
from crate_mae.theory.sparse_coding import lasso_objective


class _Claim(NamedTuple):
    text: str
    part: str
    sign: int  # of the change that is promised


CLAIMS = {
    "mssa_subspace_rate": _Claim("MSSA lowers R^c of the tokens as they are", "encoder", -1),
    "mssa_subspace_rate_normalised": _Claim("MSSA lowers R^c of normalised tokens", "encoder", -1),
    "mssa_subspace_rate_official": _Claim("MSSA lowers R^c as the official code takes it", "encoder", -1),
    "ista_lasso": _Claim("ISTA lowers its lasso objective", "encoder", -1),
    "ista_lasso_feasible": _Claim("ISTA's code is better than the positive part of its input", "encoder", -1),
    "ista_zero_fraction": _Claim("ISTA makes exact zeros", "encoder", 1),
    "ista_l1_to_l2": _Claim("ISTA lowers l1/l2", "encoder", -1),
    "ista_gini": _Claim("ISTA raises the Gini index", "encoder", 1),
    "undo_subspace_rate": _Claim("The decoder's step raises R^c of the tokens as they are", "decoder", 1),
    "undo_subspace_rate_normalised": _Claim("The decoder's step raises R^c of normalised tokens", "decoder", 1),
    "undo_subspace_rate_official": _Claim("The decoder's step raises R^c as the official code takes it", "decoder", 1),
}


@dataclass(frozen=True)
class AuditRow:
    """One claim about one layer.

    Attributes:
        part: "encoder" or "decoder".
        layer: number of the layer, from 0.
        measure: short name of the claim.
        claim: in words.
        change: mean over images of the value after the step less the value before it.
        low: of the 95% interval of that mean (Student's t, paired over images); None for one image.
        high: of the same.
        share: of images in which the change has the promised sign.
        share_low: of Wilson's 95% interval of the share.
        share_high: of the same.
        n: number of images.
        holds: whether all of the interval of the change has the promised sign.
    """

    part: str
    layer: int
    measure: str
    claim: str
    change: float
    low: float | None
    high: float | None
    share: float
    share_low: float
    share_high: float
    n: int
    holds: bool


def audit_measures() -> list[LayerMeasure]:
    """What `audit` judges, for `streaming.stream`; rates are measured on the way, and not twice."""
    return [
        LayerMeasure(SUBSPACES, POINTS, audited_subspace_rates, has_subspaces),
        LayerMeasure("audit of ISTA", ("z_half", "code"), sparse_coding_changes),
    ]


def audited_subspace_rates(layer: nn.Module, *points: Float[Tensor, "b n d"]) -> Values:
    """`layer_measures.subspace_rates`, and by how much the layer's attention step changes R^c in its three forms."""
    rates = subspace_rates(layer, *points)
    step, before, after = ("mssa", "z", "z_half") if isinstance(layer, EncoderLayer) else ("undo", "z_half", "z_next")
    changes = {f"{step}_{form}": rates[form, after] - rates[form, before] for form in SUBSPACE_RATES}
    return {**rates, **_with_shares(changes)}


def sparse_coding_changes(layer: nn.Module, z_half: Float[Tensor, "b n d"], code: Float[Tensor, "b n m"]) -> Values:
    """The lasso objective and sparsity of the code, less those of what sparse coding started from.

    ISTA starts from its input X itself, which has negative entries and so is no feasible code; "feasible" compares
    with the positive part of X. CRATE-alpha's sparse coding starts from 0, with which its objective is compared.
    """
    ista = layer.get_submodule("ista")
    assert isinstance(ista, (ISTA, OvercompleteISTA))
    x = normalised(layer.get_submodule("norm2"), z_half)
    dictionary = ista.dictionary.to(x.dtype)

    def lasso(codes: Tensor) -> Tensor:
        pairs = zip(codes, x, strict=True)
        return torch.stack([lasso_objective(a, x_i, dictionary, ista.threshold) for a, x_i in pairs])

    after = lasso(code)
    changes = {"ista_lasso": after - lasso(x if isinstance(ista, ISTA) else torch.zeros_like(code))}
    if isinstance(ista, ISTA):
        changes["ista_lasso_feasible"] = after - lasso(x.relu())
    changes["ista_zero_fraction"] = (code == 0).float().mean((1, 2)) - (x == 0).float().mean((1, 2))
    changes["ista_l1_to_l2"] = (l1_to_l2(code) - l1_to_l2(x)).mean(1)
    changes["ista_gini"] = (gini(code) - gini(x)).mean(1)
    return _with_shares(changes)


def audit(rows: Sequence[Row]) -> list[AuditRow]:
    """Judge every claim that the rows of `audit_measures` speak of, claim by claim and layer by layer."""
    found = []
    for measure, claim in CLAIMS.items():
        changes, shares = (find(rows, measure, point, claim.part) for point in ("change", "share"))
        found += [_judged(change, share, claim) for change, share in zip(changes, shares, strict=True)]
    return found


def _with_shares(changes: dict[str, Float[Tensor, "b"]]) -> Values:
    found = {}
    for name, change in changes.items():
        found[name, "change"] = change
        found[name, "share"] = (CLAIMS[name].sign * change > 0).float()
    return found


def _judged(change: Row, share: Row, claim: _Claim) -> AuditRow:
    low, high = Statistic(change.mean, change.spread, change.n).interval()
    score = wilson_interval(round(share.mean * share.n), share.n)
    return AuditRow(
        part=change.part,
        layer=change.layer,
        measure=change.measure,
        claim=claim.text,
        change=change.mean,
        low=low if change.n > 1 else None,
        high=high if change.n > 1 else None,
        share=score.value,
        share_low=score.low,
        share_high=score.high,
        n=change.n,
        holds=low > 0 if claim.sign > 0 else high < 0,
    )
