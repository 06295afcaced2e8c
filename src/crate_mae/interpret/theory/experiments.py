"""All five experiments, and the file of their numbers."""

import dataclasses
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version

from crate_mae.interpret.theory.attention import Attention, measure_attention
from crate_mae.interpret.theory.denoising import Denoising, measure_denoising
from crate_mae.interpret.theory.diffusion import Diffusion, measure_diffusion
from crate_mae.interpret.theory.ista import Ista, measure_ista
from crate_mae.interpret.theory.signal_to_noise import SignalToNoise, measure_signal_to_noise


@dataclass(frozen=True, kw_only=True)
class TheoryResults:
    """What was measured, with the seed and the versions that it depends on."""

    seed: int
    versions: dict[str, str]
    denoising: Denoising
    attention: Attention
    signal_to_noise: SignalToNoise
    diffusion: Diffusion
    ista: Ista

    def to_json(self) -> str:
        """All numbers but the tokens' paths, which are only drawn; the same text for the same numbers."""
        content = dataclasses.asdict(self)
        for run in content["diffusion"]["runs"]:
            del run["paths"]
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def measure_theory(seed: int = 0, draws: int = 5) -> TheoryResults:
    """Run all experiments.

    Args:
        seed: of all randomness.
        draws: how many times each setting is drawn anew.
    """
    packages = ("crate-mae", "torch", "scikit-learn", "numpy")
    return TheoryResults(
        seed=seed,
        versions={"python": platform.python_version(), **{name: version(name) for name in packages}},
        denoising=measure_denoising(seed, draws),
        attention=measure_attention(seed, draws),
        signal_to_noise=measure_signal_to_noise(seed, draws),
        diffusion=measure_diffusion(seed, draws),
        ista=measure_ista(seed, draws),
    )
