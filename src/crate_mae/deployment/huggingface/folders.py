"""Our models as folders that transformers opens, and those folders run by transformers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
from transformers.utils import logging

from crate_mae.deployment.card import card
from crate_mae.deployment.huggingface.configuration import CrateMAEConfig
from crate_mae.deployment.huggingface.modeling import (
    CrateMAEForImageClassification,
    CrateMAEForPreTraining,
    CrateMAEModel,
)
from crate_mae.models.classifier import Classifier
from crate_mae.models.description import settings_of
from crate_mae.models.weights import Model


def pretrained(model: Model, part: str, facts: Mapping[str, str] | None = None) -> Any:
    """One of our models as one of transformers', with the same weights; `facts` are what its card tells."""
    kind: Any = CrateMAEModel if part == "encoder" else CrateMAEForPreTraining
    options: dict[str, Any] = {}
    if isinstance(model, Classifier) and part == "full":
        kind = CrateMAEForImageClassification
        labels = dict(enumerate(model.config.classes))
        numbers = {name: i for i, name in labels.items()}
        options = {"id2label": labels, "label2id": numbers, "pooling": model.config.pooling}
    config = model.config.encoder if isinstance(model, Classifier) else model.config
    net = kind(CrateMAEConfig(settings=settings_of(config), run=dict(facts or {}), **options))
    tensors = model.state_dict()
    net.load_state_dict({name: tensors[name] for name in net.state_dict()})
    return net.eval()


def write_pretrained(model: Model, folder: Path, part: str, *, facts: Mapping[str, str] | None = None) -> None:
    """Write a model as transformers does, with its image processor and card."""
    pretrained(model, part, facts).save_pretrained(folder)


def write_card(net: Any, folder: Path) -> None:
    """Write the card of a model of transformers."""
    part = "encoder" if isinstance(net, CrateMAEModel) else "full"
    config = net.config.classifier if isinstance(net, CrateMAEForImageClassification) else net.config.autoencoder
    text = card(config, "hf", part, inputs=(), outputs=(), facts=net.config.run)
    (folder / "README.md").write_text(text, encoding="utf-8")


def runner(model: Model, folder: Path, part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Run a folder with transformers."""
    if part == "encoder":
        encoder = _opened(AutoModel, folder)

        def encode(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            output = encoder(inputs["images"])
            return {"tokens": output.last_hidden_state, "embedding": output.pooler_output}

        return encode
    if isinstance(model, Classifier):
        classifier = _opened(AutoModelForImageClassification, folder)
        return lambda inputs: {"logits": classifier(inputs["images"]).logits}
    autoencoder = _opened(AutoModelForPreTraining, folder)

    def complete(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = inputs.get("mask")
        if mask is None:
            mask = torch.ones(len(inputs["images"]), model.num_patches, dtype=torch.bool)
            mask.scatter_(1, inputs["visible"], False)
        return {"prediction": autoencoder(inputs["images"], bool_masked_pos=mask).logits}

    return complete


def _opened(kind: Any, folder: Path) -> Any:
    """A model of transformers, without the bar of its progress, which lasts no time."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
