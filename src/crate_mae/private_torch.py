"""Private APIs of PyTorch that the library uses, all in this file; tests/test_private_torch.py reports changes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "ATTENTION_OF_PROCESSORS",
    "ATTENTION_OF_PROCESSORS_BACKWARD",
    "COMPILED",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "hooks_of",
    "is_compiled",
    "is_transformed",
    "softmax_backward",
    "storage_identity",
    "tree_leaves",
    "uncompiled",
    "uncompiled_name",
    "unset_fake_temporarily",
]

COMPILED = "_orig_mod"  # the name of a module in what `torch.compile` made of it
# The operations by which CPUs compute fused attention, forward and backward.
ATTENTION_OF_PROCESSORS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_OF_PROCESSORS_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def softmax_backward(gradient: Tensor, probabilities: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of scores, of the given dtype, from that of their softmax over the last axis."""
    return torch.ops.aten._softmax_backward_data(gradient, probabilities, -1, dtype)


def is_transformed() -> bool:
    """Whether a transform of `torch.func`, such as `vmap` or `grad`, is running."""
    return torch._C._are_functorch_transforms_active()


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module run what `torch.compile` made of it."""
    return COMPILED in module._modules or module._compiled_call_impl is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was called with; every other module as it is."""
    return module._modules.get(COMPILED) or module


def uncompiled_name(name: str) -> str:
    """Return the name of a part or a tensor without what `torch.compile` of any part puts into it."""
    return name.replace(f"{COMPILED}.", "")


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """Return what runs before and after each call of a module."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def storage_identity(storage: torch.UntypedStorage) -> int:
    """Return a number that identifies living memory, also that of fake tensors, which has no address."""
    return storage._cdata
