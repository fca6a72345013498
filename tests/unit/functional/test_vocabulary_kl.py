"""KL over the whole vocabulary, against torch's own and against the sampled estimators' means."""

import itertools
import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from trl_ext.functional import exact_forward_kl, exact_kl, k1, k3, topk_kl


def two_logits(*shape: int, seed: int = 0, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * 2
    return logits.to(dtype), ref_logits.to(dtype)


@pytest.mark.equation("E27")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_exact_kl_is_torchs(temperature):
    logits, ref_logits = two_logits(2, 3, 11)
    p, q = (Categorical(logits=each / temperature) for each in (logits, ref_logits))
    ours = exact_kl(logits, ref_logits, temperature=temperature)
    torch.testing.assert_close(ours, kl_divergence(p, q))
    forward = exact_forward_kl(logits, ref_logits, temperature=temperature)
    torch.testing.assert_close(forward, kl_divergence(q, p))


@pytest.mark.equation("E27")
def test_it_is_the_expectation_of_k1_and_of_k3_over_the_next_token():
    logits, ref_logits = two_logits(5, 7)
    logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    for estimate in (k1, k3):
        mean = (logps.exp() * estimate(logps, ref_logps)).sum(-1)
        torch.testing.assert_close(exact_kl(logits, ref_logits), mean)


def test_its_gradient_is_right_and_0_at_the_reference():
    logits, ref_logits = two_logits(2, 6)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: exact_kl(x, ref_logits), (logits,))
    assert torch.autograd.gradcheck(lambda x: exact_forward_kl(x, ref_logits), (logits,))
    assert torch.autograd.gradcheck(lambda x: topk_kl(x, ref_logits, 2), (logits,))
    (at_reference,) = torch.autograd.grad(exact_kl(logits, logits.detach()).sum(), logits)
    assert at_reference.abs().max() < 1e-15


def test_tokens_that_cannot_occur_count_nothing():
    logits = torch.tensor([0.0, 1.0, -torch.inf], requires_grad=True)
    ref_logits = torch.tensor([0.5, 0.0, -torch.inf])
    value = exact_kl(logits, ref_logits)
    torch.testing.assert_close(value, exact_kl(logits[:2], ref_logits[:2]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all() and gradient[2] == 0
    assert exact_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -torch.inf])) == torch.inf


def test_topk_is_a_lower_bound_that_rises_with_k_and_ends_at_the_exact_value():
    logits, ref_logits = two_logits(50, 12)
    values = [topk_kl(logits, ref_logits, k) for k in range(1, 13)]
    for less, more in itertools.pairwise(values):
        assert (less <= more + 1e-12).all()
    assert values[0].min() >= 0
    torch.testing.assert_close(values[-1], exact_kl(logits, ref_logits))
    torch.testing.assert_close(topk_kl(logits, ref_logits, 99), values[-1])


def test_topk_by_hand():
    """p = (½, ¼, ¼), q = (¼, ½, ¼), k = 1: ½ ln 2 + ½ ln(½ / ¾)."""
    p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert topk_kl(p, q, 1).item() == pytest.approx(expected, rel=1e-6)


def test_a_tail_far_below_rounding_keeps_its_part():
    """One token of probability 1 to float32 rounding, a tail 40 times rarer under the reference."""
    p = torch.tensor([0.0, -20.0, -20.0])
    q = torch.tensor([0.0, -20.0 - math.log(40), -20.0 - math.log(40)])
    expected = exact_kl(p.double(), q.double()).item()
    assert topk_kl(p.double(), q.double(), 1).item() == pytest.approx(expected, rel=1e-6)
    assert topk_kl(p, q, 1).item() == pytest.approx(expected, abs=1e-8)


def test_half_precision_logits_are_summed_in_float32():
    logits, ref_logits = two_logits(4, 1000, dtype=torch.bfloat16)
    value = exact_kl(logits, ref_logits)
    assert value.dtype == torch.float32
    exact = exact_kl(logits.double(), ref_logits.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


def test_bad_k():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        topk_kl(torch.zeros(3), torch.zeros(3), 0)
