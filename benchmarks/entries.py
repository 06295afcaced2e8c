"""Who takes part: a model, its loss on images in memory, and its features; all on the same images, equally masked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.reference import Reference
from crate_mae.models.autoencoder import MaskedAutoencoder, build
from crate_mae.models.config import ModelConfig, config_from_dict
from crate_mae.models.masking import random_mask, visible_indices
from crate_mae.models.official import to_official
from crate_mae.models.presets import preset
from crate_mae.training.optimizer import BETAS, adamw

MASK_RATIO = 0.75
_WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Size:
    """What is alike for all entries.

    Attributes:
        ours: configuration of CRATE-MAE; "ours, visible patches" has mask tokens at the decoder only.
        twin: configuration of ViT-MAE: the published one where there is one, else that of the same width and depth.
        batch: images.
    """

    ours: ModelConfig
    twin: ModelConfig
    batch: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"ours": self.ours.to_dict(), "twin": self.twin.to_dict(), "batch": self.batch}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Size":
        """What `to_dict` gave."""
        return cls(config_from_dict(fields["ours"]), config_from_dict(fields["twin"]), fields["batch"])


@dataclass(frozen=True)
class Entry:
    """A model that can be trained and asked for features.

    Attributes:
        model: all its parameters are trained.
        loss: the forward pass of training.
        encode: features of the unmasked images.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    encode: Callable[[], Tensor]

    def optimizer(self) -> Optimizer:
        """AdamW in one kernel, for all alike: what is compared is the models."""
        return adamw(param_groups_weight_decay(self.model, _WEIGHT_DECAY), BETAS)


def sizes() -> dict[str, Size]:
    """Those that `--sizes` takes."""
    return {
        "large": Size(preset("crate_mae_large_patch16_224"), preset("vit_mae_large_published_patch16_224"), 8),
        "base": Size(preset("crate_mae_base_patch16_224"), preset("vit_mae_base_published_patch16_224"), 8),
        "micro": Size(preset("crate_mae_micro_patch4_32"), preset("vit_mae_micro_patch4_32"), 128),
        "nano": Size(preset("crate_mae_nano_patch2_8"), preset("vit_mae_nano_patch2_8"), 4),  # to try the benchmark
    }


def images_and_mask(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same for every entry of a size."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size.batch, size.ours.in_chans, *size.ours.image_size, generator=generator)
    rows, columns = size.ours.grid_size
    return images.to(device), random_mask(size.batch, rows * columns, MASK_RATIO, generator).to(device)


def _ours(size: Size, device: torch.device, **settings: Any) -> Entry:
    return _of_config(size, size.ours.replace(**settings), device)


def _frugal(size: Size, device: torch.device) -> Entry:
    entry = _ours(size, device)
    assert isinstance(entry.model, MaskedAutoencoder)
    entry.model.set_grad_checkpointing()
    return entry


def _reference(size: Size, device: torch.device) -> Entry:
    model = Reference(to_official(_build(size.ours, device)), size.ours.num_heads).to(device)
    images, mask = images_and_mask(size, device)
    return Entry(model, lambda: model(images, mask), lambda: model.features(images))


def _timm(size: Size, device: torch.device) -> Entry:
    """Blocks of timm as a masked autoencoder with a visible-only encoder: our baseline."""
    return _of_config(size, size.twin, device)


def _of_config(size: Size, config: ModelConfig, device: torch.device) -> Entry:
    model = _build(config, device)
    images, mask = images_and_mask(size, device)
    visible = visible_indices(mask)  # known before the step, as in training
    return Entry(
        model,
        lambda: model(images, mask=mask, visible=visible).loss,
        lambda: model.encoder.forward_features(images),
    )


def _build(config: ModelConfig, device: torch.device) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return build(config).to(device)


def _transformers(size: Size, device: torch.device) -> Entry:
    """Hugging Face's ViT-MAE in the twin's configuration."""
    from transformers import ViTMAEForPreTraining

    # On a CPU its fused attention is several times slower than plain products in bfloat16: it gets the faster one.
    attention = "eager" if torch.is_autocast_enabled("cpu") else "sdpa"
    torch.manual_seed(0)
    model = ViTMAEForPreTraining._from_config(_transformers_config(size), attn_implementation=attention).to(device)
    images, mask = images_and_mask(size, device)
    noise = mask.float()  # it hides where there is most of it

    def encode() -> Tensor:
        model.config.mask_ratio = 0.0  # its encoder always masks
        features = model.vit(images, noise=noise).last_hidden_state
        model.config.mask_ratio = MASK_RATIO
        return features

    return Entry(model, lambda: model(images, noise=noise).loss, encode)


def _transformers_config(size: Size) -> Any:
    from transformers import ViTMAEConfig

    twin = size.twin
    return ViTMAEConfig(
        hidden_size=twin.embed_dim,
        num_hidden_layers=twin.depth,
        num_attention_heads=twin.num_heads,
        intermediate_size=4 * twin.embed_dim,
        decoder_hidden_size=twin.decoder_embed_dim,
        decoder_num_hidden_layers=twin.decoder_depth,
        decoder_num_attention_heads=twin.decoder_num_heads,
        decoder_intermediate_size=4 * twin.decoder_embed_dim,
        image_size=twin.image_size[0],
        patch_size=twin.patch_size,
        mask_ratio=MASK_RATIO,
    )


ENTRIES: dict[str, Callable[[Size, torch.device], Entry]] = {
    "ours": _ours,
    "ours, layers computed again": _frugal,
    "ours, visible patches": lambda size, device: _ours(size, device, mask_tokens="decoder"),
    "reference": _reference,
    "timm blocks": _timm,
    "transformers": _transformers,
}
