"""CRATE-MAE as models of transformers: the encoder, also as a backbone, the masked autoencoder, the classifier.

Their tensors have the names that they have in our own files, so the four open one another's folders: what a model has
no place for is ignored, and what is missing, such as the head of a classifier, is initialised as in a new model.
`pretrained` makes one of ours one of these.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    ModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)
from transformers.utils.generic import can_return_tuple

from crate_mae.deployment.huggingface.configuration import CrateMAEConfig, autoencoder_config, classifier_config
from crate_mae.errors import UserError
from crate_mae.models.autoencoder import MaskedAutoencoder, build, masked_loss, predict
from crate_mae.models.classifier import Classifier
from crate_mae.models.config import encoder_config, settings_of
from crate_mae.models.encoder import build_encoder
from crate_mae.models.features import pool
from crate_mae.models.masking import check_mask_ratio, hide_all_but, random_mask, visible_from_noise, visible_indices
from crate_mae.models.monotone import refuse_earlier_layers
from crate_mae.models.tracing import trace

Model = MaskedAutoencoder | Classifier
_IS_COPY = not __name__.startswith("crate_mae.")  # beside weights, where this library may not be installed


@dataclass
class CrateMAEForPreTrainingOutput(ModelOutput):
    """What the masked autoencoder returns in transformers; see `models.autoencoder.MAEOutput`.

    Attributes:
        loss: mean squared error over the pixels of hidden patches; 0 if none is hidden.
        logits: predicted pixels of every patch, b n q.
        mask: true = hidden, b n.
        last_hidden_state: the encoder's normalised output, class token first.
        hidden_states: of the encoder; see `CrateMAEModel`.
        attentions: of the encoder; see `CrateMAEModel`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class CrateMAEPreTrainedModel(PreTrainedModel):
    """The base of the models. `encoder` takes images of any size in whole patches."""

    config: Any  # a `CrateMAEConfig`, perhaps of another copy of this file: see `autoencoder_config`
    config_class = CrateMAEConfig
    base_model_prefix = "crate_mae"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [  # noqa: RUF012  # as transformers has it
        "EncoderLayer",
        "CompressingEncoderLayer",
        "MonotoneEncoderLayer",
        "DecoderLayer",
        "MonotoneDecoderLayer",
        "Block",
    ]

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__(config)
        self.encoder: Any = build_encoder(autoencoder_config(config), dynamic_img_size=True)

    def _observed(
        self, states: bool | None, attentions: bool | None, compute: Callable[..., Any], *inputs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """`compute(*inputs)`, and what it made the encoder's layers do: hidden states and attention, if wanted.

        Whether they are is the configuration's choice where it is None.
        """
        wants = {
            "hidden_states": self.config.output_hidden_states if states is None else states,
            "attentions": self.config.output_attentions if attentions is None else attentions,
        }
        patterns = {"hidden_states": ("blocks.0.z", "blocks.*.z_next"), "attentions": ("blocks.*.attention",)}
        wanted = [pattern for kind in wants if wants[kind] for pattern in patterns[kind]]
        with trace(self.encoder, wanted, detach=False) as record:
            result = compute(*inputs)
        weights = tuple(values[0] for name, values in record.items() if name.endswith(".attention"))
        tokens = tuple(values[0] for name, values in record.items() if not name.endswith(".attention"))
        found = {"hidden_states": tokens, "attentions": weights}
        return result, {kind: values if wants[kind] else None for kind, values in found.items()}

    def _finish(self) -> None:
        """The end of every constructor."""
        if not any(parameter.is_meta for parameter in self.parameters()):
            for module in self.modules():  # each kind of layer has initialised itself already
                module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a file had no weights for, as in a new model."""
        names = {part: name for name, part in self.named_modules()}
        kind_of_model: Any = type(self)
        new = kind_of_model(self.config).get_submodule(names[module])
        for kind in ("named_parameters", "named_buffers"):
            values = dict(getattr(new, kind)(recurse=False))
            for name, value in getattr(module, kind)(recurse=False):
                if not getattr(value, "_is_hf_initialized", False):
                    value.copy_(values[name])

    def _set_gradient_checkpointing(self, enable: bool = True, **_function: Any) -> None:  # pyright: ignore
        """Compute layers again in the backward pass; timm's function does it, not the one that transformers passes."""
        for part in ("encoder", "decoder"):
            if hasattr(self, part):
                getattr(self, part).set_grad_checkpointing(enable)
        self.gradient_checkpointing = enable

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:  # pyright: ignore
        """Load a model as transformers does; the arguments are those of transformers.

        Raises:
            UserError: for monotone layers of an earlier version, whose numbers would be left at their first values.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, info = loaded
        refuse_earlier_layers(info["unexpected_keys"], str(args[0] if args else "The folder"))
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:  # pyright: ignore
        """Write weights, configuration, image processor, code and card; the options are those of transformers.

        Where this library is not installed, the code is the copy that transformers has loaded, and there is no card.
        """
        from crate_mae.deployment.huggingface.processing import CrateMAEImageProcessor

        processor: Any = CrateMAEImageProcessor.for_model(autoencoder_config(self.config))
        if _IS_COPY:
            processor.auto_map = _of_processor(self.config.auto_map)
            super().save_pretrained(save_directory, **options)
            processor.save_pretrained(save_directory)
            for file in Path(__file__).parent.glob("[!_]*.py"):
                shutil.copy(file, save_directory)
            return
        from crate_mae.deployment.hub import upload
        from crate_mae.deployment.huggingface.remote_code import auto_map, write_code

        self.config.auto_map = auto_map()
        processor.auto_map = _of_processor(self.config.auto_map)
        repository = options.pop("repo_id", None) or Path(save_directory).name
        uploads = options.pop("push_to_hub", False)  # transformers would do it at once, with a card of its own
        hub = {key: options.pop(key) for key in ("private", "revision", "commit_message") if key in options}
        super().save_pretrained(save_directory, **options)
        processor.save_pretrained(save_directory)
        write_code(Path(save_directory))
        write_card(self, Path(save_directory))
        if uploads:
            upload(Path(save_directory), repository, token=options.get("token"), **hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # pyright: ignore
        """Upload what `save_pretrained` writes, the card too; see `hub.upload` for the options."""
        if _IS_COPY:
            push: Any = super().push_to_hub
            return push(repo_id, **options)
        from crate_mae.deployment.hub import upload

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), repo_id, **options)


def _of_processor(auto_map: dict[str, str]) -> dict[str, str]:
    """The entry of `auto_map` that transformers looks for in the file of the image processor."""
    return {name: place for name, place in auto_map.items() if name == "AutoImageProcessor"}


class CrateMAEModel(CrateMAEPreTrainedModel):
    """The encoder: images to tokens."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^mask_token$", r"^norm\.", r"^head\."]  # noqa: RUF012

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__(config)
        self._finish()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Float[Tensor, "b c hh ww"],
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_options: Any,
    ) -> Any:
        """Encode whole images.

        Returns:
            `last_hidden_state`, normalised features, class token first; `pooler_output`, the class token and the mean
            of the patches, concatenated, as in `crate-mae embed`; on request `hidden_states`, the input of the first
            layer and the output of every layer, and `attentions`, the weights of every layer, b h n n (of monotone
            layers, balanced: their rows need not sum to 1).
        """
        tokens, observed = self._observed(
            output_hidden_states, output_attentions, self.encoder.forward_features, pixel_values
        )
        pooled = pool(tokens, self.encoder.num_prefix_tokens)
        return BaseModelOutputWithPooling(
            last_hidden_state=cast(Any, tokens), pooler_output=cast(Any, pooled), **observed
        )


class CrateMAEBackbone(BackboneMixin, CrateMAEPreTrainedModel):
    """The encoder as a backbone, for detectors and the like: images to feature maps of chosen layers.

    Every map is normalised by the encoder's last norm, as the last layer's tokens are, and is b d gh gw.
    """

    _keys_to_ignore_on_load_unexpected = CrateMAEModel._keys_to_ignore_on_load_unexpected

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self._finish()

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # `return_dict` is the decorator's
        self,
        pixel_values: Float[Tensor, "b c hh ww"],
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_options: Any,
    ) -> Any:
        """Feature maps of the configuration's `out_features`, from images of any size in whole patches."""
        _, observed = self._observed(True, output_attentions, self.encoder.forward_features, pixel_values)
        rows = pixel_values.shape[2] // self.config.patch_size
        maps = tuple(
            self.encoder.norm(tokens)[:, self.encoder.num_prefix_tokens :].mT.unflatten(-1, (rows, -1))
            for name, tokens in zip(self.config.stage_names, observed["hidden_states"], strict=True)
            if name in self.config.out_features
        )
        keeps = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if not keeps:
            observed["hidden_states"] = None
        return BackboneOutput(feature_maps=cast(Any, maps), **observed)


class CrateMAEForPreTraining(CrateMAEPreTrainedModel):
    """The masked autoencoder. In `eval()` it hides nothing by default, so that it is deterministic."""

    _keys_to_ignore_on_load_unexpected = [r"^norm\.", r"^head\."]  # noqa: RUF012

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__(config)
        net = build(autoencoder_config(config))
        self.decoder, self.mask_token = net.decoder, net.mask_token
        self._finish()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Float[Tensor, "b c hh ww"],
        bool_masked_pos: Bool[Tensor, "b ..."] | None = None,
        mask_ratio: float | None = None,
        noise: Float[Tensor, "b n"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_options: Any,
    ) -> Any:
        """Complete masked images, and measure how well.

        Args:
            pixel_values: normalised images of the configured size.
            bool_masked_pos: true = hidden, b n or b gh gw.
            mask_ratio: share of patches to hide; by default the configuration's in training, and none otherwise. In
                `eval()` the same patches are hidden at every call.
            noise: which patches to hide: those with the largest numbers, a share of `mask_ratio`.
            output_hidden_states: whether to return those of the encoder, too.
            output_attentions: whether to return that of the encoder, too.

        Raises:
            UserError: for images or a mask of another size, or a ratio that hides all, or is above
                0 and hides nothing.
        """
        c = autoencoder_config(self.config)
        if tuple(pixel_values.shape[1:]) != (c.in_chans, *c.image_size):
            raise UserError(
                f"Images are {tuple(pixel_values.shape[1:])}, but this autoencoder takes {(c.in_chans, *c.image_size)}."
                " AutoModel, the encoder alone, takes any size in whole patches."
            )
        mask = self._mask(len(pixel_values), bool_masked_pos, mask_ratio, noise).to(pixel_values.device)
        hidden = {"mask": mask} if c.mask_tokens == "encoder" else {"visible": visible_indices(mask)}
        (latent, prediction), observed = self._observed(
            output_hidden_states, output_attentions, partial(predict, self, **hidden), pixel_values
        )
        loss = masked_loss(c, pixel_values, prediction, mask)
        return CrateMAEForPreTrainingOutput(
            loss=loss, logits=prediction, mask=mask, last_hidden_state=latent, **observed
        )

    def _mask(self, batch: int, given: Tensor | None, ratio: float | None, noise: Tensor | None) -> Bool[Tensor, "b n"]:
        rows, columns = autoencoder_config(self.config).grid_size
        count = rows * columns
        if given is not None:
            if given.numel() != batch * count:
                raise UserError(
                    f"bool_masked_pos is {tuple(given.shape)}, but these images have {batch} x {count} patches."
                )
            return given.reshape(batch, count).bool()
        if ratio is None:
            ratio = float(self.config.mask_ratio) if self.training or noise is not None else 0.0
        if ratio == 0:
            return torch.zeros(batch, count, dtype=torch.bool)
        check_mask_ratio(ratio, count)
        if noise is not None:
            if tuple(noise.shape) != (batch, count):
                raise UserError(f"noise is {tuple(noise.shape)}, but these images have {batch} x {count} patches.")
            return hide_all_but(visible_from_noise(noise, ratio), count)
        return random_mask(batch, count, ratio, None if self.training else torch.Generator().manual_seed(0))


class CrateMAEForImageClassification(CrateMAEPreTrainedModel):
    """The classifier that `crate-mae finetune` trains."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^mask_token$"]  # noqa: RUF012

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__(config)
        net = Classifier(self.encoder, classifier_config(config))
        self.norm, self.head = net.norm, net.head
        self._finish()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Float[Tensor, "b c hh ww"],
        labels: Int[Tensor, "b"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_options: Any,
    ) -> Any:
        """Logits of the classes and, with labels, the loss."""
        tokens, observed = self._observed(
            output_hidden_states, output_attentions, self.encoder.forward_features, pixel_values
        )
        pooled = pool(tokens, self.encoder.num_prefix_tokens, self.config.pooling)
        logits = self.head(self.norm(pooled))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, **observed)


def pretrained(model: Model, part: str, facts: Mapping[str, str] | None = None) -> Any:
    """A model of this library as one of transformers, with the same weights; `facts` are for its card."""
    kind: Any = CrateMAEModel if part == "encoder" else CrateMAEForPreTraining
    options: dict[str, Any] = {}
    if isinstance(model, Classifier) and part == "full":
        kind = CrateMAEForImageClassification
        labels = dict(enumerate(model.config.classes))
        numbers = {name: i for i, name in labels.items()}
        options = {"id2label": labels, "label2id": numbers, "pooling": model.config.pooling}
    net = kind(CrateMAEConfig(settings=settings_of(encoder_config(model.config)), run=dict(facts or {}), **options))
    tensors = model.state_dict()
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})
    return net.eval()


def write_card(net: Any, folder: Path) -> None:
    """Write the card of a model of transformers."""
    from crate_mae.deployment.card import card

    part = "encoder" if isinstance(net, CrateMAEModel) else "full"
    config = (
        classifier_config(net.config)
        if isinstance(net, CrateMAEForImageClassification)
        else autoencoder_config(net.config)
    )
    text = card(config, "hf", part, inputs=(), outputs=(), facts=net.config.run)
    (folder / "README.md").write_text(text, encoding="utf-8")


AutoModel.register(CrateMAEConfig, CrateMAEModel, exist_ok=True)
AutoBackbone.register(CrateMAEConfig, CrateMAEBackbone, exist_ok=True)
AutoModelForPreTraining.register(CrateMAEConfig, CrateMAEForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(CrateMAEConfig, CrateMAEForImageClassification, exist_ok=True)
