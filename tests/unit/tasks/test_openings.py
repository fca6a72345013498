import pytest

from trl_ext.errors import ConfigError
from trl_ext.tasks import load_splits
from trl_ext.tasks.openings import BEGINNINGS, HELD_OUT, SUBJECTS


def test_test_openings_are_about_other_subjects():
    train, test = load_splits({"dataset_name": "openings"})
    assert test is not None
    assert len(set(train["prompt"])) == len(BEGINNINGS) * (len(SUBJECTS) - HELD_OUT) == 120
    assert len(set(test["prompt"])) == len(BEGINNINGS) * HELD_OUT == 40
    for subject in SUBJECTS[-HELD_OUT:]:
        assert not any(subject in prompt for prompt in train["prompt"])


def test_the_seed_is_of_the_order():
    def drawn(seed):
        return load_splits({"dataset_name": "openings", "dataset_kwargs": {"seed": seed}})[0]

    one, other = drawn(0)["prompt"], drawn(1)["prompt"]
    assert one != other and sorted(one) == sorted(other) and one == drawn(0)["prompt"]


@pytest.mark.parametrize("kwargs", [{"size": 3}, {"seed": -1}, {"seed": 0.5}, {"seed": True}])
def test_settings_that_are_refused(kwargs):
    with pytest.raises(ConfigError, match="dataset_kwargs: "):
        load_splits({"dataset_name": "openings", "dataset_kwargs": kwargs})
