"""The decoder: from latent tokens to the pixels of every patch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from crate_mae.models.config import CrateConfig, Initialization, Layer, ModelConfig, ViTConfig
from crate_mae.models.initialization import initialize, sincos_positions
from crate_mae.models.layers import DecoderLayer, OutputProjection
from crate_mae.models.monotone import MonotoneDecoderLayer


class Decoder(nn.Module):
    """Layers that predict each patch's pixels from latent tokens.

    Args:
        block: builds one layer.
        depth: number of layers.
        encoder_dim: width of the latent tokens.
        embed_dim: width of the decoder's layers.
        patch_pixels: q, predicted numbers per patch (patch_size^2 x channels).
        grid_size: rows and columns of patches.
        fills_in: whether the decoder gets visible tokens only and fills in mask tokens itself (MAE), instead of all
            tokens (the official CRATE-MAE).
        init: the initialisation, see `models.initialization`.

    Attributes:
        embed: linear map from the encoder's width. The identity if all tokens have the right width already: the
            official code has a linear map there, and never calls it.
        grad_checkpointing: whether layers are computed again in the backward pass, instead of what they would save.
    """

    pos_embed: Tensor | None

    def __init__(
        self,
        *,
        block: Callable[[], nn.Module],
        depth: int,
        encoder_dim: int,
        embed_dim: int,
        patch_pixels: int,
        grid_size: tuple[int, int],
        fills_in: bool,
        init: Initialization = "official",
    ) -> None:
        super().__init__()
        needs_embed = fills_in or encoder_dim != embed_dim
        self.embed = nn.Linear(encoder_dim, embed_dim) if needs_embed else nn.Identity()
        self.register_buffer("pos_embed", sincos_positions(embed_dim, grid_size)[None] if fills_in else None)
        self.blocks = nn.Sequential(*[block() for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.pred = nn.Linear(embed_dim, patch_pixels)
        self.grad_checkpointing = False
        initialize(self, init)

    def forward(self, latent: Float[Tensor, "b n_plus_1 d"]) -> Float[Tensor, "b n q"]:
        """Predict from all tokens, class token first."""
        return self._predict(self.embed(latent))

    def forward_visible(
        self,
        latent: Float[Tensor, "b keep_plus_1 d"],
        visible: Int[Tensor, "b keep"],
        mask_token: Float[Tensor, "1 1 e"],
    ) -> Float[Tensor, "b n q"]:
        """Predict from the class token and the visible patches, with a mask token in each hidden place.

        Positions are added after that, as in MAE.
        """
        assert self.pos_embed is not None, "a decoder that gets all tokens fills nothing in"
        tokens = self.embed(latent)
        b, _, width = tokens.shape
        everywhere = mask_token.to(tokens.dtype).expand(b, self.pos_embed.shape[1] - 1, width)
        patches = everywhere.scatter(1, visible[..., None].expand(-1, -1, width), tokens[:, 1:])
        return self._predict(torch.cat([tokens[:, :1], patches], dim=1) + self.pos_embed)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute layers again in the backward pass, as timm's method of this name makes an encoder do."""
        self.grad_checkpointing = enable

    def _predict(self, tokens: Tensor) -> Tensor:
        checkpoints = self.grad_checkpointing and self.training
        tokens = checkpoint_seq(self.blocks, tokens) if checkpoints else self.blocks(tokens)
        return self.pred(self.norm(tokens)[:, 1:])


def build_decoder(config: ModelConfig) -> Decoder:
    """The decoder that a configuration describes, with random weights."""
    c = config
    width, heads = c.decoder_embed_dim, c.decoder_num_heads
    init: Initialization = "official"
    if isinstance(c, CrateConfig):
        init = c.init
        block = crate_decoder_block(width, heads, layer=c.layer, output_projection=c.output_projection)
    else:
        assert isinstance(c, ViTConfig)
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)  # timm annotates a class, and calls it as a function
        block = partial(Block, width, heads, mlp_ratio=c.mlp_ratio, qkv_bias=True, norm_layer=norm_layer)  # MAE's
    return Decoder(
        block=block,
        depth=c.decoder_depth,
        encoder_dim=c.embed_dim,
        embed_dim=width,
        patch_pixels=c.patch_size**2 * c.in_chans,
        grid_size=c.grid_size,
        fills_in=c.mask_tokens == "decoder",
        init=init,
    )


def crate_decoder_block(
    embed_dim: int, num_heads: int, *, layer: Layer, output_projection: OutputProjection
) -> Callable[[], nn.Module]:
    """A builder of CRATE's decoder layers."""
    if layer != "published":
        return partial(MonotoneDecoderLayer, embed_dim, num_heads)
    return partial(DecoderLayer, embed_dim, num_heads, output_projection=output_projection)
