"""Named intermediates of a forward pass, recorded by hooks."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from crate_mae.errors import UserError
from crate_mae.models.layers import ISTA, DecoderLayer, EncoderLayer, OvercompleteISTA, SubspaceAttention
from crate_mae.theory.derivatives import without_autocast

INTERMEDIATES = ("z", "z_half", "z_next", "projections", "attention", "head_steps", "preactivation", "code")


# Where an intermediate is recorded: a module that gets a hook, and a function of its first input and its output.
Tap = tuple[nn.Module, Callable[[Any, Tensor], Tensor]]


@contextmanager
def trace(model: nn.Module, patterns: Sequence[str], *, detach: bool = True) -> Iterator[dict[str, list[Tensor]]]:
    """Collect intermediates while the `with` block runs: outputs of sub-modules, and what a layer is derived from.

    A pattern names sub-modules with shell wildcards: "encoder.blocks.*.ista" is the output of every layer's ISTA. Or it
    names layers, again with wildcards, and one of these intermediates:

    | name            | shape   | is                                                                                   |
    |-----------------|---------|--------------------------------------------------------------------------------------|
    | `z`             | b n d   | the layer's input Z (the decoder's Y)                                                |
    | `z_half`        | b n d   | between its two steps: Z + MSSA(LN(Z)); in the decoder LN(Y) E^T                     |
    | `z_next`        | b n d   | the layer's output                                                                   |
    | `projections`   | b h n p | W_k = LN(Z) U_k of every head                                                        |
    | `attention`     | b h n n | weights, rows that sum to 1: `theory.attention_membership` of the projections; in    |
    |                 |         | monotone layers `theory.balanced_membership`, whose rows need not                    |
    | `head_steps`    | b h n p | each head's step, in the coordinates of its subspace: P_k W_k, in monotone layers    |
    |                 |         | kappa_k (B_k W_k - W_k)                                                              |
    | `preactivation` | b n d   | what ISTA takes the positive part of: X W - eta lambda                               |
    | `code`          | b n m   | the non-negative sparse code A                                                       |

    "encoder.blocks.*.z_half" is every encoder layer's; "*.attention" that of all layers, encoder and decoder. Where a
    layer has no such thing it is left out: blocks of timm have no projections and no codes, their attention is
    softmax(s Q K^T) of their own queries and keys, and a head's step is this times V, before the output projection.
    Everything is what the pass really used: masked or not, in the precision of autocast.

    Args:
        model: any module.
        patterns: see above.
        detach: whether what is recorded is cut off from the graph of the pass. If not, it has gradients as the pass
            has.

    Yields:
        A dictionary from name, in the model's order, to the recorded tensors, one per call. Hooks are
        removed when the block ends, however it ends, and outside of it nothing is added to the model.

    Raises:
        UserError: if a pattern matches nothing.
    """
    with _recording(_taps(model, patterns), detach=detach) as record:
        yield record


def trace_layer(layer: nn.Module, z: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Run one layer on tokens alone, and give the intermediates of these names that it has."""
    with _recording({name: tap for name, tap in taps_of(layer).items() if name in kinds}) as record:
        layer(z)
    return {name: values[0] for name, values in record.items()}


@contextmanager
def _recording(taps: Mapping[str, Tap], *, detach: bool = True) -> Iterator[dict[str, list[Tensor]]]:
    """Record the intermediates at the taps while the block runs."""
    record: dict[str, list[Tensor]] = {name: [] for name in taps}

    def keep(name: str, read: Callable[[Any, Tensor], Tensor]) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
                value = read(inputs[0] if inputs else None, output)
            record[name].append(value.detach() if detach else value)

        return hook

    handles = [module.register_forward_hook(keep(name, read)) for name, (module, read) in taps.items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model by name, in order: what its lists called "blocks" hold."""
    found = {}
    for name, module in model.named_modules():
        if name.split(".")[-1] == "blocks":
            found.update({f"{name}.{number}": layer for number, layer in module.named_children()})
    return found


def taps_of(layer: nn.Module) -> dict[str, Tap]:
    """The intermediates that a layer has, of those that `trace` lists, in its order."""
    taps: dict[str, Tap] = {"z": (layer, _input), "z_next": (layer, _output)}
    if isinstance(layer, (EncoderLayer, DecoderLayer, Block)):
        taps["z_half"] = (layer.norm2, _input)
    attn, ista = getattr(layer, "attn", None), getattr(layer, "ista", None)
    if isinstance(attn, SubspaceAttention):
        subspaces = attn.get_submodule("subspaces")
        taps["projections"] = (subspaces, lambda _z, w: attn.split(w))
        taps["attention"] = (subspaces, lambda _z, w: _memberships(attn, attn.split(w)))
        taps["head_steps"] = (attn.per_head, _output)
    elif isinstance(attn, Attention):
        taps["attention"] = (attn.qkv, lambda _z, qkv: _timm_attention(attn, qkv))
        taps["head_steps"] = (attn.proj, lambda heads, _out: heads.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2))
    if isinstance(ista, ISTA):
        taps["preactivation"] = (ista, lambda x, _code: ista.preactivation(x))
        taps["code"] = (ista, _output)
    elif isinstance(ista, OvercompleteISTA):
        taps["code"] = (ista.readout, _input)
    return {name: taps[name] for name in INTERMEDIATES if name in taps}


def _taps(model: nn.Module, patterns: Sequence[str]) -> dict[str, Tap]:
    """What the patterns name: sub-modules in the model's order, then intermediates, layer by layer."""
    modules: dict[str, Tap] = {name: (module, _output) for name, module in model.named_modules()}
    layers = layers_of(model)
    intermediates = {f"{name}.{kind}": tap for name, layer in layers.items() for kind, tap in taps_of(layer).items()}
    wanted: set[str] = set()
    for pattern in patterns:
        names = matching_names(pattern, modules, intermediates)
        if not names:
            raise UserError(f'No part of the {type(model).__name__} is called "{pattern}".')
        wanted.update(names)
    return {name: tap for name, tap in (modules | intermediates).items() if name in wanted}


def matching_names(pattern: str, modules: Iterable[str], intermediates: Iterable[str]) -> list[str]:
    """The names of sub-modules that a pattern matches; if there are none, those of intermediates.

    A pattern names intermediates only by its last part, so that "encoder.*" means sub-modules.
    """
    names = fnmatch.filter(modules, pattern)
    if not names and pattern.rpartition(".")[2] in INTERMEDIATES:
        names = fnmatch.filter(intermediates, pattern)
    return names


def _input(x: Tensor, _output: Tensor) -> Tensor:
    return x


def _output(_x: Tensor, output: Tensor) -> Tensor:
    return output


def _memberships(attn: Any, w: Tensor) -> Tensor:
    """As the layer computes them: in the precision in which the projections are, also under autocast."""
    with without_autocast(w.device):
        return attn.membership(w)


def _timm_attention(attn: Attention, qkv: Tensor) -> Tensor:
    q, k, _ = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    # Their `forward`, not a call, so that other hooks of these modules do not run twice.
    q, k = attn.q_norm.forward(q), attn.k_norm.forward(k)
    return torch.softmax((q * attn.scale) @ k.mT, dim=-1)
