"""One way to look inside: named intermediates of a forward pass."""

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from crate_mae.errors import UserError


@contextmanager
def trace(model: nn.Module, patterns: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs of sub-modules while the `with` block runs.

    Args:
        model: any module.
        patterns: names of sub-modules, with shell wildcards: "encoder.blocks.*.ista" is every layer's sparse code,
            "encoder.blocks.*.attn.subspaces" every layer's projections [Z U_1 .. Z U_h].

    Yields:
        A dictionary from module name, in the model's order, to its outputs (detached), one per call. Hooks are removed
        when the block ends, however it ends.

    Raises:
        UserError: if a pattern matches no sub-module.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(f'No part of the {type(model).__name__} is called "{pattern}".')
    wanted = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    record: dict[str, list[Tensor]] = {name: [] for name in names if name in wanted}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: record[name].append(output.detach())

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in record]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
