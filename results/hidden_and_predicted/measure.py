"""What is hidden, and what is predicted: principal components instead of patches, and fewer patches than are hidden.

    python results/hidden_and_predicted/measure.py CIFAR10/train.parquet

The network of the recipe `small_color` (monotone layers), 1,000 steps of 64 images of CIFAR-10, seed 0, bfloat16.

- Patches: three quarters are hidden, with normalised targets, as in the recipe. This is the control.
- Fewer patches (as in CrossMAE, Fu et al. 2024, arXiv 2401.14391, which has cross-attention instead): the decoder gets
  the visible patches and 12 of the 48 hidden ones, and predicts these.
- Components (PMAE, Bizeul et al. 2025, arXiv 2502.06314): an image is c = V^T (x - mean) in the principal components of
  the training images. A random set of components with a given share of the variance is hidden: the encoder sees all
  patches of the image without them, and the loss is the squared error of the predicted image in the hidden components,
  divided by their variance.

Images, probes and their strength are those of results/monotone_layers: trained on the first 45,000 training images,
probed with the labels of the first 10,000 on the last 5,000. Minutes are those of the processor, not of the clock.
Results: trials.csv; what is in it already is not made again.

The rule, written before the runs of this script, after trials that had the same outcome: a variant is worth three seeds
if the best of its probes, over layers, is above that of the control at the same number of steps; or, of fewer patches,
at the same minutes.
"""

import csv
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import crate_mae
from crate_mae.data import ImageSource, open_source
from crate_mae.data.base import Part
from crate_mae.data.documents import to_csv
from crate_mae.data.files import write_whole
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.extract import Extraction, extract
from crate_mae.evaluation.probes import knn_probe, linear_probe
from crate_mae.evaluation.reconstruction import read_images
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.features import transform_of
from crate_mae.models.masking import patch_statistics, patchify, unpatchify
from crate_mae.training.optimizer import build_optimizer, scaled_lr, warmup_cosine

MODEL = "crate_mae_micro_wide_monotone_patch4_32"
STEPS, WARMUP, BATCH, CLIP, DECAY = 1000, 140, 64, 1.0, 0.05
SEEN, OF_COMPONENTS, LABELLED, ASKED = 45_000, 12_000, 10_000, 5_000
C = 0.01  # of the linear probe, as in results/monotone_layers
VISIBLE, FEWER = 16, 12  # of 64 patches
# name: steps, learning rate, number of predicted patches or lowest and highest share of the variance that is hidden
TRIALS: dict[str, tuple[int, float, int | tuple[float, float]]] = {
    "patches": (STEPS, 1.08e-2, 48),
    "patches, 12 of 48 predicted": (STEPS, 1.08e-2, FEWER),
    "patches, 12 of 48 predicted, as many minutes": (1260, 1.08e-2, FEWER),
    "components, 20% of the variance": (STEPS, 3.6e-3, (0.2, 0.2)),
    "components, 10 to 90%": (STEPS, 1.08e-2, (0.1, 0.9)),
    "components, 20% of the variance, higher rate": (STEPS, 1.08e-2, (0.2, 0.2)),
    "components, 10 to 90%, lower rate": (STEPS, 3.6e-3, (0.1, 0.9)),
}
FILE = Path(__file__).with_name("trials.csv")
Row = dict[str, Any]


class Components(NamedTuple):
    """Principal components of images.

    Attributes:
        mean: of the images' pixels.
        vectors: V, one in a column.
        variances: of their coefficients.
    """

    mean: Tensor
    vectors: Tensor
    variances: Tensor


def main(data: str) -> None:
    """Make what is missing."""
    torch.set_num_threads(1)
    source = open_source(data)
    images = read_images(source, transform_of(crate_mae.create_model(MODEL).config), range(SEEN), SEEN).images
    components = components_of(images[:OF_COMPONENTS])
    for name, (steps, lr, what) in TRIALS.items():
        rows: list[Row] = list(csv.DictReader(FILE.open())) if FILE.exists() else []
        if any(row["trial"] == name for row in rows):
            continue
        start = time.process_time()
        net, loss = trained(images, components, steps, lr, what)
        minutes = round((time.process_time() - start) / 60, 1)
        rows.append({"trial": name, "steps": steps, "lr": lr, "loss": round(loss, 4), "minutes": minutes})
        rows[-1] |= probes(net, source)
        write_whole(FILE, to_csv(list(rows[0]), [[row.get(column) for column in rows[0]] for row in rows]))


def components_of(images: Tensor) -> Components:
    """The principal components of these images."""
    flat = images.flatten(1)
    mean = flat.mean(0)
    variances, vectors = torch.linalg.eigh(((flat - mean).T @ (flat - mean) / len(flat)).double())
    return Components(mean, vectors.float(), variances.clamp_min(0).float())


def trained(
    images: Tensor, components: Components, steps: int, lr: float, what: int | tuple[float, float]
) -> tuple[MaskedAutoencoder, float]:
    """A model, and its loss over the last 100 steps."""
    torch.manual_seed(0)
    net = crate_mae.create_model(MODEL, norm_pix_loss=True).train()
    generator = torch.Generator().manual_seed(1)
    optimizer = build_optimizer(net, DECAY)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(1 + steps * BATCH // SEEN)])
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, WARMUP, scaled_lr(lr, BATCH), 0.0)
        x = images[order[step * BATCH : (step + 1) * BATCH]]
        mirrored = torch.rand(BATCH, generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        with torch.autocast("cpu", torch.bfloat16):
            if isinstance(what, int):
                loss = patch_loss(net, x, what, generator)
            else:
                loss = component_loss(net, x, components, what, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return net.eval(), float(np.mean(losses[-100:]))


def patch_loss(net: MaskedAutoencoder, x: Tensor, predicted: int, generator: torch.Generator) -> Tensor:
    """The masked loss on so many hidden patches; the decoder does not see the other hidden ones."""
    order = torch.rand(len(x), net.num_patches, generator=generator).argsort(1)
    visible, hidden = order[:, :VISIBLE].sort(1).values, order[:, VISIBLE : VISIBLE + predicted]
    decoder = net.decoder
    tokens = decoder.embed(net.encoder.forward_visible(x, visible))
    shape = (*hidden.shape, tokens.shape[-1])
    tokens = torch.cat([tokens, net.mask_token.to(tokens).expand(shape)], dim=1)
    places = torch.cat([visible, hidden], dim=1)
    assert decoder.pos_embed is not None, "the decoder fills in mask tokens"
    class_position, positions = decoder.pos_embed[:, :1], decoder.pos_embed[0, 1:][places]
    tokens = tokens + torch.cat([class_position.expand(len(x), -1, -1), positions], dim=1)
    prediction = decoder.pred(decoder.norm(decoder.blocks(tokens)))[:, 1 + VISIBLE :]
    target = patchify(x, net.config.patch_size)
    mean, std = patch_statistics(target)
    wanted = ((target - mean) / std).gather(1, hidden[..., None].expand(-1, -1, target.shape[-1]))
    return F.mse_loss(prediction.float(), wanted)


def component_loss(
    net: MaskedAutoencoder, x: Tensor, components: Components, shares: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Squared error in hidden components, as a share of their variance."""
    mean, vectors, variances = components
    with torch.autocast("cpu", enabled=False):
        coefficients = (x.flatten(1) - mean) @ vectors
        order = torch.rand(coefficients.shape, generator=generator).argsort(1)
        share = torch.empty(len(x), 1).uniform_(*shares, generator=generator)
        of_all = (variances / variances.sum())[order]
        hidden = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, of_all.cumsum(1) - of_all < share)
        seen = ((coefficients * ~hidden) @ vectors.T + mean).view_as(x)
    everywhere = torch.arange(net.num_patches).expand(len(x), -1)
    predicted = net.decoder.forward_visible(net.encoder.forward_features(seen), everywhere, net.mask_token)
    with torch.autocast("cpu", enabled=False):
        pixels = unpatchify(predicted.float(), net.config.patch_size, net.grid_size).flatten(1)
        error = ((pixels @ vectors - coefficients) * hidden).square().sum(1)
        return (error / (variances * hidden).sum(1)).mean()


def probes(net: MaskedAutoencoder, source: ImageSource) -> Row:
    """Accuracy by layer."""
    labels = source.labels
    assert labels is not None, "CIFAR-10 has labels"
    parts = np.arange(LABELLED), np.arange(len(source) - ASKED, len(source))
    how = Extraction(layers="all", pooling="cls+mean", workers=0, cache=False)
    fitted, asked = (extract(open_backbone(net), Part(source, part), how) for part in parts)
    linear, knn = [], []
    for x, y in zip(fitted, asked, strict=True):
        known = x.values, labels[parts[0]], y.values, labels[parts[1]]
        linear.append(f"{100 * linear_probe(*known, grid=(C,)).top1.value:.1f}")
        knn.append(f"{100 * knn_probe(*known).top1.value:.1f}")
    return {"linear": " ".join(linear), "knn": " ".join(knn)}


if __name__ == "__main__":
    main(*sys.argv[1:])
