import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.functional import (
    entropy,
    entropy_weights,
    plausible,
    product_of_experts,
    weighted_scores,
)

INF = math.inf


def distributions(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.mark.equation("E14")
def test_a_product_by_hand():
    # sqrt(.5·.2) = sqrt(.1), sqrt(.25·.2) = sqrt(.05), sqrt(.25·.6) = sqrt(.15).
    experts = distributions([0.5, 0.25, 0.25], [0.2, 0.2, 0.6])
    roots = torch.tensor([0.1, 0.05, 0.15], dtype=torch.float64).sqrt()
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(product_of_experts(experts, halves).exp(), roots / roots.sum())
    torch.testing.assert_close(weighted_scores(experts, halves).exp(), roots)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 6))
def test_a_product_is_what_a_slow_loop_gives(seed, experts, vocabulary):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(experts, 2, 3, vocabulary, generator=generator, dtype=torch.float64)
    logps = logits.log_softmax(-1)
    weights = torch.randn(experts, 2, 3, generator=generator, dtype=torch.float64)
    product = product_of_experts(logps, weights)
    for row in range(2):
        for position in range(3):
            scores = [
                math.prod(
                    math.exp(logps[k, row, position, v]) ** float(weights[k, row, position])
                    for k in range(experts)
                )
                for v in range(vocabulary)
            ]
            z = sum(scores)
            for v in range(vocabulary):
                assert product[row, position, v].exp().item() == pytest.approx(scores[v] / z)


def test_one_expert_of_weight_one_is_itself():
    logps = torch.randn(4, 7).log_softmax(-1)
    assert torch.equal(weighted_scores(logps[None], torch.ones(1)), logps)
    torch.testing.assert_close(product_of_experts(logps[None], torch.ones(1)), logps)


def test_scores_need_not_be_normalised():
    """E19: a reward over β is an expert, and a constant in it changes nothing."""
    reward, reference = torch.randn(2, 5), torch.randn(2, 5).log_softmax(-1)
    weights = torch.tensor([2.0, 1.0])
    product = product_of_experts([reward, reference], weights)
    torch.testing.assert_close(product, (2 * reward + reference).log_softmax(-1))
    torch.testing.assert_close(product_of_experts([reward + 3, reference], weights), product)


def test_minus_log_z_is_a_renyi_divergence():
    p, q = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)
    alpha = 0.3
    renyi = (p**alpha * q ** (1 - alpha)).sum().log() / (alpha - 1)
    weights = torch.tensor([alpha, 1 - alpha], dtype=torch.float64)
    log_z = weighted_scores(torch.stack([p, q]).log(), weights).logsumexp(-1)
    torch.testing.assert_close(-log_z, (1 - alpha) * renyi)


def test_who_forbids_a_token_and_who_may():
    nobody, first, second = [0.0, -1.0, -2.0], [-INF, -1.0, -2.0], [0.0, -INF, -2.0]
    two = torch.ones(2)
    assert product_of_experts(torch.tensor([nobody, first]), two)[0] == -INF
    # A weight of 0 leaves the expert out, and its −inf.
    left_out = product_of_experts(torch.tensor([nobody, first]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(left_out, torch.tensor(nobody).log_softmax(-1))
    # Forbidden by one that pulls and one that pushes: forbidden. Nothing left: log Z is −inf.
    both = weighted_scores(torch.tensor([first, first]), torch.tensor([1.0, -0.5]))
    assert both[0] == -INF and both[1:].isfinite().all()
    all_of_them = torch.tensor([[-INF, 0.0], [0.0, -INF]])
    assert (weighted_scores(all_of_them, two) == -INF).all()
    assert weighted_scores(torch.tensor([nobody, second]), torch.tensor([1.0, -1.0]))[1] == INF


def test_tokens_left_out_have_no_probability():
    logps = torch.tensor([[0.5, 0.3, 0.2]]).log()
    keep = torch.tensor([True, False, True])
    kept = weighted_scores(logps, torch.ones(1), keep)
    torch.testing.assert_close(kept.exp(), torch.tensor([0.5, 0.0, 0.2]))


@pytest.mark.equation("E20")
def test_weights_grow_with_the_entropy_that_an_expert_removes():
    # Entropies: log 2 against a prior of log 4, gain log 2; 0 against log 4, gain 2 log 2. With
    # w = (1, .5) the products are log 2 and log 2; Σ|w| = 1.5 is shared out: .75 each.
    sure, half = [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]
    priors = torch.full((2,), math.log(4))
    weights = entropy_weights(distributions(half, sure), torch.tensor([1.0, 0.5]), priors)
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.75], dtype=torch.float64))


def test_an_expert_that_knows_no_more_than_its_prior_has_no_weight():
    half, prior = [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]
    priors = torch.full((2,), math.log(4), dtype=torch.float64)
    weights = torch.tensor([0.4, -0.6])
    of_one = entropy_weights(distributions(half, prior), weights, priors)
    torch.testing.assert_close(of_one, torch.tensor([1.0, 0.0], dtype=torch.float64))
    # None of them knows anything: as they were given.
    of_none = entropy_weights(distributions(prior, prior), weights, priors)
    torch.testing.assert_close(of_none, weights.double())


def test_equal_gains_leave_the_weights_and_their_signs():
    logps = torch.randn(5, 6).log_softmax(-1)
    weights = entropy_weights([logps, logps], torch.tensor([1.5, -0.5]), torch.full((2,), 9.0))
    torch.testing.assert_close(weights, torch.tensor([[1.5], [-0.5]]).expand(2, 5))


def test_entropy_of_certain_and_uniform():
    torch.testing.assert_close(
        entropy(distributions([1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3])),
        torch.tensor([0.0, math.log(3)], dtype=torch.float64),
    )


def test_plausible_tokens():
    logps = torch.tensor([[0.6, 0.31, 0.09], [0.2, 0.4, 0.4]]).log()
    assert plausible(logps, 0.5).tolist() == [[True, True, False], [True, True, True]]
    assert plausible(logps, 1.0).tolist() == [[True, False, False], [False, True, True]]


@pytest.mark.parametrize(
    "weights, said",
    [
        (torch.zeros(2), "sum to nothing"),
        (torch.tensor([1.0, INF]), "must be finite"),
        (torch.ones(3), "got (3,)"),
        (torch.ones(2, 5), "(2, 4), got (2, 5)"),
    ],
)
def test_weights_that_are_refused(weights, said):
    with pytest.raises(ValueError) as refusal:
        product_of_experts(torch.zeros(2, 4, 3), weights)
    assert said in str(refusal.value)


def test_other_input_that_is_refused():
    with pytest.raises(ValueError, match="at least one expert"):
        product_of_experts([], torch.ones(0))
    with pytest.raises(ValueError, match=r"got \(4, 3\), \(4, 2\)"):
        product_of_experts([torch.zeros(4, 3), torch.zeros(4, 2)], torch.ones(2))
    with pytest.raises(ValueError, match="as many weights"):
        entropy_weights(torch.zeros(2, 3), torch.ones(2), torch.ones(1))
    for cutoff in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="at most 1"):
            plausible(torch.zeros(3), cutoff)
