"""Make `tests/golden/crate_mae_reference.safetensors`: python -m tests.models.make_golden

Random weights in the official layout, random images and masks, and what the reference implementation computes from
them in float64. Small, and of our own making, so that the check of every number runs wherever the tests run.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import crate_mae
from benchmarks import reference

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "crate_mae_reference.safetensors"


def main() -> None:
    torch.manual_seed(11)
    settings = {"image_size": (15, 25), "patch_size": 5, "embed_dim": 28, "num_heads": 7, "depth": 3}
    model = crate_mae.create_model("crate_mae_nano_patch2_8", decoder_depth=2, **settings).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    state = crate_mae.to_official(model)
    images = torch.randn(2, 3, 15, 25, dtype=torch.float64)
    mask = torch.rand(2, 15) < 0.6
    results = reference.forward(state, images, mask, heads=7)
    feat = reference.forward(state, images, torch.zeros_like(mask), heads=7)["latent"]
    tensors = {f"official.{name}": value for name, value in state.items()} | results
    tensors |= {"images": images, "mask": mask.double(), "feat": feat}
    save_file({name: value.float().contiguous() for name, value in tensors.items()}, GOLDEN)


if __name__ == "__main__":
    main()
