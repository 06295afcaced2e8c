import math

import numpy as np
import pytest
import torch

from crate_mae.errors import UserError
from crate_mae.interpret.tokens import nearest_tokens, token_colours

TOKENS = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 4, 2, 1e-3, 0, 0, 0])


def test_colours_are_the_principal_components():
    found = token_colours(TOKENS, (2, 5))
    assert found.pictures.shape == (3, 2, 5, 3)
    assert found.explained.shape == (1, 3)
    assert found.pictures.min() == 0 and found.pictures.max() == 1
    x = TOKENS.double().flatten(0, 1).numpy()
    x = x - x.mean(0)
    _, sigma, axes = np.linalg.svd(x, full_matrices=False)
    for channel in range(3):
        colour = found.pictures[..., channel].ravel()
        assert abs(np.corrcoef(colour, x @ axes[channel])[0, 1]) == pytest.approx(1)
    np.testing.assert_allclose(found.explained[0], (sigma**2 / (sigma**2).sum())[:3], rtol=1e-9)


def test_colours_of_one_image_do_not_depend_on_others_unless_joint():
    alone = token_colours(TOKENS[1:2], (2, 5), joint=False).pictures[0]
    apart = token_colours(TOKENS, (2, 5), joint=False)
    assert apart.explained.shape == (3, 3)
    np.testing.assert_allclose(apart.pictures[1], alone)
    assert np.abs(token_colours(TOKENS, (2, 5)).pictures[1] - alone).max() > 0.05


@pytest.mark.parametrize("fill", [0.0, 0.7])
@pytest.mark.parametrize("joint", [True, False])
def test_equal_tokens_are_grey(fill, joint):
    found = token_colours(torch.full((1, 10, 7), fill), (2, 5), joint=joint)
    assert (found.pictures == 0.5).all() and (found.explained == 0).all()


def test_few_directions_leave_colours_grey_and_nan_is_a_sentence():
    line = torch.arange(10.0)[None, :, None] * torch.ones(7)
    found = token_colours(line, (2, 5))
    assert np.ptp(found.pictures[..., 0]) == 1
    assert (found.pictures[..., 1:] == 0.5).all()
    assert token_colours(torch.rand(1, 2, 7), (1, 2)).pictures.shape == (1, 1, 2, 3)
    with pytest.raises(UserError, match="not finite"):
        token_colours(line * math.nan, (2, 5))


def test_neighbours_are_in_other_images_best_first():
    patches = TOKENS.clone()
    patches[2, 3], patches[0, 8] = 5 * patches[1, 6], patches[1, 6] + torch.tensor([1.0, 1, 0, 0, 0, 0, 0])
    found = nearest_tokens(patches, 1, 6)
    assert [image for image, _, _ in found] == [2, 0]
    assert found[0][1] == 3
    unit = torch.nn.functional.normalize(patches[0], dim=-1) @ torch.nn.functional.normalize(patches[1, 6], dim=0)
    assert [cosine for _, _, cosine in found] == pytest.approx([1, float(unit.max())])
    assert found[1][1] == unit.argmax()
    assert nearest_tokens(patches, 1, 6, count=1) == found[:1]
    with pytest.raises(UserError, match="no token 10 of image 1"):
        nearest_tokens(patches, 1, 10)
    with pytest.raises(UserError, match="only one"):
        nearest_tokens(patches[:1], 0, 0)
