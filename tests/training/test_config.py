import dataclasses

import pytest

from crate_mae.errors import UserError
from crate_mae.training.config import PretrainConfig


def test_a_saved_configuration_is_read_back_equal(tmp_path, config):
    config.save(tmp_path / "config.yaml")
    assert PretrainConfig.load(tmp_path / "config.yaml") == config


def test_the_file_puts_what_decides_the_result_first(config):
    text = config.to_yaml()
    assert text.index("seed:") < text.index("# Speed") < text.index("workers:")
    assert "!!python" not in text


def test_only_what_decides_the_result_counts_as_a_difference(config):
    other = dataclasses.replace(config, workers=7, log_steps=5, compile=True, seed=3, image_size=(16, 16))
    assert config.differences(other) == ["image_size: 8 10 -> 16 16", f"seed: {2**40} -> 3"]
    assert config.differences(config) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [("seed:", "sed:", "seed.*Unknown options: sed"), ("# What", "}{", "Cannot read"), (None, "3", "holds no options")],
)
def test_a_file_that_is_not_a_configuration_is_refused(tmp_path, config, old, new, named):
    text = new if old is None else config.to_yaml().replace(old, new, 1)
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        PretrainConfig.load(tmp_path / "config.yaml")
