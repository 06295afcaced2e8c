"""Memory of tensors, followed operation by operation: how much of it lives at once."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Follows the memory of every tensor that operations inside this context make, until nobody holds it.

    Inside PyTorch's `FakeTensorMode`, where tensors have shapes and no numbers, this takes no memory itself.
    Operations on real tensors alone are computed there nevertheless: which patches are visible is a matter of numbers.

    Attributes:
        now: bytes alive.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute as usual, and note the memory of what comes out."""
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_real = bool(tensors) and not any(isinstance(x, FakeTensor) or x.is_meta for x in tensors)
        with unset_fake_temporarily() if is_real else nullcontext():
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()  # what tells memory of fake tensors, which has no address, apart
        if key in self._alive:
            return
        self.now += size

        def gone(_storage: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
