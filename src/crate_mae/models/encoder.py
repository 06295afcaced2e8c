"""The encoder: a timm Vision Transformer with fixed positions that also takes masked images."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from crate_mae.models.config import LAYER_SETTINGS, SETTINGS_WITHOUT, Initialization, Layer, ModelConfig
from crate_mae.models.initialization import initialize, sincos_positions
from crate_mae.models.layers import EncoderLayer
from crate_mae.models.masking import patchify, unpatchify
from crate_mae.models.monotone import CompressingEncoderLayer, MonotoneEncoderLayer, orthogonal_parameters


class MaskedEncoder(VisionTransformer):
    """A timm `VisionTransformer` for masked images: CRATE's layers or, as the baseline, timm's own blocks.

    It keeps timm's contract for a backbone (`forward_features`, `forward_intermediates`, `reset_classifier`,
    `set_grad_checkpointing`, ...), with these differences:

    - positions are the fixed sine-cosine table of `sincos_positions`, a buffer and not a parameter;
    - `forward_masked` and `forward_visible` encode an image with hidden patches;
    - the initialisation is the official one, or isometric (`models.initialization`).

    Args:
        block: builds one layer from timm's block arguments: `crate_block`, or timm's own `Block`.
        init: the initialisation, see `models.initialization`.
        vit_options: all other arguments of timm's `VisionTransformer`.
    """

    pos_embed: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]  # timm: a parameter, or none at all
    cls_token: nn.Parameter  # pyright: ignore[reportIncompatibleVariableOverride]  # timm: perhaps none

    def __init__(
        self,
        *,
        block: Callable[..., nn.Module],
        init: Initialization = "official",
        num_classes: int = 0,
        **vit_options: Any,
    ) -> None:
        super().__init__(
            block_fn=block,  # pyright: ignore[reportArgumentType]  # timm asks for a type, and calls it as a function
            num_classes=num_classes,
            pos_embed="none",
            weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
            **vit_options,
        )
        del self.pos_embed  # timm's placeholder for "none"
        positions = sincos_positions(self.embed_dim, self.patch_embed.grid_size, self.num_prefix_tokens)
        self.register_buffer("pos_embed", positions[None].to(self.cls_token))  # its device and precision
        self.init: Initialization = init
        self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:  # noqa: ARG002  # timm's signature
        """Initialise as `init` says; `mode` (timm's other schemes) does not apply."""
        if needs_reset:
            for module in self.modules():
                if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            positions = sincos_positions(self.embed_dim, self.patch_embed.grid_size, self.num_prefix_tokens)
            self.pos_embed.copy_(positions)
        initialize(self, self.init)
        nn.init.normal_(self.cls_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Timm's names, without the table of positions, which is a buffer here, and with orthogonal matrices."""
        return super().no_weight_decay() - {"pos_embed"} | orthogonal_parameters(self)

    def set_input_size(
        self,
        img_size: tuple[int, int] | None = None,
        patch_size: tuple[int, int] | None = None,
    ) -> None:
        """Change the image or patch size; positions are interpolated, and stay a buffer (timm makes a parameter)."""
        old_grid, positions = self.patch_embed.grid_size, self.pos_embed
        del self.pos_embed
        self.pos_embed = None  # pyright: ignore[reportAttributeAccessIssue]  # so timm leaves positions alone
        super().set_input_size(img_size, patch_size)
        del self.pos_embed
        new_grid = self.patch_embed.grid_size
        resampled = resample_abs_pos_embed(positions, list(new_grid), list(old_grid), self.num_prefix_tokens)
        self.register_buffer("pos_embed", resampled)

    def forward_masked(
        self,
        images: Float[Tensor, "b c hh ww"],
        mask: Bool[Tensor, "b n"],
        mask_token: Float[Tensor, "1 1 d"],
    ) -> Float[Tensor, "b n_plus_1 d"]:
        """Encode images whose hidden patches are replaced by a token before positions are added, as in CRATE-MAE.

        Args:
            images: normalised images.
            mask: true = hidden.
            mask_token: stands in for hidden patches.

        Returns:
            Normalised features, class token first, then all patches in order.
        """
        tokens = self.patch_embed(images)
        hidden = mask.reshape(*tokens.shape[:-1], 1)
        tokens = torch.where(hidden, mask_token.reshape(-1).to(tokens.dtype), tokens)
        return self._encode(self._pos_embed(tokens))

    def forward_visible(
        self, images: Float[Tensor, "b c hh ww"], visible: Int[Tensor, "b keep"]
    ) -> Float[Tensor, "b keep_plus_1 d"]:
        """Encode some patches of each image alone, as in MAE (He et al. 2022).

        Args:
            images: normalised images.
            visible: positions of the patches to encode, from 0; see `masking.visible_indices`.

        Returns:
            Normalised features, class token first, then the visible patches in the order of `visible`.
        """
        tokens = self._pos_embed(self.patch_embed(images))
        places = visible + self.num_prefix_tokens
        prefix = torch.arange(self.num_prefix_tokens, device=places.device).expand(places.shape[0], -1)
        places = torch.cat([prefix, places], dim=1)
        return self._encode(tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1])))

    def _encode(self, tokens: Tensor) -> Tensor:
        checkpoints = self.grad_checkpointing and self.training
        return self.norm(checkpoint_seq(self.blocks, tokens) if checkpoints else self.blocks(tokens))


class NormedPatchEmbed(PatchEmbed):
    """Patches to tokens as in the official CRATE classifiers: a patch's pixels are normalised, and so is its token.

    Attributes:
        pixel_norm: over the numbers of a patch, in the order of `masking.patchify`.
    """

    EPS: ClassVar[float] = 1e-5

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["norm_layer"] = partial(nn.LayerNorm, eps=self.EPS)
        super().__init__(*arguments, **options)
        self.side = int(self.patch_size[0])
        self.pixel_norm = nn.LayerNorm(self.side**2 * self.proj.in_channels, eps=self.EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Images b c hh ww to tokens b n d, or b gh gw d where any size is taken."""
        grid = (x.shape[2] // self.side, x.shape[3] // self.side)
        return super().forward(unpatchify(self.pixel_norm(patchify(x, self.side)), self.side, grid))


def build_encoder(config: ModelConfig, **options: Any) -> MaskedEncoder:
    """The encoder that a configuration describes, with random initialisation; `options` are more for `encoder_of`."""
    return encoder_of(**(config.encoder_arguments() | options))


def encoder_of(**arguments: Any) -> MaskedEncoder:
    """An encoder with random initialisation from the arguments that it has in timm's `create_model`, too.

    Args:
        arguments: of timm's `VisionTransformer`; `init`; for timm's blocks their `mlp_ratio`, and for CRATE's the
            settings of `crate_block`, and `patch_norm`: whether patches are embedded by `NormedPatchEmbed`.
    """
    if "mlp_ratio" in arguments:
        return MaskedEncoder(block=Block, **arguments)
    block = crate_block(**{key: arguments.pop(key) for key in LAYER_SETTINGS})
    if not arguments.pop("patch_norm", False):
        return MaskedEncoder(block=block, **arguments)
    encoder = MaskedEncoder(block=block, embed_layer=NormedPatchEmbed, **arguments)
    encoder.norm.eps = NormedPatchEmbed.EPS  # pyright: ignore[reportArgumentType]  # of the same models
    return encoder


def crate_block(*, layer: Layer, **settings: Any) -> Callable[..., nn.Module]:
    """A block builder for `MaskedEncoder` that makes CRATE's layers, of the settings that this kind of them has."""
    kind = {"published": EncoderLayer, "compressing": CompressingEncoderLayer, "monotone": MonotoneEncoderLayer}[layer]
    settings = {key: value for key, value in settings.items() if key not in SETTINGS_WITHOUT[layer]}

    # timm hands every block the options of an MLP and of ordinary attention. A CRATE layer has neither.
    def build(
        *,
        dim: int,
        num_heads: int,
        drop_path: float,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **_vit_only: Any,
    ) -> nn.Module:
        return kind(dim, num_heads, **settings, drop_path=drop_path, device=device, dtype=dtype)

    return build
