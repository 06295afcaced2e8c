"""What a reader of the table must know, in plain words; above all where the first contestant is behind."""

import math
from collections.abc import Iterator, Sequence

from scipy.stats import t as student_t

from crate_mae.comparison.contestants import Images
from crate_mae.comparison.options import Budget, Options
from crate_mae.comparison.outcome import PROBES, SCORES, Outcome, Spread, spread
from crate_mae.comparison.scores import MASK_RATIO
from crate_mae.comparison.table import score_text

_NORMAL_QUANTILE = 1.96  # two-sided, 95%
_MUCH_LONGER = 1.15
_WORTH_SAYING = 0.02  # of a cost
_NAMES = {
    "linear": "the linear probe",
    "knn": "k-NN",
    "psnr": "the PSNR of completions",
    "ssim": "the SSIM of completions",
    "mse": "the squared error of completions",
}


def describe(outcomes: Sequence[Outcome], options: Options, budget: Budget, images: Images) -> list[str]:
    """All notes, in the order in which they matter."""
    return [
        *_standing(outcomes, images),
        *_certainty(options, images),
        *_terms(outcomes, options, budget),
        *_warnings(outcomes, budget, images),
    ]


def _standing(outcomes: Sequence[Outcome], images: Images) -> Iterator[str]:
    """Where the first is behind, and where it is not, against each of the others."""
    first, *others = outcomes
    for other in others:
        behind, ahead = [], []
        for name, title in _NAMES.items():
            mine, theirs = spread(first.scores, name), spread(other.scores, name)
            if mine is None or theirs is None or mine.mean == theirs.mean:
                continue
            is_better = (mine.mean > theirs.mean) == SCORES[name]
            text = " against ".join(score_text(name, score, with_range=False) for score in (mine, theirs))
            chance = ", may be chance" if may_be_chance(name, mine, theirs, len(images.val)) else ""
            text = f"{title} ({text}{chance})"
            (ahead if is_better else behind).append(text)
        costs = {
            "parameters": (first.costs.parameters, other.costs.parameters, False),
            "training FLOPs an image": (first.costs.training_flops, other.costs.training_flops, False),
            "images/s in training": (first.images_per_second, other.images_per_second, True),
            "memory": (first.costs.memory or 0, other.costs.memory or 0, False),
        }
        for title, (mine, theirs, more_is_better) in costs.items():
            if mine and theirs and abs(mine / theirs - 1) > _WORTH_SAYING:
                text = f"{title} ({mine / theirs:.2f} times as {'many' if title != 'memory' else 'much'})"
                (ahead if (mine > theirs) == more_is_better else behind).append(text)
        yield f"{first.name} is behind {other.name} in: {', '.join(behind) or 'nothing that was measured'}."
        yield f"{first.name} is ahead of {other.name} in: {', '.join(ahead) or 'nothing that was measured'}."


def may_be_chance(name: str, mine: Spread, theirs: Spread, val_images: int) -> bool:
    """Whether a difference lies within what another choice of images, or of seeds, would give.

    The bound is the two-sided 95% quantile of Student's t, with the degrees of freedom of the seeds, times the standard
    error of the difference: 4.3 standard errors for two seeds each, 2.8 for three; for one seed each, 1.96.

    The outcome of each image is not kept, so the probes' errors count as independent, although they are of the same
    images. Two models mostly err on the same images, so that the true standard error is smaller: a difference that is
    not marked is surer than that, and one that is marked might pass a test of pairs such as McNemar's. Of one seed
    nothing is known of what another seed would give; `_certainty` says so.
    """
    variance, freedom = 0.0, 0
    for score in (mine, theirs):
        if name in PROBES:
            variance += score.mean * (1 - score.mean) / val_images
        if score.std is not None:
            variance += score.std**2 / score.count
            freedom += score.count - 1
    bound = float(student_t.ppf(0.975, freedom)) if freedom else _NORMAL_QUANTILE
    return abs(mine.mean - theirs.mean) < bound * math.sqrt(variance)


def _certainty(options: Options, images: Images) -> Iterator[str]:
    """What is, and what is not, behind the words "may be chance"."""
    if options.seeds > 1:
        yield (
            f"Scores are means over {options.seeds} seeds ± the sample standard deviation, and the range. Each seed "
            "had a final run of the same length; the search was done once, with the first."
        )
    else:
        yield (
            "One run each: there is no spread, so nobody can tell what another seed would change. One seed cannot tell "
            "models apart by less than the spread of seeds, whatever the number of images: read every difference above "
            "as that of two runs, not of two models. Try --seeds 3."
        )
    if images.classes:
        yield (
            "A difference of probes may be chance if it is within 95% of what other images"
            f"{' or other seeds' if options.seeds > 1 else ', not other seeds,'} would give, as if each model had been "
            "asked about images of its own. All were asked about the same ones, which makes this bound a cautious one."
        )


def _terms(outcomes: Sequence[Outcome], options: Options, budget: Budget) -> Iterator[str]:
    """What was the same for all."""
    c = outcomes[0].contestant.config
    search = (
        f", of which {options.search_share:.0%} went into a search over {options.lr_search} learning rates (chosen by "
        "the loss on held-out training images, never by the validation images)"
        if options.lr_search > 1
        else " (no search for a learning rate)"
    )
    yield (
        f"Each contestant had {budget}{search}. The final run had the rest, with its own full schedule; all had "
        f"batches of {c.batch_size}, the same images in the same order, {c.mask_ratio:.0%} hidden, crops of at least "
        f"{c.min_crop:.0%}, {'flips' if c.flip else 'no flips'}."
    )
    places = {outcome.name: outcome.contestant.config.mask_tokens for outcome in outcomes}
    if len(set(places.values())) > 1:
        listed = ", ".join(f"{name} at the {place}" for name, place in places.items())
        yield (
            f"Mask tokens come in where each model's design has them: {listed}. An encoder without them works on "
            "visible patches alone, which saves it FLOPs in training."
        )
    yield (
        "FLOPs are those of matrix products and convolutions as they are computed, a multiplication with addition "
        "counted as 2. Norms, softmax and the optimizer are not counted."
    )
    yield (
        "Images/s are those of a training step with its images in memory, the median of steps taken in turns. Minutes "
        "are those of training as it went, without the measurements in between. Memory is that of a training step in a "
        "process of its own, above what its imports take."
    )
    yield f"Completions: {MASK_RATIO:.0%} of the patches hidden, the same images and masks for all."


def _warnings(outcomes: Sequence[Outcome], budget: Budget, images: Images) -> Iterator[str]:
    """What makes a number less than it says."""
    if images.why_no_probes:
        yield f"No probes: {images.why_no_probes}"
    else:
        yield (
            f"Probes: frozen features, {len(images.train):,} training and {len(images.val):,} validation images of "
            f"{images.classes} classes. Random weights are those before the first step; a model that does not beat "
            "them, or raw pixels, has learned nothing that these labels ask for."
        )
    if outcomes[0].contestant.config.norm_pix_loss:
        yield (
            "Trained with --norm-pix-loss: brightness and contrast of each completed patch come from the original, so "
            "completions look better here than without it."
        )
    for outcome in outcomes:
        losses = outcome.trained.search_losses
        if outcome.trained.is_rate_at_edge:
            tried = ", ".join(f"{rate:.3g}" for rate in losses)
            yield (
                f"{outcome.name}: the best learning rate, {outcome.trained.rate:.3g}, lies at the edge of those that "
                f"were tried ({tried}). A better one may lie beyond: try more with --lr-search."
            )
        if diverged := [f"{rate:.3g}" for rate, loss in losses.items() if math.isinf(loss)]:
            yield f"{outcome.name} did not stay finite at {', '.join(diverged)}; the minutes of that are not counted."
        if budget.kind == "minutes" and not 1 / _MUCH_LONGER < outcome.minutes / budget.amount < _MUCH_LONGER:
            yield (
                f"{outcome.name} took {outcome.minutes:.2f} minutes, not {budget.amount:g}: its steps were counted "
                "before the start, from a step's time then, and the machine was slower or faster later."
            )
