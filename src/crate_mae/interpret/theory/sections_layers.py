"""What the page says of the last three claims: every number in a sentence is taken from what was measured."""

from crate_mae.interpret.theory.diffusion import Diffusion, DiffusionRun
from crate_mae.interpret.theory.ista import Ista, IstaCurve
from crate_mae.interpret.theory.signal_to_noise import HOLDS_WITHIN, SignalToNoise
from crate_mae.interpret.theory.wording import Section, number, power, span

_OPERATORS = {
    "threshold": "thresholded",
    "normalised": "thresholded, normalised",
    "softmax": "softmax, s = 1",
    "network": "softmax, s = p<sup>−1/2</sup>",
}


def signal_to_noise_section(results: SignalToNoise) -> Section:
    """The third claim: every layer cleans by the same factor."""

    def grown(operator: str) -> str:
        counts = [curve.layers_grown for curve in results.curves if curve.operator == operator]
        return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])

    def whole(operator: str) -> list[float]:
        return [c.noise_std for c in results.curves if c.operator == operator and c.layers_held == results.layers]

    def up_to(operator: str) -> str:
        levels = whole(operator)
        return f"at {len(levels)} noise levels (largest σ = {max(levels):g})" if levels else "at no noise level"

    network = [curve for curve in results.curves if curve.operator == "network"]
    first = [curve.factor[0].mean for curve in network]
    return Section(
        figure="signal_to_noise",
        title="Every layer cleans by the same factor",
        claim="In a transformer of attention alone, the ratio of signal to noise of a cluster's tokens is said to "
        "grow by one constant factor per layer (<a href='https://arxiv.org/abs/2506.03790'>arXiv 2506.03790</a>).",
        formula="SNR<sub>k</sub> = ‖Z U<sub>k</sub>U<sub>k</sub><sup>⊤</sup>‖ / ‖Z (I − "
        "U<sub>k</sub>U<sub>k</sub><sup>⊤</sup>)‖, &nbsp; SNR<sub>k</sub>(layer l + 1) = (1 + ητ) "
        "SNR<sub>k</sub>(layer l)",
        how=f"{results.tokens} tokens of {results.h} orthogonal subspaces of dimension {results.p} that fill d = "
        f"{results.d}; {results.layers} layers with η = {results.step_size:g}; {results.draws} draws. The factor is "
        f"exact if every token attends with weight τ = {results.threshold:g} to itself in its own subspace, and to "
        "nothing elsewhere: that is what the thresholded softmax is for. It was also run on tokens normalised before "
        "attention, as a network has them, and without threshold (then τ = 1 at best).",
        found=(
            f"The predicted factor is {1 + results.step_size * results.threshold:.2f} with the threshold and "
            f"{1 + results.step_size:.2f} without. The table shows for how many of the {results.layers} layers it "
            "holds.",
            f"With the network's softmax the first layer gains a factor of {span(first)} over the noise levels, and "
            f"the ratio grows for {grown('network')} layers in a row; with s = 1, for {grown('softmax')}.",
        ),
        limits=(
            "Without normalisation tokens grow with every layer, until attention is peaked also in the subspaces "
            "where a token is only noise: it then takes on what other clusters' tokens hold there, and the ratio "
            "falls. The constant factor therefore ends after some layers, the sooner the more noise.",
            "Without the threshold, every token takes a little of every other in every subspace; the ratio falls "
            "after few layers. The constant factor is a statement about thresholded attention, not about the softmax "
            "that networks use; the sparse-coding step between, which they also have, was not in this experiment.",
        ),
        glance=f"The predicted factor holds in all {results.layers} layers {up_to('threshold')} as the operator "
        f"stands, {up_to('normalised')} with normalised tokens, and {up_to('network')} with the network's softmax.",
        caption="Ratio of signal to noise, relative to its start, after each layer (logarithmic). Dashed: predicted. "
        "Curves that coincide with it hide one another.",
        table=_factors(results),
    )


def _factors(results: SignalToNoise) -> str:
    """For each noise level: how many layers have the predicted factor, and the first layer's factor."""
    operators = dict.fromkeys(curve.operator for curve in results.curves)
    heading = "".join(f"<th>{_OPERATORS[operator]}</th>" for operator in operators)
    rows = []
    for noise_std in dict.fromkeys(curve.noise_std for curve in results.curves):
        curves = [curve for curve in results.curves if curve.noise_std == noise_std]
        cells = [f"<td>{curve.layers_held}; {curve.factor[0].mean:.2f}</td>" for curve in curves]
        rows.append(f"<tr><td>{noise_std:g}</td>{''.join(cells)}</tr>")
    held = f"Layers, from the first, whose factor is within {HOLDS_WITHIN:.0%} of the predicted one"
    caption = f"{held}; the first layer's factor"
    return f"<table><caption>{caption}</caption><tr><th>σ</th>{heading}</tr>{''.join(rows)}</table>"


def diffusion_section(results: Diffusion) -> Section:
    """The fourth claim: forward structures, reverse undoes it."""

    def course(run: DiffusionRun) -> str:
        scope = "all tokens at once" if run.together else "each token alone"
        return (
            f"{run.name.capitalize()}, {scope}: {number(run.forward[0])} degrees to the nearest line before, "
            f"{number(run.forward[-1])} after {run.steps} steps forward, {number(run.reverse[-1])} after the way "
            f"back; to the token's own line {number(run.own[0])} before, {number(run.own[-1])} after. Distance to the "
            f"nearest line: {number(run.distance[0])}, then {number(run.distance[-1])}."
        )

    closer = [run for run in results.runs if run.forward[-1].mean < 0.9 * run.forward[0].mean]
    first = results.runs[0]
    misses = "; ".join(f"{number(value)} with {steps} steps" for steps, value in first.missed.items())
    counts = list(first.missed)
    gain = first.missed[counts[1]].mean / first.missed[counts[2]].mean
    shrunk = [run.norm[-1].mean / run.norm[0].mean for run in results.runs]
    return Section(
        figure="diffusion",
        title="Structured diffusion, and its reverse",
        claim="Small steps down R<sup>c</sup> move tokens onto the subspaces: the model of an encoder. The same steps "
        "with a plus sign take them back: the model of a decoder. The steps are those of the exact gradient, not those "
        "of the published layers (section 2).",
        formula="forward: Z ← Z − κ ∇R<sup>c</sup>(Z | U) &nbsp;&nbsp; reverse: Z ← Z + κ ∇R<sup>c</sup>(Z | U)",
        how=f"{results.tokens} tokens on lines in the plane or in space, with noise σ = {results.noise_std:g}; ε = "
        f"{results.eps:.3g}; {first.steps} steps forward and as many back; {results.draws} draws. Angles to the lines "
        "count: distances also fall when tokens merely shrink.",
        found=(
            *(course(run) for run in results.runs),
            f"The reverse ends beside the start, by this share of the way gone (first example): {misses}. The smaller "
            f"the steps, the nearer: {counts[2] // counts[1]} times as many divide the miss by {gain:.1f}.",
        ),
        limits=(
            f"Tokens came closer to a line (by at least a tenth) in {len(closer)} of {len(results.runs)} examples. "
            "Over all tokens at once one matrix multiplies them all, and equal clusters on orthogonal lines stay as "
            "they are. Lines at 60 degrees are not orthogonal: lowering the rate along one moves a token off the "
            "other.",
            f"Tokens do not only move onto lines, they shrink: to {span(shrunk)} of their mean norm. Run on, they end "
            "at zero; what keeps a network from that is R, the other half of the objective, and normalisation.",
            "The reverse knows where the forward run ended. A decoder has other layers, other weights, and hidden "
            "patches.",
        ),
        glance=f"Tokens come closer to their lines in {len(closer)} of {len(results.runs)} examples; the reverse "
        f"misses the start by {first.missed[first.steps].mean:.1%} of the way.",
        caption="Hollow: where tokens start; black: where they end; grey: their ways; coloured: the lines. The "
        "farthest tenth of the tokens is outside the frame.",
    )


def ista_section(results: Ista) -> Section:
    """The fifth claim: sparse-coding steps approach the minimum of a lasso."""

    def curve(start: str, step_size: float) -> IstaCurve:
        return next(c for c in results.curves if c.start == start and c.step_size == step_size)

    def course(curve: IstaCurve) -> str:
        shown = [i for i, steps in enumerate(results.steps) if steps in (1, 10, 100)]
        return "; ".join(
            f"{results.steps[i]} step{'s' if results.steps[i] > 1 else ''}: gap {number(curve.gap[i])}, agreement "
            f"{curve.support[i].mean:.2f}"
            for i in shown
        )

    raising = sorted({c.step_size for c in results.curves if c.raises})
    falling = sorted({c.step_size for c in results.curves} - set(raising))
    last, tokens, zero = results.steps[-1], curve("tokens", 1.0), curve("zero", 1.0)
    rising = (
        f"with η = {' and '.join(f'{s:g}' for s in raising)} times 1/‖D‖² it rose, to "
        f"{power(curve('tokens', raising[-1]).gap[-1].mean)} times the minimum after {last} steps"
        if raising
        else "it rose with none"
    )
    return Section(
        figure="ista",
        title="One sparse-coding step, and where more would lead",
        claim="The second half of a layer is one proximal-gradient step towards sparse, non-negative codes of its "
        "tokens in a dictionary.",
        formula="A ← relu(A + η (X − A D<sup>⊤</sup>) D − ηλ), &nbsp; towards the minimum of ½‖X − A D<sup>⊤</sup>‖² "
        "+ λ‖A‖<sub>1</sub> over A ≥ 0",
        how=f"{results.tokens} tokens made of few atoms of a random {results.d} × {results.d} dictionary, with noise; "
        f"λ = {results.threshold:g}; {results.draws} draws, ‖D‖² = {number(results.largest_eigenvalue)}. The minimum "
        f"is scikit-learn's, converged; {number(results.active)} of its codes are active. Gap: how far the objective "
        "is above the minimum, relative to it. Agreement: active codes in common, over those active in either.",
        found=(
            f"From A = X, the network's start (gap {number(results.initial_gap['tokens'])}), with η = 1/‖D‖²: "
            f"{course(tokens)}.",
            f"From A = 0 (gap {number(results.initial_gap['zero'])}), with the same η: {course(zero)}.",
            f"The objective fell at every recorded number of steps with η = {', '.join(f'{s:g}' for s in falling)} "
            f"times 1/‖D‖²; {rising}. The textbook guarantees descent up to 1 and convergence below 2.",
        ),
        limits=(
            f"One step solves nothing: from A = X it leaves a gap of {number(tokens.gap[0])} and an agreement of "
            f"{tokens.support[0].mean:.2f}. With a random dictionary tokens are no good first guess of their codes: "
            f"the start A = 0 is nearer ({number(zero.gap[0])} after one step). A network's dictionary is learned, "
            "and starts near an isometry, which this experiment did not have.",
            f"With η too large the step does harm: {rising}.",
        ),
        glance=f"One step from A = X takes the gap from {results.initial_gap['tokens'].mean:.1f} to "
        f"{tokens.gap[0].mean:.1f}; {last} steps end at {power(tokens.gap[-1].mean)}; {rising}.",
        caption=f"Left: gap (logarithmic; cut off at {1e3:g}). Right: agreement of the active codes. Solid: from A = "
        "X; dashed: from A = 0.",
    )
