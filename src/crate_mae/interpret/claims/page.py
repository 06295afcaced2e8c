"""The page of the theory: all claims measured, and the files with their numbers, figures and explanations."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version

from matplotlib.figure import Figure

from crate_mae.drawing.page import figure, page
from crate_mae.drawing.style import encode
from crate_mae.interpret.claims.attention import Attention, draw_attention, explain_attention, measure_attention
from crate_mae.interpret.claims.common import Section
from crate_mae.interpret.claims.denoising import Denoising, draw_denoising, explain_denoising, measure_denoising
from crate_mae.interpret.claims.diffusion import Diffusion, draw_diffusion, explain_diffusion, measure_diffusion
from crate_mae.interpret.claims.ista import Ista, draw_ista, explain_ista, measure_ista
from crate_mae.interpret.claims.signal_to_noise import (
    SignalToNoise,
    draw_signal_to_noise,
    explain_signal_to_noise,
    measure_signal_to_noise,
)

PAGE = "theory.html"
_PACKAGES = ("crate-mae", "torch", "scikit-learn", "numpy")


@dataclass(frozen=True, kw_only=True)
class TheoryResults:
    """The results of all claims, with the seed and the versions that they depend on."""

    seed: int
    versions: dict[str, str]
    denoising: Denoising
    attention: Attention
    signal_to_noise: SignalToNoise
    diffusion: Diffusion
    ista: Ista

    def to_json(self) -> str:
        """All numbers except the tokens' paths, which are only drawn; equal results give equal text."""
        content = dataclasses.asdict(self)
        for run in content["diffusion"]["runs"]:
            del run["paths"]
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def measure_theory(seed: int = 0, draws: int = 5) -> TheoryResults:
    """Measure all claims.

    Args:
        seed: of all randomness.
        draws: number of independent draws of each setting.
    """
    return TheoryResults(
        seed=seed,
        versions={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        denoising=measure_denoising(seed, draws),
        attention=measure_attention(seed, draws),
        signal_to_noise=measure_signal_to_noise(seed, draws),
        diffusion=measure_diffusion(seed, draws),
        ista=measure_ista(seed, draws),
    )


def theory_files(results: TheoryResults) -> dict[str, bytes]:
    """The content of every file by its name: each figure as PNG and PDF, the numbers as JSON, and the page last."""
    figures = draw_theory(results)
    pictures = {name: encode(figure, "png") for name, figure in figures.items()}
    files = {f"{name}.png": picture for name, picture in pictures.items()}
    files |= {f"{name}.pdf": encode(figure, "pdf") for name, figure in figures.items()}
    files["theory.json"] = results.to_json().encode()
    files[PAGE] = write_page(results, explain_theory(results), pictures).encode()
    return files


def draw_theory(results: TheoryResults) -> dict[str, Figure]:
    """The figure of each claim, by name."""
    return {
        "denoising": draw_denoising(results.denoising),
        "attention": draw_attention(results.attention),
        "signal_to_noise": draw_signal_to_noise(results.signal_to_noise),
        "diffusion": draw_diffusion(results.diffusion),
        "ista": draw_ista(results.ista),
    }


def explain_theory(results: TheoryResults) -> list[Section]:
    """The section of each claim, in the order of the derivation."""
    return [
        explain_denoising(results.denoising),
        explain_attention(results.attention),
        explain_signal_to_noise(results.signal_to_noise),
        explain_diffusion(results.diffusion),
        explain_ista(results.ista),
    ]


def write_page(results: TheoryResults, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """The page as HTML.

    Args:
        results: what was measured.
        sections: what is said of it.
        pictures: PNG files, by the names of the sections' figures.
    """
    glances = "".join(f"<li><a href='#{s.figure}'>{escape(s.title)}</a>: {s.glance}</li>" for s in sections)
    body = "".join(
        _section(number, section, pictures[section.figure]) for number, section in enumerate(sections, start=1)
    )
    versions = ", ".join(f"{escape(name)} {escape(value)}" for name, value in results.versions.items())
    content = f"""<p>Every layer of CRATE-MAE is derived from a statement about tokens near a few low-dimensional
subspaces. Here the statements are put to the test on data that obey the assumptions: noisy mixtures of Gaussians on
known subspaces. What fails here can hold in a trained network only for other reasons; what holds here may still fail
there.</p>
<h2>At a glance</h2>
<ul>{glances}</ul>
<p class="small">Tokens Z are rows; U<sub>k</sub> is an orthonormal basis of subspace k, and W<sub>k</sub> =
Z U<sub>k</sub>; n tokens of width d, h subspaces of dimension p; a = p/(n ε²). Numbers are means ± standard deviations
over independent draws.</p>
{body}
<footer><h2>To make it again</h2>
<p><code>crate-mae theory --out DIR --seed {results.seed}</code></p>
<p>All numbers are in <code>theory.json</code>; each figure is also a PNG and a PDF file. Versions:
{versions}.</p></footer>"""
    return page("The theory of CRATE-MAE, checked", content)


def _section(number: int, section: Section, picture: bytes) -> str:
    found = "".join(f"<li>{sentence}</li>" for sentence in section.found)
    limits = "".join(f"<li>{sentence}</li>" for sentence in section.limits)
    return f"""<section id="{section.figure}">
<h2>{number}. {escape(section.title)}</h2>
<p class="glance">{section.glance}</p>
<h3>The claim</h3>
<p>{section.claim}</p>
<p class="formula">{section.formula}</p>
<h3>How it was tested</h3>
<p>{section.how}</p>
{figure(picture, section.caption)}
<h3>What came out</h3>
<ul>{found}</ul>
<div class="wide">{section.table}</div>
<h3>Where it fails</h3>
<div class="limits"><ul>{limits}</ul></div>
</section>
"""
