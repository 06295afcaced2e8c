"""Wrong shapes are errors in every test."""

import jaxtyping
import pytest
import torch

from crate_mae.theory.coding_rate import coding_rate
from crate_mae.theory.measures import isometry_error
from crate_mae.theory.subspaces import project


def test_a_tensor_of_another_number_of_dimensions_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"isometry_error(.|\n)*dictionary"):
        isometry_error(torch.zeros(3))


def test_dimensions_of_one_name_are_equal():
    project(torch.zeros(2, 5, 4), torch.zeros(2, 4, 2))
    with pytest.raises(jaxtyping.TypeCheckError, match="project"):
        project(torch.zeros(2, 5, 4), torch.zeros(2, 3, 2))


def test_integer_tokens_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="coding_rate"):
        coding_rate(torch.zeros(5, 4, dtype=torch.int64), 0.5)
