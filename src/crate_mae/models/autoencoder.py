"""The masked autoencoder: hide patches, encode, decode, compare. The decoder is here, the encoder in `encoder`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import Attention
from timm.models import checkpoint_seq
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from crate_mae.errors import UserError
from crate_mae.models.config import MASK_RATIO, CrateConfig, Initialization, ModelConfig, ViTConfig
from crate_mae.models.devices import send, without_memory
from crate_mae.models.encoder import MaskedEncoder, build_encoder
from crate_mae.models.features import DEFAULT_LAYER, OneImage, Pooling, apply_to_images, encode, transform_of
from crate_mae.models.initialization import initialize, sincos_positions
from crate_mae.models.layers import DecoderLayer
from crate_mae.models.masking import hide_all_but, patch_statistics, patchify, random_mask, visible_indices
from crate_mae.models.monotone import MonotoneDecoderLayer, orthogonal_parameters
from crate_mae.theory.derivatives import at_least_float


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


class MAEOutput(NamedTuple):
    """What a masked autoencoder returns.

    Attributes:
        loss: mean squared error over the pixels of hidden patches.
        prediction: predicted pixels of every patch, in the normalisation of the targets; q = patch_size^2 c.
        mask: true = hidden.
        latent: the encoder's normalised output, class token first; all patches with mask tokens at the encoder,
            visible patches alone with mask tokens at the decoder.
    """

    loss: Float[Tensor, ""]
    prediction: Float[Tensor, "b n q"]
    mask: Bool[Tensor, "b n"]
    latent: Float[Tensor, "b m d"]


class MaskedAutoencoder(nn.Module):
    """Masked completion by an encoder and a decoder: CRATE-MAE, or ViT-MAE behind the same contract.

    Args:
        encoder: a timm backbone with `forward_masked` and `forward_visible`.
        decoder: predicts the pixels of every patch.
        config: what both were built from; `build` makes all three fit.

    Attributes:
        mask_token: one learned token that stands in for hidden patches, at the encoder or at the decoder.
    """

    def __init__(self, encoder: MaskedEncoder, decoder: Decoder, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.config = config
        at_encoder = config.mask_tokens == "encoder"
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.embed_dim if at_encoder else config.decoder_embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.official_unused: dict[str, Any] = {}  # see `models.official`

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.config.grid_size

    @property
    def num_patches(self) -> int:
        """Patches per image n."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def layers(self) -> list[nn.Module]:
        """The layers of the encoder, then those of the decoder."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute layers again in the backward pass, which saves memory; timm's contract."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, besides one-dimensional ones, that weight decay should skip."""
        of_encoder = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return {"mask_token"} | of_encoder | {f"decoder.{name}" for name in orthogonal_parameters(self.decoder)}

    def forward(
        self,
        images: Float[Tensor, "b c hh ww"],
        mask_ratio: float = MASK_RATIO,
        mask: Bool[Tensor, "b n"] | None = None,
        generator: torch.Generator | None = None,
        visible: Int[Tensor, "b keep"] | None = None,
    ) -> MAEOutput:
        """Complete masked images, and measure how well.

        Args:
            images: normalised images of the configured size.
            mask_ratio: share of patches to hide at random, without a mask.
            mask: true = hidden.
            generator: draws the mask. None takes torch's global generator in training; in `eval()` nothing is
                random, so None then hides the same patches at every call.
            visible: positions of the patches that stay visible, from which the mask is made if there is none; or
                `masking.visible_indices(mask)` if it is known already; a compiled model cannot count them.

        Returns:
            Named loss, prediction, mask and latent. Without any hidden patch the loss is 0.

        Raises:
            UserError: for images or a mask of another size than the model's, or a mask ratio outside [0, 1).
        """
        check_images(images, self.config)
        if mask is None and visible is not None:
            mask = hide_all_but(visible, self.num_patches)
        elif mask is None:
            if generator is None and not self.training:
                generator = torch.Generator().manual_seed(0)
            mask = random_mask(images.shape[0], self.num_patches, mask_ratio, generator)
        elif tuple(mask.shape) != (images.shape[0], self.num_patches) or mask.dtype != torch.bool:
            wanted = _times((images.shape[0], self.num_patches))
            raise UserError(
                f"The mask is {_times(mask.shape)} of {mask.dtype}, "
                f"but these images need {wanted} (images x patches) of torch.bool."
            )
        at_encoder = self.config.mask_tokens == "encoder"
        if not at_encoder:
            # The visible patches are counted on the mask's own device, which spares a GPU the wait.
            visible = send(visible_indices(mask) if visible is None else visible, images.device)
        mask = send(mask, images.device)
        latent, prediction = predict(self, images, **({"mask": mask} if at_encoder else {"visible": visible}))
        return MAEOutput(masked_loss(self.config, images, prediction, mask), prediction, mask, latent)

    def embed(
        self,
        images: OneImage | Sequence[OneImage],
        *,
        pooling: Pooling | None = None,
        layer: int = DEFAULT_LAYER,
        batch_size: int = 64,
    ) -> Float[Tensor, "b f"] | Float[Tensor, "b n d"]:
        """Features of whole images.

        The images are converted, scaled to cover the model's size, centre-cropped and normalised, as in evaluation.
        The model is in `eval()` while it runs, so that the same image always has the same features.

        Args:
            images: one image, or a sequence of them: paths, Pillow images, arrays (hh ww, or hh ww c) or tensors
                (c hh ww), uint8 or float in [0, 1]. A tensor b c hh ww or an array b hh ww c holds b images.
            pooling: "cls", "mean", "cls+mean" or "tokens"; see `models.features.pool`.
            layer: of the encoder, from 0, or negative from the end; see `models.features.encode_layers`.
            batch_size: images that are encoded at once.

        Returns:
            A float32 tensor on the CPU, one row an image, also if there is one image only.

        Raises:
            UserError: for an image that cannot be read (named), or a pooling or layer that does not exist.
        """
        function = partial(encode, self.encoder, layer=layer, pooling=pooling)
        return apply_to_images(function, self.encoder, transform_of(self.config), images, batch_size)


def predict(
    model: Any,
    images: Float[Tensor, "b c hh ww"],
    *,
    mask: Bool[Tensor, "b n"] | None = None,
    visible: Int[Tensor, "b keep"] | None = None,
) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b n q"]]:
    """Encode masked images, and predict every patch.

    Args:
        model: has `encoder`, `decoder` and `mask_token`: a `MaskedAutoencoder`, or its form in transformers.
        images: normalised images.
        mask: true = hidden, if mask tokens come in at the encoder.
        visible: positions of the patches that stay visible, if mask tokens come in at the decoder.

    Returns:
        The encoder's normalised output, and the prediction in the normalisation of the targets.
    """
    if visible is None:
        latent = model.encoder.forward_masked(images, mask, model.mask_token)
        return latent, model.decoder(latent)
    latent = model.encoder.forward_visible(images, visible)
    return latent, model.decoder.forward_visible(latent, visible, model.mask_token)


def masked_loss(
    config: ModelConfig,
    images: Float[Tensor, "b c hh ww"],
    prediction: Float[Tensor, "b n q"],
    mask: Bool[Tensor, "b n"],
) -> Float[Tensor, ""]:
    """Mean squared error on hidden patches: sum_i m_i e_i / sum_i m_i, e_i of `patch_errors`."""
    error = patch_errors(config, images, prediction)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def patch_errors(
    config: ModelConfig, images: Float[Tensor, "b c hh ww"], prediction: Float[Tensor, "b n q"]
) -> Float[Tensor, "b n"]:
    """Mean squared error of each patch: e_i = mean_q (x_iq - y_iq)^2, in float32 at least.

    With `norm_pix_loss` the target is each patch less its mean, divided by its standard deviation.
    """
    target = at_least_float(patchify(images, config.patch_size))
    if config.norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    return F.mse_loss(prediction.to(target.dtype), target, reduction="none").mean(dim=-1)


def check_images(images: Tensor, config: Any) -> None:
    """Raise a `UserError` for images of another size than a model takes.

    Args:
        images: a batch.
        config: a `ModelConfig` or `ClassifierConfig`.
    """
    expected = (config.in_chans, *config.image_size)
    if tuple(images.shape[1:]) != expected:
        raise UserError(f"Images are {_times(images.shape[1:])}, but this model takes {_times(expected)}.")


def build_decoder(config: ModelConfig) -> Decoder:
    """The decoder that a configuration describes, with random initialisation."""
    c = config
    width, heads = c.decoder_embed_dim, c.decoder_num_heads
    init: Initialization = "official"
    block: Callable[[], nn.Module]
    if isinstance(c, CrateConfig):
        init = c.init
        if c.layer == "published":
            block = partial(DecoderLayer, width, heads, output_projection=c.output_projection)
        else:
            block = partial(MonotoneDecoderLayer, width, heads)
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


def build(config: ModelConfig) -> MaskedAutoencoder:
    """Build the autoencoder that a configuration describes, with random initialisation."""
    model = MaskedAutoencoder(build_encoder(config), build_decoder(config), config)
    for part in model.modules():
        if isinstance(part, Attention):
            part.register_forward_pre_hook(_choose_attention_kernel)
    return model


def build_without_memory(config: ModelConfig) -> MaskedAutoencoder:
    """`build` on the device "meta"; see `without_memory`."""
    with without_memory():
        return build(config)


def _choose_attention_kernel(attention: Any, arguments: tuple[Tensor, ...]) -> None:
    """Before each call, have timm's attention take the faster of its two forms, as `theory.attention.ssa` does.

    On a CPU PyTorch's fused kernel takes 0.75 to 0.95 of the time of plain products in float32, and holds no n x n
    matrix; in bfloat16 it made a training step of `vit_mae_micro_patch4_32` 1.6 times slower. A baseline deserves the
    better of both.
    """
    tokens = arguments[0]
    is_half = tokens.dtype.itemsize < torch.float32.itemsize or torch.is_autocast_enabled(tokens.device.type)
    attention.fused_attn = not (tokens.device.type == "cpu" and is_half)


def _times(shape: tuple[int, ...] | torch.Size) -> str:
    return " x ".join(str(int(size)) for size in shape)
