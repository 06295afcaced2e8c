"""How weights start: as in the official code, or with every layer near an isometry.

Officially all linear maps, MSSA's output projection among them, start with Xavier-uniform weights. MSSA is derived as a
small gradient step, and this is a large one: sparse codes are non-negative, so all tokens share a large common part,
attention averages it, the output projection adds as much again, and ISTA hands on nothing but the normalised sum.
After the 6 + 6 layers of `crate_mae_micro_patch4_32`, 0.2% of the energy of CIFAR-10's tokens tells one place of an
image from another; the first several hundred steps of training go into undoing that (`docs/log.md`).

The "isometric" initialisation takes a tenth of the output projection, so that Z + MSSA(Z) starts near Z, and orthogonal
dictionaries E in the decoder, so that Y E^T keeps all angles. The encoder's dictionary stays as it is: I + eta (D -
D^T D) is near the identity already. 29% of the energy is then left for places. The functions that can be learned are
the same.
"""

import torch
from torch import nn

from crate_mae.models.config import Initialization
from crate_mae.models.layers import MSSA, Dictionary

ISOMETRIC_GAIN = 0.1  # of MSSA's output projection, relative to Xavier's


def initialize(module: nn.Module, init: Initialization = "official") -> None:
    """Initialise the linear maps and dictionaries of an encoder or decoder in place.

    The patch embedding counts as a linear map of flattened patches. Biases start at zero. Layer norms, and dictionaries
    if `init` is "official", initialise themselves.

    Args:
        module: any module with the layers of `models.layers` or of timm.
        init: "official", the Xavier-uniform weights of the official `initialize_weights`; or "isometric", in which
            MSSA's free output projection is `ISOMETRIC_GAIN` times that, and the decoder's dictionaries are orthogonal.
            Layers of timm have neither.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.flatten(1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if init == "isometric":
        _make_isometric(module)


@torch.no_grad()
def _make_isometric(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, MSSA) and part.proj is not None:
            part.proj.weight.mul_(ISOMETRIC_GAIN)
        elif isinstance(part, Dictionary):
            nn.init.orthogonal_(part.weight)
