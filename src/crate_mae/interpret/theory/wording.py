"""What a section of the page holds, and how numbers are written in its sentences."""

from dataclasses import dataclass

from crate_mae.interpret.theory.spread import Spread


@dataclass(frozen=True, kw_only=True)
class Section:
    """One claim on the page; the texts may hold simple HTML.

    Attributes:
        figure: name of its figure.
        title: in a few words.
        claim: what is claimed.
        formula: of the claim.
        how: it was tested.
        found: what came out, a sentence or two each.
        limits: where it fails, or was not tested.
        glance: the outcome in one sentence.
        caption: of the figure.
        table: more of what came out, as an HTML table; empty if there is none.
    """

    figure: str
    title: str
    claim: str
    formula: str
    how: str
    found: tuple[str, ...]
    limits: tuple[str, ...]
    glance: str
    caption: str
    table: str = ""


def number(value: Spread) -> str:
    """Mean ± standard deviation, in as many digits as that leaves; in powers of ten where decimals show nothing."""
    if 0 < abs(value.mean) < 0.005 or abs(value.mean) >= 1000:
        return f"{power(value.mean)} ± {power(value.std)}"
    digits = 3 if value.std < 0.005 else 2
    return f"{value.mean:.{digits}f} ± {value.std:.{digits}f}".replace("-", "−")


def power(value: float) -> str:
    """Two digits and a power of ten."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}·10<sup>{int(exponent)}</sup>".replace("-", "−")


def span(values: list[float]) -> str:
    """Smallest and largest."""
    return f"{min(values):.2f} to {max(values):.2f}"
