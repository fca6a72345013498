"""Weights on samples of another policy, and weights that are capped."""

import math

import pytest
import torch

from trl_ext.functional import clip_weights, gibbs_weights, target_log_weights


@pytest.mark.equation("E4", "E12")
def test_samples_of_another_policy_are_weighted_towards_the_target():
    """Two completions, h = (½, ½), sampler π = (¼, ¾), λ = ln 3, r = (0, 1).

    π*/π ∝ (½·1/¼, ½·3/¾) = (2, 2): equal weights; at β = inf h/π ∝ (2, ⅔) = (¾, ¼).
    """
    rewards = torch.tensor([0.0, 1.0], dtype=torch.float64)
    ratios = torch.tensor([math.log(2), math.log(2 / 3)], dtype=torch.float64)
    tilted = gibbs_weights(target_log_weights(rewards, ratios, 1 / math.log(3)), 1.0)
    assert tilted.tolist() == pytest.approx([0.5, 0.5])
    supervised = gibbs_weights(target_log_weights(rewards, ratios, math.inf), 1.0)
    assert supervised.tolist() == pytest.approx([0.75, 0.25])


def test_without_a_target_there_are_no_weights():
    with pytest.raises(ValueError, match="beta must be positive"):
        target_log_weights(torch.zeros(2), torch.zeros(2), 0.0)


def test_a_cap_is_in_units_of_a_uniform_weight_of_what_is_kept():
    """1.2 times ⅓ is 0.4 where three are kept, 1.2 times ½ is 0.6 where two are."""
    weights = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.3, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    clipped = clip_weights(weights, 1.2, mask=mask)
    torch.testing.assert_close(
        clipped, torch.tensor([[0.4, 0.2, 0.1], [0.6, 0.3, 0.0]], dtype=torch.float64)
    )
    assert torch.equal(clip_weights(weights, math.inf, mask=mask), weights)
    assert clip_weights(weights.T, 1.2, dim=0, mask=mask.T).T.tolist() == clipped.tolist()


@pytest.mark.parametrize("limit", [0.99, math.nan])
def test_a_cap_below_uniform_weights_is_refused(limit):
    with pytest.raises(ValueError, match="limit must be at least 1"):
        clip_weights(torch.tensor([0.5, 0.5]), limit)
