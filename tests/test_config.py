from typing import get_args

import pytest

from sam_cache import model
from sam_cache.config import EmbedConfig, TrainTopConfig, base, resolve
from sam_cache.errors import UsageError


def test_unknown_key_names_the_nearest_right_one():
    with pytest.raises(UsageError, match="unknown key 'learning_rat'; did you mean 'learning_rate'"):
        resolve(TrainTopConfig, {"learning_rat": 1.0}, "recipe.toml [train-top]")


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("dataset", "cocoo"), ("steps", "many")])
def test_bad_value_names_source_field_and_value(field, value):
    model = EmbedConfig if field in EmbedConfig.model_fields else TrainTopConfig
    with pytest.raises(UsageError, match=rf"^here: {field} = {value!r}: "):
        resolve(model, {field: value}, "here")


def test_integers_are_written_with_commas_or_as_a_list():
    assert resolve(TrainTopConfig, {"milestones": "10,20"}, "").milestones == (10, 20)
    assert resolve(TrainTopConfig, {"milestones": [10, 20]}, "").milestones == (10, 20)


def test_resolved_config_survives_json():
    cfg = resolve(TrainTopConfig, {"milestones": [1], "store": "x.zarr"}, "")
    assert TrainTopConfig.model_validate_json(cfg.model_dump_json(by_alias=True)) == cfg


def test_the_parts_to_train_follow_the_head():
    assert resolve(TrainTopConfig, {}, "").train == ("prompt", "decoder")
    assert resolve(TrainTopConfig, {"head": "hq"}, "").train == ("head",)
    assert resolve(TrainTopConfig, {"head": "hq", "train": "head,decoder"}, "").train == ("head", "decoder")


def test_both_floors_name_the_same_masks_of_the_head():
    """The configuration cannot import the model, which would bring torch to --help."""
    assert get_args(model.HqOutput) == get_args(base.HqOutput)


def test_every_knob_says_what_it_does():
    from sam_cache.recipe import STAGES

    for stage in STAGES.values():
        for name, field in stage.config.model_fields.items():
            assert field.description, f"{stage.name}: {name} has no description"
            assert field.description.endswith("."), f"{stage.name}: {name}"
