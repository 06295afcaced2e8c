"""Every mistake is reported before a file is written, and before anything is trained."""

import math
import re
import shutil

import pytest
import torch

from crate_mae.comparison.entries import Costs, Entry, _check_classes, plan_budget
from crate_mae.comparison.options import Budget, parse_budget
from crate_mae.comparison.runs import next_rate
from crate_mae.data import open_source
from crate_mae.errors import UserError
from crate_mae.models.presets import preset
from crate_mae.training.options import PretrainOptions

CRATE, VIT = "crate_mae_nano_patch2_8", "vit_mae_nano_patch2_8"
FORMS = "A budget is steps=N, minutes=N or flops=N"


def images(number, classes, size=(8, 8)):
    """Grey images as a data set from Python; without labels for no classes."""
    made = [torch.rand(1, *size, generator=torch.Generator().manual_seed(i)) for i in range(number)]
    return [(image, classes[i % len(classes)]) for i, image in enumerate(made)] if classes else made


def costs_of(**seconds):
    return Costs(
        parameters=1,
        encoder_parameters=1,
        encoder_flops=1.0,
        training_flops=100.0,
        precision="float32",
        memory=None,
        **seconds,
    )


@pytest.fixture
def refused(compare, tmp_path, monkeypatch):
    """`refused(*models, **options)`: the error message of a refused comparison, which must not leave a file."""
    costs = costs_of(step_seconds=6.0, loading_seconds=0.0)
    monkeypatch.setattr("crate_mae.comparison.compare.measure_costs", lambda entries, *_: [costs] * len(entries))

    def message(*models, **options):
        with pytest.raises(UserError) as error:
            compare(tmp_path / "out", *models, **options)
        assert list(tmp_path.iterdir()) == []
        return str(error.value)

    return message


@pytest.mark.parametrize(
    ("models", "options", "expected"),
    [
        ((CRATE,), {}, f"needs at least two models, but only {CRATE} was named"),
        ((CRATE, VIT, CRATE), {}, f"{CRATE} is named twice"),
        ((CRATE, "vit_mae_nano_patch2_9"), {}, f"Did you mean {VIT}?"),
        ((CRATE, f"{VIT}?dept=3"), {}, 'has no setting "dept". Did you mean "depth"?'),
        (
            (f"{CRATE}?depth=1|2|3", VIT),
            {},
            f"different numbers of networks (3 with {CRATE}?depth=1|2|3, 1 with {VIT})",
        ),
        ((f"{CRATE}?depth=1|", f"{VIT}?depth=1|2"), {}, '"depth=" is not a setting'),
        ((f"{CRATE}?depth=1|1", f"{VIT}?depth=1|2"), {}, f"{CRATE}?depth=1 is named twice"),
        (
            (f"{CRATE}?patch_size=2|4", f"{VIT}?depth=1|2"),
            {},
            f"{CRATE}?patch_size=2 and {CRATE}?patch_size=4 complete different patches",
        ),
        (
            (f"{CRATE}?depth=1|2", f"{VIT}?depth=1|2"),
            {"lr_search": 1, "budget": "steps=3"},
            "too few for a search over 2 networks with one learning rate each",
        ),
        (
            (CRATE, f"{VIT}?depth"),
            {},
            f'{VIT}?depth: "depth" is not a setting. Settings are written',
        ),
        ((CRATE, f"{VIT}?depth=2&depth=3"), {}, "has the setting depth twice"),
        ((CRATE, f"{VIT}?num_heads=7"), {}, "embed_dim 96 is not a multiple of num_heads 7"),
        ((f"{VIT}?depth=2&num_heads=2", f"{VIT}?num_heads=2&depth=2"), {}, "is named twice"),
        ((CRATE, VIT), {"budget": "hours=2"}, f'--budget "hours=2" is not a valid budget. {FORMS}'),
        ((CRATE, VIT), {"budget": "minutes"}, FORMS),
        ((CRATE, VIT), {"budget": "steps=0"}, FORMS),
        ((CRATE, VIT), {"budget": "flops=inf"}, FORMS),
        ((CRATE, VIT), {"budget": "steps=1.5"}, "is not a whole number of steps"),
        ((CRATE, VIT), {"seeds": 0}, "--seeds is 0"),
        ((CRATE, VIT), {"lr_search": 0}, "--lr-search is 0"),
        ((CRATE, VIT), {"search_share": 1.0}, "--search-share is 1.0"),
        ((CRATE, VIT), {"mask_ratio": 1.5}, "--mask-ratio is 1.5, but must be between 0 and 1"),
        ((CRATE, VIT), {"probe_layer": 4}, "There is no layer 4"),
        ((CRATE, VIT), {"train": "missing"}, "does not exist"),
        ((CRATE, VIT), {"train": "digits:train", "val": "digits:train"}, "are the same images"),
        ((CRATE, "vit_mae_micro_patch4_32"), {}, "different sizes"),
        ((CRATE, VIT), {"budget": "minutes=0.05"}, f"too small for one step of {CRATE}, which takes minutes=0.1"),
        ((CRATE, VIT), {"budget": "flops=2499"}, "which takes flops=2.5e+03"),
        ((CRATE, VIT), {"budget": "steps=4"}, "too few for a search over 2 learning rates"),
    ],
)
def test_a_mistake_is_named_and_leaves_no_file(refused, models, options, expected):
    assert expected in refused(*models, **options)


def test_all_mistakes_are_reported_at_once(refused):
    message = refused(CRATE, CRATE, budget="hours=2", seeds=0)
    assert all(part in message for part in ("named twice", "hours=2", "--seeds"))


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        ([3, 4], [3, 4, 7], "different classes:\nonly in .*: 7"),
        ([5], [5], r"are of one class \(5\)"),
    ],
)
def test_labels_that_no_probe_can_use_are_refused_before_the_training(refused, train, val, expected):
    message = refused(CRATE, VIT, train=images(200, train), val=images(60, val), batch_size=10)
    assert re.search(expected, message), message


def test_unreadable_validation_images_are_reported_before_the_training(refused, digits, tmp_path):
    broken = tmp_path.parent / f"{tmp_path.name}-broken"
    shutil.copytree(digits["val"], broken)
    for file in sorted(broken.glob("*/*.png"))[:3]:
        file.write_bytes(b"no picture")
    message = refused(CRATE, VIT, val=str(broken))
    assert "3 of 90 validation images cannot be read" in message
    assert "give other images with --val" in message


def test_nothing_to_validate_on_is_refused(refused):
    assert "is empty" in refused(CRATE, VIT, val=[])


def test_too_few_labelled_images_for_the_neighbours_are_refused(refused):
    message = refused(CRATE, VIT, train=images(19, [0, 1]), val=images(10, [0, 1]), batch_size=5)
    assert "19 labelled images" in message


def test_a_launcher_is_refused(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without a launcher" in refused(CRATE, VIT)


def test_a_folder_with_something_else_is_refused(compare, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a comparison"):
        compare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(UserError, match="is a file"):
        compare(tmp_path / "letter.txt")


def test_a_damaged_plan_is_refused(compare, tmp_path):
    (tmp_path / "comparison.yaml").write_text("options: [3")
    with pytest.raises(UserError, match="cannot be read as a comparison"):
        compare(tmp_path)


def test_a_budget_that_is_not_text_is_refused_in_the_same_sentence():
    with pytest.raises(UserError, match='--budget "2000" is not a valid budget'):
        parse_budget(2000)


def test_an_image_that_cannot_be_read_is_not_a_class_with_too_few():
    class Damaged(list):
        def __getitem__(self, i):
            if i == 7:
                raise OSError("damaged")
            return super().__getitem__(i)

    train = open_source(Damaged(images(60, ["cat", "dog"])))
    assert -1 in train.labels
    assert _check_classes(train, open_source(images(20, ["cat", "dog"]))) == 2


@pytest.mark.parametrize("text", ["steps=2000", "minutes=0.5", "flops=1e+15"])
def test_a_budget_is_parsed_and_formatted(text):
    assert str(parse_budget(text)) == text


@pytest.mark.parametrize(
    ("budget", "workers", "steps"),
    [
        (Budget("steps", 103.0), 0, 103),
        (Budget("minutes", 1.0), 0, 8),  # 5 s of computing and 2 s of loading a step
        (Budget("minutes", 1.0), 1, 12),  # loading meanwhile
        (Budget("flops", 1e5), 0, 142),  # 7 images a step, 100 each
    ],
)
def test_a_budget_becomes_steps(budget, workers, steps):
    costs = costs_of(step_seconds=5.0, loading_seconds=2.0)
    config = PretrainOptions("images", out="", batch_size=7, workers=workers, lr=0.1)
    entry = Entry("x", "x", config, preset(CRATE))
    alone = plan_budget(budget, entry, costs, tries=1, share=0.5)
    assert (alone.tries, alone.search_steps, alone.final_steps) == (0, 0, steps)
    plan = plan_budget(budget, entry, costs, tries=3, share=0.5)
    assert plan.first_rate == 0.1
    assert plan.search_steps == int(steps * 0.5 / 3)
    assert 3 * plan.search_steps + plan.final_steps == steps  # the search counts
    plan = plan_budget(budget, entry, costs, tries=1, share=0.5, networks=2)
    assert (plan.tries, plan.search_steps, plan.final_steps) == (1, steps // 4, steps - 2 * (steps // 4))
    plan = plan_budget(Budget("steps", 103.0), entry, costs, tries=2, share=0.5, networks=3)
    assert (plan.tries, plan.search_steps, plan.final_steps) == (2, 8, 55)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.0025, [0.003, 0.009, 0.001, 0.00173, 0.00228]),
        (0.1, [0.003, 0.009, 0.027, 0.081, 0.243]),
        (1e-5, [0.003, 0.009, 0.001, 0.000333, 0.000111]),
        (0.01, [0.003, 0.009, 0.027, 0.0156, 0.0118]),
    ],
)
def test_the_search_follows_the_loss_and_closes_in_on_the_best_rate(best, tried):
    losses = {}
    for _ in tried:
        rate = next_rate(losses, 0.003)
        losses[rate] = abs(math.log(rate / best))
    assert list(losses) == tried


def test_the_search_turns_back_from_a_rate_that_diverges():
    assert next_rate({0.003: 0.9, 0.009: math.inf}, 0.003) == 0.001
    assert next_rate({0.003: math.inf}, 0.003) == 0.001
    assert next_rate({0.003: math.inf, 0.001: math.inf}, 0.003) == 0.000333
