"""The private APIs of PyTorch that the library uses still exist, do what is expected, and are used through one file."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "crate_mae"
PRIVATE = re.compile(r"\btorch(\.\w+)*\._[a-z]\w*|storage\(?\)?\._[a-z]\w*|_orig_mod")


@pytest.fixture(scope="module")
def private_torch():
    try:
        from crate_mae import private_torch
    except ImportError as error:
        pytest.fail(
            f"PyTorch {torch.__version__} has moved a private API that crate_mae/private_torch.py needs: {error}"
        )
    return private_torch


def test_private_names_stand_in_one_file():
    found = {
        str(path.relative_to(PACKAGE)): match[0]
        for path in PACKAGE.rglob("*.py")
        if path.name != "private_torch.py" and (match := PRIVATE.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}, "use these private names of PyTorch through crate_mae/private_torch.py"


def test_the_private_method_of_timm_is_called_in_one_file():
    files = {path.name for path in PACKAGE.rglob("*.py") if "._pos_embed(" in path.read_text(encoding="utf-8")}
    assert files == {"encoder.py"}


def test_the_backward_pass_of_softmax_is_that_of_autograd(private_torch):
    scores, gradient = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    probabilities = scores.softmax(-1)
    probabilities.backward(gradient)
    found = private_torch.softmax_backward(gradient, probabilities.detach(), torch.float32)
    message = "PyTorch has changed _softmax_backward_data: adapt private_torch.softmax_backward"
    torch.testing.assert_close(found, scores.grad, msg=message)


def test_fake_tensors_have_shapes_and_identities_but_no_memory(private_torch):
    with private_torch.FakeTensorMode():
        a, b = torch.empty(10**9, 10**3), torch.empty(3)
        assert isinstance(a, private_torch.FakeTensor), "PyTorch's FakeTensorMode makes other tensors now"
        identities = {private_torch.storage_identity(x.untyped_storage()) for x in (a, a.view(-1), b)}
        assert len(identities) == 2, "PyTorch's storages of fake tensors cannot be told apart by _cdata any more"
        with private_torch.unset_fake_temporarily():
            assert not isinstance(torch.empty(3), private_torch.FakeTensor), "unset_fake_temporarily has changed"


def test_operations_inside_a_dispatch_mode_are_seen(private_torch):
    seen = []

    class Mode(private_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    query = torch.randn(1, 2, 5, 3, requires_grad=True)
    with Mode():
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    for name in ("ATTENTION_OF_PROCESSORS", "ATTENTION_OF_PROCESSORS_BACKWARD"):
        assert getattr(private_torch, name) in seen, f"PyTorch computes attention on CPUs differently: adapt {name}"


def test_what_compiling_puts_around_a_module_is_seen_and_taken_off(private_torch):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3))
    assert not private_torch.is_compiled(module)
    assert private_torch.uncompiled(module) is module
    message = "PyTorch has changed how torch.compile wraps modules: adapt private_torch"
    whole = torch.compile(module)
    assert private_torch.is_compiled(whole) and private_torch.uncompiled(whole) is module, message
    assert {private_torch.uncompiled_name(name) for name in whole.state_dict()} == set(module.state_dict()), message
    module.compile()
    assert private_torch.is_compiled(module), message


def test_hooks_and_transforms_are_seen(private_torch):
    module = torch.nn.Linear(2, 3)
    hooks = [print, repr]
    module.register_forward_pre_hook(hooks[0])
    module.register_forward_hook(hooks[1])
    assert private_torch.hooks_of(module) == hooks, "PyTorch keeps the hooks of modules elsewhere"
    seen = []
    torch.func.vmap(lambda x: seen.append(private_torch.is_transformed()) or x)(torch.zeros(2))
    assert [*seen, private_torch.is_transformed()] == [True, False], "PyTorch tells transforms of torch.func otherwise"


def test_leaves_of_nested_arguments_are_listed(private_torch):
    assert private_torch.tree_leaves(([1, (2,)], {"a": 3})) == [1, 2, 3], "PyTorch's tree_leaves has changed"


def test_timm_has_the_private_method_that_masked_images_need():
    from timm.models.vision_transformer import VisionTransformer

    message = "timm has changed VisionTransformer._pos_embed, which models/encoder.py calls"
    assert callable(getattr(VisionTransformer, "_pos_embed", None)), message
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=6, depth=1, num_heads=2)
    patches = torch.randn(2, 4, 6)
    expected = torch.cat([model.cls_token.expand(2, -1, -1), patches], dim=1) + model.pos_embed
    assert torch.equal(model._pos_embed(patches), expected), message
