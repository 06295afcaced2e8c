"""Images to patches and back, and which patches are hidden."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crate_mae.errors import UserError
from crate_mae.private_torch import is_transformed


def random_mask(
    batch: int,
    num_patches: int,
    mask_ratio: float,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "b n"]:
    """Hide the same number of patches in every image, chosen uniformly and independently.

    `visible_patches` of them stay visible.

    Args:
        batch: number of images b.
        num_patches: patches per image n.
        mask_ratio: share of hidden patches; see `check_mask_ratio`.
        generator: source of randomness; its device is the mask's device. None takes torch's global CPU generator.

    Returns:
        True where a patch is hidden.

    Raises:
        UserError: for a ratio that hides nothing, or leaves nothing visible.
    """
    check_mask_ratio(mask_ratio, num_patches)
    device = generator.device if generator else "cpu"
    noise = torch.rand(batch, num_patches, generator=generator, device=device, dtype=torch.float32)
    return hide_all_but(visible_from_noise(noise, mask_ratio), num_patches)


def check_mask_ratio(mask_ratio: float, num_patches: int) -> None:
    """Raise a `UserError` for a ratio that hides none of the patches of an image, or leaves none visible."""
    visible = visible_patches(num_patches, mask_ratio) if 0.0 < mask_ratio < 1.0 else 0
    if not 0 < visible < num_patches:
        hidden = "none" if mask_ratio <= 0 or visible else "all"
        raise UserError(
            f"mask_ratio is {mask_ratio}, which hides {hidden} of {num_patches:,} patches, but must hide some and "
            "leave some visible."
        )


def visible_from_noise(noise: Float[Tensor, "b n"], mask_ratio: float) -> Int[Tensor, "b keep"]:
    """Positions of the patches that stay visible, in ascending order: those with the smallest numbers."""
    keep = visible_patches(noise.shape[1], mask_ratio)
    return noise.argsort(dim=1)[:, :keep].sort(dim=1).values


def hide_all_but(visible: Int[Tensor, "b keep"], num_patches: int) -> Bool[Tensor, "b n"]:
    """The mask that leaves these patches visible: `visible_indices` the other way round."""
    hidden = torch.ones(len(visible), num_patches, dtype=torch.bool, device=visible.device)
    return hidden.scatter(1, visible, False)


def visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Patches per image that are not hidden, int(n (1 - mask_ratio)), as in the official code's `random_masking`."""
    return int(num_patches * (1.0 - mask_ratio))


def visible_indices(mask: Bool[Tensor, "b n"]) -> Int[Tensor, "b keep"]:
    """Positions of the visible patches of each image, in ascending order.

    Raises:
        UserError: if the images do not all hide the same number of patches, since the visible ones then fill no tensor,
            or cannot be counted.
    """
    hidden = mask.sum(dim=1)
    try:
        first = int(hidden[0])
    except RuntimeError as error:
        if not is_transformed():
            raise
        raise UserError(
            "torch.func.vmap does not let a model count visible patches: draw the mask before, and give the model "
            "visible=crate_mae.models.masking.visible_indices(mask) beside it."
        ) from error
    if not torch.jit.is_tracing() and bool((hidden != first).any()):
        raise UserError(
            f"The mask hides between {int(hidden.min())} and {int(hidden.max())} patches per image.\n"
            'A model with mask_tokens="decoder" encodes visible patches alone and needs the same number in every image.'
        )
    # A stable sort brings the visible (False) first and keeps their order.
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : mask.shape[1] - first]


def patchify(images: Float[Tensor, "b c hh ww"], patch_size: int) -> Float[Tensor, "b n q"]:
    """Cut images into patches: row by row over the grid, pixels row by row with channels last, q = patch_size^2 c.

    Raises:
        UserError: if the patch does not divide the image.
    """
    b, c, hh, ww = images.shape
    if hh % patch_size or ww % patch_size:
        raise UserError(f"Images of {hh} x {ww} pixels cannot be cut into patches of {patch_size} x {patch_size}.")
    x = images.reshape(b, c, hh // patch_size, patch_size, ww // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(
    patches: Float[Tensor, "b n q"],
    patch_size: int,
    grid_size: tuple[int, int],
) -> Float[Tensor, "b c hh ww"]:
    """The inverse of `patchify` for images of `grid_size` (rows, columns) patches."""
    b, _, q = patches.shape
    gh, gw = grid_size
    x = patches.reshape(b, gh, gw, patch_size, patch_size, q // patch_size**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, gh * patch_size, gw * patch_size)


def mean_over_hidden(values: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b"]:
    """The mean of each image's hidden patches; every image has at least one."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1)


def patch_statistics(
    patches: Float[Tensor, "b n q"],
) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
    """Mean and standard deviation of each patch, with which normalised pixel targets are made.

    The standard deviation is sqrt(var + 1e-6) with the unbiased variance, as in the official `forward_loss`.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    return mean, (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
