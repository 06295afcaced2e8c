"""Numbers that nothing can be done with, names that no file can have, and options typed on a run that has others."""

import dataclasses
import math

import pytest

from crate_mae.commands.console import takes
from crate_mae.commands.estimate import estimate
from crate_mae.comparison.options import CompareOptions
from crate_mae.errors import UserError
from crate_mae.training.options import FinetuneOptions, PretrainOptions, check
from crate_mae.training.run_directory import RunDirectory

HUGE = 10**400
KINDS = {
    "pretrain": PretrainOptions("images", out="run"),
    "finetune": FinetuneOptions("model", train="images", val="images", out="run"),
}
PAIR = ("crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8")


def numeric(options):
    return [item.name for item in dataclasses.fields(options) if item.metadata["numbers"]]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, HUGE, -HUGE, 2**63], ids=str)
@pytest.mark.parametrize(("kind", "option"), [(kind, name) for kind in KINDS for name in numeric(KINDS[kind])])
def test_no_number_of_a_run_is_infinite_or_larger_than_can_be_counted(kind, option, value):
    options = type(KINDS[kind])(**{**KINDS[kind].given(), option: value})
    mistakes = check(options)
    assert len(mistakes) == 1 and mistakes.options == {option}


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 1_000_000},
        {"workers": 1025},
        {"mean": (math.nan,)},
        {"std": (0.5, math.inf)},
        {"model_settings": {"threshold": math.nan}},
        {"drop_path": 1.0},
    ],
    ids=str,
)
def test_other_options_with_such_numbers_are_refused(wrong):
    mistakes = check(PretrainOptions("images", out="run", **wrong))
    assert len(mistakes) == 1 and mistakes.options == set(wrong)


@pytest.mark.parametrize(
    "wrong", [{"threads": 1_000_000}, {"mask_ratio": 0.0}, {"mask_ratio": math.nan}, {"batch_size": 0}, {"workers": -1}]
)
def test_a_comparison_refuses_them_before_anything_is_opened(wrong):
    with pytest.raises(UserError, match="but must be"):
        CompareOptions(PAIR, train="images", val="images", budget="steps=8", out="run", **wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": HUGE}, {"devices": 10**9}, {"flops_per_s": math.inf}, {"epochs": HUGE}, {"mask_ratio": 1.5}],
)
def test_an_estimate_refuses_them(wrong):
    with pytest.raises(UserError, match="but must be"):
        estimate(**{"model": PAIR[0], "batch_size": 256, **wrong})


@pytest.mark.parametrize("name", ["x" * 256, "x" * 5000, "x\0y"])
def test_a_folder_of_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"--out .*(name too long|null byte)"):
        RunDirectory(tmp_path / name).existing_config()


def test_an_option_typed_with_its_default_value_is_no_option_left_out():
    parsed = takes(PretrainOptions)(_given)
    assert "mask_ratio" not in parsed("images", out="run")
    assert parsed("images", out="run", mask_ratio=0.75, lr=None)["mask_ratio"] == 0.75
    assert "lr" not in parsed("images", out="run", lr=None)


def _given(options: PretrainOptions) -> dict:
    """Options that were given.

    Returns:
        them.
    """
    return options.given()
