"""What the parts of trained models are worth: heads and atoms that are removed, what atoms stand for, do they return.

    pip install overcomplete
    python results/inside/measure.py CIFAR10/train.parquet CIFAR10/test.parquet RUNS [TRAINED]

Three seeds of the network of the recipe `small_color` (monotone layers, 1,000 steps, as in results/monotone_layers),
which are made in RUNS or read from there; of its ViT-MAE twin, with the better of two learning rates by held-out loss
with seed 0; both with random initialisation; and the model in the package, which is the same network after 6,500 steps.
TRAINED holds runs of results/monotone_layers/measure.py, which are used if given. The training of the three seeds is on
the first 45,000 training images, that of the model in the package on all of them; everything here is measured on test
images. Rows that a table already has are not made again.

removals.csv: what is lost without each head and without eight atoms of each layer, against ten random draws each
(`crate_mae.interpret.removals`); of the twin, which has no atoms, without each head. scores.csv: what an atom stands
for, by layer and seed, against other directions in the same tokens. responses.csv: what the decoder draws when one of
16 atoms of a layer is raised, against its linear response and against eight random directions of the code
(`crate_mae.interpret.atoms`); means over atoms. returns.csv: whether an atom of one seed has a counterpart in another.

Rules, written before the runs:
- A head or an atom matters if it costs more than one more random draw would (p < 0.05, one-sided, Student's t over ten
  draws, Holm's correction over all of a model).
- A kind of directions has a higher score than another one if the means over seeds of its median differ by more than two
  standard errors, with the deviation of seeds; otherwise there is no difference. (Decided after the first scores of the
  model in the package, of which there is one: its atoms are compared with five draws of random directions.)
- Atoms return if their mean best correlation is higher than that of each control by the same rule.
- The decoder follows an atom linearly if the mean cosine with the linear response is above 0.9, and better than a
  random direction if it is higher by the same rule, over layers and seeds.
"""

import csv
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
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
from crate_mae.data.documents import to_csv
from crate_mae.data.files import write_whole
from crate_mae.evaluation.backbones import open_backbone
from crate_mae.evaluation.reconstruction import nested_masks, read_images
from crate_mae.interpret.atoms import measure_atoms, of_codes
from crate_mae.interpret.removals import fitted_probe, mattering, removals
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.features import encode, evaluating
from crate_mae.models.weights import initialised
from crate_mae.training.recipes import read_recipe
from crate_mae.training.run_directory import RunDirectory, numbers

SEEDS, STEPS, SEEN = (0, 1, 2), 1000, 45_000
TWIN, TWIN_RATES = "vit_mae_micro_wide_monotone_matched_patch4_32", (1.2e-3, 3.6e-3)
ATOMS, COMPLETED, FITTED, CLASSIFIED = 8, 64, 2_000, 200  # of the removals: atoms of each layer, images
SCORED, SAE_IMAGES, SAE_EPOCHS = 2_000, 4_000, 10
# Published layers, another width: not a model that is scored.
OTHER_EMBEDDING = "trained_models/crate_mae_micro_cifar10"
IN_PACKAGE = "crate_mae_micro_monotone_cifar10"
RESPONDING, DIRECTIONS = 16, 8  # atoms of each layer, random directions
DRAWS = 5  # of as many random directions as atoms
HERE = Path(__file__).parent

Row = dict[str, Any]
Codes = Tensor  # "b n m": non-negative activations of m directions in n patches of b images


def main(train: str, test: str, runs: str, trained: str | None = None) -> None:
    """Make what is missing, and measure all of it."""
    torch.set_num_threads(1)
    seen, asked = Part(open_source(train), np.arange(SEEN)), open_source(test)
    models = Models(seen, Path(runs), trained)
    images, labels = read(models.of("in the package", 0), asked, SCORED)
    embedding = functools.cache(lambda: embedding_of(asked))

    @functools.cache
    def codes(kind: str, seed: int) -> list[Codes]:
        return codes_of(models.of(kind, seed), images)

    def scored_codes(kind: str, seed: int) -> Iterator[Row]:
        others = {}
        if kind == "trained":  # as long as the twin
            found = sparse_autoencoders(models.of("twin", seed), codes(kind, seed), images, seen, seed)
            others["TopK autoencoder of the twin"] = found
        untrained = codes("random initialisation", seed)
        others["atoms of a network with random initialisation"] = [(code, None) for code in untrained]
        inputs = dictionary_inputs(models.of(kind, seed), images)
        if kind == "in the package":  # of which there is one: other draws of directions instead of other seeds
            for draw in range(1, DRAWS):
                others[f"random directions of the same tokens, draw {draw}"] = [
                    (thresholded(x, random_directions(x, draw), active_share(code)), None)
                    for x, code in zip(inputs, codes(kind, seed), strict=True)
                ]
        return scores(codes(kind, seed), inputs, others, seed, labels, embedding())

    for kind, seed in [*itertools.product(("trained", "random initialisation"), SEEDS), ("in the package", 0)]:
        row = {"model": kind, "seed": seed}
        extend("removals", row, lambda k=kind, s=seed: lost(models.of(k, s), s, seen, asked))
        extend("responses", row, lambda k=kind, s=seed: responses(models.of(k, s), s, images))
        if kind != "random initialisation":  # which is a control of the others
            extend("scores", row, lambda k=kind, s=seed: scored_codes(k, s))
    for seed in SEEDS:
        extend("removals", {"model": "twin", "seed": seed}, lambda s=seed: lost(models.of("twin", s), s, seen, asked))
    for first, second in itertools.combinations(SEEDS, 2):
        extend(
            "returns", {"seeds": f"{first}, {second}"}, lambda a=first, b=second: returns(models, codes, images, a, b)
        )


# --- Models ---


@dataclass(frozen=True)
class Models:
    """The models, which are trained or read when they are needed."""

    seen: ImageSource
    runs: Path
    trained: str | None

    @functools.cache  # noqa: B019  (there is one)
    def of(self, kind: str, seed: int) -> MaskedAutoencoder:
        """A model, by its kind and its seed."""
        if kind == "in the package":
            return crate_mae.load(IN_PACKAGE)
        if kind == "random initialisation":
            torch.manual_seed(seed)
            return initialised(crate_mae.load(IN_PACKAGE).config)
        if kind == "twin":  # with the better learning rate
            searched = [pretrained(self.seen, self.runs / f"twin_0_{lr:g}", 0, model=TWIN, lr=lr) for lr in TWIN_RATES]
            best = TWIN_RATES[int(np.argmin([loss for _, loss in searched]))]
            return pretrained(self.seen, self.runs / f"twin_{seed}_{best:g}", seed, model=TWIN, lr=best)[0]
        if self.trained is not None:
            return crate_mae.load(Path(self.trained) / f"monotone_seed{seed}_lr0.0108")
        return pretrained(self.seen, self.runs / f"monotone_{seed}", seed, lr=1.08e-2)[0]


def pretrained(seen: ImageSource, out: Path, seed: int, **options: Any) -> tuple[MaskedAutoencoder, float]:
    """A model and its held-out loss, made or read."""
    if not (out / "model.safetensors").exists():
        length = {"steps": STEPS, "warmup_epochs": 0.2, "monitor_steps": STEPS}
        one_core = {"threads": 1, "workers": 0, "trackers": (), "quiet": True}
        given = {**read_recipe("small_color").options, **length, **one_core, "seed": seed, **options}
        crate_mae.pretrain(seen, out=out, **given)
    losses = [row["held_out_loss"] for row in numbers(RunDirectory(out).metrics()) if row["held_out_loss"] is not None]
    return crate_mae.load(out), losses[-1]


# --- What is lost ---


def lost(model: MaskedAutoencoder, seed: int, seen: ImageSource, asked: ImageSource) -> Iterator[Row]:
    """Every removed part of a model."""
    backbone = open_backbone(model)
    images = read_images(asked, backbone.transform(), evenly(len(asked), COMPLETED), COMPLETED).images
    masks = nested_masks(COMPLETED, model.num_patches, 0.75, 0)
    parts = Part(seen, evenly(len(seen), FITTED)), Part(asked, evenly(len(asked), CLASSIFIED))
    found = removals(model, images, masks, probe=fitted_probe(backbone, parts), atoms=ATOMS, seed=seed)
    matters = set(map(id, mattering(found)))
    for each in found:
        yield {**asdict(each), "matters": id(each) in matters}


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


def random_directions(tokens: Tensor, seed: int) -> Tensor:
    """As many as the tokens have dimensions, as columns."""
    d = tokens.shape[-1]
    return torch.randn(d, d, generator=torch.Generator().manual_seed(seed))


def active_share(code: Codes) -> float:
    """The share of active atoms, over patches."""
    return float((code > 0).float().mean())


def controls(tokens: Tensor, active: float, seed: int) -> dict[str, Codes]:
    """Other directions in the tokens that a dictionary codes, active as often as its atoms are on average."""
    d = tokens.shape[-1]
    flat = tokens.flatten(0, 1)
    principal = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh.T
    both = torch.cat([principal[:, : d // 2], -principal[:, : d // 2]], dim=1)
    return {
        "random directions of the same tokens": thresholded(tokens, random_directions(tokens, seed), active),
        "principal components of the same tokens": thresholded(tokens, both, active),
    }


def sparse_autoencoders(
    twin: MaskedAutoencoder, like: Sequence[Codes], images: Tensor, seen: ImageSource, seed: int
) -> list[tuple[Codes, float]]:
    """TopK codes of the twin's tokens, by layer, and the share of the tokens' variance that they explain.

    There are as many units as atoms, and as many are active in a token.
    """
    matplotlib.cm.get_cmap = matplotlib.colormaps.get_cmap  # overcomplete 0.3.0 imports it; matplotlib 3.9 removed it
    from overcomplete.sae import TopKSAE
    from overcomplete.sae.train import train_sae

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
    codes: list[Codes],
    inputs: list[Tensor],
    others: dict[str, list[tuple[Codes, float | None]]],
    seed: int,
    labels: Tensor,
    embedding: Tensor,
) -> Iterator[Row]:
    """Medians over directions, for every kind and layer."""
    for layer, code in enumerate(codes):
        active = active_share(code)
        of_layer = {"atoms": (code, None)}
        of_layer |= {kind: (control, None) for kind, control in controls(inputs[layer], active, seed).items()}
        of_layer |= {kind: other[layer] for kind, other in others.items()}
        for kind, (each, explained) in of_layer.items():
            yield {"directions": kind, "layer": layer, **scored(each, labels, embedding), "explained": explained}


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
        "active": active_share(code),
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


# --- What the decoder draws ---


def responses(model: MaskedAutoencoder, seed: int, images: Tensor) -> Iterator[Row]:
    """For each layer, means over atoms and over random directions; of those under which hidden pixels change at all."""
    for layer in range(len(model.encoder.blocks)):
        found = measure_atoms(model, images, layer=layer, count=RESPONDING, draws=DIRECTIONS, seed=seed).atoms
        drawn = [each for each in found if each.cosine is not None and each.random_cosine is not None]
        of_all = ("change", "random_change")
        of_drawn = ("cosine", "realised", "random_cosine")
        yield {
            "layer": layer,
            "atoms": len(found),
            **{name: fmean(getattr(each, name) for each in found) for name in of_all},
            "drawn": len(drawn),
            **{name: fmean(getattr(each, name) for each in drawn) if drawn else None for name in of_drawn},
            "least_cosine": min((each.cosine for each in drawn), default=None),
        }


# --- Do atoms return ---


def returns(
    models: Models, codes: Callable[[str, int], list[Codes]], images: Tensor, first: int, second: int
) -> Iterator[Row]:
    """For two seeds: the largest correlation of each atom of the first with any of the second, mean over atoms."""
    inputs = dictionary_inputs(models.of("trained", second), images)
    for layer, code in enumerate(codes("trained", first)):
        active = active_share(codes("trained", second)[layer])
        candidates = {
            "atoms of another seed": codes("trained", second)[layer],
            "atoms of a network with random initialisation": codes("random initialisation", second)[layer],
            **{f"{kind}, of another seed": c for kind, c in controls(inputs[layer], active, second).items()},
        }
        for kind, candidate in candidates.items():
            yield {"layer": layer, "among": kind, "correlation": best_match(code, candidate)}
    of_both = zip(codes("random initialisation", first), codes("random initialisation", second), strict=True)
    for layer, (a, b) in enumerate(of_both):
        yield {"layer": layer, "among": "both with random initialisation", "correlation": best_match(a, b)}


def best_match(code: Codes, candidates: Codes) -> float:
    """Mean over atoms that are ever active of their best correlation over patches."""

    def standardised(each: Codes) -> Tensor:
        flat = each.flatten(0, 1)
        flat = flat[:, flat.std(0) > 0]
        return (flat - flat.mean(0)) / flat.std(0)

    a, b = standardised(code), standardised(candidates)
    return float((a.T @ b / len(a)).amax(1).mean())


def extend(name: str, key: Row, rows: Callable[[], Iterable[Row]]) -> None:
    """Rows of a table with this key, if it has none."""
    path = HERE / f"{name}.csv"
    found: list[Row] = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
    if any(all(row[column] == str(value) for column, value in key.items()) for row in found):
        return
    for row in rows():
        rounded = {column: f"{value:.5g}" if isinstance(value, float) else value for column, value in row.items()}
        found.append(key | rounded)
    write_whole(path, to_csv(list(found[0]), [[row.get(column) for column in found[0]] for row in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
