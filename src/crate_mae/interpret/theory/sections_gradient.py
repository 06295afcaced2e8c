"""What the page says of the first two claims: every number in a sentence is taken from what was measured."""

from crate_mae.interpret.theory.attention import STEP_LENGTH, Attention, AttentionPoint
from crate_mae.interpret.theory.denoising import Denoising, DenoisingPoint
from crate_mae.interpret.theory.spread import Spread
from crate_mae.interpret.theory.wording import Section, number, span

SAME_DIRECTION = 0.9  # of a cosine: what the page calls nearly the same direction
_NETWORK = "s = p<sup>−1/2</sup>"
ACCURATE = 0.05  # of a relative error: what the page calls accurate


def denoising_section(results: Denoising) -> Section:
    """The first claim: a gradient step denoises."""

    def cosines(key: str) -> list[float]:
        return [point.cosine[key].mean for point in results.by_noise]

    def errors(point: DenoisingPoint, key: str) -> str:
        return number(point.error[key])

    middle = min(results.by_noise, key=lambda point: abs(point.noise_std - 0.2))
    widest, first = results.by_dimension[-1], results.by_noise[0]
    good = sum(value >= SAME_DIRECTION for value in cosines("all"))
    alone = sum(value >= SAME_DIRECTION for value in cosines("token"))
    return Section(
        figure="denoising",
        title="Compressing is denoising",
        claim="A noisy token is best cleaned by projecting it onto the subspace that it came from. A gradient step "
        "that lowers the coding rate R<sup>c</sup> is said to do the same.",
        formula="E[x | z] = z + σ² ∇ log q<sub>σ</sub>(z) = Σ<sub>k</sub> P(k | z) "
        "U<sub>k</sub>U<sub>k</sub><sup>⊤</sup> z / (1 + σ²) &nbsp;≈?&nbsp; z − κ ∇R<sup>c</sup>(z | U)",
        how=f"{middle.tokens} tokens from {middle.h} subspaces of dimension {middle.p}, mutually orthogonal, plus "
        f"noise; {results.draws} draws each. The left side is exact for such data. The right side was taken over each "
        "token alone, over the tokens of one cluster (as if the clusters were known), and over all tokens at once, "
        "with the distortion ε chosen in favour of the claim. Attention with softmax (s = 1) stands beside it, as the "
        "step −W + PW of its full length, which where the subspaces fill the space puts MSSA(Z) in the place of Z; the "
        "network adds MSSA to Z instead (next section).",
        found=(
            f"At σ = {middle.noise_std:g} the moves have these cosines with the denoiser's: each token alone "
            f"{number(middle.cosine['token'])}, one cluster's tokens {number(middle.cosine['cluster'])}, all tokens "
            f"at once {number(middle.cosine['all'])}, attention {number(middle.cosine['attention'])}.",
            f"There, {errors(middle, 'noisy')} of a token's norm lies outside its own subspace before the step; after "
            f"it {errors(middle, 'token')} with the gradient of each token alone, {errors(middle, 'all')} with that "
            f"of all at once, {errors(middle, 'attention')} with attention, and {errors(middle, 'denoiser')} with the "
            "denoiser.",
            f"Over all noise levels the cosine goes from {span(cosines('token'))} for each token alone, and "
            f"{span(cosines('all'))} for all at once.",
        ),
        limits=(
            "The exact gradient over all tokens at once multiplies every token by one and the same matrix. When the "
            "clusters are equally large that matrix is nearly a multiple of the identity on the subspaces, so it "
            "shrinks tokens rather than sorting them; where its cosine is high, at much noise, it is because the "
            "denoiser then mostly shrinks, too. What tells clusters apart is the softmax (or looking at one token or "
            "one cluster at a time).",
            f"R<sup>c</sup> does not see directions outside all subspaces, so noise there stays: with d = {widest.d} "
            f"the gradient of each token alone leaves {errors(widest, 'token')} outside the own subspace "
            f"({errors(widest, 'noisy')} before), attention {errors(widest, 'attention')}.",
            f"Attention is no denoiser at every noise level either: its cosine is {number(first.cosine['attention'])} "
            f"at σ = {first.noise_std:g} and {number(results.by_noise[-1].cosine['attention'])} at σ = "
            f"{results.by_noise[-1].noise_std:g}.",
        ),
        glance=f"Nearly the same direction (cosine at least {SAME_DIRECTION}) at {alone} of {len(results.by_noise)} "
        f"noise levels when the rate is that of each token alone, at {good} when it is that of all tokens at once.",
        caption="Top: cosine between each move and the denoiser's. Bottom: share of the tokens' norm outside their "
        "own subspace. Bands: one standard deviation over draws.",
    )


def attention_section(results: Attention) -> Section:
    """The second claim: attention comes from that step."""

    def at(points: tuple[AttentionPoint, ...], radius: float) -> AttentionPoint:
        return min(points, key=lambda point: abs(point.radius - radius))

    near, edge, beyond = (at(results.orthogonal, radius) for radius in (0.3, 0.9, 3.0))
    tilted = at(results.coherent, 0.3)
    one, network = "s = 1", "s = p^-1/2"
    accurate = [point.radius for point in results.orthogonal if point.error["order 1"].mean <= ACCURATE]
    reach = f"up to a‖W‖² = {max(accurate):g}" if accurate else "nowhere"
    kinds = ("restored", "published")
    downhill = {k: sum(point.descent[f"{k}, {network}"].mean > 0 for point in results.orthogonal) for k in kinds}

    def both(values: dict[str, Spread], kind: str) -> str:
        return f"{number(values[f'{kind}, {one}'])} for s = 1 and {number(values[f'{kind}, {network}'])} for {_NETWORK}"

    return Section(
        figure="attention",
        title="Attention keeps one of the two terms of the gradient step",
        claim="Expand the inverse in the gradient to first order and attention without softmax appears. A step "
        "downhill then has two terms: −W, which shrinks tokens, and one that mixes them. Put a softmax P where the "
        "auto-correlation W W<sup>⊤</sup> stands, and the second is PW, the network's attention. The published layer "
        "adds PW and drops −W.",
        formula="∇R<sup>c</sup> = a Σ<sub>k</sub> (I + a W<sub>k</sub>W<sub>k</sub><sup>⊤</sup>)<sup>−1</sup> "
        "W<sub>k</sub>U<sub>k</sub><sup>⊤</sup> ≈ a Σ<sub>k</sub> (W<sub>k</sub> − a "
        "W<sub>k</sub>W<sub>k</sub><sup>⊤</sup>W<sub>k</sub>) U<sub>k</sub><sup>⊤</sup> ≈ a Σ<sub>k</sub> "
        "(W<sub>k</sub> − P<sub>k</sub>W<sub>k</sub>) U<sub>k</sub><sup>⊤</sup>, &nbsp; P<sub>k</sub> = softmax(s "
        "W<sub>k</sub>W<sub>k</sub><sup>⊤</sup>) &nbsp;&nbsp; restored step: Z + κ Σ<sub>k</sub> "
        "(P<sub>k</sub>W<sub>k</sub> − W<sub>k</sub>) U<sub>k</sub><sup>⊤</sup> &nbsp;&nbsp; published step: Z + "
        "Σ<sub>k</sub> P<sub>k</sub>W<sub>k</sub> U<sub>k</sub><sup>⊤</sup>",
        how=f"{results.tokens} noisy tokens (σ = {results.noise_std:g}) of {results.h} subspaces of dimension "
        f"{results.p}; {results.draws} draws. The distortion sets a‖W‖²; the series converges below 1. The softmax "
        "forms got the best factor before them, in their favour. Because every form begins with the same shrinking, "
        "the part that mixes tokens is also compared alone. Subspaces: orthogonal, and tilted to a coherence of "
        f"{number(tilted.coherence)}. The restored and the published step are held to the exact direction of descent; "
        f"for the change of R<sup>c</sup> all steps were scaled to {STEP_LENGTH:g} of the tokens' norm. The published "
        "step has the projections U<sub>k</sub> here, where the network has learned ones, and tokens that are not "
        "normalised.",
        found=(
            f"Relative errors of the orders 0, 1, 2 at a‖W‖² = {near.radius:g}: "
            + ", ".join(number(near.error[f"order {m}"]) for m in range(3))
            + f"; at {edge.radius:g}: "
            + ", ".join(number(edge.error[f"order {m}"]) for m in range(3))
            + ".",
            f"With softmax, W − PW at a‖W‖² = {near.radius:g}: relative error {number(near.error[f'softmax, {one}'])} "
            f"for s = 1 and {number(near.error[f'softmax, {network}'])} for {_NETWORK}. The part that mixes tokens "
            f"points where the gradient's does with cosine {number(near.mixing[f'softmax, {one}'])} for s = 1 and "
            f"{number(near.mixing[f'softmax, {network}'])} for {_NETWORK}.",
            f"Cosine with −∇R<sup>c</sup> there: restored step {both(near.descent, 'restored')}; published step "
            f"{both(near.descent, 'published')}. With {_NETWORK} the restored step points downhill at "
            f"{downhill['restored']} of {len(results.orthogonal)} distortions, the published one at "
            f"{downhill['published']}.",
            f"Steps of the same length change R<sup>c</sup> by these shares: the exact gradient's "
            f"{number(near.change['gradient'])}; restored {both(near.change, 'restored')}; published "
            f"{both(near.change, 'published')}. Of R<sup>c</sup> as the official code takes it, which scales every "
            f"projection to length 1: restored {both(near.official_change, 'restored')}; published "
            f"{both(near.official_change, 'published')}.",
            f"Slight coherence changes little: order 1 has error {number(tilted.error['order 1'])} and softmax with "
            f"{_NETWORK} {number(tilted.error[f'softmax, {network}'])} there.",
        ),
        limits=(
            f"Beyond a‖W‖² = 1 the series is useless: at {beyond.radius:g} order 1 has relative error "
            f"{number(beyond.error['order 1'])}, and cosine {number(beyond.cosine['order 1'])}.",
            "The published step is not a step down R<sup>c</sup> of tokens as they are: it lengthens a token's part in "
            "every subspace, where the gradient shortens it. In a measure that does not see length, or after a "
            "normalisation, it can still compress.",
            "As an approximation of the gradient's value the softmax is poor: the errors of "
            f"{number(near.error[f'softmax, {one}'])} and {number(near.error[f'softmax, {network}'])} compare with "
            f"{number(near.error['order 0'])} for plain shrinking (order 0). It is not meant to approximate: it "
            "replaces likeness by membership, which the first and the third claim show to be what cleans tokens.",
        ),
        glance=f"First order is accurate (error at most {ACCURATE}) {reach}. With the softmax ({_NETWORK}) the step "
        f"with both terms has a cosine of {number(near.descent[f'restored, {network}'])} with the direction of "
        f"descent; the published step, without −W, has {number(near.descent[f'published, {network}'])}.",
        caption="Left: relative error of the whole gradient. Middle: cosine of the part that mixes tokens. Right: "
        "cosine of the steps with the direction of descent, −∇R<sup>c</sup>; below 0 a step goes uphill.",
    )
