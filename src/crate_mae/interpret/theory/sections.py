"""The sections of the page, in the order of the derivation."""

from crate_mae.interpret.theory.experiments import TheoryResults
from crate_mae.interpret.theory.sections_gradient import attention_section, denoising_section
from crate_mae.interpret.theory.sections_layers import diffusion_section, ista_section, signal_to_noise_section
from crate_mae.interpret.theory.wording import Section


def write_sections(results: TheoryResults) -> list[Section]:
    """What the page says of each of the five claims."""
    return [
        denoising_section(results.denoising),
        attention_section(results.attention),
        signal_to_noise_section(results.signal_to_noise),
        diffusion_section(results.diffusion),
        ista_section(results.ista),
    ]
