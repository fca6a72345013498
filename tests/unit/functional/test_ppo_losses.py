"""PPO's two losses by hand, in their limits, and their gradients."""

import math

import pytest
import torch

from trl_ext.functional import clipped_surrogate, value_loss

INF = float("inf")


def surrogate(ratio: float, advantage: float, low: float = 0.2, high: float = 0.3):
    """Loss and its gradient with respect to log π, of one token."""
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(
        logps, torch.zeros(1, 1), torch.tensor([advantage]), clip_low=low, clip_high=high
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    return loss.item(), gradient.item()


@pytest.mark.equation("E45")
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # within the clip: −ρA, and d/dlogπ of it is itself
        (1.5, 2.0, -2.6, 0.0),  # good and already 1.3 times likelier: nothing more to gain
        (0.5, 2.0, -1.0, -1.0),  # good but made rarer: the min keeps the pull
        (0.5, -2.0, 1.6, 0.0),  # bad and already rarer than 0.8
        (1.5, -2.0, 3.0, 3.0),  # bad but made likelier: the min keeps the push
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, gradient):
    assert surrogate(ratio, advantage) == pytest.approx((loss, gradient))


@pytest.mark.equation("E44")
def test_without_a_clip_it_is_the_importance_sampled_surrogate():
    for ratio in (0.01, 1.0, 50.0):
        for advantage in (-1.0, 3.0):
            loss, gradient = surrogate(ratio, advantage, low=1.0, high=INF)
            assert (loss, gradient) == pytest.approx((-ratio * advantage, -ratio * advantage))


@pytest.mark.equation("E37")
def test_at_the_sampling_policy_the_gradient_is_that_of_a_log_pi():
    logps = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    loss = clipped_surrogate(logps, logps.detach(), advantages, clip_low=0.2, clip_high=0.2)
    (ours,) = torch.autograd.grad(loss.sum(), logps)
    assert torch.equal(ours, -advantages)


def test_a_credit_a_completion_is_the_same_as_one_a_token():
    logps, old = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    credit = torch.tensor([1.0, -1.0, 2.0])
    options = {"clip_low": 0.2, "clip_high": 0.2}
    by_token = clipped_surrogate(logps, old, credit[:, None].expand(3, 4), **options)
    assert torch.equal(clipped_surrogate(logps, old, credit, **options), by_token)


@pytest.mark.equation("E41")
def test_value_loss_by_hand():
    """V = 3, R = 1; V_old = 2: the clip at 0.5 holds V at 2.5, whose error is the smaller one."""
    values, returns, old = (torch.tensor([[v]]) for v in (3.0, 1.0, 2.0))
    assert value_loss(values, returns).item() == 2.0
    assert value_loss(values, returns, old_values=old, clip=0.5).item() == 2.0
    # V has come within the target by more than the clip allows: the clipped error counts, and
    # has no gradient.
    values = torch.tensor([[1.1]], requires_grad=True)
    loss = value_loss(values, returns, old_values=old, clip=0.5)
    assert loss.item() == pytest.approx(0.5 * 0.5**2)
    assert torch.autograd.grad(loss.sum(), values)[0].item() == 0.0


def test_targets_and_old_values_have_no_gradient():
    each = [torch.ones(1, 2, requires_grad=True) for _ in range(4)]
    value_loss(each[0], each[1], old_values=each[2], clip=1.0).sum().backward()
    clipped_surrogate(each[0], each[1], each[3], clip_low=0.2, clip_high=0.2).sum().backward()
    assert [x.grad is not None for x in each] == [True, False, False, False]


@pytest.mark.parametrize("name", ["clip_low", "clip_high"])
def test_bad_clips(name):
    options = {"clip_low": 0.2, "clip_high": 0.2} | {name: -0.1}
    with pytest.raises(ValueError, match=f"{name} must be at least 0"):
        clipped_surrogate(*torch.zeros(3, 1, 1), **options)


@pytest.mark.parametrize("options", [{"clip": 0.5}, {"clip": 0.0, "old_values": torch.zeros(1)}])
def test_bad_value_clips(options):
    with pytest.raises(ValueError, match="must be positive and comes with old_values"):
        value_loss(torch.zeros(1), torch.zeros(1), **options)
