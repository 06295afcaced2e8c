"""How numbers, times, lists and formulas are written in messages, reports and figures.

Text is plain: "R^c", "U_k", "λ‖Z‖_0" and "1.0·10^−7" are typeset by `html` in a report, by `mathtext` in a figure of
matplotlib, and by `raised` where there are characters only.
"""

import math
import re
from collections.abc import Sequence

from markupsafe import Markup, escape

_SUPERSCRIPT = re.compile(r"\^(−?\d+(?:/\d+)?|⊤|[a-z]\b)")
_RAISED = str.maketrans("c⊤−0123456789", "ᶜᵀ⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SUBSCRIPT = re.compile(r"(?:(?<=\b[A-ZΣ])|(?<=‖))_(\w)\b|(?<=\w)_([α-ω])\b")


def number(value: float) -> str:
    """Three digits, with a true minus sign; in powers of ten where decimals would show nothing."""
    if math.isinf(value):
        text = f"{value}".replace("inf", "∞")
    elif (value and abs(value) < 0.001) or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa}·10^{int(exponent)}"
    elif abs(value) >= 999.5:  # with three digits, it would be 1.00e+03
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.3g}".rstrip(".") if value else "0"
    return text.replace("-", "−")


def signed(value: float) -> str:
    """A change: `number` with its sign."""
    return f"+{number(value)}" if value > 0 else number(value)


def percent(share: float, decimals: int = 0) -> str:
    """A share in percent, with a true minus sign."""
    return f"{100 * share:.{decimals}f}%".replace("-", "−")


def listed(words: Sequence[str]) -> str:
    """Such as "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def plural(count: int, word: str) -> str:
    """Such as "1 layer", "6 layers" and "1,200 processes"."""
    return f"{count:,} {word}" + ("" if count == 1 else "es" if word.endswith("s") else "s")


def duration(seconds: float) -> str:
    """Format a length of time: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def html(text: str) -> Markup:
    """Text as HTML, escaped, with superscripts, subscripts, minus signs and line breaks; HTML stays as it is."""
    if isinstance(text, Markup):
        return text
    marked = _SUPERSCRIPT.sub(r"<sup>\1</sup>", str(escape(text)))
    marked = _SUBSCRIPT.sub(lambda found: f"<sub>{found[1] or found[2]}</sub>", marked)
    return Markup(marked.replace(" - ", " − ").replace("\n", "<br>"))


def raised(text: str) -> str:
    """Text whose superscripts are characters of their own, such as "Rᶜ"."""
    return _SUPERSCRIPT.sub(lambda found: found[1].translate(_RAISED), text).replace(" - ", " − ")


def mathtext(text: str) -> str:
    """Text for a figure of matplotlib, with superscripts, subscripts and minus signs."""
    marked = _SUPERSCRIPT.sub(r"$^{\1}$", text)
    marked = _SUBSCRIPT.sub(lambda found: f"$_{found[1] or found[2]}$", marked)
    return marked.replace("$^{c}$", "$^c$").replace(" - ", " − ")
