"""Measures over a data set that keep one number an image, not tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crate_mae.interpret.statistics import Row, not_finite, place_of, rows_over_layers
from crate_mae.models.autoencoder import MaskedAutoencoder
from crate_mae.models.tracing import layers_of, taps_of, trace

Values = Mapping[tuple[str, str], Float[Tensor, "b"]]  # (measure, point) -> one value an image


def _every_layer(_name: str, _layer: nn.Module) -> bool:
    return True


class LayerMeasure(NamedTuple):
    """Something that can be measured of one layer, image by image.

    Attributes:
        name: for saying that no layer has it.
        needs: the intermediates that it is a function of, by their names in `models.tracing.trace`.
        values: from the layer and these intermediates (in float32 at least) to values of each image.
        applies: whether a layer of this name, which has these intermediates, is meant.
    """

    name: str
    needs: tuple[str, ...]
    values: Callable[..., Values]
    applies: Callable[[str, nn.Module], bool] = _every_layer


class Streamed(NamedTuple):
    """What `stream` finds.

    Attributes:
        rows: means and spreads over images, layer by layer.
        left_out: names of the measures that no layer of the model has.
    """

    rows: list[Row]
    left_out: list[str]


def stream(
    model: nn.Module,
    batches: Iterable[Any],
    measures: Sequence[LayerMeasure],
    *,
    forward: Callable[[Any], object] | None = None,
) -> Streamed:
    """Measure the layers of a model on batches of any number.

    Intermediates of a layer are measured and dropped as soon as the layer is done, so that never more than one layer's
    are held. The measures are computed in float32 (rates in float64), also if the pass is under autocast.

    Args:
        model: ours, or anything with timm's `blocks`; in `eval()` mode.
        batches: what `forward` takes.
        measures: see `layer_measures` and `inversion`.
        forward: runs the model on a batch; by default on normalised images of which nothing is hidden, through encoder
            and, if there is one, decoder.

    Raises:
        UserError: if a value is not finite, or there is no batch.
    """
    layers = layers_of(model)
    plan = {name: [m for m in measures if _has(name, layer, m)] for name, layer in layers.items()}
    used = {measure.name for chosen in plan.values() for measure in chosen}
    left_out = [measure.name for measure in measures if measure.name not in used]
    if not used:
        return Streamed([], left_out)
    run = forward or default_pass(model)
    kept: dict[str, dict[tuple[str, str], list[Tensor]]] = {name: {} for name, chosen in plan.items() if chosen}
    with _measuring(model, layers, plan, kept), torch.no_grad():
        for batch in batches:
            run(batch)
    keys = dict.fromkeys(key for found in kept.values() for key in found)
    rows = [row for key in keys for row in _curve(kept, key)]
    return Streamed(rows, left_out)


def default_pass(model: nn.Module) -> Callable[[Any], object]:
    """How to show a model whole images."""
    if isinstance(model, MaskedAutoencoder):
        return lambda images: model(images, mask_ratio=0.0)
    features: Any = model.forward_features
    return features


def _has(name: str, layer: nn.Module, measure: LayerMeasure) -> bool:
    return set(measure.needs) <= set(taps_of(layer)) and measure.applies(name, layer)


def _curve(kept: Mapping[str, Mapping[tuple[str, str], list[Tensor]]], key: tuple[str, str]) -> list[Row]:
    """One measure over the layers that have it."""
    values = {place_of(name): torch.cat(found[key]) for name, found in kept.items() if key in found}
    return rows_over_layers(values, *key)


@contextmanager
def _measuring(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    plan: Mapping[str, Sequence[LayerMeasure]],
    kept: dict[str, dict[tuple[str, str], list[Tensor]]],
) -> Iterator[None]:
    """Trace what is needed; the hook of a layer comes after those of the trace, and takes what they collected."""
    patterns = sorted({f"{name}.{kind}" for name, chosen in plan.items() for m in chosen for kind in m.needs})
    with trace(model, patterns) as record:

        def consume(name: str) -> Any:
            @torch.no_grad()
            def hook(layer: nn.Module, _inputs: Any, _output: Any) -> None:
                _add(name, layer, record, plan[name], kept[name])

            return hook

        handles = [layers[name].register_forward_hook(consume(name)) for name in kept]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _add(
    name: str,
    layer: nn.Module,
    record: dict[str, list[Tensor]],
    measures: Sequence[LayerMeasure],
    kept: dict[tuple[str, str], list[Tensor]],
) -> None:
    kinds = {kind for measure in measures for kind in measure.needs}
    tensors = {kind: _at_least_float(record[f"{name}.{kind}"].pop()) for kind in kinds}
    for kind, tensor in tensors.items():  # LAPACK raises on NaN, and a sentence is wanted
        if not tensor.isfinite().all():
            raise not_finite(place_of(name), kind)
    device = next(iter(tensors.values())).device.type
    with torch.autocast(device, enabled=False):
        for measure in measures:
            for key, values in measure.values(layer, *(tensors[kind] for kind in measure.needs)).items():
                if not values.isfinite().all():
                    raise not_finite(place_of(name), key[0])
                kept.setdefault(key, []).append(values.cpu())


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
