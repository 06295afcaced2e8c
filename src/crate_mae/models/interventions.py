"""Changes to what a model computes while it runs: subspaces, atoms, tokens and steps scaled, replaced or removed."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, fx, nn

from crate_mae.data.numbers import is_number
from crate_mae.errors import UserError, and_more
from crate_mae.models.layers import ISTA, DecoderLayer, EncoderLayer, OvercompleteISTA, SubspaceAttention
from crate_mae.models.tracing import layers_of, matching_names
from crate_mae.private_torch import hooks_of, is_compiled

logger = logging.getLogger(__name__)

_LARGEST = 1e30  # of a factor; a float32 ends at 3e38
Change = float | Tensor | Callable[[Tensor], Tensor]


class Place(NamedTuple):
    """Where an intermediate passes from module to module."""

    module: nn.Module  # which takes or returns it
    is_input: bool  # whether it is the module's first input, or its output
    axis: int | None = None  # that an index counts along; None for the output of a sub-module, which has no parts
    what: str = ""  # the index counts: tokens of `z`, heads of `head_steps`, atoms of `code`
    size: int | None = None  # how many there are, if this does not depend on the images
    heads: int | None = None  # into how many the last axis is divided: b h n p passes as b n (h p)


@contextmanager
def intervene(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[dict[str, int]]:
    """Change intermediates of a model while the `with` block runs, in every pass, masked or not.

        with crate_mae.intervene(model, {"encoder.blocks.1.head_steps[3]": 0, "encoder.blocks.2.code[17]": 2.0}):
            model(images)

    A name is that of a sub-module, whose output is changed ("encoder.blocks.0.attn" is a whole attention step), or of
    an intermediate as [`trace`][crate_mae.models.tracing.trace] names it, optionally followed by an index, with the
    same wildcards:

    | name            | is                                                | [i] is one  |
    |-----------------|---------------------------------------------------|-------------|
    | `z`             | the layer's input                                 | token       |
    | `z_half`        | between its two steps                             | token       |
    | `z_next`        | the layer's output                                | token       |
    | `projections`   | W_k, which also determines the attention          | subspace k  |
    | `head_steps`    | a subspace's step: 0 removes it and nothing else  | subspace k  |
    | `code`          | the sparse code A                                 | atom        |

    Tokens are counted as the layer sees them, class token first: with visible patches only, as many as are visible.
    Blocks of timm have `z`, `z_next` and `head_steps`, where 0 removes a head.

    A change is a number to multiply by (0 removes the part), a tensor to put in its place, of any shape that broadcasts
    to it (also a tensor of one number), or a function of the old value. An index leaves out its axis: `head_steps[3]`
    is b n p, `code[17]` is b n, `z[0]` is b d.

    The model itself is not touched: the changes are hooks, which are removed when the block ends, however it ends;
    copies of the model that are made inside do not have them. A `trace` sees what has been changed, and gradients pass
    through it; with gradient checkpointing, call `backward()` inside the block, since it computes layers again.
    Changes of different parts combine, also in blocks inside of each other. Every thread that uses the model sees them.

    Args:
        model: any of ours, or one with blocks of timm.
        changes: from the names of intermediates to their changes.

    Yields:
        A dictionary from each full name to how often it has been changed so far: 0 if nothing has passed there.

    Raises:
        UserError: for a name that the model lacks or that cannot be changed; an index out of range; a value that is
            none of the three, or does not fit; a part that is being changed already; a compiled or exported model.
    """
    _refuse_fixed_graphs(model)
    hooks = [
        _Hook(name, place, index, change)
        for key, change in changes.items()
        for name, place, index in _named(model, key, change)
    ]
    applied = {hook.name: 0 for hook in hooks}
    handles = []
    try:
        for hook in hooks:
            hook.refuse_overlap()
            hook.applied = applied
            register = hook.place.module.register_forward_hook
            if hook.place.is_input:
                register = hook.place.module.register_forward_pre_hook
            handles.append(register(hook, prepend=not hook.place.is_input))  # before the hooks of an outer trace
        yield applied
        if idle := [name for name, count in applied.items() if not count]:
            logger.warning("Nothing was changed: no forward pass reached %s.", and_more(idle))
    finally:
        for handle in handles:
            handle.remove()


class _Hook:
    """One change at one place; `applied` counts what it has done."""

    def __init__(self, name: str, place: Place, index: int | None, change: Change) -> None:
        self.name, self.place, self.index, self.change = name, place, index, change
        self.applied: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_unchanged,)  # a copy of the model is intact

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> Any:
        value = output if not self.place.is_input else inputs[0] if inputs else None
        if not isinstance(value, Tensor):
            raise UserError(f'"{self.name}" is a {type(value).__name__}, not a tensor: it cannot be changed.')
        if self.index is not None and self.place.what == "tokens" and value.ndim != 3:
            raise UserError(
                f'"{self.name}": the layer has no sequence of tokens, but a tensor of {tuple(value.shape)}.'
            )
        self.applied[self.name] += 1
        changed = self._changed(value)
        return (changed, *inputs[1:]) if self.place.is_input else changed

    def _changed(self, value: Tensor) -> Tensor:
        heads = self.place.heads
        if heads is None:
            return self._with_part_changed(value)
        return self._with_part_changed(value.unflatten(-1, (heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)

    def _with_part_changed(self, whole: Tensor) -> Tensor:
        axis = self.place.axis
        if self.index is None or axis is None:
            return self._change_of(whole)
        if self.index >= whole.shape[axis]:
            raise _out_of_range(self.name, self.place.what, whole.shape[axis])
        part = self._change_of(whole.select(axis, self.index))
        return torch.select_scatter(whole, part.contiguous(), axis, self.index)

    def _change_of(self, part: Tensor) -> Tensor:
        if not isinstance(self.change, Tensor) and not callable(self.change):
            return part * float(self.change)
        new = self.change if isinstance(self.change, Tensor) else self.change(part.clone())
        try:
            return new.to(part).expand_as(part)
        except (RuntimeError, AttributeError) as error:
            given = f"{tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise UserError(
                f'"{self.name}" is a tensor of {tuple(part.shape)}: {given} cannot take its place.'
            ) from error

    def refuse_overlap(self) -> None:
        """Two changes of the same thing would depend on their order."""
        mine = self.place.module, self.place.is_input
        for other in hooks_of(self.place.module):
            if not isinstance(other, _Hook) or (other.place.module, other.place.is_input) != mine:
                continue
            if self.index is None or other.index in (None, self.index) or other.place.axis != self.place.axis:
                raise UserError(f'"{self.name}" is changed already, as "{other.name}": give one change for both.')


def _named(model: nn.Module, key: str, change: Change) -> Iterator[tuple[str, Place, int | None]]:
    """What a key names: full names with their places, and the index."""
    if isinstance(change, bool) or not (isinstance(change, Real | Tensor) or callable(change)):
        raise UserError(f'"{key}": {change!r} is not a number, a tensor or a function.')
    if isinstance(change, Real) and not is_number(change, -_LARGEST, _LARGEST):
        raise UserError(f'"{key}": the number must be finite, and at most {_LARGEST:g}.')
    pattern, index = key, None
    if match := re.fullmatch(r"(.*)\[(-?\d+)\]", key):
        pattern, index = match[1], int(match[2])
    modules = {name: Place(part, False) for name, part in model.named_modules() if name}
    places = {f"{at}.{kind}": p for at, layer in layers_of(model).items() for kind, p in places_of(layer).items()}
    found = {name: (modules | places)[name] for name in matching_names(pattern, modules, places)}
    if not found:
        raise UserError(
            f'No part of the {type(model).__name__} that can be changed is called "{pattern}". {_there_is(model)}'
        )
    for name, place in found.items():
        if index is not None and place.axis is None:
            raise UserError(f'"{name}" has no parts that are counted: leave out [{index}].')
        if index is not None and (index < 0 or (place.size is not None and index >= place.size)):
            raise _out_of_range(f"{name}[{index}]", place.what, place.size)
        yield name if index is None else f"{name}[{index}]", place, index


def places_of(layer: nn.Module) -> dict[str, Place]:
    """The intermediates of a layer that can be changed, by name."""
    attn, ista = getattr(layer, "attn", None), getattr(layer, "ista", None)
    places = {"z": Place(layer, True, 1, "tokens"), "z_next": Place(layer, False, 1, "tokens")}
    if isinstance(layer, EncoderLayer) and not layer.ista_skip:
        places["z_half"] = Place(layer.norm2, True, 1, "tokens")
    if isinstance(layer, DecoderLayer):
        places["z_half"] = Place(layer.dictionary, False, 1, "tokens")
    if isinstance(attn, SubspaceAttention):
        h = attn.num_heads
        places["projections"] = Place(attn.get_submodule("subspaces"), False, 1, "heads", h, heads=h)
        places["head_steps"] = Place(attn.per_head, False, 1, "heads", h)
    elif isinstance(layer, Block) and isinstance(attn, Attention):
        places["head_steps"] = Place(attn.proj, True, 1, "heads", attn.num_heads, heads=attn.num_heads)
    if isinstance(ista, ISTA):
        places["code"] = Place(ista, False, 2, "atoms", ista.dictionary.shape[1])
    elif isinstance(ista, OvercompleteISTA):
        places["code"] = Place(ista.readout, True, 2, "atoms", ista.dictionary.shape[1])
    return places


def _unchanged(*_call: object) -> None:
    """The hook of a copy."""


def _refuse_fixed_graphs(model: nn.Module) -> None:
    for part in model.modules():
        if is_compiled(part):
            raise UserError("A compiled model cannot be changed while it runs: intervene on it before `torch.compile`.")
        if isinstance(part, torch.jit.ScriptModule | fx.GraphModule):
            raise UserError("An exported model cannot be changed while it runs: intervene on the one it was made from.")


def _out_of_range(name: str, what: str, size: int | None) -> UserError:
    there_are = "counted from 0" if size is None else f"0 to {size - 1}"
    return UserError(f'"{name}" does not exist: {what} are {there_are}.')


def _there_is(model: nn.Module) -> str:
    layers = layers_of(model)
    if not layers:
        return "It has no layers."
    kinds = dict.fromkeys(kind for layer in layers.values() for kind in places_of(layer))
    return f"Its layers are {next(iter(layers))} to {list(layers)[-1]}, each with {', '.join(kinds)}."
