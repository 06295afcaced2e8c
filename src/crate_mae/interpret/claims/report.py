"""The report on the theory: all claims measured, and the files with their numbers, figures and explanations."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from crate_mae.drawing.style import encode
from crate_mae.drawing.templates import render
from crate_mae.interpret.claims import attention, denoising, diffusion, ista, signal_to_noise

REPORT_FILE = "theory.html"
# In the order of the derivation; each measures with `measure`, then `draw`s and `explain`s what it found.
CLAIMS = {
    "denoising": denoising,
    "attention": attention,
    "signal_to_noise": signal_to_noise,
    "diffusion": diffusion,
    "ista": ista,
}
_PACKAGES = ("crate-mae", "torch", "scikit-learn", "numpy")


@dataclass(frozen=True, kw_only=True)
class TheoryResults:
    """The results of all claims, by the names in `CLAIMS`, with the seed and the versions that they depend on."""

    seed: int
    versions: dict[str, str]
    claims: dict[str, Any]

    def to_json(self) -> str:
        """All numbers except the tokens' paths, which are only drawn; equal results give equal text."""
        content = {"seed": self.seed, "versions": self.versions, **asdict(self)["claims"]}
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
        claims={name: claim.measure(seed, draws) for name, claim in CLAIMS.items()},
    )


def theory_files(results: TheoryResults) -> dict[str, bytes | str]:
    """The content of every file by its name: each figure as PNG and PDF, the numbers as JSON, and the report last."""
    figures = {name: claim.draw(results.claims[name]) for name, claim in CLAIMS.items()}
    pictures = {name: encode(figure, "png") for name, figure in figures.items()}
    files: dict[str, bytes | str] = {f"{name}.png": picture for name, picture in pictures.items()}
    files |= {f"{name}.pdf": encode(figure, "pdf") for name, figure in figures.items()}
    files["theory.json"] = results.to_json()
    files[REPORT_FILE] = write_html(results, pictures)
    return files


def write_html(results: TheoryResults, pictures: Mapping[str, bytes]) -> str:
    """The report as HTML, from the results and the PNG files of the figures by the names of the claims."""
    return render(
        "interpret/claims/theory.html.j2",
        title="The theory of CRATE-MAE, checked",
        results=results,
        sections={name: claim.explain(results.claims[name]) for name, claim in CLAIMS.items()},
        pictures=pictures,
    )
