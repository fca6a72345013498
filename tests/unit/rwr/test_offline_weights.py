"""The weights of logged completions, by hand and against a loop over groups."""

import math
from typing import Any

import numpy as np
import pytest

from tests.tiny import QUIET
from trl_ext.errors import ConfigError, DataError
from trl_ext.rwr import OfflineRWRConfig, offline_weights
from trl_ext.rwr.logged import LoggedRows
from trl_ext.rwr.offline_weights import weigh

LN2 = math.log(2)
OPTIONS: dict[str, Any] = {
    name: value for name, value in QUIET.items() if name != "max_completion_length"
}


@pytest.fixture
def weighed(tmp_path):
    def of(groups, rewards, log_ratios=None, values=None, **options: Any):
        rewards = np.array(rewards, float)
        rows = LoggedRows(
            keys=np.arange(len(rewards), dtype=np.uint64),
            groups=np.array(groups, np.uint64),
            prompts=None,
            rewards=rewards,
            scores=rewards if values is None else rewards - np.array(values),
            log_ratios=None if log_ratios is None else np.array(log_ratios, float),
        )
        settings: dict[str, Any] = OPTIONS | {"beta": 1 / LN2} | options
        config = OfflineRWRConfig(str(tmp_path), **settings)
        return weigh(rows, config, "train_dataset")

    return of


@pytest.mark.equation("E8")
def test_weights_and_what_is_said_of_them_by_hand(weighed):
    """β = 1/ln 2: weights ∝ 2^r: (1, 2, 4)/7 and (1, 3)/4 with r = log₂ 3; 5 rows, 2 groups."""
    found = weighed([7, 3, 7, 3, 7], [0, 0, 1, math.log2(3), 2])
    within = np.array([1 / 7, 1 / 4, 2 / 7, 3 / 4, 4 / 7])
    np.testing.assert_allclose(found.weights, within * 5 / 2, rtol=1e-12)
    sizes = [49 / (1 + 4 + 16), 16 / (1 + 9)]
    assert found.metrics["effective_sample_size"] == pytest.approx(np.mean(sizes))
    assert found.metrics["weight_entropy"] == pytest.approx(-(within * np.log(within)).sum() / 2)
    assert found.metrics["beta_used"] == 1 / LN2
    assert found.metrics["uniform_groups"] == found.metrics["mass_clipped"] == 0


def test_ragged_groups_are_those_of_a_loop(weighed, monkeypatch):
    """60 groups of 2 to 9 rows, in blocks of at most 20 entries."""
    monkeypatch.setattr(offline_weights, "_BLOCK", 20)
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), random.integers(2, 10, 60))
    random.shuffle(groups)
    rewards = random.normal(size=len(groups))
    found = weighed(groups, rewards, beta=0.7)
    expected = np.zeros(len(groups))
    for group in range(60):
        tilted = np.exp(rewards[groups == group] / 0.7)
        expected[groups == group] = tilted / tilted.sum() * len(groups) / 60
    np.testing.assert_allclose(found.weights, expected, rtol=1e-12)
    assert found.weights.mean() == pytest.approx(1)


@pytest.mark.equation("E10")
def test_limits(weighed):
    """Best of n: the best row of each group, ties shared; supervised: every row of a group alike.

    Best of n keeps 3 rows of 2 groups: weights ½·3/2, ½·3/2 and 1·3/2.
    """
    groups, rewards = [0, 0, 0, 1, 1], [2, 2, 0, 1, 0]
    best = weighed(groups, rewards, beta=0.0)
    assert best.weights.tolist() == pytest.approx([0.75, 0.75, 0, 1.5, 0])
    supervised = weighed(groups, rewards, beta=math.inf)
    assert supervised.weights.tolist() == pytest.approx([5 / 6] * 3 + [5 / 4] * 2)


@pytest.mark.equation("E9")
def test_a_constant_for_each_prompt_changes_nothing(weighed):
    groups, rewards = np.array([0, 0, 1, 1]), np.array([0.0, 1.0, 0.0, 2.0])
    shifted = weighed(groups, rewards + np.array([5.0, -3.0])[groups])
    np.testing.assert_allclose(shifted.weights, weighed(groups, rewards).weights, rtol=1e-12)


def test_uniform_groups_are_left_out_unless_they_are_asked_for(weighed):
    """Group 1 says nothing. Left out, 2 rows of 1 group stay; kept, 4 of 2."""
    groups, rewards = [0, 0, 1, 1], [0, 1, 3, 3]
    dropped = weighed(groups, rewards)
    assert dropped.weights.tolist() == pytest.approx([2 / 3, 4 / 3, 0, 0])
    assert dropped.metrics["uniform_groups"] == 0.5
    kept = weighed(groups, rewards, drop_uniform_groups=False)
    assert kept.weights.tolist() == pytest.approx([2 / 3, 4 / 3, 1, 1])
    assert weighed(groups, rewards, beta=math.inf).weights.tolist() == [1, 1, 1, 1]


def test_a_threshold_leaves_out_rows_and_no_group_for_becoming_uniform(weighed):
    """Rejection sampling: of group 0 one row stays, of group 1 two, of group 2 none."""
    groups, rewards = [0, 0, 1, 1, 2, 2], [1, 0, 1, 1.5, 0, 0.5]
    found = weighed(groups, rewards, beta=math.inf, reward_threshold=1.0)
    assert found.weights.tolist() == pytest.approx([1.5, 0, 0.75, 0.75, 0, 0])
    tilted = weighed([0, 0, 0], [1, 1, 0], reward_threshold=1.0)
    assert tilted.weights.tolist() == pytest.approx([1, 1, 0])


def test_over_the_whole_dataset_a_better_prompt_weighs_more(weighed):
    """2^r over all rows, (1, 2, 4, 8)/15, mean one: times 4. A group of one is no obstacle."""
    groups, rewards = [0, 0, 1, 2], [0, 1, 2, 3]
    found = weighed(groups, rewards, baseline="dataset")
    np.testing.assert_allclose(found.weights, np.array([1, 2, 4, 8]) * 4 / 15)
    assert found.metrics["effective_sample_size"] == pytest.approx(225 / 85)
    shifted = weighed(groups, [r + 9 for r in rewards], baseline="dataset")
    np.testing.assert_allclose(shifted.weights, found.weights)


def test_a_value_is_taken_from_the_reward(weighed):
    """Advantages 0, 1, 0, 1: weights (1, 2, 1, 2)/6, times 4; the threshold is one of rewards."""
    rewards, values = [0, 1, 2, 3], [0, 0, 2, 2]
    found = weighed([0] * 4, rewards, values=values, baseline="value")
    np.testing.assert_allclose(found.weights, np.array([1, 2, 1, 2]) * 4 / 6)
    cut = weighed([0] * 4, rewards, values=values, baseline="value", reward_threshold=1)
    np.testing.assert_allclose(cut.weights, np.array([0, 2, 1, 2]) * 3 / 5)


def test_with_beta_log_z_as_value_each_prompt_has_its_own_target_again(weighed):
    """βlog Z = β·log mean exp(r/β) of a prompt: equal masses, and within them those of groups."""
    rewards = np.array([0.0, 1.0, 5.0, 7.0])
    beta = 1 / LN2
    log_z = [beta * np.log(np.exp(r / beta).mean()) for r in (rewards[:2], rewards[2:])]
    found = weighed([0, 0, 1, 1], rewards, values=np.repeat(log_z, 2), baseline="value")
    by_group = weighed([0, 0, 1, 1], rewards)
    np.testing.assert_allclose(found.weights, by_group.weights, rtol=1e-12)


@pytest.mark.equation("E12")
def test_importance_weights(weighed):
    """2^r·ratio: (1·4, 2·1)/6 of 2 rows; supervised (4, 1)/5; equal rewards are not uniform."""
    ratios = [math.log(4), 0.0]
    found = weighed([0, 0], [0, 1], ratios, importance_weights=True)
    assert found.weights.tolist() == pytest.approx([4 / 3, 2 / 3])
    sft = weighed([0, 0], [0, 1], ratios, importance_weights=True, beta=math.inf)
    assert sft.weights.tolist() == pytest.approx([8 / 5, 2 / 5])
    equal = weighed([0, 0], [1, 1], ratios, importance_weights=True)
    assert equal.weights.tolist() == pytest.approx([8 / 5, 2 / 5])


def test_a_cap_and_what_it_cuts_off(weighed):
    """(1, 2, 4)/7 capped at 1.2/3: 4/7 − 0.4 are gone, of one group; of two, half of it a group."""
    found = weighed([0, 0, 0, 1, 1], [0, 1, 2, 0, 0], max_weight=1.2, drop_uniform_groups=False)
    expected = np.array([1 / 7, 2 / 7, 0.4, 0.5, 0.5]) * 5 / 2
    np.testing.assert_allclose(found.weights, expected)
    assert found.metrics["mass_clipped"] == pytest.approx((4 / 7 - 0.4) / 2)


def test_a_cap_counts_the_rows_above_the_threshold(weighed):
    """Two of four are left, (1, 2)/3: the cap is 1.2/2."""
    found = weighed([0] * 4, [-1, 0, -2, 1], max_weight=1.2, reward_threshold=0.0)
    np.testing.assert_allclose(found.weights, np.array([0, 1 / 3, 0, 0.6]) * 2)


def test_groups_that_are_left_out_do_not_count_as_samples(weighed):
    """The mean over the first group alone is the floor; the second has 2 effective samples."""
    found = weighed([0, 0, 1, 1], [0, 1, 5, 5], beta=0.0, min_effective_sample_size=1.6)
    assert found.metrics["beta_used"] == pytest.approx(1 / math.log(3), rel=1e-9)


def test_beta_is_raised_until_enough_samples_count(weighed):
    """Two rows, r = 0 and 1: 1/Σw² = 1.6 at odds of 3 (16/10), so β = 1/ln 3."""
    found = weighed([0, 0], [0, 1], beta=0.0, min_effective_sample_size=1.6)
    assert found.metrics["beta_used"] == pytest.approx(1 / math.log(3), rel=1e-9)
    assert found.metrics["effective_sample_size"] >= 1.6 * (1 - 1e-11)
    assert found.weights.tolist() == pytest.approx([0.5, 1.5])
    enough = weighed([0, 0], [0, 1], beta=50.0, min_effective_sample_size=1.6)
    assert enough.metrics["beta_used"] == 50.0
    tiny = weighed([0, 0], [0, 1e-30], beta=0.0, min_effective_sample_size=1.6)
    assert tiny.metrics["beta_used"] == pytest.approx(1e-30 / math.log(3), rel=1e-9, abs=0)


def test_one_beta_for_all_groups(weighed):
    """The floor is the mean over a sharp group and a flat one, computed in a loop."""
    groups, rewards = np.array([0] * 4 + [1] * 4), np.array([0, 0, 0, 9, 0, 1, 0, 1.0])
    beta = weighed(groups, rewards, beta=0.1, min_effective_sample_size=3).metrics["beta_used"]
    sizes = []
    for group in (0, 1):
        tilted = np.exp(rewards[groups == group] / beta)
        sizes.append(tilted.sum() ** 2 / (tilted**2).sum())
    assert np.mean(sizes) == pytest.approx(3, rel=1e-9)
    assert abs(sizes[0] - sizes[1]) > 0.5


def test_all_samples_of_three_can_be_asked_for(weighed):
    """1/Σw² of thirds is 3 up to rounding."""
    found = weighed([0] * 3, [0, 1, 2], min_effective_sample_size=3)
    assert found.weights.tolist() == pytest.approx([1, 1, 1], abs=1e-4)


def test_more_samples_than_there_are(weighed):
    with pytest.raises(ConfigError, match=r"=2.5 cannot be reached: with beta=inf .* have 2 eff"):
        weighed([0, 0, 1, 1], [0, 1, 0, 2], min_effective_sample_size=2.5)


def test_groups_of_one(weighed):
    with pytest.raises(DataError, match=r"2 of 3 groups have one completion.*baseline: dataset"):
        weighed([0, 0, 1, 2], [0, 1, 0, 0])
    allowed = weighed([0, 0, 1, 2], [0, 1, 0, 0], drop_uniform_groups=False)
    assert allowed.weights.tolist() == pytest.approx([4 / 9, 8 / 9, 4 / 3, 4 / 3])
    assert weighed([0, 1], [0, 1], beta=math.inf).weights.tolist() == [1, 1]


def test_nothing_is_left(weighed):
    with pytest.raises(DataError, match=r"no row is left. 2 groups have rewards that are all eq"):
        weighed([0, 0, 1, 1], [1, 1, 0, 0])
    with pytest.raises(DataError, match=r"reaches reward_threshold=9.0; the highest is 1"):
        weighed([0, 0], [0, 1], reward_threshold=9.0)


def test_extreme_rewards_stay_finite(weighed):
    """exp(1e300) overflows; the softmax of it is best of n."""
    found = weighed([0, 0, 0], [-1e300, 1e300, 0], beta=1e-15)
    assert found.weights.tolist() == [0, 1, 0]


def test_one_giant_group(weighed, monkeypatch):
    """Wider than a block: it is a block of its own."""
    monkeypatch.setattr(offline_weights, "_BLOCK", 8)
    found = weighed([0] * 100 + [1] * 2, [*range(100), 0, 1])
    assert found.weights[:100].sum() == pytest.approx(51, rel=1e-9)
    group = found.weights[:100] / found.weights[:100].sum()
    np.testing.assert_allclose(group[-2:], [0.25, 0.5], rtol=1e-9)
