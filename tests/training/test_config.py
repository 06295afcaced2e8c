import dataclasses

import pytest

from crate_mae.errors import UserError
from crate_mae.training.config import differences, load_config, to_yaml
from crate_mae.training.options import FinetuneOptions


def test_a_saved_configuration_is_read_back_equal(tmp_path, config):
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_file_names_its_command(tmp_path, finetune_config):
    (tmp_path / "config.yaml").write_text(to_yaml(finetune_config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == finetune_config
    assert isinstance(finetune_config, FinetuneOptions)
    assert "crate-mae finetune --config" in to_yaml(finetune_config)


def test_a_file_from_before_there_was_fine_tuning_is_of_pretraining(tmp_path, config):
    (tmp_path / "config.yaml").write_text(to_yaml(config).replace("command: pretrain\n", ""), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_file_puts_what_decides_the_result_first(config):
    text = to_yaml(config)
    assert text.index("seed:") < text.index("# Speed") < text.index("workers:")
    assert "!!python" not in text


def test_only_what_decides_the_result_counts_as_a_difference(config):
    other = dataclasses.replace(config, workers=7, log_steps=5, compile=True, seed=3, image_size=(16, 16))
    assert differences(config, other) == [
        "image_size: 8 10 in that run, 16 16 now",
        f"seed: {2**40} in that run, 3 now",
    ]
    assert differences(config, config) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seed:", "sed:", "seed.*Unknown options: sed"),
        ("# What", "}{", "cannot be read as YAML: line 4"),
        (None, "3", "config.yaml is not the configuration of a run\\.$"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path, config, old, new, named):
    text = new if old is None else to_yaml(config).replace(old, new, 1)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("batch_size: 128", "batch_size: eight", "batch_size is 'eight'"),
        ("steps: 39", "steps: 39.5", "steps is '39.5'"),
        ("flip: true", "flip: 1", "flip is '1'"),
        ("lr: 1.0e-05", "lr: true", "lr is 'True'"),
        ("precision: float32", "precision: float8", "precision is 'float8'"),
        ("- 8\n- 10", "- 8", "image_size is '8'"),
        ("command: pretrain", "command: resume", "names the command 'resume', but must name pretrain or finetune"),
        ("command: pretrain", "command: [1]", "names the command [1], but must name"),
        ("  threshold: 0.1\n  depth: 2", "  1: 2", "model_settings is"),
    ],
)
def test_a_value_of_a_wrong_type_is_one_sentence(tmp_path, config, old, new, named):
    assert old in to_yaml(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config).replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "config.yaml")
    assert named in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_whole_number_will_do_for_a_fraction(tmp_path, config):
    (tmp_path / "config.yaml").write_text(to_yaml(config).replace("lr: 1.0e-05", "lr: 1"), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml").lr == 1
