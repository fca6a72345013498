"""Sampling from a product of experts draws from the exact locally normalised product."""

import math

import pytest
import torch

from trl_ext.functional import product_of_experts
from trl_ext.oracle import Enumeration, TabularLM, TabularLMConfig
from trl_ext.poe import ProductOfExperts

SAMPLES = 20_000
SHAPE = TabularLMConfig(vocab_size=3, max_completion_length=3, initializer_range=0.8)
WEIGHTS = torch.tensor([0.5, 0.5])


@pytest.fixture(scope="module")
def experts():
    torch.manual_seed(5)
    return [TabularLM(SHAPE), TabularLM(SHAPE)]


def drawn(product: ProductOfExperts, space: Enumeration, **how) -> torch.Tensor:
    """How often each completion comes up."""
    ids = torch.ones(SAMPLES, 1, dtype=torch.long)
    torch.manual_seed(0)
    out = product.generate(ids, attention_mask=ids, do_sample=True, max_new_tokens=3, **how)
    return torch.bincount(space.index(out[:, 1:]), minlength=len(space))


def locally(experts, space: Enumeration, weights=WEIGHTS) -> torch.Tensor:
    """Π_t of the product normalised at each token, (number of completions,)."""
    logps = [space.logits(expert).detach().log_softmax(-1) for expert in experts]
    return space.logps(product_of_experts(logps, weights))[0].exp()


def globally(experts, space: Enumeration) -> torch.Tensor:
    """The product of whole completions, normalised once."""
    logps = [space.logps(expert)[0].detach() for expert in experts]
    return product_of_experts(logps, WEIGHTS).exp()


def statistic(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's, in standard deviations √(2d) from its mean d = cells − 1."""
    expected = probabilities * counts.sum()
    assert expected.min() > 20
    freedom = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    return (chi_square - freedom) / math.sqrt(2 * freedom)


@pytest.mark.equation("E14")
@pytest.mark.equation("E21")
def test_samples_are_the_locally_normalised_product(experts):
    """And not the global one: its noncentrality N·Σ(p − q)²/q is the power to tell."""
    space = Enumeration(SHAPE)
    local, whole = locally(experts, space), globally(experts, space)
    counts = drawn(ProductOfExperts(experts, WEIGHTS), space)
    assert abs(statistic(counts, local)) <= 4
    noncentrality = SAMPLES * ((local - whole) ** 2 / whole).sum().item()
    # Mean (d + λ − d)/√(2d), standard deviation √(2(d + 2λ))/√(2d): above 4 by 4 of them.
    freedom = len(space) - 1
    spread = math.sqrt((freedom + 2 * noncentrality) / freedom)
    assert noncentrality / math.sqrt(2 * freedom) - 4 * spread > 4
    assert statistic(counts, whole) > 4


def test_samples_without_a_cache(experts):
    space = Enumeration(SHAPE)
    counts = drawn(ProductOfExperts(experts, WEIGHTS), space, use_cache=False)
    assert abs(statistic(counts, locally(experts, space))) <= 4


def test_samples_of_a_contrast(experts):
    space, weights = Enumeration(SHAPE), torch.tensor([0.9, -0.4])
    counts = drawn(ProductOfExperts(experts, weights), space)
    assert abs(statistic(counts, locally(experts, space, weights))) <= 4
