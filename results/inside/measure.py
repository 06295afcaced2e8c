"""What the parts of trained models are worth: heads and atoms that are removed, what atoms stand for, do they return.

    pip install overcomplete
    python results/inside/measure.py CIFAR10/train.parquet CIFAR10/test.parquet RUNS [TRAINED]

Three seeds of the network of the recipe `small_color` (monotone layers, 1,000 steps, as in results/monotone_layers),
which are made in RUNS or read from there; of its ViT-MAE twin, with the better of two learning rates by held-out loss
with seed 0; and of both with random initialisation. TRAINED holds runs of results/monotone_layers/measure.py, which are
used if given. All training is on the first 45,000 training images; everything here is measured on test images.

removals.csv: what is lost without each head and without eight atoms of each layer, against ten random draws each
(`crate_mae.interpret.removals`). scores.csv: what an atom stands for, by layer and seed, against other directions in
the same tokens. returns.csv: whether an atom of one seed has a counterpart in another.

Rules, written before the runs:
- A head or an atom matters if it costs more than one more random draw would (p < 0.05, one-sided, Student's t over ten
  draws, Holm's correction over all of a model).
- A kind of directions has a higher score than another one if the means over seeds of its median differ by more than two
  standard errors, with the deviation of seeds; otherwise there is no difference.
- Atoms return if their mean best correlation is higher than that of each control by the same rule.
"""

import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.cm
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import crate_mae
from crate_mae.data import ImageSource, open_source
from crate_mae.data.base import Part
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.reconstruction import nested_masks, read_images
from crate_mae.interpret.atoms import of_codes
from crate_mae.interpret.removals import fitted_probe, mattering, removals
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.features import encode, evaluating
from crate_mae.models.weights import initialised
from crate_mae.training.recipes import read_recipe
from crate_mae.training.run_directory import RunDirectory, numbers

matplotlib.cm.get_cmap = matplotlib.colormaps.get_cmap  # overcomplete 0.3.0 imports it; matplotlib 3.9 removed it
from overcomplete.sae import TopKSAE  # noqa: E402
from overcomplete.sae.train import train_sae  # noqa: E402

SEEDS, STEPS, SEEN = (0, 1, 2), 1000, 45_000
TWIN, TWIN_RATES = "vit_mae_micro_wide_monotone_matched_patch4_32", (1.2e-3, 3.6e-3)
ATOMS, COMPLETED, FITTED, CLASSIFIED = 8, 64, 2_000, 200  # of the removals: atoms of each layer, images
SCORED, SAE_IMAGES, SAE_EPOCHS = 2_000, 4_000, 10
# Published layers, another width: not a model that is scored.
OTHER_EMBEDDING = "trained_models/crate_mae_micro_cifar10"
HERE = Path(__file__).parent

Row = dict[str, Any]
Codes = Tensor  # "b n m": non-negative activations of m directions in n patches of b images


def main(train: str, test: str, runs: str, trained: str | None = None) -> None:
    """Make what is missing, and measure all of it."""
    torch.set_num_threads(1)
    seen, asked, folder = Part(open_source(train), np.arange(SEEN)), open_source(test), Path(runs)
    crates = {seed: of_library(seen, folder, seed, trained) for seed in SEEDS}
    twins = {seed: of_twin(seen, folder, seed) for seed in SEEDS}
    network = {
        "trained": crates,
        "random initialisation": {seed: untrained(model, seed) for seed, model in crates.items()},
    }
    write("removals", itertools.chain.from_iterable(lost(*each, seen, asked) for each in by_seed(network)))
    images, labels = read(crates[0], asked, SCORED)
    codes = {kind: {seed: codes_of(model, images) for seed, model in of.items()} for kind, of in network.items()}
    others = {seed: sparse_autoencoders(twins[seed], codes["trained"][seed], images, seen, seed) for seed in SEEDS}
    write("scores", scores(network, codes, others, images, labels, embedding_of(asked)))
    write("returns", returns(network, codes, images))


# --- Models ---


def of_library(seen: ImageSource, runs: Path, seed: int, trained: str | None) -> MaskedAutoencoder:
    """Monotone layers."""
    if trained is not None:
        return crate_mae.load(Path(trained) / f"monotone_seed{seed}_lr0.0108")
    return pretrained(seen, runs / f"monotone_{seed}", seed, lr=1.08e-2)[0]


def of_twin(seen: ImageSource, runs: Path, seed: int) -> MaskedAutoencoder:
    """The ViT-MAE of the same size, with the better learning rate."""
    searched = [pretrained(seen, runs / f"twin_0_{lr:g}", 0, model=TWIN, lr=lr) for lr in TWIN_RATES]
    best = TWIN_RATES[int(np.argmin([loss for _, loss in searched]))]
    return pretrained(seen, runs / f"twin_{seed}_{best:g}", seed, model=TWIN, lr=best)[0]


def pretrained(seen: ImageSource, out: Path, seed: int, **options: Any) -> tuple[MaskedAutoencoder, float]:
    """A model and its held-out loss, made or read."""
    if not (out / "model.safetensors").exists():
        length = {"steps": STEPS, "warmup_epochs": 0.2, "monitor_steps": STEPS, "precision": "bfloat16"}
        one_core = {"threads": 1, "workers": 0, "trackers": (), "quiet": True}
        given = {**read_recipe("small_color").options, **length, **one_core, "seed": seed, **options}
        crate_mae.pretrain(seen, out=out, **given)
    losses = [row["held_out_loss"] for row in numbers(RunDirectory(out).metrics()) if row["held_out_loss"] is not None]
    return crate_mae.load(out), losses[-1]


def untrained(model: MaskedAutoencoder, seed: int) -> MaskedAutoencoder:
    """The same network with random initialisation."""
    torch.manual_seed(seed)
    return initialised(model.config)


def by_seed(network: dict[str, dict[int, MaskedAutoencoder]]) -> Iterator[tuple[str, int, MaskedAutoencoder]]:
    """Every model with its kind and seed."""
    return ((kind, seed, model) for kind, of in network.items() for seed, model in of.items())


# --- What is lost ---


def lost(kind: str, seed: int, model: MaskedAutoencoder, seen: ImageSource, asked: ImageSource) -> Iterator[Row]:
    """Every removed part of a model."""
    backbone = open_backbone(model)
    images = read_images(asked, backbone.transform(), evenly(len(asked), COMPLETED), COMPLETED).images
    masks = nested_masks(COMPLETED, model.num_patches, 0.75, 0)
    parts = Part(seen, evenly(len(seen), FITTED)), Part(asked, evenly(len(asked), CLASSIFIED))
    found = removals(model, images, masks, probe=fitted_probe(backbone, parts), atoms=ATOMS, seed=seed)
    matters = set(map(id, mattering(found)))
    for each in found:
        yield {"model": kind, "seed": seed, **asdict(each), "matters": id(each) in matters}


def evenly(total: int, count: int) -> np.ndarray:
    """Numbers of images, spread over all."""
    return np.linspace(0, total - 1, count).astype(np.int64)


# --- What atoms stand for ---


def read(model: MaskedAutoencoder, source: ImageSource, count: int) -> tuple[Tensor, Tensor]:
    """Images for a model, and their classes."""
    chosen = evenly(len(source), count)
    assert source.labels is not None, "CIFAR-10 has labels"
    return read_images(source, open_backbone(model).transform(), chosen, count).images, torch.as_tensor(
        source.labels[chosen]
    )


def codes_of(model: MaskedAutoencoder, images: Tensor, place: str = "code") -> list[Codes]:
    """For each layer of the encoder, what is at one of its places, in all patches of whole images."""
    names = [f"encoder.blocks.{i}.{place}" for i in range(len(model.encoder.blocks))]
    return [torch.cat(of_codes(model, name, images, 250, Tensor.float)) for name in names]


def dictionary_inputs(model: MaskedAutoencoder, images: Tensor) -> list[Tensor]:
    """The tokens that the sparse coding of each layer gets."""
    return codes_of(model, images, "norm2")


def thresholded(tokens: Tensor, directions: Tensor, active: float) -> Codes:
    """relu(tokens . direction - b) of unit directions, with b for each such that it is active in that share."""
    values = (tokens - tokens.mean((0, 1))) @ F.normalize(directions, dim=0)
    flat = values.flatten(0, 1)
    k = max(1, round(active * len(flat)))
    return (values - flat.topk(k, dim=0).values[-1]).relu()


def controls(tokens: Tensor, active: float, seed: int) -> dict[str, Codes]:
    """Other directions in the tokens that a dictionary codes, active as often as its atoms are on average."""
    d = tokens.shape[-1]
    random = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
    flat = tokens.flatten(0, 1)
    principal = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh.T
    both = torch.cat([principal[:, : d // 2], -principal[:, : d // 2]], dim=1)
    return {
        "random directions of the same tokens": thresholded(tokens, random, active),
        "principal components of the same tokens": thresholded(tokens, both, active),
    }


def sparse_autoencoders(
    twin: MaskedAutoencoder, like: Sequence[Codes], images: Tensor, seen: ImageSource, seed: int
) -> list[tuple[Codes, float]]:
    """TopK codes of the twin's tokens, by layer, and the share of the tokens' variance that they explain.

    There are as many units as atoms, and as many are active in a token.
    """
    learned, _ = read(twin, seen, SAE_IMAGES)
    found = []
    for layer in range(len(twin.encoder.blocks)):
        fit, asked = (block_outputs(twin, which, layer) for which in (learned, images))
        mean, std = fit.mean((0, 1)), fit.std((0, 1))
        fit, asked = (fit - mean) / std, (asked - mean) / std
        torch.manual_seed(seed)
        active = max(1, round(float((like[layer] > 0).float().sum(-1).mean())))
        sae = TopKSAE(fit.shape[-1], nb_concepts=like[layer].shape[-1], top_k=active, device="cpu")
        tokens = fit.flatten(0, 1)
        # Whole batches, not token by token.
        batches = BatchSampler(RandomSampler(tokens), batch_size=1024, drop_last=False)
        loader = DataLoader(TensorDataset(tokens), sampler=batches, batch_size=None)

        def criterion(x: Tensor, x_hat: Tensor, *_: Any) -> Tensor:
            return F.mse_loss(x_hat, x)

        train_sae(
            sae, loader, criterion, torch.optim.Adam(sae.parameters(), lr=1e-3), nb_epochs=SAE_EPOCHS, monitoring=0
        )
        sae.eval()
        with torch.no_grad():
            code = torch.cat([sae.encode(part)[1] for part in asked.flatten(0, 1).split(8192)])
            explained = 1 - float((sae.get_dictionary().T @ code.T - asked.flatten(0, 1).T).square().mean())
        found.append((code.unflatten(0, asked.shape[:2]), explained))
    return found


def block_outputs(model: MaskedAutoencoder, images: Tensor, layer: int) -> Tensor:
    """The tokens after a layer of a ViT."""
    with evaluating(model):
        return torch.cat(
            [
                model.encoder.forward_intermediates(batch, indices=[layer], output_fmt="NLC", intermediates_only=True)[
                    0
                ]
                for batch in images.split(250)
            ]
        )


def embedding_of(source: ImageSource) -> Tensor:
    """Features of the images by a model that is not scored, standardised, of length 1."""
    model = crate_mae.load(OTHER_EMBEDDING)
    images, _ = read(model, source, SCORED)
    with evaluating(model):
        values = torch.cat([encode(model.encoder, batch, pooling="cls+mean") for batch in images.split(250)])
    return F.normalize((values - values.mean(0)) / values.std(0).clamp_min(1e-6), dim=1)


def scores(
    network: dict[str, dict[int, MaskedAutoencoder]],
    codes: dict[str, dict[int, list[Codes]]],
    others: dict[int, list[tuple[Codes, float]]],
    images: Tensor,
    labels: Tensor,
    embedding: Tensor,
) -> Iterator[Row]:
    """Medians over directions, for every kind, seed and layer."""

    def rows(kind: str, seed: int, layer: int, code: Codes, explained: float | None = None) -> Row:
        found = scored(code, labels, embedding)
        return {"directions": kind, "seed": seed, "layer": layer, **found, "explained": explained}

    for seed, model in network["trained"].items():
        inputs = dictionary_inputs(model, images)
        for layer, code in enumerate(codes["trained"][seed]):
            active = float((code > 0).float().mean())
            yield rows("atoms", seed, layer, code)
            yield rows(
                "atoms of a network with random initialisation",
                seed,
                layer,
                codes["random initialisation"][seed][layer],
            )
            for kind, control in controls(inputs[layer], active, seed).items():
                yield rows(kind, seed, layer, control)
            yield rows("TopK autoencoder of the twin", seed, layer, *others[seed][layer])


def scored(code: Codes, labels: Tensor, embedding: Tensor) -> Row:
    """Three scores of each direction by its mean activation in an image; their medians over directions.

    AUC: of the class that it tells best from the others in every second image, in the other images; 0.5 is chance.
    Same class: the share of pairs of images of one class, each weighted by the product of activations; 0.1 is chance.
    Monosemanticity (Pach et al. 2025): mean cosine of pairs of images in another model's embedding, weighted likewise.
    """
    by_image = code.mean(1).double()
    alive = (by_image > 0).sum(0) > 1
    a = by_image[:, alive]
    a = (a - a.amin(0)) / (a.amax(0) - a.amin(0)).clamp_min(1e-12)
    one_hot = F.one_hot(labels).double()
    chosen, asked = aucs(a[::2], one_hot[::2]), aucs(a[1::2], one_hot[1::2])
    auc = asked.gather(1, chosen.argmax(1, keepdim=True))[:, 0]
    same = weighted_pairs(a, one_hot)
    alike = weighted_pairs(a, embedding.double())
    return {
        "active": float((code > 0).float().mean()),
        "never_active": float((~alive).float().mean()),
        "auc": float(auc.median()),
        "same_class": float(same.median()),
        "monosemanticity": float(alike.median()),
    }


def weighted_pairs(a: Tensor, vectors: Tensor) -> Tensor:
    """Sum over pairs of images of a_n a_m <v_n, v_m>, by that of a_n a_m, for each column of a."""
    own, square = vectors.square().sum(1), a.square()
    together = (a.T @ vectors).square().sum(1) - square.T @ own
    return together / (a.sum(0).square() - square.sum(0)).clamp_min(1e-12)


def aucs(a: Tensor, one_hot: Tensor) -> Tensor:
    """The area under the ROC curve of each column of a, for each class: Mann and Whitney's U, with average ranks."""
    ranks = torch.from_numpy(rankdata(a.numpy(), axis=0))
    inside = one_hot.sum(0)
    outside = len(a) - inside
    return (ranks.T @ one_hot - inside * (inside + 1) / 2) / (inside * outside)


# --- Do atoms return ---


def returns(
    network: dict[str, dict[int, MaskedAutoencoder]], codes: dict[str, dict[int, list[Codes]]], images: Tensor
) -> Iterator[Row]:
    """For two seeds: the largest correlation of each atom of the first with any of the second, mean over atoms."""
    for first, second in itertools.combinations(SEEDS, 2):
        inputs = dictionary_inputs(network["trained"][second], images)
        for layer, code in enumerate(codes["trained"][first]):
            active = float((codes["trained"][second][layer] > 0).float().mean())
            candidates = {
                "atoms of another seed": codes["trained"][second][layer],
                "atoms of a network with random initialisation": codes["random initialisation"][second][layer],
                **{f"{kind}, of another seed": c for kind, c in controls(inputs[layer], active, second).items()},
            }
            for kind, candidate in candidates.items():
                yield {
                    "seeds": f"{first}, {second}",
                    "layer": layer,
                    "among": kind,
                    "correlation": best_match(code, candidate),
                }
        for layer, (a, b) in enumerate(
            zip(codes["random initialisation"][first], codes["random initialisation"][second], strict=True)
        ):
            yield {
                "seeds": f"{first}, {second}",
                "layer": layer,
                "among": "both with random initialisation",
                "correlation": best_match(a, b),
            }


def best_match(code: Codes, candidates: Codes) -> float:
    """Mean over atoms that are ever active of their best correlation over patches."""

    def standardised(each: Codes) -> Tensor:
        flat = each.flatten(0, 1)
        flat = flat[:, flat.std(0) > 0]
        return (flat - flat.mean(0)) / flat.std(0)

    a, b = standardised(code), standardised(candidates)
    return float((a.T @ b / len(a)).amax(1).mean())


def write(name: str, rows: Iterator[Row]) -> None:
    """A table; one that exists is kept."""
    path = HERE / f"{name}.csv"
    if path.exists():
        return
    found = [{key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
