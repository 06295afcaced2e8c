"""The page of the theory: all claims measured, and the files with their numbers, figures and explanations."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from matplotlib.figure import Figure

from crate_mae.drawing.page import render
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


def theory_files(results: TheoryResults) -> dict[str, bytes | str]:
    """The content of every file by its name: each figure as PNG and PDF, the numbers as JSON, and the page last."""
    figures = draw_theory(results)
    pictures = {name: encode(figure, "png") for name, figure in figures.items()}
    files: dict[str, bytes | str] = {f"{name}.png": picture for name, picture in pictures.items()}
    files |= {f"{name}.pdf": encode(figure, "pdf") for name, figure in figures.items()}
    files["theory.json"] = results.to_json()
    files[PAGE] = write_page(results, explain_theory(results), pictures)
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
        results: of all claims.
        sections: their explanations.
        pictures: PNG files, by the names of the sections' figures.
    """
    return render(
        "interpret/claims/theory.html.j2",
        title="The theory of CRATE-MAE, checked",
        results=results,
        sections=sections,
        pictures=pictures,
    )
